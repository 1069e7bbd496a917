"""Host integers: attention windows, M-RoPE ids and padding sizes. NumPy only; traced code receives the arrays.

Letters: T slots, h and w rows and columns of patches, M = h w / merge^2 merged tokens per slot, Z places for them in
its windows (M, or more where windows are padded), S sequence length.
"""

import dataclasses
import functools
import itertools

import numpy as np

from adapttoken_jax.config import VisionConfig

LANES = 128  # numbers side by side in a TPU: its memory pads rows, and its kernels work, to multiples of these


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Where every merged token of one slot sits when the slot is cut into attention windows.

    Windows follow one another, those with most tokens first.

    Attributes:
      windows: (count, places) of each run of windows with equally many places.
      token: int32[Z], merged token in raster order at each place; 0 where padded.
      valid: bool[Z], False where a window is padded, at its end.
      place: int32[M], place of each merged token: the way back.
      rows, cols: int32[Z merge^2], patch coordinates at each patch place, for the rotary embedding.
    """

    windows: tuple[tuple[int, int], ...]
    token: np.ndarray
    valid: np.ndarray
    place: np.ndarray
    rows: np.ndarray
    cols: np.ndarray


@functools.lru_cache(maxsize=64)
def window_layout(config: VisionConfig, height: int, width: int, padded: bool = True) -> WindowLayout:
    """Cuts a slot of `height` x `width` patches into windows (`get_window_index` of the HF vision tower).

    If `padded`, those that the frame's border cuts have as many places as the largest; else there is no padding.
    """
    merge, side = config.merge, config.window // (config.patch * config.merge)
    row, col = np.divmod(np.arange(height * width // merge**2), width // merge)
    window = row // side * width + col // side
    tokens = sorted((np.flatnonzero(window == each) for each in np.unique(window)), key=len, reverse=True)
    places = [len(tokens[0]) if padded else len(own) for own in tokens]
    token = np.concatenate([np.pad(own, (0, size - len(own))) for own, size in zip(tokens, places, strict=True)])
    valid = np.concatenate([np.arange(size) < len(own) for own, size in zip(tokens, places, strict=True)])
    place = np.empty(len(row), np.int32)
    place[token[valid]] = np.flatnonzero(valid)
    inner_row, inner_col = np.divmod(np.arange(merge**2), merge)
    patches = lambda first, inner: (first[token, None] * merge + inner).reshape(-1).astype(np.int32)
    return WindowLayout(
        windows=tuple((len(list(run)), size) for size, run in itertools.groupby(places)),
        token=token.astype(np.int32),
        valid=valid,
        place=place,
        rows=patches(row, inner_row),
        cols=patches(col, inner_col),
    )


def time_ids(slots, seconds_per_slot: float, tokens_per_second: float) -> np.ndarray:
    """Temporal M-RoPE ids, before the offset of the video's start: floor(slot x seconds x ids per second).

    The product is formed in float32, left to right, as the original PyTorch code does; float64 differs by one id where
    the product is a whole number.
    """
    seconds = np.asarray(slots, np.float32) * np.float32(seconds_per_slot)
    return np.floor(seconds * np.float32(tokens_per_second)).astype(np.int32)


def token_position_ids(start: int, times: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """M-RoPE ids int32[3, S] (time, row, column) of visual tokens, all offset by `start`, the prefix's length."""
    return (start + np.stack([times, rows, cols])).astype(np.int32)


def text_start(rule: str, start: int, visual_ids: np.ndarray, height: int, width: int, merge: int) -> int:
    """Position of the first text token after the video.

    `legacy`: the largest visual id + 1 (the original code, vLLM, FlexSelect). `hf5`: the video's start + its larger
    side in merged tokens (`get_rope_index` of transformers 5.3 and later, 5.23.0 included).
    """
    if rule == "hf5":
        return start + max(height, width) // merge
    return int(visual_ids.max(initial=start - 1)) + 1


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`: the padded size of a static shape."""
    return -(-number // step) * step


def bucket(number: int, step: int, parts: int = 16) -> int:
    """A padded size of which there are few: a multiple of `step` and of a `parts`-th of the power of two below.

    The padding is below `step` or a `parts`-th of `number`, and beyond parts * step every doubling has `parts` sizes.
    `parts` is a power of two.
    """
    below = 1 << max(0, (number - 1).bit_length() - 1)
    return round_up(number, max(step, below // parts))
