"""Calibration of Lite: exact statistics, logs, replay, certificates, and a live run that does what its replay says."""

import dataclasses
import fractions
import json
import math
import re

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import calibration, cli
from adapttoken_jax.calibration import LogWriter, QuestionLog, Said, VideoLog
from adapttoken_jax.calibration.record import record_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import scene, write_mp4
from adapttoken_jax.selection import StopRule
from tests import launcher, tiny
from tests.method.test_oracle import OPTIONS, random_video

# Statistics


def exact_tail(losses, n, alpha):
    a = fractions.Fraction(alpha)
    return sum(math.comb(n, k) * a**k * (1 - a) ** (n - k) for k in range(losses + 1))


@pytest.mark.parametrize("n", [1, 2, 17, 300])
@pytest.mark.parametrize("alpha", [0.001, 0.02, 0.5, 0.97])
def test_the_binomial_tail_is_exact(n, alpha):
    for losses in {0, 1, n // 20, n // 2, n - 1, n, n + 3} - ({1} if n == 1 else set()):
        expected = float(exact_tail(min(losses, n), n, alpha))
        assert calibration.binomial_tail(losses, n, alpha) == pytest.approx(expected, rel=1e-11, abs=1e-300)
    assert max(calibration.binomial_tail(k, n, alpha) for k in range(n)) <= 1  # whatever the terms' rounding adds up to


def test_a_tail_of_a_million_videos_does_not_overflow():
    n, alpha = 10**6, 0.02
    mean, deviation = n * alpha, math.sqrt(n * alpha * (1 - alpha))
    for z in (-2, 0, 1):
        normal = (1 + math.erf((z + 0.5 / deviation) / math.sqrt(2))) / 2
        assert calibration.binomial_tail(round(mean + z * deviation), n, alpha) == pytest.approx(normal, abs=2e-3)


def test_how_many_losses_are_allowed():
    assert calibration.allowed_losses(500, 0.02, 0.1) == 5
    assert calibration.allowed_losses(300, 0.05, 0.1) == 9
    assert calibration.allowed_losses(100, 0.02, 0.1) == -1  # 0.98 ** 100 = 0.13
    assert calibration.allowed_losses(3, 0.9, 0.5) == 2
    for n, alpha in ((500, 0.02), (300, 0.05)):
        most = calibration.allowed_losses(n, alpha, 0.1)
        assert exact_tail(most, n, alpha) <= 0.1 < exact_tail(most + 1, n, alpha)


def test_how_many_videos_are_needed():
    assert calibration.required_videos(0.02, 0.1) == 114 == math.ceil(math.log(0.1) / math.log(0.98))
    assert calibration.required_videos(0.5, 0.5) == 1
    for alpha, delta, losses in ((0.02, 0.1, 3), (0.1, 0.05, 1), (0.3, 0.2, 10)):
        n = calibration.required_videos(alpha, delta, losses)
        assert exact_tail(losses, n, alpha) <= delta < exact_tail(losses, n - 1, alpha)


def test_tests_end_at_the_first_failure():
    # 20 videos, alpha 0.2, delta 0.1: one loss is allowed (p = 0.069), two are not (p = 0.206).
    assert calibration.certified([0, 0, 1, 1], 20, 0.2, 0.1) == 4
    assert calibration.certified([0, 1, 2, 0, 0], 20, 0.2, 0.1) == 2
    assert calibration.certified([2, 0], 20, 0.2, 0.1) == 0
    assert calibration.certified([0], 1, 0.5, 0.5) == 1  # p = 0.5: delta itself is small enough


@pytest.mark.parametrize("levels", [(0, 0.1), (1, 0.1), (0.1, 0), (0.1, 1.5), (math.nan, 0.1)])
def test_levels_lie_between_0_and_1(levels):
    for call in (lambda: calibration.required_videos(*levels), lambda: calibration.certified([0], 9, *levels)):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            call()


@pytest.mark.parametrize("seed", range(10))
def test_auroc_counts_pairs(seed):
    random = np.random.default_rng(seed)
    scores, positive = random.integers(0, 6, 40), random.random(40) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    assert calibration.auroc(scores, positive) == pytest.approx(np.mean(pairs))


def test_auroc_of_extremes():
    assert calibration.auroc([1, 2, 3], [False, False, True]) == 1
    assert calibration.auroc([-math.inf, 0.0], [True, False]) == 0
    assert calibration.auroc([1, 1, 1], [True, False, True]) == 0.5
    assert math.isnan(calibration.auroc([1, 2], [True, True]))


# The promise, on populations whose risks are known


def population(risks, nested=False, size=20_000):
    """bool[size, thresholds] in which the share lost under each threshold is the risk exactly.

    `nested`: who is lost under a low risk is lost under every higher one; else losses are independent.
    """
    random = np.random.default_rng(0)
    places = [random.permutation(size) for _ in range(1 if nested else len(risks))]
    return np.broadcast_to(np.stack(places, 1), (size, len(risks))) < np.round(np.multiply(risks, size))


CURVES = {
    "just_above": [0.0, 0.051],
    "at_once_above": [0.051, 0.052, 0.06],
    "gentle": np.linspace(0.0, 0.2, 15),
    "cliff": [0.0, 0.01, 0.02, 0.3, 0.3],
    "down_again": [0.0, 0.08, 0.01, 0.08, 0.01],
    "many_above": [0.051] * 15,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("delta", [0.1, 0.25])
def test_the_promise_is_kept(name, nested, delta):
    alpha, resamples = 0.05, 1000
    risks = calibration.resampled_risks(population(CURVES[name], nested), 300, alpha, delta, resamples, seed=1)
    broken = (risks[~np.isnan(risks)] > alpha).sum() / resamples
    # Three standard errors of a share of 1000 calibrations that is delta at most.
    assert broken <= delta + 3 * math.sqrt(delta * (1 - delta) / resamples)


def test_the_promise_is_not_kept_by_never_promising():
    lost = population(CURVES["gentle"])
    risks = calibration.resampled_risks(lost, 300, 0.05, 0.1, 1000)
    assert np.isnan(risks).mean() < 0.01 and np.nanmean(risks) > 0.01
    # Not idle either: just above alpha some calibrations do certify, and one more loss allowed would be too many.
    draws = population([0.0505])[np.random.default_rng(0).integers(20_000, size=(2000, 300)), 0].sum(1)
    assert 0.04 < (draws <= 9).mean() <= 0.1 < (draws <= 10).mean() + 0.01


def test_risks_are_counted_where_no_calibration_looked():
    none, every = np.zeros((60, 2), bool), np.ones((60, 2), bool)
    fresh = np.array([[False, True], [True, True], [False, True], [False, False]])
    counted = lambda lost: calibration.resampled_risks(lost, 45, 0.05, 0.1, 3, fresh=fresh)
    np.testing.assert_array_equal(counted(none), [0.75] * 3)  # the bolder threshold's
    np.testing.assert_array_equal(counted(np.concatenate([none[:, :1], every[:, 1:]], 1)), [0.25] * 3)
    np.testing.assert_array_equal(counted(every), [math.nan] * 3)


def test_calibrations_of_known_outcome():
    # 45 videos certify 5 % at 0.1 without a loss alone: 0.95 ** 45 = 0.099.
    none, every = np.zeros((10, 1), bool), np.ones((10, 1), bool)
    for lost, risk in (([none, none], 0.0), ([none, every], 0.0), ([every, none], math.nan)):
        found = calibration.resampled_risks(np.concatenate(lost, 1), 45, 0.05, 0.1, 3)
        np.testing.assert_array_equal(found, [risk] * 3)


def test_questions_of_one_video_are_not_independent():
    # 40 videos of 10 questions that are lost together: counted as 400, they would certify what they must not.
    alpha, delta, random = 0.05, 0.1, np.random.default_rng(0)
    lost = random.random((2000, 40)) < 0.06
    as_questions = (10 * lost.sum(1) <= calibration.allowed_losses(400, alpha, delta)).mean()
    as_videos = (lost.sum(1) <= calibration.allowed_losses(40, alpha, delta)).mean()
    assert as_questions > 2 * delta and as_videos <= delta


# Logs


def said(answer, entropy, margin=0.5, options=(0.7, 0.2, 0.1)):
    return Said(answer, entropy, margin, options)


def question(groups, after, blind=1.0, text="?"):
    """A log from (answer, entropy) per group, and the final answers after 1, 2, ... groups."""
    finals = {v: said(*final) for v, final in enumerate(after, 1)}
    return QuestionLog(text, said("A", blind), tuple(said(*group) for group in groups), finals)


GROUPS = [("A", 0.3), ("A", 0.1), ("B", 0.05), ("A", 0.2), ("B", 0.6)]
AFTER = [("C", 0.9), ("A", 0.5), ("B", 0.4), ("A", 0.1), ("A", 0.2)]
VIDEO = VideoLog("film, ünïcode\n.mp4", (question(GROUPS, AFTER), question(GROUPS[:3], AFTER[:3], text="Wer?")))
FINGERPRINT = {"model": "abc", "config": {"budget": 30, "certainty": "neg_entropy"}}


def test_logs_come_back_as_they_were(tmp_path):
    open_question = QuestionLog("?", Said(None, 0.5, 0.25), (Said("ja", 0.1, 0.0),), {1: Said("nein", 1 / 3, 1.0)})
    other = VideoLog("b", (open_question,))
    with LogWriter(tmp_path / "log", FINGERPRINT) as writer:
        for video in (VIDEO, other):
            writer.append(video)
    log = calibration.read_log(tmp_path / "log")
    assert log == calibration.Log(FINGERPRINT, (VIDEO, other))
    assert log.only({"b"}).videos == (other,) and log.only({"b"}).sha256 != log.sha256
    assert set(writer.done) == {VIDEO.video, "b"} and other.questions[0].full.answer == "nein"


def write_log(path, *videos):
    """What a log of these videos, continued if there is one, tells before they are added."""
    with LogWriter(path, FINGERPRINT) as writer:
        before = dict(writer.done)
        for video in videos:
            writer.append(video)
    return before


def test_an_interrupted_log_goes_on(tmp_path):
    path = tmp_path / "log"
    write_log(path, VIDEO)
    whole = path.read_bytes()
    for cut in (1, 30, len(whole) - whole.index(b"\n") - 2):
        path.write_bytes(whole[:-cut])
        assert calibration.read_log(path).videos == ()
        assert not write_log(path, VIDEO)
        assert path.read_bytes() == whole


def test_a_log_has_one_writer_and_a_video_once(tmp_path):
    """Two that write at the same time would both log what the other is at."""
    path = tmp_path / "log"
    with LogWriter(path, FINGERPRINT), pytest.raises(UserError, match="log: another process is writing"):
        LogWriter(path, FINGERPRINT)
    write_log(path, VIDEO, VIDEO)
    with pytest.raises(UserError, match=re.escape(f"holds {VIDEO.video} 2 times")):
        calibration.read_log(path)


def test_a_log_whose_first_line_was_interrupted_begins_anew_and_another_file_stays(tmp_path):
    path = tmp_path / "log"
    write_log(path)
    whole = path.read_bytes()
    for cut in range(1, len(whole) + 1):
        path.write_bytes(whole[:-cut])
        assert write_log(path) == {} and path.read_bytes() == whole
    for notes in ("notes", "notes\nand more", "{}\n{"):
        path.write_text(notes)
        with pytest.raises(UserError, match="log: not a log"):
            LogWriter(path, FINGERPRINT)
        assert path.read_text() == notes


def test_a_setting_that_is_none_differs_from_one_that_is_not_there():
    known, unknown = ({"model": "m", "config": config} for config in ({"seed": None}, {}))
    difference = calibration.full_runs.first_difference
    assert (
        difference(known, known) == "" and "seed" in difference(known, unknown) and "seed" in difference(unknown, known)
    )


def test_a_log_goes_on_under_the_same_settings_only(tmp_path):
    path = tmp_path / "log"
    write_log(path, VIDEO)
    before = path.read_bytes()
    for change, words in (
        ({"config": {**FINGERPRINT["config"], "budget": 31}}, "budget=30, but this run has budget=31"),
        ({"config": {**FINGERPRINT["config"], "debias": True}}, "debias=None, but this run has debias=True"),
        ({"model": "def"}, "another model"),
    ):
        with pytest.raises(UserError, match=f"--log=.*: written with {words}; name another file"):
            LogWriter(path, {**FINGERPRINT, **change})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "text", "{}\n", '{"version": 9}\n', "[1]\n", '{"version": 1, "fingerprint": {}}\n{"video": 1}\n']
)
def test_other_files_are_no_logs(tmp_path, content):
    path = tmp_path / "log"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: (not a log|damaged)"):
        calibration.read_log(path)


