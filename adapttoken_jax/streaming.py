"""In which order the slots of a clip are read: in one pass over the file, or group by group.

The groups of a video are interleaved, so each spans the whole file. One pass decodes everything once, but no group is
complete before its end. Reading a group by itself jumps from key frame to key frame; it pays where a group's slots lie
further apart than the key frames. The cost of either is counted in decoded frames (`video.decoding_cost`), from the
positions of the key frames alone, before anything is decoded.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from adapttoken_jax.geometry import round_up
from adapttoken_jax.video import Clip, decoding_cost

# If every group will be visited, group by group may cost this much more: the passes over groups then start earlier.
_SLACK = 1.1


@dataclasses.dataclass(frozen=True)
class Part:
    """Slots that are read one after the other.

    Attributes:
      slots: int64 [n].
      ahead: how many are decoded before they are wanted, at most; None: as many as memory allows.
      certain: how many of them, from the first on, will be wanted for certain; None: all.
    """

    slots: np.ndarray
    ahead: int | None = None
    certain: int | None = None

    def certain_slots(self, step: int) -> np.ndarray:
        """Those of the slots that will be wanted for certain, in whole steps of so many, as they are encoded."""
        return self.slots[: None if self.certain is None else round_up(self.certain, step)]


def one_pass(clip: Clip) -> list[Part]:
    """The order of a single pass over the file."""
    return [Part(np.arange(clip.grid[0]))]


def reading_order(clip: Clip, visits: Sequence[np.ndarray], at_least: int | None, ahead: int) -> list[Part]:
    """The order that costs least decoding for groups visited one after the other.

    If the scan may stop early nobody knows how many groups it will visit. Groups are then read by themselves until that
    has cost as much as one pass over the file, and what is left is read in one pass: never more than twice the cost of
    knowing in advance.

    Args:
      clip: the video.
      visits: slots of each group in visiting order; together every slot once.
      at_least: groups that are visited at least before the scan may stop; None if it visits all of them.
      ahead: slots of a group read by itself that are decoded before they are wanted, at most.

    Returns:
      One or two parts, with every slot once.
    """
    whole = decoding_frames(clip, np.arange(clip.grid[0]))
    each = [decoding_frames(clip, slots) for slots in visits]
    if at_least is None:
        return [Part(np.concatenate(visits))] if sum(each) <= _SLACK * whole else one_pass(clip)
    alone = int(np.searchsorted(np.cumsum(each), whole, side="right"))
    if alone < min(at_least, len(visits)):
        return one_pass(clip)
    parts = [Part(np.concatenate(visits[:alone]), ahead, sum(map(len, visits[:at_least])))]
    return parts + ([Part(np.sort(np.concatenate(visits[alone:])))] if alone < len(visits) else [])


def decoding_frames(clip: Clip, slots: np.ndarray) -> int:
    """What reading slots in this order costs, in decoded frames."""
    return int(decoding_cost(clip.info, clip.slot_frames[slots].reshape(-1)).sum())
