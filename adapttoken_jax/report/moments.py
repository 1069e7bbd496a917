"""The most used moments: frames of the slots that gave most tokens, a heat map and the tokens' outlines on them."""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from adapttoken_jax.report.entries import ReportEntry
from adapttoken_jax.video import read_images

# The heat map starts where a token is among this share of the most relevant ones, and is full at the second share.
HEAT_FROM, HEAT_FULL = 0.5, 0.01
_COOL, _HOT = np.array([255.0, 196, 0]), np.array([255.0, 42, 0])
_HEAT_OPACITY = 0.6

# Neighbouring slots show nearly the same picture: one moment speaks for this share of the video on either side.
_APART = 1 / 40
_THUMB_WIDTH, _LEAST_THUMB_WIDTH = 384, 96
_CHANGED = 16  # of 255, the mean over a cell's pixels: more than noise and compression do
_SMALL_FRAME = 160  # pixels; up to here a frame is drawn with hard edges, and kept exactly where that fits
_QUALITIES = (78, 66, 54, 42, 30)


@dataclasses.dataclass(frozen=True)
class Moment:
    """One slot. `images` are (seconds, frame) of those that tell something, `heat` is an image of rows x cols pixels
    (None without relevance), `outline` a path in cells.
    """

    number: int
    slot: int
    time_s: float
    tokens: int
    group: int | None
    where: str
    images: tuple[tuple[float, str], ...]
    hard_edges: bool
    heat: str | None
    outline: str