# Replay


def rule(**given):
    return StopRule(**{"rule": "groups", "groups": 2, "entropy": 0.25, "agreement": True, **given})


def test_stop_points_literally():
    first, second = VIDEO.questions
    for entropy, groups, agreement, expected in (
        (0.05, 1, True, 3), (0.1, 1, True, 2), (0.3, 1, True, 1), (0.04, 1, True, 5),
        (0.2, 2, True, 4), (0.1, 2, False, 3), (0.3, 2, True, 2), (0.1, 2, True, 5),
    ):  # fmt: skip
        assert calibration.stop_point(first, rule(entropy=entropy, groups=groups, agreement=agreement)) == expected
    assert calibration.stop_point(second, rule(entropy=0.2)) == 3
    # Asked again after 2 and 4 groups, 0.5 and 0.1 nats; after 3 and 5 it is not asked.
    for entropy, expected in ((0.5, 2), (0.45, 4), (0.05, 5)):
        assert calibration.stop_point(first, rule(rule="rerun", entropy=entropy)) == expected
    # Gains over the blind entropy of 1: 0.7, 0.9, 0.95, 0.8, 0.4.
    assert calibration.stop_point(first, rule(groups=1, entropy=0.3, gain=0.85)) == 2
    assert calibration.stop_point(first, rule(entropy=0.0, give_up=1)) == 4


