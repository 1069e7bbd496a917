"""Frames to the rows of numbers that the vision tower reads, chunk by chunk.

No more than one chunk of frames is held: each is resized as soon as it is decoded and the decoded one dropped.
"""

import collections
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from adapttoken_jax.config import VisionConfig
from adapttoken_jax.video.decode import FrameReader
from adapttoken_jax.video.resize import RESIZERS
from adapttoken_jax.video.sampling import PRESETS, Clip

# Mean and standard deviation of each RGB channel, of pixels in [0, 1], that the vision tower was trained with.
_MEAN = np.asarray([0.48145466, 0.4578275, 0.40821073], np.float32) * np.float32(255)
_STD = np.asarray([0.26862954, 0.26130258, 0.27577711], np.float32) * np.float32(255)

# Resizing costs about as much as decoding; more threads than this would outrun any decoder.
_RESIZE_THREADS = min(4, os.cpu_count() or 1)


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
    starts = range(0, len(slots), chunk_slots)
    chunks = zip(starts, _images(clip, clip.slot_frames[slots], chunk_slots), strict=True)
    return ((slots[start : start + chunk_slots], patch_rows(images, clip.vision)) for start, images in chunks)


def read_images(clip: Clip, slots: Sequence[int]) -> np.ndarray:
    """The first frame of each slot as the model sees it before normalisation: uint8 [n, height, width, 3].

    Raises:
      UserError: a file that ends early or is damaged.
      ValueError: a slot that the clip does not have.
    """
    frames = clip.slot_frames[_checked(clip, slots)][:, :1]
    chunks = [images[:, 0] for images in _images(clip, frames, 8)]
    return np.concatenate([np.zeros((0, clip.height, clip.width, 3), np.uint8), *chunks])


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


def _images(clip: Clip, frames: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Yields resized uint8 [n, t, H, W, 3] for `frames` int64 [N, t], `chunk` rows at a time."""
    with FrameReader(clip.info, np.unique(frames)) as reader, ThreadPoolExecutor(_RESIZE_THREADS) as pool:
        for start in range(0, len(frames), chunk):
            rows = frames[start : start + chunk]
            images = _resized(clip, reader.read(np.unique(rows)), pool)
            yield np.stack([[images[index].result() for index in row] for row in rows])


def _resized(clip: Clip, decoded: Iterator[tuple[int, np.ndarray]], pool: ThreadPoolExecutor) -> dict[int, Future]:
    """Resizes frames beside the decoder, which waits when the resizers fall behind: decoded frames are large."""
    resize = RESIZERS[PRESETS[clip.preset].resizer]
    images: dict[int, Future] = {}
    waiting: collections.deque[Future] = collections.deque()
    for index, image in decoded:
        images[index] = pool.submit(resize, image, clip.height, clip.width)
        waiting.append(images[index])
        if len(waiting) > 2 * _RESIZE_THREADS:
            waiting.popleft().result()
    return images