def moments(entry: ReportEntry, most: int, image_bytes: int) -> tuple[Moment, ...]:
    """At most `most` moments in video order, the images of each at most about `image_bytes` long."""
    if entry.clip is None:
        return ()
    slots = chosen_slots(entry, most)
    group_of = {slot: group.index for group in entry.result.groups for slot in group.slots}
    heat, rows_cols = heat_of_slots(entry, slots), entry.merged_grid
    found = []
    for number, (slot, images) in enumerate(zip(slots, read_images(entry.clip, slots), strict=True), 1):
        cells = selected_cells(entry, slot)
        whole = cells.all()
        shown = telling_frames(images, cells) if entry.result.groups else [0]
        times = entry.clip.frame_times[slot * len(images) :]
        found.append(
            Moment(
                number=number,
                slot=int(slot),
                time_s=float(entry.slot_times[slot]),
                tokens=int(cells.sum()),
                group=group_of.get(int(slot)),
                where="" if whole else where(cells),
                images=tuple((float(times[k]), frame_uri(images[k], image_bytes // len(shown))) for k in shown),
                hard_edges=images.shape[2] <= _SMALL_FRAME,
                heat=heat_uri(heat[int(slot)].reshape(rows_cols)) if int(slot) in heat else None,
                outline="" if whole and not entry.result.groups else outline(cells),
            )
        )
    return tuple(found)


def chosen_slots(entry: ReportEntry, most: int) -> np.ndarray:
    """int64[n] ascending: slots with most selected tokens, the most relevant first among equals, and not too close.

    A direct answer used all slots alike: of these, some at even distances.
    """
    counts, times = entry.tokens_of_slots, entry.slot_times
    if not entry.result.groups:
        shown = np.flatnonzero(counts)
        return shown[np.unique(np.linspace(0, len(shown) - 1, min(most, len(shown))).round().astype(int))]
    gap, chosen = (times[-1] - times[0]) * _APART, []
    for slot in np.lexsort([-_peaks(entry), -counts]):
        if len(chosen) == most or not counts[slot]:
            break
        if all(abs(times[slot] - times[other]) > gap for other in chosen):
            chosen.append(int(slot))
    return np.sort(np.array(chosen, np.int64))


def _peaks(entry: ReportEntry) -> np.ndarray:
    """float64[T]: the highest relevance in each slot; 0 where none is known."""
    peaks = np.zeros(entry.result.video.slots)
    if entry.result.relevance is not None:
        slots, per_slot = entry.result.config["slots_per_group"], entry.tokens_per_slot
        best = np.nan_to_num(entry.result.relevance).reshape(-1, slots, per_slot).max(2)
        for group in entry.result.groups:
            peaks[list(group.slots)] = best[group.index, : len(group.slots)]
    return peaks


def selected_cells(entry: ReportEntry, slot: int) -> np.ndarray:
    """bool[rows, cols]: which tokens of a slot are in the final prompt."""
    selected = entry.result.selected
    here = np.asarray(selected.slots) == slot
    cells = np.zeros(entry.merged_grid, bool)
    cells[np.asarray(selected.rows)[here], np.asarray(selected.cols)[here]] = True
    return cells


def telling_frames(images: np.ndarray, cells: np.ndarray) -> list[int]:
    """Which of a slot's frames, uint8 [F, H, W, 3], to show: the first, and each in which a true cell has changed.

    A token stands for all frames of its slot; what it was selected for may be in the last one alone.
    """
    rows, cols = cells.shape
    shown = [0]
    for k in range(1, len(images)):
        change = np.abs(images[k].astype(np.int16) - images[shown[-1]])
        of_cells = change.reshape(rows, change.shape[0] // rows, cols, -1).mean((1, 3))
        if (of_cells[cells] > _CHANGED).any():
            shown.append(k)
    return shown


def where(cells: np.ndarray) -> str:
    """Where most of the true cells lie, in words."""
    if not cells.any():
        return ""
    middle = (np.argwhere(cells).mean(0) + 0.5) / cells.shape
    row, col = np.minimum((3 * middle).astype(int), 2)
    if (row, col) == (1, 1):
        return "around the centre"
    return " ".join(filter(None, (("at the top", "", "at the bottom")[row], ("on the left", "", "on the right")[col])))


def heat_of_slots(entry: ReportEntry, slots: np.ndarray) -> dict[int, np.ndarray]:
    """slot -> float64[M] in [0, 1]: how high a token's relevance ranks among all tokens of the groups visited.

    0 is the median or below, 1 the most relevant hundredth, in between by the logarithm of the rank's share. Ranks,
    because attention is so uneven that a few tokens would leave the rest of any linear scale dark.
    """
    if entry.result.relevance is None:
        return {}
    relevance, per_slot = np.asarray(entry.result.relevance, np.float64), entry.tokens_per_slot
    everything = np.sort(relevance[np.isfinite(relevance)])
    place = {slot: (group.index, k) for group in entry.result.groups for k, slot in enumerate(group.slots)}
    found = {}
    for slot in map(int, slots):
        group, k = place[slot]
        own = relevance[group, k * per_slot : (k + 1) * per_slot]
        if np.isfinite(own).all() and len(everything):
            # The share of tokens that are at least as relevant.
            share = 1 - np.searchsorted(everything, own, side="left") / len(everything)
            found[slot] = np.clip(np.log(HEAT_FROM / share) / np.log(HEAT_FROM / HEAT_FULL), 0, 1)
    return found


def heat_uri(heat: np.ndarray) -> str:
    """A PNG of one pixel per token: yellow to red, and the more opaque the hotter."""
    level = heat[..., None]
    colour = _COOL + (_HOT - _COOL) * level
    pixels = np.concatenate([colour, 255 * _HEAT_OPACITY * level**0.75], -1)
    return _as_uri(_encoded(Image.fromarray(pixels.round().astype(np.uint8)), "PNG", optimize=True), "PNG")


def outline(cells: np.ndarray) -> str:
    """Path around the true cells, one unit per cell; shared sides are not drawn."""
    across = np.diff(np.pad(cells, ((1, 1), (0, 0))).astype(np.int8), axis=0) != 0
    down = np.diff(np.pad(cells, ((0, 0), (1, 1))).astype(np.int8), axis=1) != 0
    lines = [f"M{start} {row}h{length}" for row, line in enumerate(across) for start, length in _runs(line)]
    lines += [f"M{col} {start}v{length}" for col, line in enumerate(down.T) for start, length in _runs(line)]
    return "".join(lines)


def _runs(line: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each run of true values."""
    edges = np.flatnonzero(np.diff(np.pad(line, 1).astype(np.int8)))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def frame_uri(image: np.ndarray, most_bytes: int) -> str:
    """uint8 [H, W, 3] as the best JPEG that fits, smaller where none does; a tiny frame as PNG where that fits."""
    picture = Image.fromarray(image)
    if picture.width <= _SMALL_FRAME and len(exact := _encoded(picture, "PNG", optimize=True)) <= most_bytes:
        return _as_uri(exact, "PNG")
    width = _THUMB_WIDTH
    while True:
        small = picture.copy()
        small.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            encoded = _encoded(small, "JPEG", quality=quality, optimize=True, progressive=True)
            if len(encoded) <= most_bytes:
                return _as_uri(encoded, "JPEG")
        if width <= _LEAST_THUMB_WIDTH:
            return _as_uri(encoded, "JPEG")
        width = width * 2 // 3


def _encoded(picture: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def _as_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"