def test_a_video_is_lost_if_any_of_its_questions_is():
    one, two = VideoLog("one", VIDEO.questions[:1]), VideoLog("two", VIDEO.questions)
    run = calibration.replay([one, two], rule(groups=1, entropy=0.3))  # both stop at once, with C instead of A and B
    assert run.lost.tolist() == [True, True] and run.visited == pytest.approx([1 / 5, (1 / 5 + 1 / 3) / 2])
    run = calibration.replay([one, two], rule(groups=1, entropy=0.1))  # after 2: A is right, then A instead of B
    assert run.lost.tolist() == [False, True] and run.losses == 1 and run.share == pytest.approx((0.4 + 8 / 15) / 2)
    run = calibration.replay([one, two], rule(entropy=0.0))
    assert run.losses == 0 and run.share == 1


def test_answers_that_were_not_logged_are_not_guessed():
    sparse = dataclasses.replace(VIDEO.questions[0], after={5: said("A", 0.2)})
    with pytest.raises(UserError, match="no answer after 2 groups"):
        calibration.replay([VideoLog("v", (sparse,))], rule(groups=1, entropy=0.1))


def test_what_a_rule_needs_is_logged():
    config = at.AdaptTokenConfig(stop_groups=1)
    first = VIDEO.questions[0]
    assert calibration.stop_points(first, config, [0.04, 0.05, 0.1, 0.3]) == [1, 2, 3, 5]
    again = dataclasses.replace(config, stop_rule="rerun", stop_groups=2)
    assert calibration.stop_points(first, again, [0.1]) == [2, 4, 5]
    giving_up = dataclasses.replace(again, give_up_groups=2)
    assert calibration.stop_points(first, giving_up, [0.1]) == [2, 3, 4, 5]
    seldom = dataclasses.replace(giving_up, stop_groups=4)
    assert calibration.stop_points(first, seldom, [0.1]) == [3, 4, 5]  # after 2 nothing can have stayed as it was twice


