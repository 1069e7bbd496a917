"""The timeline: tokens per second along the video, and under it one row per group.

Every group spans the whole video, so a row is as long as the video and shows the group's slots as ticks. Rows stand in
the order of their visit; beside each are bars of its entropy and its budget. Path data is in units of `WIDTH` for the
whole time axis or a whole bar, and `ROW` for the height of a row.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from adapttoken_jax.report.entries import ReportEntry
from adapttoken_jax.result import GroupResult
from adapttoken_jax.selection import visiting_order
from adapttoken_jax.video import slot_edges

WIDTH = 1000
ROW = 10
DENSITY_HEIGHT = 100

_MOST_BINS = 120
# Ticks of slots that gave no token show the weave of the groups; beyond this many they only fill the rows.
_MOST_FAINT_TICKS = 2048
_LEVELS = 4
_TALLEST_ROW, _LOWEST_ROW, _ROWS_HEIGHT = 20, 1.0, 420  # CSS pixels
_LABEL_HEIGHT = 15
_TICK_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)
_MOST_AXIS_TICKS = 7


@dataclasses.dataclass(frozen=True)
class Label:
    """A text at `place` percent of an axis."""

    place: float
    text: str


@dataclasses.dataclass(frozen=True)
class Band:
    """A stretch of an axis, `start` and `size` in percent."""

    start: float
    size: float
    text: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """The groups, top to bottom in visiting order.

    faint: path of all slots, empty when too many. chosen: paths of the slots with selected tokens, few to many.
    entropy, budget, selected: paths of bars. top_entropy, top_budget: what a full bar stands for.
    threshold: entropy below which Lite calls a group certain, as percent of a full bar; None for other methods.
    letters: the option that a group chose, where there is room for it. unvisited: bands of rows. stop: percent from
    the top where the scan ended early, else None.
    """

    count: int
    height: float
    labels: tuple[Label, ...]
    letters: tuple[Label, ...]
    faint: str
    chosen: tuple[str, ...]
    entropy: str
    budget: str
    selected: str
    top_entropy: float
    top_budget: int
    threshold: float | None
    unvisited: tuple[Band, ...]
    stop: float | None


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Everything that the figure shows. `end` is the last second of the axis, `peak` the density's maximum."""

    end: float
    axis: tuple[float, ...]
    density: str
    peak: float
    peak_at: float
    evidence: tuple[Band, ...]
    rows: Rows | None

    def percent(self, seconds: float) -> float:
        """Where a time lies on the axis."""
        return round(100 * min(max(seconds / self.end, 0), 1), 3)


def timeline(entry: ReportEntry) -> Timeline:
    """The timeline of one entry; without groups there are no rows."""
    times = entry.slot_times
    edges = slot_edges(times, entry.result.video.duration_s)
    bins, rates = density(edges, entry.tokens_of_slots)
    end, peak = float(edges[-1]), int(np.argmax(rates))
    return Timeline(
        end=end,
        axis=axis_ticks(end),
        density=_area(bins / end, rates / max(rates.max(), 1e-9)),
        peak=float(rates[peak]),
        peak_at=float(bins[peak]),
        evidence=tuple(
            Band(100 * part.start_s / end, max(100 * (part.stop_s - part.start_s) / end, 0.2), part.label)
            for part in entry.evidence
        ),
        rows=_rows(entry, edges) if entry.result.groups else None,
    )


