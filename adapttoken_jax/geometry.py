"""Host integers: attention windows, M-RoPE ids and padding sizes. NumPy only; traced code receives the arrays.

Letters: T slots, h and w rows and columns of patches, M = h w / merge^2 merged tokens per slot, W windows per slot,
U merged tokens per window, P patches, S sequence length.
"""

import dataclasses
import functools

import numpy as np

from adapttoken_jax.config import VisionConfig


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Where every merged token of one slot sits when the slot is cut into attention windows.

    Windows that the frame's border cuts are padded to the common size; `valid` tells tokens from padding.

    Attributes:
      token: int32[W, U], merged token in raster order at each window place; 0 where padded.
      valid: bool[W, U].
      place: int32[M], window place (flat index into [W, U]) of each merged token: the way back.
      rows, cols: int32[W U merge^2], patch coordinates at each patch place, for the rotary embedding.
    """

    token: np.ndarray
    valid: np.ndarray
    place: np.ndarray
    rows: np.ndarray
    cols: np.ndarray


@functools.lru_cache(maxsize=64)
def window_layout(config: VisionConfig, height: int, width: int) -> WindowLayout:
    """Cuts a slot of `height` x `width` patches into windows (`get_window_index` of the HF vision tower).

    A frame smaller than a window in one direction gets windows of its own size there, so that nothing is padded.
    """
    merge = config.merge
    tokens_high, tokens_wide = height // merge, width // merge
    side = config.window // (config.patch * merge)
    tile_high, tile_wide = min(side, tokens_high), min(side, tokens_wide)
    row, col = np.meshgrid(
        _tiled(tokens_high, tile_high), _tiled(tokens_wide, tile_wide), indexing="ij"
    )  # [windows high * tile_high, windows wide * tile_wide]
    row, col = _by_window(row, tile_high, tile_wide), _by_window(col, tile_high, tile_wide)
    valid = (row < tokens_high) & (col < tokens_wide)
    token = np.where(valid, row * tokens_wide + col, 0)
    place = np.empty(tokens_high * tokens_wide, np.int32)
    place[token[valid]] = np.flatnonzero(valid)
    inner_row, inner_col = np.divmod(np.arange(merge**2), merge)
    rows = np.where(valid, row, 0)[..., None] * merge + inner_row
    cols = np.where(valid, col, 0)[..., None] * merge + inner_col
    return WindowLayout(
        token.astype(np.int32), valid, place, rows.reshape(-1).astype(np.int32), cols.reshape(-1).astype(np.int32)
    )


def _tiled(length: int, tile: int) -> np.ndarray:
    return np.arange(-(-length // tile) * tile)


def _by_window(grid: np.ndarray, tile_high: int, tile_wide: int) -> np.ndarray:
    """[rows, cols] -> [W, U]: windows in raster order, their places in raster order."""
    high, wide = grid.shape[0] // tile_high, grid.shape[1] // tile_wide
    tiles = grid.reshape(high, tile_high, wide, tile_wide).transpose(0, 2, 1, 3)
    return tiles.reshape(high * wide, tile_high * tile_wide)


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


def grid_position_ids(start: int, times: np.ndarray, height: int, width: int, merge: int) -> np.ndarray:
    """M-RoPE ids int32[3, T M] of whole slots: `times[T]` are their temporal ids, `height` x `width` is in patches."""
    grid = np.meshgrid(times, np.arange(height // merge), np.arange(width // merge), indexing="ij")
    return token_position_ids(start, *(axis.reshape(-1) for axis in grid))


def text_start(rule: str, start: int, visual_ids: np.ndarray, height: int, width: int, merge: int) -> int:
    """Position of the first text token after the video.

    `legacy`: the largest visual id + 1 (the original code, vLLM, FlexSelect). `hf5`: the video's start + its larger
    side in merged tokens (`get_rope_index` of transformers 5.3 and later, 5.23.0 included).
    """
    if rule == "hf5":
        return start + max(height, width) // merge
    return int(visual_ids.max(initial=start - 1)) + 1


def suffix_position_ids(first: int, length: int) -> np.ndarray:
    """M-RoPE ids int32[3, length] of text that starts at position `first`."""
    return np.broadcast_to(np.arange(first, first + length, dtype=np.int32), (3, length))


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`: the padded size of a static shape."""
    return -(-number // step) * step


def bucket(number: int, step: int) -> int:
    """A padded size of which there are few: a multiple of `step` and of a sixteenth of the power of two below.

    The padding is below `step` or a sixteenth of `number`, and sizes up to n have about 16 log2(n / (16 step)) values.
    """
    return round_up(number, max(step, 1 << max(0, (number - 1).bit_length() - 5)))