def test_signals_literally():
    found = calibration.signals(VIDEO.questions[0], 3)
    evidence = np.array([0.7, 0.2, 0.1]) ** 3 / np.array([0.7, 0.2, 0.1]) ** 2  # all groups say what the blind one says
    assert found == pytest.approx({
        "entropy": -0.05, "margin": 0.5, "gain": 0.95, "agreement": 2 / 3,
        "evidence": float((evidence * np.log(evidence)).sum()), "rerun": -0.4,
    })  # fmt: skip
    unknown = QuestionLog("?", Said("x", 1.0, 0.1), (Said("x", 0.2, 0.3), Said(None, 0.4, 0.2)), {1: Said("x", 0.1, 0)})
    assert math.isnan(calibration.signals(unknown, 1)["evidence"])
    logged = dataclasses.replace(unknown, after={1: Said("x", 0.1, 0), 2: Said("x", 0.1, 0)})
    assert calibration.signals(logged, 2)["margin"] == 0.3  # the larger of 0.3 and 0.2
    rows = {row["signal"]: row for row in calibration.compare_signals([VideoLog("v", (logged,))], resamples=2)}
    assert rows["entropy"]["cases"] == 1 and rows["evidence"]["cases"] == 0 and math.isnan(rows["evidence"]["right"])


def test_signals_are_compared_by_auroc():
    # Lite's answer is right exactly when the answer over all so far is certain; the groups' entropy says nothing.
    random, videos = np.random.default_rng(0), []
    for i in range(60):
        right = random.random(6) < 0.6
        groups = [("A", float(random.uniform(0, 1))) for _ in range(7)]
        after = [("A" if r else "B", float(random.uniform(0, 0.5) if r else random.uniform(0.5, 1))) for r in right]
        videos.append(VideoLog(str(i), (question(groups, [*after, ("A", 0.0)]),)))
    rows = {row["signal"]: row for row in calibration.compare_signals(videos, resamples=50)}
    assert list(rows) == list(calibration.SIGNALS)
    assert rows["rerun"]["auroc"] == rows["rerun"]["low"] == 1
    assert 0.4 < rows["entropy"]["auroc"] < 0.6 and rows["agreement"]["auroc"] == 0.5
    assert rows["entropy"]["low"] < rows["entropy"]["auroc"] < rows["entropy"]["high"]
    assert rows["rerun"]["cases"] == 360 and rows["rerun"]["right"] == pytest.approx(0.6, abs=0.1)


# Certificates


CONFIG = at.AdaptTokenConfig(stop_groups=1, reference_layer=3)


def made_log(losses_at, n=40):
    """n one-question videos that stop at 0.1 nats; of them `losses_at[t]` are lost by stopping at threshold t."""
    videos, lost = [], [t for t, count in losses_at.items() for _ in range(count)]
    for i in range(n):
        threshold = lost[i] if i < len(lost) else 0.1
        final = ("B" if i < len(lost) else "A", 0.3)
        videos.append(VideoLog(str(i), (question([("A", threshold), ("A", 0.0)], [final, ("A", 0.0)]),)))
    return calibration.Log(calibration.config_fingerprint(CONFIG, "abc"), tuple(videos))


