"""Where a benchmark says when the answer is to be seen (LVBench's `time_reference`): did the method look there?"""

from collections.abc import Sequence

import numpy as np

from adapttoken_jax.result import Result
from adapttoken_jax.video import slot_edges


def localise(result: Result, slot_times: Sequence[float], duration_s: float, reference: tuple[float, float]) -> dict:
    """How much of what the model was shown lies inside the reference.

    Args:
      slot_times: float[T], time of each slot's first frame, seconds.
      duration_s: the video's length, seconds.
      reference: begin and end, seconds.

    Returns:
      "chance": share of the video's slots that touch the reference, what tokens spread evenly over the video would get.
      "budget": share of the budget that the groups give it, were each group's tokens spread evenly over its slots: what
      weighting the groups adds to chance. Equal to it where there are no groups.
      "selected": share of the selected tokens inside: what choosing tokens adds.
      "hit": 1.0 if at least one selected token is inside, else 0.0.
    """
    inside = slots_inside(slot_times, duration_s, reference)
    chance = float(inside.mean())
    spent = sum(group.budget for group in result.groups)
    budget = (
        sum(group.budget * inside[list(group.slots)].mean() for group in result.groups) / spent if spent else chance
    )
    selected = inside[list(result.selected.slots)]
    return {
        "chance": chance,
        "budget": float(budget),
        "selected": float(selected.mean()) if len(selected) else 0.0,
        "hit": float(selected.any()),
    }


def slots_inside(slot_times: Sequence[float], duration_s: float, reference: tuple[float, float]) -> np.ndarray:
    """Slots that share a moment with the closed interval `reference`: bool[T]. Every moment of the video is in one."""
    begin, end = reference
    edges = slot_edges(slot_times, duration_s)
    ends = np.append(edges[1:-1], np.nextafter(edges[-1], np.inf))  # the video's last moment is the last slot's
    return (edges[:-1] <= end) & (ends > begin)
