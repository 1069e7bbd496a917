"""The layer probe: at which decoder layer attention points at the needles.

Only groups that show a needle are asked, once per layer, by the pass that the method itself uses.

Letters: T slots, M tokens per slot, n tokens of a group.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.loading import Model
from adapttoken_jax.needle.study import measures
from adapttoken_jax.needle.study.scans import Footage, ask_groups
from adapttoken_jax.selection import group_slots, top_tokens
from adapttoken_jax.video import slot_edges


@dataclasses.dataclass(frozen=True)
class Needles:
    """A question and where its evidence is.

    Attributes:
      footage: with the question.
      shows: bool[T, M], whether each visual token shows some of the evidence.
      left_out: needles that no token shows.
    """

    footage: Footage
    shows: np.ndarray
    left_out: int = 0


def scene_needles(footage: Footage) -> Needles:
    """The needles of a generated scene of which every frame was sampled."""
    tokens = footage.tokens
    shows = np.zeros((tokens.clip.grid[0], tokens.per_slot), bool)
    columns = tokens.clip.token_grid[1]
    for needle in footage.scene.needles:
        shows[needle.slots, needle.cell[0] * columns + needle.cell[1]] = True
    return Needles(footage, shows)


def boxed_needles(footage: Footage, boxes: Iterable[tuple[float, float, float, float, float, float]]) -> Needles:
    """Needles given as (start, stop) in seconds and (top, left, bottom, right) as shares of the frame.

    A slot shows a needle if the middle of its time lies inside; where no slot's does, those that the needle overlaps.
    Rows and columns of tokens likewise: a needle is left out only if it lies outside of the video.
    """
    clip = footage.tokens.clip
    (rows, cols), slots = clip.token_grid, clip.grid[0]
    edges = slot_edges(clip.slot_times, clip.info.duration_s)
    shows, left_out = np.zeros((slots, rows, cols), bool), 0
    for start, stop, top, left, bottom, right in boxes:
        when = _covered(start, stop, edges)
        down, across = (
            _covered(top, bottom, np.arange(rows + 1) / rows),
            _covered(left, right, np.arange(cols + 1) / cols),
        )
        own = when[:, None, None] & down[:, None] & across
        shows |= own
        left_out += not own.any()
    return Needles(footage, shows.reshape(slots, -1), left_out)


def _covered(low: float, high: float, bounds: np.ndarray) -> np.ndarray:
    """Cells whose middle lies in the closed interval from `low` to `high`, or if none does, those it overlaps: bool[n].

    Args:
      bounds: [n + 1], cell i reaches from bounds[i] up to bounds[i + 1]; the last one has its end, too.
    """
    middles = (bounds[:-1] + bounds[1:]) / 2
    inside = (low <= middles) & (middles <= high)
    if inside.any():
        return inside
    ends = np.append(bounds[1:-1], np.nextafter(bounds[-1], np.inf))
    return (bounds[:-1] < max(high, np.nextafter(low, np.inf))) & (ends > low)  # a mere point overlaps one cell


def recall(relevance: np.ndarray, shows: np.ndarray, taken: int | None) -> np.ndarray:
    """Share of the needle tokens among the most relevant ones of each group, float64[groups].

    Args:
      relevance: [groups, n], NaN at padding. shows: bool[groups, n], at least one per group.
      taken: tokens taken per group; None: as many as show the needle.
    """
    count = shows.sum(1)
    best = top_tokens(relevance, count if taken is None else np.full(len(count), taken))
    return (best & shows).sum(1) / count


def probe_layers(
    model: Model, questions: Iterable[Needles], config: AdaptTokenConfig, layers: Sequence[int], taken: Sequence[int]
) -> list[dict]:
    """Mean recall over all groups that show a needle, and half of its 95 % interval, robust to groups of one question.

    Returns:
      A row {"layer", "taken", "recall", "half_width", "groups"} per layer and number of tokens taken, which is "needle"
      for as many as show it.
    """
    found: dict[tuple, list[np.ndarray]] = {}
    for question in questions:
        groups = group_slots(len(question.shows), config.slots_per_group)
        groups = [slots for slots in groups if question.shows[slots].any()]
        if not groups:
            continue
        visits = [(question.footage, slots) for slots in groups]
        for layer in layers:
            log = ask_groups(model, visits, dataclasses.replace(config, reference_layer=layer))
            shows = np.where(log.slots[..., None] >= 0, question.shows[log.slots], False).reshape(len(groups), -1)
            for count in (None, *taken):
                found.setdefault((layer, count or "needle"), []).append(recall(log.relevance, shows, count))
    return [{"layer": layer, "taken": count} | _mean_recall(values) for (layer, count), values in found.items()]


def _mean_recall(values: Sequence[np.ndarray]) -> dict[str, float]:
    question = np.repeat(np.arange(len(values)), [len(own) for own in values])
    recall, half = measures.mean(np.concatenate(values), question)
    return {"recall": recall, "half_width": half, "groups": len(question)}


def proposed_layer(rows: Sequence[dict]) -> int:
    """The layer with the highest recall of as many tokens as show the needle; among equals the lower one."""
    own = [each for each in rows if each["taken"] == "needle"]
    return max(own, key=lambda each: (each["recall"], -each["layer"]))["layer"]