def test_the_boldest_threshold_before_the_first_failure_is_certified():
    # 40 videos, alpha 0.15, delta 0.1: two losses are allowed (p = 0.049), three not (p = 0.13).
    log = made_log({0.05: 1, 0.2: 1, 0.4: 3})
    certificate = calibration.certify(log, CONFIG, 0.15, 0.1, [0.01, 0.1, 0.3, 0.5, 1.0])
    assert certificate.stop == {
        "stop_rule": "groups", "stop_groups": 1, "stop_entropy": 0.3, "stop_agreement": True, "stop_gain": 0.0,
        "give_up_groups": 0,
    }  # fmt: skip
    assert (certificate.losses, certificate.videos, certificate.questions) == (2, 40, 40)
    assert certificate.p_value == pytest.approx(float(exact_tail(2, 40, 0.15)))
    assert certificate.mean_share_visited == pytest.approx((37 * 0.5 + 3) / 40)
    assert [(t["losses"], t["accepted"]) for t in certificate.tested] == [
        (0, True), (1, True), (2, True), (5, False), (5, False),
    ]  # fmt: skip
    assert certificate.data_sha256 == log.sha256 and certificate.fingerprint == log.fingerprint


def test_too_few_videos_are_refused_with_how_many_are_needed():
    with pytest.raises(
        UserError, match=r"--alpha=0.02: 100 videos can never certify it at --delta=0.1; 114 are needed"
    ):
        calibration.certify(made_log({}, 100), CONFIG, 0.02, 0.1)
    calibration.check_enough(114, 0.02, 0.1)


def test_too_many_losses_are_refused_with_how_many_videos_they_need():
    needed = calibration.required_videos(0.1, 0.1, 4)
    with pytest.raises(
        UserError,
        match=rf"0.05 nats, Lite differs in 4 of 40 videos; .*would void the promise; .* losses need {needed}\)$",
    ):
        calibration.certify(made_log({0.05: 4}), CONFIG, 0.1, 0.1, [0.05, 0.2])


def test_a_log_is_good_for_one_test(tmp_path):
    path, log, thresholds = tmp_path / "log", made_log({0.05: 4}), [0.05, 0.2]
    test = calibration.planned_test(log, CONFIG, 0.1, 0.1, thresholds)
    assert list(test.values())[:4] == [40, 0.1, 0.1, thresholds]
    with LogWriter(path, log.fingerprint) as writer:
        for video in log.videos:
            writer.append(video)
        writer.record_test(test)
    tested = calibration.read_log(path)
    assert tested == dataclasses.replace(log, test=test)
    with LogWriter(path, log.fingerprint) as again:
        assert again.done == writer.done
    assert calibration.planned_test(tested, CONFIG, 0.1, 0.1, thresholds) == test
    more = made_log({0.05: 4}, 80)
    for other, arguments, words in (
        (more.videos, (CONFIG, 0.1, 0.1, thresholds), "videos=40, but this run has videos=80"),
        (more.videos[40:], (CONFIG, 0.1, 0.1, thresholds), "data_sha256=.*"),
        (log.videos, (CONFIG, 0.2, 0.1, thresholds), "alpha=0.1, but this run has alpha=0.2"),
        (log.videos, (CONFIG, 0.1, 0.3, thresholds), "delta=0.1, but this run has delta=0.3"),
        (log.videos, (CONFIG, 0.1, 0.1, [0.01, 0.05]), r"thresholds=\[0.05, 0.2\], .*"),
        (log.videos, (dataclasses.replace(CONFIG, stop_groups=2), 0.1, 0.1, thresholds), "stop_groups=1, .*"),
    ):
        with pytest.raises(UserError, match=f"^--log: tested before with {words}; .*would void the promise"):
            calibration.certify(dataclasses.replace(tested, videos=other), *arguments)


def test_a_test_is_checked_before_its_videos_are_logged():
    log, arguments = made_log({}, 40), (CONFIG, 0.05, 0.1, [0.05, 0.2])
    assert calibration.planned_test(log, *arguments, awaited=5)["videos"] == 45
    with pytest.raises(UserError, match=r"^--alpha=0.05: 44 videos can never certify it at --delta=0.1; 45 are needed"):
        calibration.planned_test(log, *arguments, awaited=4)
    tested = dataclasses.replace(log, test=calibration.planned_test(log, CONFIG, 0.1, 0.1, [0.05, 0.2]))
    part = dataclasses.replace(tested, videos=tested.videos[:39])
    for has, awaited, words in ((tested, 10, "videos=40, but this run has videos=50"), (part, 1, "data_sha256=.*")):
        with pytest.raises(UserError, match=f"^--log: tested before with {words}; .*would void the promise"):
            calibration.planned_test(has, CONFIG, 0.1, 0.1, [0.05, 0.2], awaited)


