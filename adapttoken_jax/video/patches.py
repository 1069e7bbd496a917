"""Frames to the rows of numbers that the vision tower reads, chunk by chunk.

Each frame is resized as soon as it is decoded and the decoded one dropped. `SlotPatches` decodes ahead of its consumer,
but holds no more than a bounded number of slots. Rows stay pixels of one byte, a quarter of what they are once
normalised, which `passes.encode_slots` does on the device.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from adapttoken_jax.config import VisionConfig
from adapttoken_jax.video.ahead import ReadAhead
from adapttoken_jax.video.resize import RESIZERS
from adapttoken_jax.video.sampling import PRESETS, Clip

# Mean and standard deviation of each RGB channel that the vision tower was trained with, of pixels from 0 to 255.
PIXEL_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32) * np.float32(255)
PIXEL_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32) * np.float32(255)

# Slots that are held at most, in bytes: some 250 of the largest that are usual, enough for 16 cores to decode.
_BYTES_AHEAD = 2**28


class SlotPatches(ReadAhead):
    """Reads slots, each resized and cut into patches by the thread that decodes it; a context manager.

    Args:
      clip: from `plan_clip`.
      slots: in any order. Ascending order costs one pass over the file.
      ahead: slots read before they are taken, at most; None for as many as `_BYTES_AHEAD` holds.
      cancelled: as in `ReadAhead`.

    Raises:
      ValueError: a slot that the clip does not have.
    """

    def __init__(
        self, clip: Clip, slots: Sequence[int], ahead: int | None = None, cancelled: Callable[[], bool] = lambda: False
    ):
        self._shape = (clip.grid[1] * clip.grid[2], clip.vision.patch_features)
        bound = _BYTES_AHEAD // math.prod(self._shape)
        super().__init__(
            clip.info,
            clip.slot_frames[_checked(clip, slots)],
            lambda images: cut_patches([_resized(image, clip) for image in images], clip.vision),
            bound if ahead is None else min(bound, ahead),
            cancelled=cancelled,
        )

    def take_slots(self, count: int) -> np.ndarray:
        """The next `count` slots, uint8 [n, h*w, features] in the order of `cut_patches`; fewer at the end."""
        slots = self.take(count)
        return np.stack(slots) if slots else np.zeros((0, *self._shape), np.uint8)


def read_patches(
    clip: Clip,
    slots: Sequence[int] | None = None,
    chunk_slots: int = 8,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes slots of a clip and yields them in the order asked for, `chunk_slots` at a time.

    Args:
      clip: from `plan_clip`.
      slots: slot indices in any order, None for all. Ascending order costs one pass over the file.
      chunk_slots: slots yielded at once; more are decoded ahead.
      cancelled: asked before every frame is decoded; once it says yes, iterating raises `Cancelled`.

    Yields:
      (int64 [n] slot indices, uint8 [n, h*w, features] patches in the order of `cut_patches`).

    Raises:
      UserError: while iterating, for a file that ends early or is damaged.
      ValueError: a slot that the clip does not have, or a chunk of no slots.
    """
    if chunk_slots < 1:
        raise ValueError(f"chunk_slots is {chunk_slots}; at least 1 slot is read at a time")
    slots = _checked(clip, slots)
    return _chunks_of_patches(clip, slots, chunk_slots, cancelled)


def _chunks_of_patches(clip, slots: np.ndarray, size: int, cancelled) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with SlotPatches(clip, slots, cancelled=cancelled) as reader:
        for start in range(0, len(slots), size):
            yield slots[start : start + size], reader.take_slots(size)


def read_images(clip: Clip, slots: Sequence[int]) -> np.ndarray:
    """The frames of each slot as the model sees them before normalisation: uint8 [n, temporal_patch, height, width, 3].

    Raises:
      UserError: a file that ends early or is damaged.
      ValueError: a slot that the clip does not have.
    """
    frames = clip.slot_frames[_checked(clip, slots)]
    resized = lambda images: np.stack([_resized(image, clip) for image in images])
    with ReadAhead(clip.info, frames, resized, len(frames)) as reader:
        taken = reader.take(len(frames))
    return np.stack([np.zeros((frames.shape[1], clip.height, clip.width, 3), np.uint8), *taken])[1:]


def cut_patches(frames: Sequence[np.ndarray], vision: VisionConfig) -> np.ndarray:
    """Cuts the frames of a slot, each uint8 [H, W, 3], into the vision tower's rows: uint8 [h*w, features].

    Rows are patches. They run over merged tokens (row by row), and within each over its merge x merge patches, so that
    those of one merged token are neighbours; features run over channel, frame, pixel row, pixel column. This is the
    layout of the Qwen2-VL processors.
    """
    height, width, channels = frames[0].shape
    side, merge, token = vision.patch, vision.merge, vision.pixels_per_token
    rows = np.empty((height * width // side**2, channels, len(frames), side**2), np.uint8)
    for place, frame in enumerate(frames):
        blocks = frame.reshape(height // token, merge, side, width // token, merge, side * channels)
        pixels = blocks.transpose(0, 3, 1, 4, 2, 5).reshape(-1, side**2, channels)  # copies whole rows of a patch
        rows[:, :, place] = pixels.swapaxes(1, 2)
    return rows.reshape(len(rows), -1)


def normalised(rows):
    """Rows of `cut_patches` as the vision tower was trained with them: (pixel - mean) / deviation, in float32.

    They may be NumPy's or, where it is compiled, JAX's: XLA multiplies by an inverse, and the last bits may differ.
    """
    mean, deviation = (np.repeat(each, rows.shape[-1] // 3) for each in (PIXEL_MEAN, PIXEL_STD))
    return (rows.astype(np.float32) - mean) / deviation


def _resized(image: np.ndarray, clip: Clip) -> np.ndarray:
    return RESIZERS[PRESETS[clip.preset].resizer](image, clip.height, clip.width)


def _checked(clip: Clip, slots: Sequence[int] | None) -> np.ndarray:
    slots = np.arange(clip.grid[0]) if slots is None else np.asarray(slots, np.int64).reshape(-1)
    if len(slots) and not 0 <= slots.min() <= slots.max() < clip.grid[0]:
        raise ValueError(f"slots {slots.min()} to {slots.max()} asked for; the clip has 0 to {clip.grid[0] - 1}")
    return slots
