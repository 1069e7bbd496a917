"""Step 7 inside a compiled loop: the stop rule of Lite on the device, held to `stop_rule.StopRule` by tests.

The device sees numbers, not texts. Where the rule needs a text (open answers must be compared) or another pass
(`rerun`), it ends the loop for the host to decide, at the visits where the rule can come true at all; a scan that the
host lets go on continues from the next group. Entropies are compared in float32 exactly as the host compares them in
float64.

Axis letters: Q questions, O options.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.selection.stop_rule import GAVE_UP, StopRule
from adapttoken_jax.selection.stopping import CERTAIN_GROUPS_AGREE, ENOUGH_CERTAIN_GROUPS, GO_ON


class Stop(enum.IntEnum):
    """Why the loop needs no more groups for a question. `ASK_HOST`: only the host can tell; `ENDED`: it has told."""

    GOING = 0
    AGREE = 1
    ENOUGH = 2
    GAVE_UP = 3
    ASK_HOST = 4
    ENDED = 5


# The reasons that the device finds by itself, as `StopRule.reason` words them.
REASONS = {
    Stop.GOING: GO_ON,
    Stop.AGREE: CERTAIN_GROUPS_AGREE,
    Stop.ENOUGH: ENOUGH_CERTAIN_GROUPS,
    Stop.GAVE_UP: GAVE_UP,
}


class DeviceRule(NamedTuple):
    """A `StopRule` in numbers that are traced, so that other thresholds compile nothing.

    Attributes:
      threshold: float32[Q], highest entropy of a certain group, nats.
      groups: int32[], certain groups that suffice.
      agreement: bool[], whether they must agree.
      every: int32[], visits between two decisions of the host (rule `rerun`); 0: none.
      give_up: int32[], visits without a lower entropy that end the scan; 0: never.
    """

    threshold: jax.Array
    groups: jax.Array
    agreement: jax.Array
    every: jax.Array
    give_up: jax.Array


class StopState(NamedTuple):
    """What the rule remembers of the groups visited so far.

    Attributes:
      visited: int32[Q], groups that count.
      certain: int32[Q], certain ones among them.
      votes: int32[Q, O], certain ones per option.
      best: float32[Q], lowest entropy, nats.
      stale: int32[Q], visits since it fell.
      stop: int32[Q], a `Stop`.
    """

    visited: jax.Array
    certain: jax.Array
    votes: jax.Array
    best: jax.Array
    stale: jax.Array
    stop: jax.Array


def device_rule(rule: StopRule | None, blind: list[float | None]) -> DeviceRule:
    """The rule for questions whose entropies without the video are `blind`; None never stops."""
    never = np.iinfo(np.int32).max
    if rule is None:
        rule = StopRule(rule="groups", groups=never, entropy=0.0, agreement=False)
    rerun = rule.rule == "rerun"
    return DeviceRule(
        threshold=np.asarray([_threshold(rule, each) for each in blind], np.float32),
        groups=np.int32(never if rerun else rule.groups),
        agreement=np.bool_(rule.agreement),
        every=np.int32(rule.groups if rerun else 0),
        give_up=np.int32(rule.give_up),
    )


def _threshold(rule: StopRule, blind: float | None) -> np.float32:
    """The highest float32 entropy that the rule calls certain; NaN, which no entropy is below, if there is none."""
    limit = rule.entropy if rule.gain == 0 else min(rule.entropy, blind - rule.gain)
    certain = lambda h: h <= rule.entropy and (rule.gain == 0 or blind - h >= rule.gain)
    if not certain(-np.inf):  # `blind` is no number; any other search ends at -inf at the latest
        return np.float32(np.nan)
    highest = np.float32(limit)
    while not certain(float(highest)):
        highest = np.nextafter(highest, np.float32(-np.inf))
    return highest


def start_state(questions: int, options: int) -> StopState:
    """The state before the first group."""
    zeros = np.zeros(questions, np.int32)
    votes, best = np.zeros((questions, options), np.int32), np.full(questions, np.inf, np.float32)
    return StopState(zeros, zeros, votes, best, zeros, zeros)


def count_group(rule: DeviceRule, state: StopState, entropy: jax.Array, option: jax.Array, real) -> StopState:
    """The state after one more group.

    Args:
      entropy: float32[Q], nats.
      option: int32[Q], the option that the group's answer chose; -1 for an open question.
      real: bool[], False for padding, which changes nothing.
    """
    counts = ((state.stop == Stop.GOING) | (state.stop == Stop.ASK_HOST)) & real
    certain = counts & (entropy <= rule.threshold)
    fell = entropy < state.best
    now = StopState(
        visited=state.visited + counts,
        certain=state.certain + certain,
        votes=state.votes + (certain[:, None] & (option[:, None] == jnp.arange(state.votes.shape[1]))),
        best=jnp.where(counts & fell, entropy, state.best),
        stale=jnp.where(counts, jnp.where(fell, 0, state.stale + 1), state.stale),
        stop=state.stop,
    )
    stop = _stop_of(rule, now, certain, option < 0)
    return now._replace(stop=jnp.where(counts & (state.stop == Stop.GOING), stop, state.stop))


def _stop_of(rule, state, certain, is_open) -> jax.Array:
    """The `Stop` of each question, int32[Q]; `certain`: whether the group just counted is."""
    enough = certain & (state.certain >= rule.groups)
    agree = certain & (state.votes.max(-1) >= rule.groups)
    due = (rule.every > 0) & (state.visited % jnp.maximum(rule.every, 1) == 0)
    return jnp.select(
        [due | (enough & rule.agreement & is_open), agree & rule.agreement, enough & ~rule.agreement,
         (rule.give_up > 0) & (state.stale >= rule.give_up)],
        [Stop.ASK_HOST, Stop.AGREE, Stop.ENOUGH, Stop.GAVE_UP],
        Stop.GOING,
    )  # fmt: skip