def test_no_certificate_is_made_or_used_with_pruning(certificate):
    pruned = dataclasses.replace(CONFIG, keep_after_reference=0.5)
    for call in (
        lambda: calibration.certify(made_log({}), pruned, 0.1, 0.1),
        lambda: certificate.config_for(pruned),
        lambda: dataclasses.replace(certificate, fingerprint=calibration.config_fingerprint(pruned, "abc")).config_for(
            pruned
        ),
    ):
        with pytest.raises(UserError, match=r"^--keep_after_reference=0.5: .*leave it out$"):
            call()


@pytest.mark.parametrize("thresholds", [[], [0.2, 0.1], [0.1, 0.1]])
def test_thresholds_go_from_cautious_to_bold(thresholds):
    words = ",".join(map(str, thresholds))
    with pytest.raises(
        UserError, match=rf"^--thresholds={words}: give numbers in ascending order, from cautious to bold$"
    ):
        calibration.certify(made_log({}), CONFIG, 0.1, 0.1, thresholds)


@pytest.fixture
def certificate():
    return calibration.certify(made_log({0.3: 1}), CONFIG, 0.1, 0.1, [0.1, 0.2])


def test_certificates_come_back_as_they_were(tmp_path, certificate):
    path = tmp_path / "stop.json"
    calibration.write_certificate(path, certificate)
    assert calibration.read_certificate(path) == certificate
    assert [p.name for p in tmp_path.iterdir()] == ["stop.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "another version"),
        ({"losses": 5}, "do not support its promise"),
        ({"videos": 3}, "do not support its promise"),
        ({"alpha": 0}, "not a certificate"),
        ({"stop": {"stop_entropy": 0.1}}, "not a valid certificate"),
        ({"extra": 1}, "not a certificate"),
        (None, "no such file"),
        ("text", "not a certificate"),
        ("[]", "not a certificate"),
    ],
)
def test_other_files_are_no_certificates(tmp_path, certificate, change, words):
    path = tmp_path / "stop.json"
    if change is not None:
        changed = change if isinstance(change, str) else json.dumps({**json.loads(certificate.to_json()), **change})
        path.write_text(changed)
    with pytest.raises(UserError, match=f"{path}: .*{words}"):
        calibration.read_certificate(path)


def test_a_certificate_sets_the_rule_and_refuses_other_settings(certificate):
    other_rule = dataclasses.replace(CONFIG, stop_groups=7, stop_entropy=1.0)
    assert certificate.config_for(other_rule, "abc") == dataclasses.replace(CONFIG, stop_entropy=0.2)
    with pytest.raises(UserError, match=r"^F: calibrated with budget=7040, but this run has budget=9; calibrate again"):
        certificate.config_for(dataclasses.replace(CONFIG, budget=9), "abc", "F")
    with pytest.raises(UserError, match=r"^F: calibrated with another model; calibrate again"):
        certificate.config_for(CONFIG, "abd", "F")
    certificate.config_for(CONFIG)  # the model unknown yet: settings alone


# Live


SMALL = {"slots_per_group": 4, "budget": 30, "max_answer_tokens": 3, "max_pixels": 56 * 84}


def test_a_log_knows_what_was_asked():
    texts = ("red", "blue", "green")
    noted = VideoLog("v", (dataclasses.replace(question(GROUPS, AFTER), options=texts),))
    assert noted.asks(["?"], [texts]) and noted.asks(("?",), [list(texts)])
    for questions, options in (
        (["!"], [texts]), (["?"], [texts[::-1]]), (["?"], [None]), (["?", "?"], [texts, texts]), ([], []),
    ):  # fmt: skip
        assert not noted.asks(questions, options)
    earlier = VideoLog("v", (question(GROUPS, AFTER),))  # three options, whichever
    assert earlier.asks(["?"], [texts]) and not earlier.asks(["?"], [texts[:2]]) and not earlier.asks(["?"], [None])


