"""The steps beyond the paper: closed forms, literal cases and properties, one section per step."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax.selection import (
    CERTAIN_GROUPS_AGREE,
    CERTAIN_OVER_ALL,
    GAVE_UP,
    GO_ON,
    StopRule,
    allocate_budget,
    blind_gain,
    budget_temperature,
    coverage_count,
    coverage_tokens,
    debias_relevance,
    effective_groups,
    gave_up,
    group_weights,
    option_consensus,
    pooled_evidence,
    position_trend,
    should_stop,
    solve_temperature,
    target_groups,
    token_entropy,
)

# Consensus


def test_consensus_is_the_weighted_mean():
    mixed = option_consensus([[1.0, 0.0], [0.25, 0.75]], [3.0, 1.0])
    np.testing.assert_allclose(mixed, [0.8125, 0.1875], rtol=1e-15)
    np.testing.assert_allclose(option_consensus(jnp.eye(3), jnp.ones(3)), [1 / 3] * 3, rtol=1e-7)


def test_one_group_is_its_own_consensus_and_groups_without_weight_say_nothing():
    said = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    np.testing.assert_array_equal(option_consensus(said[:1], [0.2]), said[0])
    np.testing.assert_array_equal(option_consensus(said, [0.5, 0.0]), said[0])


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.5], [1.0, math.nan], [1.0, math.inf]])
def test_consensus_needs_usable_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        option_consensus(np.full((2, 2), 0.5), weights)


def test_two_halves_of_the_evidence_pool_to_one_option_and_mix_to_a_half():
    # Options: red-disc, red-ring, blue-disc, blue-ring. One group saw red, another the ring.
    saw_red, saw_ring = [0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]
    np.testing.assert_allclose(pooled_evidence([saw_red, saw_ring]), [0, 1, 0, 0], atol=1e-12)
    assert option_consensus([saw_red, saw_ring], [1, 1]).max() == 0.5


def test_pooling_is_bayes_rule_for_independent_evidence():
    prior = np.array([0.6, 0.3, 0.1])
    likelihoods = np.array([[0.2, 0.5, 0.9], [0.7, 0.1, 0.4]])
    posteriors = prior * likelihoods / (prior * likelihoods).sum(1, keepdims=True)
    expected = prior * likelihoods.prod(0)
    np.testing.assert_allclose(pooled_evidence(posteriors, prior), expected / expected.sum(), rtol=1e-12)
    np.testing.assert_allclose(pooled_evidence([prior] * 5, prior), prior, rtol=1e-12)  # nothing new from any group


def test_pooling_many_groups_that_contradict_each_other_leaves_both_options():
    np.testing.assert_allclose(pooled_evidence([[1, 0]] * 10 + [[0, 1]] * 10), [0.5, 0.5], rtol=1e-12)


# Blind prior


def test_blind_gain_is_the_difference_of_entropies():
    even, sure = float(token_entropy(np.zeros(4))), float(token_entropy(np.array([50.0, 0, 0, 0])))
    np.testing.assert_allclose(blind_gain([even, sure, 1.0], even), [0, math.log(4), math.log(4) - 1], atol=1e-12)


def test_the_blind_prior_moves_no_budget():
    # One number added to every certainty cancels in the softmax: an argument for using it only against thresholds.
    entropies, capacity = np.array([0.1, 0.9, 1.3, 0.4]), np.full(4, 50)
    gained = allocate_budget(blind_gain(entropies, 1.386), capacity, 97, 0.3)
    np.testing.assert_array_equal(gained, allocate_budget(-entropies, capacity, 97, 0.3))


# Giving up


@pytest.mark.parametrize(
    ("entropies", "groups", "expected"),
    [
        ([], 2, False),
        ([1.0, 1.0], 2, False),
        ([1.0, 1.0, 1.0], 2, True),
        ([1.0, 1.1, 0.9], 2, False),
        ([1.0, 0.9, 0.9, 0.95], 2, True),
        ([1.0, 0.9, 1.2, 1.1], 3, False),
        ([0.5, 0.9, 1.2, 1.1], 3, True),
        ([1.0] * 9, 0, False),
        ([1.0, 1.0], 1, True),
    ],
)
def test_giving_up_literally(entropies, groups, expected):
    assert gave_up(entropies, groups) is expected


@pytest.mark.parametrize("seed", range(20))
def test_giving_up_counts_visits_since_the_last_record(seed):
    entropies = np.random.default_rng(seed).integers(0, 6, 15) / 4
    record, since = math.inf, 0
    for visited, entropy in enumerate(entropies, 1):
        record, since = (entropy, 0) if entropy < record else (record, since + 1)
        assert gave_up(list(entropies[:visited]), 4) == (since >= 4)


# The whole stop rule


def never():
    raise AssertionError("nobody may be asked again")


def rule(**given):
    return StopRule(**{"rule": "groups", "groups": 2, "entropy": 0.25, "agreement": True, **given})


@pytest.mark.parametrize("seed", range(20))
def test_without_its_options_the_rule_is_should_stop(seed):
    random = np.random.default_rng(seed)
    entropies, answers = random.uniform(0, 0.6, 9), random.choice(list("AB"), 9).tolist()
    for v, agreement in itertools.product(range(10), (True, False)):
        expected = should_stop(entropies[:v], answers[:v], groups=3, entropy=0.25, agreement=agreement)
        assert rule(groups=3, agreement=agreement).reason(entropies[:v], answers[:v], None, never) == expected


def test_certainty_that_the_question_alone_gives_is_no_evidence():
    entropies, answers = [0.2, 0.2, 0.05], "AAA"
    assert rule(gain=0.1).reason(entropies, answers, 0.25, never) == GO_ON  # gains 0.05, 0.05, 0.2
    assert rule(gain=0.04).reason(entropies, answers, 0.25, never) == CERTAIN_GROUPS_AGREE
    assert rule(gain=1.0).reason(entropies, answers, math.log(4), never) == CERTAIN_GROUPS_AGREE
    assert rule(gain=0.5).reason([0.25, 0.25], answers[:2], 0.75, never) == CERTAIN_GROUPS_AGREE  # the least is enough


def test_asking_again_happens_every_few_groups_and_decides_alone():
    asked = []
    ask = lambda: asked.append(None) or 0.3
    ready = rule(rule="rerun", groups=3, entropy=0.3)
    assert [ready.reason([0.0] * v, "A" * v, None, ask) for v in range(1, 7)] == [
        GO_ON, GO_ON, CERTAIN_OVER_ALL, GO_ON, GO_ON, CERTAIN_OVER_ALL,
    ]  # fmt: skip
    assert len(asked) == 2
    assert rule(rule="rerun", groups=3, entropy=0.29).reason([0.0] * 3, "AAA", None, ask) == GO_ON
    assert rule(rule="rerun", groups=3, entropy=0.3, gain=0.5).reason([0.0] * 3, "AAA", 0.7, ask) == GO_ON


@pytest.mark.parametrize("kind", ["groups", "rerun"])
def test_both_rules_may_give_up(kind):
    giving_up = rule(rule=kind, groups=5, give_up=2)
    assert giving_up.reason([1.0, 1.1], "AB", None, never) == GO_ON
    assert giving_up.reason([1.0, 1.1, 1.2], "ABC", None, never) == GAVE_UP


# Adaptive temperature


def test_effective_groups_of_equal_and_of_single_weights():
    for g in (1, 2, 7, 128):
        assert effective_groups(np.full(g, 1 / g)) == pytest.approx(g)
        assert effective_groups(np.eye(g)[0]) == 1
    assert effective_groups([0.5, 0.25, 0.25]) == pytest.approx(2**1.5)


@pytest.mark.parametrize("g", [2, 3, 16, 128])
@pytest.mark.parametrize("target", [1.01, 1.7, 5.0, 15.9, 100.0])
def test_the_temperature_meets_the_target(g, target):
    certainty = -np.random.default_rng(g).uniform(0, 1.4, g)
    reached = effective_groups(group_weights(certainty, solve_temperature(certainty, target)))
    assert reached == pytest.approx(min(target, g), rel=1e-6)


def test_two_groups_in_closed_form():
    # Weights w and 1 - w belong to the temperature gap / ln(w / (1 - w)).
    for w in (0.6, 0.9, 0.999):
        target = math.exp(-w * math.log(w) - (1 - w) * math.log(1 - w))
        assert solve_temperature([0.0, -1.2], target) == pytest.approx(1.2 / math.log(w / (1 - w)), rel=1e-6)


def test_targets_out_of_reach_give_the_nearest():
    certainty = [0.0, 0.0, -1.0]
    assert effective_groups(group_weights(certainty, solve_temperature(certainty, 1.0))) == pytest.approx(2)
    assert effective_groups(group_weights(certainty, solve_temperature(certainty, 9.0))) == pytest.approx(3)
    assert solve_temperature([-0.7] * 4, 2.0) == 1.0  # every temperature is the same


@pytest.mark.parametrize("factor", [1e-7, 7.0])
def test_the_temperature_scales_with_the_certainties(factor):
    certainty = -np.random.default_rng(1).uniform(0, 1.4, 16)
    scaled = solve_temperature(factor * certainty, 3.0)
    assert scaled == pytest.approx(factor * solve_temperature(certainty, 3.0), rel=1e-6)


def test_the_target_falls_with_the_spread():
    assert target_groups([-0.3] * 16, 2) == 16
    targets = [target_groups([0.0] + [-gap] * 15, 2) for gap in (0.0, 0.1, 0.5, 1.386, 5.0, 50.0)]
    assert targets == sorted(targets, reverse=True) and targets[-1] == pytest.approx(2)
    spread = 15 / 16 * 0.5  # highest above the mean
    assert targets[2] == pytest.approx(16 * (2 / 16) ** (1 - math.exp(-spread)))
    assert target_groups([0.0, -1.0], 64) == 2  # never more than there are


def test_one_certain_group_gets_most_of_the_budget_however_many_groups_there_are():
    shares = [
        group_weights(c, budget_temperature(c, 2.0, 1.0))[0] for c in (np.r_[0, [-1.386] * n] for n in (7, 31, 127))
    ]
    fixed = [group_weights(np.r_[0, [-1.386] * n], 2.0)[0] for n in (7, 31, 127)]
    assert min(shares) > 0.8 and fixed[-1] < 0.02


# Debias


def test_a_parabola_in_the_logarithm_is_removed_and_the_size_stays():
    place = np.linspace(-1, 1, 16)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.3, 12))
    trend = np.exp(1.3 * place - 0.8 * place**2)
    trend /= np.exp(np.log(trend).mean())
    relevance = 1e-3 * trend[:, None] * noise
    np.testing.assert_allclose(position_trend(relevance), trend, rtol=1e-9)
    np.testing.assert_allclose(debias_relevance(relevance), np.tile(1e-3 * noise, (16, 1)), rtol=1e-5)


def test_evidence_in_a_few_tokens_survives_the_trend():
    place = np.linspace(-1, 1, 32)[:, None]
    plain = np.tile(np.exp(2 * place), (1, 20))
    seen = plain.copy()
    seen[4:7, 3:6] *= 40  # early, where the trend is low
    out = debias_relevance(seen)
    evidence = np.zeros_like(seen, bool)
    evidence[4:7, 3:6] = True
    assert out[evidence].min() > 5 * out[~evidence].max() and seen[evidence].min() < 5 * seen[~evidence].max()


def test_sinks_are_zeroed_and_nothing_else():
    relevance = np.random.default_rng(3).uniform(1, 2, (10, 9))
    relevance[:, 7] *= 30  # a cell that stands out all the time
    relevance[0, 0] = 90  # the first token
    relevance[5, 2] = 600  # evidence: one cell, one slot, far above the rest in the mean too
    out = debias_relevance(relevance)
    zero = np.zeros_like(relevance, bool)
    zero[:, 7], zero[0, 0] = True, True
    np.testing.assert_array_equal(out == 0, zero)
    assert out.argmax() == 5 * 9 + 2


def test_a_sink_is_eight_times_the_median_cell():
    relevance = np.ones((10, 9))
    relevance[:, 3], relevance[:, 7] = 7, 9
    for first in (7, 9):  # the very first token, by the same factor
        relevance[0, 0] = first
        expected = relevance.copy()
        expected[:, 7], expected[0, 0] = 0, 7 if first == 7 else 0
        np.testing.assert_allclose(debias_relevance(relevance), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_most_cells_are_kept_whatever_comes(seed):
    random = np.random.default_rng(seed)
    k, cells = random.integers(1, 20), random.integers(1, 9)
    relevance = np.exp(random.normal(0, 6, (k, cells)))
    out = debias_relevance(relevance)
    assert out.shape == relevance.shape and np.isfinite(out).all() and (out >= 0).all()
    assert (out == 0).all(0).sum() * 2 < max(cells, 2)


def test_few_slots_get_a_line_and_fewer_nothing():
    steep = np.exp(np.arange(8.0))[:, None] * np.ones(5)
    np.testing.assert_allclose(position_trend(steep[:4]), np.exp(np.arange(4) - 1.5))
    np.testing.assert_allclose(debias_relevance(steep[:4]), np.full((4, 5), np.exp(1.5)), rtol=1e-6)
    bent = np.exp(np.array([0.0, 2, 2, 0]))[:, None] * np.ones(5)
    np.testing.assert_allclose(position_trend(bent), np.ones(4), rtol=1e-12)  # symmetric: the best line is flat
    curve = np.exp(np.linspace(-1, 1, 8) ** 2)
    np.testing.assert_allclose(
        position_trend(np.tile(curve[:, None], 5)) / curve, np.full(8, np.exp(-3 / 7)), rtol=1e-9
    )
    np.testing.assert_array_equal(position_trend(steep[:3]), np.ones(3))
    np.testing.assert_array_equal(position_trend(steep[:1]), np.ones(1))
    evidence = np.full((3, 4), 0.01)
    evidence[0, 0] = evidence[:, 2] = 0.9
    np.testing.assert_array_equal(debias_relevance(evidence), evidence.astype(np.float32))


def test_slots_without_attention_bend_nothing_much():
    relevance = np.ones((16, 4))
    relevance[3] = 0
    out = debias_relevance(relevance)
    assert (out[3] == 0).all() and out[out > 0].min() > 0.2 and out.max() < 5
    assert (debias_relevance(np.zeros((9, 4))) == 0).all()
    place, level = np.linspace(-1, 1, 16), np.zeros(16)
    level[3] = math.log(1e-3)  # what such a slot counts as
    parabola = np.polyval(np.polyfit(place, level, 2), place)
    np.testing.assert_allclose(position_trend(relevance), np.exp(parabola - parabola.mean()), rtol=1e-9)


def test_a_few_tokens_do_not_bend_the_trend():
    relevance = np.ones((16, 9))
    relevance[4, :4] = 1000
    np.testing.assert_allclose(position_trend(relevance), np.ones(16), rtol=1e-12)


# Coverage


def test_coverage_counts_in_whole_tokens():
    assert [coverage_count(c, 30) for c in (0, 0.05, 0.1, 0.29, 0.5)] == [0, 1, 3, 8, 15]
    assert coverage_count(0.29, 100) == 29  # 28.999999999999996 in floating point


def test_the_best_token_of_each_stretch_literally():
    slots, score = [0, 0, 1, 2, 3, 4, 5, 5], [1, 3, 2, 5, 5, 0, 2, 4]
    # Three stretches of two slots: {0, 1}, {2, 3}, {4, 5}; the tie in the middle goes to the first.
    expected = [0, 1, 0, 1, 0, 0, 0, 1]
    np.testing.assert_array_equal(coverage_tokens(slots, score, 6, 3), np.array(expected, bool))
    assert not coverage_tokens(slots, score, 6, 0).any()


@pytest.mark.parametrize("seed", range(20))
def test_one_token_per_stretch_that_has_any(seed):
    random = np.random.default_rng(seed)
    num_slots, count, n = random.integers(1, 40), random.integers(1, 30), random.integers(1, 60)
    slots, score = random.integers(0, num_slots, n), random.integers(0, 9, n) / 8
    marked = coverage_tokens(slots, score, num_slots, count)
    for stretch in range(count):
        inside = [i for i in range(n) if math.floor(slots[i] * count / num_slots) == stretch]
        best = [max(inside, key=lambda i: (score[i], -i))] if inside else []
        assert [i for i in inside if marked[i]] == best
