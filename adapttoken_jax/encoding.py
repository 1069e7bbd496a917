"""A video as the text decoder sees it: visual tokens per slot, encoded once and shared by every pass."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from adapttoken_jax import sharding
from adapttoken_jax.geometry import round_up, time_ids, token_position_ids
from adapttoken_jax.loading import Model
from adapttoken_jax.passes import encode_slots
from adapttoken_jax.video import Clip, read_patches

# Patches that one call of the vision tower takes at most, whatever the frame size: bounds its memory.
_PATCHES_PER_CHUNK = 8192
_SLOTS_PER_CHUNK = 64

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """All visual tokens of a clip.

    Attributes:
      features: [T, M, D], in the model's type, M in raster order of the merged grid.
      clip: where they come from.
      merge: patches per token side.
      tokens_per_second: temporal M-RoPE ids per second.
      patches: float32[T h w, 1176] as fed to the vision tower, if they were kept.
      seconds: wall seconds spent on "decode" and "vision".
    """

    features: np.ndarray
    clip: Clip
    merge: int
    tokens_per_second: float
    patches: np.ndarray | None
    seconds: dict[str, float]

    @property
    def per_slot(self) -> int:
        """M, visual tokens per slot."""
        return self.features.shape[1]

    @property
    def slot_times(self) -> np.ndarray:
        """Time of each slot's first frame, seconds."""
        return self.clip.slot_times

    def coordinates(self, slots) -> np.ndarray:
        """(slot, row, column) of every token of `slots`, int64[len(slots) M, 3]."""
        cols = self.clip.grid[2] // self.merge
        row, col = np.divmod(np.arange(self.per_slot), cols)
        slot = np.repeat(np.asarray(slots, np.int64), self.per_slot)
        return np.stack([slot, np.tile(row, len(slots)), np.tile(col, len(slots))], 1)

    def gather(self, coordinates: np.ndarray) -> np.ndarray:
        """Features [n, D] of tokens given by (slot, row, column)."""
        slot, row, col = coordinates.T
        return self.features[slot, row * (self.clip.grid[2] // self.merge) + col]

    def position_ids(self, coordinates: np.ndarray, start: int, renumber: bool) -> np.ndarray:
        """M-RoPE ids int32[3, n] of tokens after a prefix of `start` tokens.

        With `renumber` the slots that occur count 0, 1, 2, … at one second each; else they keep their true times.
        """
        slot, row, col = coordinates.T
        seconds = self.clip.seconds_per_slot
        if renumber:
            slot, seconds = np.unique(slot, return_inverse=True)[1], 1.0
        return token_position_ids(start, time_ids(slot, seconds, self.tokens_per_second), row, col)


def encode_video(
    model: Model,
    clip: Clip,
    keep_patches: bool = False,
    on_progress: Progress | None = None,
    chunks: Iterable | None = None,
):
    """Decodes, resizes and encodes every slot of a clip, a chunk at a time; raw frames are never kept.

    The chunk after the one on the device is decoded meanwhile. `chunks` replaces the decoding by what it has already
    given: the pairs that `read_patches(clip, chunk_slots=chunk_slots(model, clip))` yields.

    Returns:
      `VisualTokens`.
    """
    slots, height, width = clip.grid
    vision = model.config.vision
    per_slot = height * width // vision.merge**2
    features = np.empty((slots, per_slot, vision.out_width), model.dtype)
    kept, seconds, waiting = [], {"decode": 0.0, "vision": 0.0}, []

    def collect():
        begin = time.perf_counter()
        for indices, chunk in waiting:
            features[indices] = np.asarray(chunk)[: len(indices)]
        waiting.clear()
        seconds["vision"] += time.perf_counter() - begin

    size = chunk_slots(model, clip)
    if chunks is None:
        chunks = read_patches(clip, chunk_slots=size)
    for indices, patches in _timed(chunks, seconds, "decode"):
        padded = np.zeros((size, *patches.shape[1:]), np.float32)
        padded[: len(indices)] = patches
        encoded = encode_slots(model.module, _place(model, padded), height, width)
        collect()
        waiting.append((indices, encoded))
        if keep_patches:
            kept.append(patches.reshape(-1, patches.shape[-1]))
        if on_progress:
            on_progress("encode", int(indices[-1]) + 1, slots)
    collect()
    patches = np.concatenate(kept) if keep_patches else None
    return VisualTokens(features, clip, vision.merge, vision.tokens_per_second, patches, seconds)


def chunk_slots(model: Model, clip: Clip) -> int:
    """Slots of a clip per call of the vision tower, a multiple of the groups that run side by side."""
    slots, height, width = clip.grid
    most = max(1, min(_SLOTS_PER_CHUNK, _PATCHES_PER_CHUNK // (height * width)))
    return min(round_up(most, model.wave), round_up(slots, model.wave))


def _place(model: Model, array: np.ndarray):
    return array if model.mesh is None else jax.device_put(array, sharding.batch_sharding(model.mesh))


def _timed(iterator: Iterator, seconds: dict[str, float], stage: str) -> Iterator:
    """Yields from `iterator`, adding the time spent inside it to `seconds[stage]`."""
    iterator = iter(iterator)
    while True:
        begin = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            seconds[stage] += time.perf_counter() - begin
        yield item
