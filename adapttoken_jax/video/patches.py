"""Frames to the rows of numbers that the vision tower reads, chunk by chunk.

Each frame is resized as soon as it is decoded and the decoded one dropped. `SlotImages` decodes ahead of its consumer,
but holds no more than a bounded number of resized frames.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from adapttoken_jax.config import VisionConfig
from adapttoken_jax.video.ahead import ReadAhead
from adapttoken_jax.video.resize import RESIZERS
from adapttoken_jax.video.sampling import PRESETS, Clip

# Mean and standard deviation of each RGB channel, of pixels in [0, 1], that the vision tower was trained with.
_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32) * np.float32(255)
_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32) * np.float32(255)

# Resized frames that are held at most, in bytes: some 500 of the largest that are usual, enough for 16 cores to decode.
_BYTES_AHEAD = 2**28


class SlotImages(ReadAhead):
    """Reads slots as the model sees them before normalisation; a context manager.

    Args:
      clip: from `plan_clip`.
      slots: in any order. Ascending order costs one pass over the file.
      ahead: slots read before they are taken, at most; None for as many as `_BYTES_AHEAD` holds.

    Raises:
      ValueError: a slot that the clip does not have.
    """

    def __init__(self, clip: Clip, slots: Sequence[int], ahead: int | None = None):
        frames = clip.slot_frames[_checked(clip, slots)]
        resize = RESIZERS[PRESETS[clip.preset].resizer]
        bound = _BYTES_AHEAD // (3 * clip.height * clip.width)
        self._per_slot = frames.shape[1]
        super().__init__(
            clip.info,
            frames.reshape(-1),
            lambda image: resize(image, clip.height, clip.width),
            bound if ahead is None else min(bound, ahead * self._per_slot),
        )
        self._shape = (-1, self._per_slot, clip.height, clip.width, 3)

    def take_slots(self, count: int) -> np.ndarray:
        """The next `count` slots, uint8 [n, t, height, width, 3]; fewer at the end."""
        images = self.take(count * self._per_slot)
        return np.stack(images).reshape(self._shape) if images else np.zeros((0, *self._shape[1:]), np.uint8)


def read_patches(
    clip: Clip, slots: Sequence[int] | None = None, chunk_slots: int = 8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes slots of a clip and yields them in the order asked for, `chunk_slots` at a time.

    Args:
      clip: from `plan_clip`.
      slots: slot indices in any order, None for all. Ascending order costs one pass over the file.
      chunk_slots: slots held and yielded at once.

    Yields:
      (int64 [n] slot indices, float32 [n, h*w, features] normalised patches in the order of `patch_rows`).

    Raises:
      UserError: while iterating, for a file that ends early or is damaged.
      ValueError: a slot that the clip does not have, or a chunk of no slots.
    """
    if chunk_slots < 1:
        raise ValueError(f"chunk_slots is {chunk_slots}; at least 1 slot is read at a time")
    slots = _checked(clip, slots)
    return _chunks_of_patches(clip, slots, chunk_slots)


def _chunks_of_patches(clip: Clip, slots: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with SlotImages(clip, slots) as images:
        for start in range(0, len(slots), size):
            yield slots[start : start + size], patch_rows(images.take_slots(size), clip.vision)


def read_images(clip: Clip, slots: Sequence[int]) -> np.ndarray:
    """The first frame of each slot as the model sees it before normalisation: uint8 [n, height, width, 3].

    Raises:
      UserError: a file that ends early or is damaged.
      ValueError: a slot that the clip does not have.
    """
    frames = clip.slot_frames[_checked(clip, slots)][:, 0]
    resize = RESIZERS[PRESETS[clip.preset].resizer]
    with ReadAhead(clip.info, frames, lambda image: resize(image, clip.height, clip.width), len(frames)) as images:
        taken = images.take(len(frames))
    return np.stack([np.zeros((clip.height, clip.width, 3), np.uint8), *taken])[1:]


def patch_rows(images: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Cuts uint8 [n, t, H, W, 3] images of slots into normalised float32 [n, h*w, 3*t*patch*patch] rows.

    Rows run over merged tokens (row by row), and within each over its merge x merge patches, so that the rows of one
    merged token are neighbours. Features run over channel, frame, pixel row, pixel column. This is the layout of the
    Qwen2-VL processors.
    """
    n, frames, height, width, channels = images.shape
    side, merge, token = vision.patch, vision.merge, vision.pixels_per_token
    pixels = images.reshape(n, frames, height // token, merge, side, width // token, merge, side, channels)
    pixels = pixels.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    rows = np.subtract(pixels, _MEAN[:, None, None, None], order="C", dtype=np.float32)
    np.divide(rows, _STD[:, None, None, None], out=rows)
    return rows.reshape(n, height * width // side**2, channels * frames * side**2)


def _checked(clip: Clip, slots: Sequence[int] | None) -> np.ndarray:
    slots = np.arange(clip.grid[0]) if slots is None else np.asarray(slots, np.int64).reshape(-1)
    if len(slots) and not 0 <= slots.min() <= slots.max() < clip.grid[0]:
        raise ValueError(f"slots {slots.min()} to {slots.max()} asked for; the clip has 0 to {clip.grid[0] - 1}")
    return slots
