"""Intervals clustered by video and the paired test, against closed forms, small cases by hand and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from adapttoken_jax.benchmarks.statistics import accuracy_interval, clustered_error, paired_difference
from adapttoken_jax.errors import UserError


def test_one_question_per_video_is_the_usual_interval_of_a_mean():
    right = np.random.default_rng(0).random(200) < 0.6
    estimate, low, high = accuracy_interval(right, [str(i) for i in range(200)])
    expected = stats.t.interval(0.95, 199, right.mean(), stats.sem(right.astype(float)))
    assert (estimate, low, high) == pytest.approx((right.mean(), *expected), abs=1e-12)


def test_a_video_whose_questions_agree_counts_as_one():
    """Three copies of every question tell nothing new."""
    right = np.random.default_rng(1).random(40) < 0.5
    videos = [str(i) for i in range(40)]
    once = accuracy_interval(right, videos)
    assert accuracy_interval(np.repeat(right, 3), np.repeat(videos, 3)) == pytest.approx(once, abs=1e-12)


def test_two_videos_by_hand():
    """1 of 2 and 2 of 2: the mean is 3/4, the cluster sums of (x - 3/4)/4 are ∓1/8; t with 1 degree is Cauchy."""
    error, freedom = clustered_error([(1 - 0.75) / 4, -0.75 / 4, (1 - 0.75) / 4, (1 - 0.75) / 4], list("aabb"))
    assert error == pytest.approx(math.sqrt(2 * (1 / 64 + 1 / 64))) and freedom == 1
    estimate, low, high = accuracy_interval([1, 0, 1, 1], list("aabb"))
    assert estimate == 0.75 and (low, high) == (0.0, 1.0)  # the Cauchy quantile is 12.7: cut to 0 … 1
    narrow = accuracy_interval([1, 0, 1, 1], list("aabb"), level=0.5)  # its quartile is 1
    assert narrow == pytest.approx((0.75, 0.5, 1.0))


def test_the_macro_mean_by_hand():
    """Task a: 1 of 1, task b: 1 of 3: the mean of 1 and 1/3 is 2/3, whatever the sizes."""
    estimate, low, high = accuracy_interval([1, 1, 0, 0], list("wxyz"), list("abbb"))
    assert estimate == pytest.approx(2 / 3)
    influences = [0, (1 - 1 / 3) / 6, (0 - 1 / 3) / 6, (0 - 1 / 3) / 6]
    error = math.sqrt(4 / 3 * sum(i**2 for i in influences))
    half = stats.t.ppf(0.975, 3) * error
    assert (low, high) == pytest.approx((2 / 3 - half, min(1, 2 / 3 + half)))


def test_one_video_alone_has_no_interval():
    estimate, low, high = accuracy_interval([1, 0], ["a", "a"])
    assert estimate == 0.5 and math.isnan(low) and math.isnan(high)


def test_where_all_videos_score_alike_the_interval_is_the_rule_of_threes():
    """0 of C differ: more than q with (1 - q)^C = 0.05 would be seen with 95 %; q is about 3 / C."""
    estimate, low, high = accuracy_interval([1, 1, 1], list("abc"))
    assert (estimate, high) == (1.0, 1.0) and low == pytest.approx(0.05 ** (1 / 3))
    assert accuracy_interval([0] * 4, list("abcd"), level=0.9) == pytest.approx((0.0, 0.0, 1 - 0.1**0.25))
    assert accuracy_interval(np.ones(300), range(300))[1] == pytest.approx(1 - 3 / 300, abs=1e-4)
    # Every video 1 of 3, which no float is: with q = 1 - 0.05^(1/50) a new one may score anything.
    estimate, low, high = accuracy_interval([1, 0, 0] * 50, np.repeat(range(50), 3))
    assert (estimate, low, high) == pytest.approx((1 / 3, 0.05**0.02 / 3, 1 - 0.05**0.02 * 2 / 3))


def test_the_interval_covers_an_accuracy_near_1():
    """30 videos with one question each, right with 0.95: none is wrong in a fifth of all benchmarks."""
    right = np.random.default_rng(4).random((1000, 30)) < 0.95
    assert 0.1 < right.all(1).mean() < 0.3
    assert all(
        low <= 0.95 <= high for each in right[right.all(1)] for _, low, high in [accuracy_interval(each, range(30))]
    )


def test_the_interval_covers_where_an_unclustered_one_does_not():
    """400 benchmarks of 60 videos with 5 questions whose chances depend on the video; 95 % ± 4 standard errors."""
    rng = np.random.default_rng(2)
    chance = rng.beta(1.2, 0.8, (400, 60, 1))  # mean 0.6
    right = rng.random((400, 60, 5)) < chance
    videos = np.repeat([str(i) for i in range(60)], 5)
    hits = naive = 0
    for each in right:
        _, low, high = accuracy_interval(each.ravel(), videos)
        hits += low <= 0.6 <= high
        half = 1.96 * stats.sem(each.ravel().astype(float))
        naive += abs(each.mean() - 0.6) <= half
    assert abs(hits / 400 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 400)
    assert naive / 400 < 0.85


def as_run(right):
    return {str(i): bool(each) for i, each in enumerate(right)}


def test_the_paired_test_is_students_where_videos_have_one_question():
    rng = np.random.default_rng(3)
    first, second = rng.random(80) < 0.5, rng.random(80) < 0.65
    videos = {str(i): f"v{i}" for i in range(80)}
    paired = paired_difference(as_run(first), as_run(second), videos)
    expected = stats.ttest_rel(second.astype(float), first.astype(float))
    assert paired.p_value == pytest.approx(expected.pvalue)
    assert paired_difference(as_run(second), as_run(first), videos).p_value == paired.p_value
    interval = expected.confidence_interval()
    assert (paired.low, paired.high) == pytest.approx((interval.low, interval.high))
    assert paired.difference == pytest.approx(second.mean() - first.mean())
    assert paired.only_first == (first & ~second).sum() and paired.only_second == (second & ~first).sum()
    assert (paired.n, paired.clusters) == (80, 80)


def test_tasks_weigh_alike_in_a_paired_difference_by_hand():
    """Task a: one of one won; b: one of three lost. (1 - 1/3) / 2 = 1/3; influences 0, and 1/3, 1/3, -2/3 over 6."""
    first, second = as_run([0, 1, 1, 0]), as_run([1, 0, 1, 0])
    names, videos = "0123", dict(zip("0123", "wxyz", strict=True))
    paired = paired_difference(first, second, videos, dict(zip(names, "abbb", strict=True)))
    half = stats.t.ppf(0.975, 3) * math.sqrt(4 / 3 * (4 + 1 + 1) / 9 / 36)
    assert paired.difference == pytest.approx(1 / 3)
    assert (paired.low, paired.high) == pytest.approx((1 / 3 - half, 1 / 3 + half))


def test_no_difference_is_above_all_or_below_nothing():
    paired = paired_difference(as_run([0, 0, 0]), as_run([1, 0, 1]), dict(zip("012", "xyz", strict=True)))
    assert paired.high == 1.0 and -1 < paired.low < 0


def test_only_common_questions_are_compared():
    first, second = {"a": True, "b": False, "c": True}, {"b": True, "c": True, "d": False}
    paired = paired_difference(first, second, {"a": "v", "b": "v", "c": "w", "d": "w"})
    assert (paired.n, paired.clusters, paired.difference, paired.only_second) == (2, 2, 0.5, 1)


def test_equal_runs_differ_by_nothing_that_was_seen():
    run = as_run([1, 0, 1, 1])
    paired = paired_difference(run, run, dict(zip(run, "aabb", strict=True)))
    assert (paired.difference, paired.p_value) == (0.0, 1.0)
    assert (-paired.low, paired.high) == pytest.approx((1 - 0.05**0.5,) * 2)


@pytest.mark.parametrize(("videos", "p"), [(2, 0.5), (6, 1 / 32)])
@pytest.mark.parametrize("questions", [1, 3])
def test_where_all_videos_gain_alike_the_test_is_the_sign_test(videos, questions, p):
    """One of each video's questions is gained."""
    names = [str(i) for i in range(videos * questions)]
    clusters = {name: int(name) // questions for name in names}
    first, second = dict.fromkeys(names, False), {name: int(name) % questions == 0 for name in names}
    assert paired_difference(first, second, clusters).p_value == p
    back = paired_difference(second, first, clusters)
    assert back.p_value == p
    # A new video may also gain nothing or lose all, with q = 1 - 0.05^(1/C).
    same = 0.05 ** (1 / videos)
    assert (-back.high, -back.low) == pytest.approx((same / questions - (1 - same), same / questions + (1 - same)))


def test_one_video_has_a_difference_and_no_test():
    paired = paired_difference({"a": True, "b": False}, {"a": True, "b": True}, {"a": "v", "b": "v"})
    assert paired.difference == 0.5 and math.isnan(paired.p_value) and math.isnan(paired.low)


def test_runs_without_a_common_question_are_refused():
    with pytest.raises(UserError, match="no question in common"):
        paired_difference({"a": True}, {"b": True}, {"a": "v", "b": "w"})