@pytest.mark.parametrize(
    "given",
    [{"stop_groups": 1}, {"stop_groups": 2, "stop_agreement": False}, {"stop_rule": "rerun", "stop_groups": 2},
     {"stop_groups": 1, "stop_gain": 0.1}, {"stop_groups": 3, "give_up_groups": 2}],
    ids=["one", "two", "rerun", "gain", "give_up"],
)  # fmt: skip
def test_lite_does_what_its_replay_says(model, given):
    config = at.AdaptTokenConfig.for_model(model.config, **SMALL, **given)
    questions, options = ["What is in the video?", "Why?"], [OPTIONS, None]
    log = record_video(model, "v", random_video(), questions, options, config)
    seen = set()
    for q, text, choice in zip(log.questions, questions, options, strict=True):
        assert len(q.groups) == 6 and sorted(q.after) == [1, 2, 3, 4, 5, 6]
        entropies = [s.entropy for s in (*q.groups, *q.after.values())]
        for threshold in [0.0, *np.quantile(entropies, [0.2, 0.5, 0.8, 1.0]).tolist()]:
            at_threshold = dataclasses.replace(config, stop_entropy=threshold + 1e-4)  # beyond rounding of a float
            stop = calibration.stop_point(q, StopRule.of(at_threshold))
            result = at.answer(model, random_video(), text, choice, at_threshold, "lite")
            assert result.stop.groups_visited == stop
            assert (result.option or result.answer.casefold()) == q.after[stop].answer
            assert result.entropy == pytest.approx(q.after[stop].entropy, abs=1e-4)
            seen.add(stop)
    assert len(seen) > 1


def test_the_full_run_is_the_last_of_its_log(model):
    config = at.AdaptTokenConfig.for_model(model.config, **SMALL)
    log = record_video(model, "v", random_video(), ["What?"], [OPTIONS], config, lambda q: [2])
    full = at.answer(model, random_video(), "What?", OPTIONS, config)
    [q] = log.questions
    assert sorted(q.after) == [2, 6] and q.full.answer == full.option
    assert q.full.options == pytest.approx(list(full.option_probabilities.values()))
    assert q.full.margin == pytest.approx(np.diff(np.sort(q.full.options))[-1])
    assert [s.entropy for s in q.groups] == pytest.approx([g.entropy for g in full.groups])
    assert [s.answer for s in q.groups] == [g.option for g in full.groups]


def test_a_short_video_has_nothing_to_stop(model):
    config = at.AdaptTokenConfig.for_model(model.config, **{**SMALL, "slots_per_group": 64})
    assert record_video(model, "v", random_video(), ["What?"], [None], config) is None


def test_the_models_fingerprint(model, checkpoint, tmp_path):
    found = calibration.model_fingerprint(model)
    assert found == calibration.model_fingerprint(at.load(checkpoint, mesh="data=2,model=2"))
    assert found != calibration.model_fingerprint(at.load(checkpoint, dtype="bfloat16"))
    other = tiny.write_checkpoint(tmp_path / "other", dataclasses.replace(tiny.SHAPES["base"], seed=99))
    assert found != calibration.model_fingerprint(at.load(other))


# The commands


FLAGS = ["--max_pixels=3136", "--slots_per_group=4", "--budget=8", "--max_answer_tokens=2"]


