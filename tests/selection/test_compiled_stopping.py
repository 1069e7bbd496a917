"""The stop rule on the device against the rule itself, group by group."""

import jax
import numpy as np
import pytest

from adapttoken_jax.selection import StopRule
from adapttoken_jax.selection.compiled_stopping import REASONS, Stop, count_group, device_rule, start_state

GROUPS, QUESTIONS, OPTIONS = 9, 64, 3
# Few values, so that ties with the best entropy and with the threshold occur; 0.3 is not a float32.
LEVELS = np.asarray([0.1, 0.25, 0.3, 0.7, 1.2], np.float32)

RULES = {
    "agreement": StopRule("groups", 2, 0.3, True),
    "enough": StopRule("groups", 3, 0.25, False),
    "give_up": StopRule("groups", 3, 0.1, True, give_up=3),
    "gain": StopRule("groups", 1, 9.0, False, gain=0.7),
    "all": StopRule("groups", 2, 0.7, True, gain=0.45, give_up=4),
}


@jax.jit
def run(rule, state, entropies, options, real):
    """The states after each group: entropies[g, Q], options[g, Q], real[g]."""

    def step(state, group):
        state = count_group(rule, state, *group)
        return state, state

    return jax.lax.scan(step, jax.tree.map(jax.numpy.asarray, state), (entropies, options, real))[1]


def random_log(seed):
    rng = np.random.default_rng(seed)
    return rng.choice(LEVELS, (GROUPS, QUESTIONS)), rng.integers(0, OPTIONS, (GROUPS, QUESTIONS)), rng


def reason_of(rule, entropies, answers, blind):
    """(visits, reason) of one question, by the rule itself."""
    for n in range(1, len(entropies) + 1):
        heard = [float(h) for h in entropies[:n]]
        if reason := rule.reason(heard, list(answers[:n]), blind, rerun=None):
            return n, reason
    return len(entropies), ""


@pytest.mark.parametrize("name", RULES)
def test_the_device_stops_where_the_rule_stops(name):
    rule = RULES[name]
    entropies, options, rng = random_log(len(name))
    blind = [float(h) for h in rng.choice(np.asarray([0.8, 1.0, 1.4], np.float32), QUESTIONS)]
    states = run(device_rule(rule, blind), start_state(QUESTIONS, OPTIONS), entropies, options, np.ones(GROUPS, bool))
    last = jax.tree.map(lambda x: np.asarray(x[-1]), states)
    expected = [reason_of(rule, entropies[:, q], options[:, q], blind[q]) for q in range(QUESTIONS)]
    assert [(int(v), REASONS[Stop(s)]) for v, s in zip(last.visited, last.stop, strict=True)] == expected
    assert len({reason for _, reason in expected}) > 1  # some stop, some do not


@pytest.mark.parametrize("blind", [float("nan"), float("-inf")])
def test_no_gain_over_what_is_no_number_is_ever_enough(blind):
    rule = RULES["gain"]
    assert np.isnan(device_rule(rule, [blind]).threshold).all()
    entropies, options = np.zeros((GROUPS, 1), np.float32), np.zeros((GROUPS, 1), int)
    states = run(device_rule(rule, [blind]), start_state(1, OPTIONS), entropies, options, np.ones(GROUPS, bool))
    assert not states.stop.any() and reason_of(rule, entropies[:, 0], options[:, 0], blind) == (GROUPS, "")


def test_padding_counts_nothing_and_a_stopped_question_counts_no_more():
    rule = device_rule(StopRule("groups", 1, 0.25, False), [None] * QUESTIONS)
    entropies, options, _ = random_log(0)
    nothing = run(rule, start_state(QUESTIONS, OPTIONS), entropies, options, np.zeros(GROUPS, bool))
    for got, begin in zip(nothing, start_state(QUESTIONS, OPTIONS), strict=True):
        np.testing.assert_array_equal(got[-1], begin)
    states = run(rule, start_state(QUESTIONS, OPTIONS), entropies, options, np.ones(GROUPS, bool))
    assert np.asarray(states.certain[-1]).max() == 1


def test_what_only_the_host_can_tell_is_asked_at_the_right_visits():
    entropies, options, _ = random_log(1)
    real = np.ones(GROUPS, bool)
    rerun = run(
        device_rule(StopRule("rerun", 4, 0.1, True), [None] * QUESTIONS),
        start_state(QUESTIONS, OPTIONS), entropies, options, real,
    )  # fmt: skip
    assert (np.asarray(rerun.stop) == Stop.ASK_HOST).all(1).tolist() == [False] * 3 + [True] * 6
    assert StopRule("rerun", 4, 0.1, True).stride == 4
    assert StopRule("rerun", 4, 0.1, True, give_up=3).stride == StopRule("groups", 4, 0.1, True).stride == 1
    assert (np.asarray(rerun.visited[-1]) == GROUPS).all()  # the host may let it go on: what came meanwhile counts
    opened = run(
        device_rule(StopRule("groups", 2, 0.25, True), [None] * QUESTIONS),
        start_state(QUESTIONS, OPTIONS), entropies, np.full_like(options, -1), real,
    )  # fmt: skip
    enough = np.cumsum(entropies <= 0.25, 0) >= 2
    np.testing.assert_array_equal(np.asarray(opened.stop) == Stop.ASK_HOST, enough)


def test_certain_groups_alone_never_end_a_scan_that_asks_again():
    """Every group is certain of one answer, and the host lets the scan go on each time that it is asked."""
    rule, state = device_rule(StopRule("rerun", 4, 9.0, True), [None]), start_state(1, OPTIONS)
    stops = []
    for _ in range(GROUPS):
        state = run(rule, state, np.zeros((1, 1), np.float32), np.zeros((1, 1), int), np.ones(1, bool))
        state = jax.tree.map(lambda x: np.asarray(x[-1]), state)
        stops.append(Stop(int(state.stop[0])))
        state = state._replace(stop=np.zeros_like(state.stop))
    assert stops == [Stop.ASK_HOST if visited % 4 == 0 else Stop.GOING for visited in range(1, GROUPS + 1)]


@pytest.mark.parametrize("gain", [0.0, 0.1, 0.25, 0.3, 1e-7])
def test_the_threshold_is_the_highest_certain_float32(gain):
    rule = StopRule("groups", 1, 0.3, False, gain=gain)
    for blind in np.float32([0.5, *np.random.default_rng(0).uniform(0.05, 0.6, 50)]):  # 0.5 - 0.25 is exactly 0.25
        highest = device_rule(rule, [float(blind)]).threshold[0]
        above = np.nextafter(highest, np.float32(np.inf))
        certain = lambda h, b=float(blind): bool(rule.reason([float(h)], ["A"], b, None))
        assert certain(highest) and not certain(above)