def density(edges: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens per second in at most `_MOST_BINS` bins of whole slots: (float64[b + 1] edges, float64[b] rates).

    Of these each has as many as another, or one less; a token would stand out in a last bin of what is left over. Bins
    of fixed seconds would hold one slot here and two there, and show ripples that are not in the data.
    """
    slots = len(counts)
    count = -(-slots // -(-slots // _MOST_BINS))
    starts = np.arange(count) * slots // count
    bins = np.append(edges[starts], edges[-1])
    # Two slots of one time (a frame that stays on screen) must not divide by zero.
    return bins, np.add.reduceat(counts, starts) / np.maximum(np.diff(bins), 1e-3)


def axis_ticks(end: float) -> tuple[float, ...]:
    """Round times from 0 to `end` seconds, at most `_MOST_AXIS_TICKS`."""
    step = next((step for step in _TICK_STEPS if end / step < _MOST_AXIS_TICKS), end)
    return tuple(round(step * i, 3) for i in range(math.floor(end / step + 1e-9) + 1))


def visited_order(entry: ReportEntry) -> list[GroupResult]:
    """The groups in visiting order."""
    groups = entry.result.groups
    return [groups[g] for g in visiting_order(len(groups), entry.result.config["group_order"])]


def _rows(entry: ReportEntry, edges: np.ndarray) -> Rows:
    groups, stop = visited_order(entry), entry.result.stop
    height = min(_TALLEST_ROW, max(_LOWEST_ROW, _ROWS_HEIGHT / len(groups)))
    letters = len(entry.result.option_probabilities or ())
    entropies = [group.entropy or 0.0 for group in groups]
    top_entropy = max([*entropies, math.log(letters) if letters > 1 else 0.0, 1e-9])
    top_budget = max(1, *(group.budget for group in groups))
    threshold = _certain_below(entry) / top_entropy
    every = math.ceil(_LABEL_HEIGHT / height)
    return Rows(
        count=len(groups),
        height=height,
        labels=tuple(Label(_middle(i, groups), str(groups[i].index)) for i in range(0, len(groups), every)),
        letters=tuple(Label(_middle(i, groups), g.option) for i, g in enumerate(groups) if g.option and every == 1),
        faint=_faint_ticks(groups, edges),
        chosen=_chosen_ticks(groups, edges, entry.tokens_of_slots),
        entropy=_bars(entropy / top_entropy for entropy in entropies),
        budget=_bars(group.budget / top_budget for group in groups),
        selected=_bars(group.selected / top_budget for group in groups),
        top_entropy=top_entropy,
        top_budget=top_budget,
        threshold=round(100 * threshold, 3) if threshold <= 1 else None,
        unvisited=_unvisited(groups),
        stop=100 * stop.groups_visited / stop.groups_total if stop.early else None,
    )


def _certain_below(entry: ReportEntry) -> float:
    """Entropy at which Lite calls a group certain, nats; infinite where no such rule decided."""
    settings = entry.result.config
    decided = entry.result.method == "lite" and settings.get("stop_rule", "groups") == "groups"
    return settings["stop_entropy"] if decided else math.inf


def _middle(row: int, groups: Sequence[GroupResult]) -> float:
    return round(100 * (row + 0.5) / len(groups), 3)


def _area(x: np.ndarray, y: np.ndarray) -> str:
    """A filled step curve: y[i] from x[i] to x[i + 1], all as shares of the axes."""
    heights = DENSITY_HEIGHT * (1 - y)
    steps = "".join(f"V{high:.1f}H{WIDTH * right:.1f}" for high, right in zip(heights, x[1:], strict=True))
    return f"M{WIDTH * x[0]:.1f} {DENSITY_HEIGHT}{steps}V{DENSITY_HEIGHT}Z"


def _ticks(places: Iterable[tuple[int, float]], end: float, width: float) -> str:
    """Path of horizontal strokes, one per (row, second), moved left at the end of the axis so that none is cut."""
    shift = WIDTH - width
    return "".join(f"M{min(WIDTH * s / end, shift):.0f} {ROW * row + ROW // 2}h{width:.0f}" for row, s in places)


def _tick_width(edges: np.ndarray, least: float) -> float:
    return max(least, WIDTH / (len(edges) - 1))


def _faint_ticks(groups: Sequence[GroupResult], edges: np.ndarray) -> str:
    if len(edges) - 1 > _MOST_FAINT_TICKS:
        return ""
    places = ((row, edges[slot]) for row, group in enumerate(groups) for slot in group.slots)
    return _ticks(places, edges[-1], _tick_width(edges, 2))


def _chosen_ticks(groups: Sequence[GroupResult], edges: np.ndarray, counts: np.ndarray) -> tuple[str, ...]:
    """One path per level; a slot's level is its share of the most tokens that any slot kept."""
    level = np.ceil(_LEVELS * counts / max(counts.max(), 1)).astype(int)
    places = [(level[slot], row, edges[slot]) for row, group in enumerate(groups) for slot in group.slots]
    width = _tick_width(edges, 5)
    return tuple(
        _ticks(((row, second) for own, row, second in places if own == wanted), edges[-1], width)
        for wanted in range(1, _LEVELS + 1)
    )


def _bars(shares: Iterable[float]) -> str:
    """Path of horizontal strokes from the left, one per row; rows of nothing are left out."""
    rows = ((row, min(share, 1) * WIDTH) for row, share in enumerate(shares))
    return "".join(f"M0 {ROW * row + ROW // 2}h{max(width, 4):.0f}" for row, width in rows if width > 0)


def _unvisited(groups: Sequence[GroupResult]) -> tuple[Band, ...]:
    """Stretches of neighbouring rows that were not visited."""
    skipped = np.array([0, *(not group.visited for group in groups), 0])
    starts, stops = np.flatnonzero(np.diff(skipped) == 1), np.flatnonzero(np.diff(skipped) == -1)
    share = 100 / len(groups)
    return tuple(Band(round(share * a, 3), round(share * (b - a), 3), "") for a, b in zip(starts, stops, strict=True))