def test_from_videos_to_a_certified_answer(checkpoint, tmp_path, capsys):
    lines = []
    for seed in range(3):
        made = scene(seed, frames=24)
        write_mp4(made, tmp_path / f"{seed}.mp4")
        lines += [{"video": f"{seed}.mp4", "question": f"\u2028{made.question.text}\x85",
                   "options": made.question.options}]  # fmt: skip
        lines += [{"video": f"../{tmp_path.name}/./{seed}.mp4", "question": "What happens?"}]  # the same file
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8-sig")
    argv = [f"--model={checkpoint}", f"--data={tmp_path}/data.jsonl", f"--log={tmp_path}/log", "--alpha=0.6", *FLAGS]
    argv += [f"--certificate={tmp_path}/stop.json", "--stop_groups=1", "--thresholds=0.01,9", "--signals", "--json=-"]
    done = launcher.run("calibrate_stop", *argv, "--resamples=20")
    assert done.returncode == 0, done.stderr
    tables = json.loads(done.stdout)
    assert tables["thresholds"][0]["losses"] == 0 and tables["thresholds"][0]["videos"] == 3
    assert {row["signal"] for row in tables["signals"]} == set(calibration.SIGNALS)
    assert (tables["promise"][0]["resamples"], tables["promise"][0]["fresh"]) == (20, 0)
    certificate = calibration.read_certificate(tmp_path / "stop.json")
    assert certificate.questions == 6 and "stop.json: rule groups" in done.stderr
    tested, data = (tmp_path / "log").read_bytes(), (tmp_path / "data.jsonl").read_text("utf-8-sig")
    for name, frames in (("more", 24), ("short", 8)):
        write_mp4(scene(9, frames=frames), tmp_path / f"{name}.mp4")
        line = json.dumps({"video": f"{name}.mp4", "question": "Why?"})
        (tmp_path / f"{name}.jsonl").write_text(f"{data}\n{line}")
    for change, code, words in (
        ("--json=-", 0, "stop.json: rule groups"),
        ("--alpha=0.7", 2, "--log: tested before with alpha"),
        (f"--data={tmp_path}/more.jsonl", 2, "--log: tested before with videos=3, but this run has videos=4"),
        (f"--data={tmp_path}/short.jsonl", 0, "stop.json: rule groups"),
    ):
        again = launcher.run("calibrate_stop", *argv, change)
        assert again.returncode == code and words in again.stderr.splitlines()[-1]
        assert code == 0 or (again.stdout == "" and again.stderr.count("\n") == 1)
        assert (tmp_path / "log").read_bytes() == tested
    assert "1 videos are too short for groups" in again.stderr
    (tmp_path / "new.jsonl").write_text(json.dumps({"video": "more.mp4", "question": "Why?"}))
    new = [word for word in argv if not word.startswith("--certificate")]
    new += [f"--data={tmp_path}/new.jsonl", f"--log={tmp_path}/new", "--resamples=4", "--resample_size=3"]
    for change, code, words in (
        ("--json=-", 0, '"fresh": 3'),
        ("--budget=9", 2, f"--fresh_log={tmp_path}/log: written with budget=8, but this run has budget=9"),
        (f"--data={tmp_path}/more.jsonl", 2, f"--fresh_log={tmp_path}/log: has 0.mp4, which is calibrated with"),
        ("--resamples=0", 2, "--fresh_log: counts the risks of --resamples"),
    ):
        other = launcher.run("calibrate_stop", *new, f"--fresh_log={tmp_path}/log", change)
        assert other.returncode == code and words in other.stdout + other.stderr, other.stderr
    pruned = launcher.run("calibrate_stop", *argv, "--keep_after_reference=0.5")
    assert pruned.returncode == 2 and "no certificate holds" in pruned.stderr.splitlines()[-1]

    answer = ["answer", f"--model={checkpoint}", f"--video={tmp_path}/0.mp4", "--question=Why?", "--json=-", *FLAGS]
    certified = [*answer, "--lite", f"--stop_calibration={tmp_path}/stop.json"]
    assert cli.main(certified) == 0
    settings = json.loads(capsys.readouterr().out)["config"]
    assert {name: settings[name] for name in calibration.RULE_FIELDS} == certificate.stop

    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, [lines[0] | {"question": "Who?"}, *lines[1:]])))
    done = launcher.run("calibrate_stop", *argv, f"--data={tmp_path}/other.jsonl")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert f"--log={tmp_path}/log: other questions about 0.mp4 were logged" in done.stderr

    other = tiny.write_checkpoint(tmp_path / "other", dataclasses.replace(tiny.SHAPES["base"], seed=99))
    for refused, words in (
        ([*certified, "--keep_after_reference=0.5"], "--keep_after_reference=0.5: .*no certificate holds"),
        ([*certified, "--budget=9"], "calibrated with budget=8, but this run has budget=9"),
        ([*certified, f"--model={other}"], "calibrated with another model"),
        ([*certified, "--stop_groups=2"], "--stop_groups: --stop_calibration=.* decides it"),
        ([*certified, "--deadline=3"], "--deadline: stops where --stop_calibration promises nothing"),
        ([w for w in certified if w != "--lite"], "the method is adapttoken; add --lite"),
        ([*answer, "--lite", "--stop_calibration=none"], "none: no such file"),
    ):
        assert cli.main(refused) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert re.search(words, err), err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--videos=100", "--alpha=0.02"],
            "--alpha=0.02: 100 videos can never certify it at --delta=0.1; 114 are needed",
        ),
        (["--videos=45", "--thresholds=0.5,0.1"], "--thresholds=0.5,0.1: give numbers in ascending order"),
        (["--videos=45", "--thresholds=0.1,inf"], "--thresholds=0.1,inf: give numbers from 0 to 1e+06"),
    ],
)
def test_what_cannot_be_certified_is_refused_before_any_work(tmp_path, flags, words):
    places = [f"--log={tmp_path}/log", f"--certificate={tmp_path}/stop.json"]
    done = launcher.run("calibrate_stop", "--needle", "--model=none", *places, *flags)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"calibrate_stop: {words}") and list(tmp_path.iterdir()) == []


def test_limits_on_the_command_line(checkpoint, tmp_path, capsys):
    write_mp4(scene(0, frames=24), tmp_path / "v.mp4")
    answer = [
        "answer",
        f"--model={checkpoint}",
        f"--video={tmp_path}/v.mp4",
        "--question=Why?",
        "--option=a",
        "--option=b",
    ]
    assert cli.main([*answer, *FLAGS, "--abstain_above=0", "--deadline=0"]) == 0
    out, err = capsys.readouterr()
    assert out == "not found in the video\n" and "1 of 3 groups" in err and "option" not in err
    for flag in ("abstain_above", "deadline"):
        assert cli.main([*answer, f"--{flag}=-1"]) == 2
        assert f"--{flag}=-1: must be at least 0" in capsys.readouterr().err
