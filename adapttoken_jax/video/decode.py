"""Decodes chosen frames of a video, once through, converting only those to RGB.

The wanted frames are known before decoding starts. Between two of them the decoder either runs on or, when the next
one lies beyond the current group of pictures, jumps to the key frame before it. Frames are recognised by their
timestamps, so a jump that lands elsewhere is noticed and undone.

PyAV is imported where a file is read: frames in memory need no decoder.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.video.probe import Orientation, VideoInfo, is_empty, open_video, to_the_end

if TYPE_CHECKING:
    import av

# A jump empties the decoder's pipeline, which was measured to cost as much as decoding 8 to 15 frames of 720p.
SEEK_FRAMES = 16
# A frame that a decoder swallows is replaced by the next one, unless that is further away than this.
_LARGEST_GAP_S = 1.0


class Cancelled(Exception):
    """A reader was told to stop while it looked for a frame."""


class FrameReader:
    """Reads frames of one video; use it as a context manager. Several readers of one video do not disturb each other.

    Args:
      info: what `probe` found.
      wanted: indices of all frames that will be asked for, in any order. The others need not be decoded at all where
        no other frame depends on them.
      threads: of the decoder; 0 lets it choose.
      cancelled: asked before every frame is decoded; `read` raises `Cancelled` once it says yes.
    """

    def __init__(
        self, info: VideoInfo, wanted: Iterable[int], threads: int = 0, cancelled: Callable[[], bool] = lambda: False
    ):
        self._info, self._threads, self._cancelled = info, threads, cancelled
        self._to_rgb = None if info.frames is not None else _rgb_converter()
        self._keys = np.arange(info.total) if info.pts is None else info.pts
        self._wanted = {int(self._keys[index]) for index in wanted}
        self._file = contextlib.ExitStack()
        self._container = self._current = None
        self._seekable, self._asked = info.seekable, -1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()
        # A generator that has not ended and its reader would keep each other, and the decoder's pictures, alive.
        self._frames = self._current = None

    def read(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, uint8 [H, W, 3]) for `indices`, all of them `wanted`, in any order; going back is a jump.

        Raises:
          UserError: the file ends early or is damaged, at a wanted frame or on the way to it.
        """
        for index in map(int, indices):
            if self._info.frames is not None:
                yield index, self._info.frames.images[index]
            else:
                image = _pixels(self._to_rgb(self._frame(index)))
                yield index, orient(image, self._info.orientation)

    def _frame(self, index: int) -> av.VideoFrame:
        self._approach(index)
        self._asked = index
        key = self._keys[index]
        while self._current is None or self._current[0] < key:
            if self._cancelled():
                raise Cancelled
            self._current = next(self._frames, None)
            if self._jumped_in_vain():
                self._seekable = False
                self._open()
                continue
            if self._current is None:
                raise UserError(f"{self._info.name}: {self._lost(index)}; copy or download the file again")
        if self._current[0] > key and self._time(self._position()) - self._info.times[index] > _LARGEST_GAP_S:
            raise UserError(f"{self._info.name}: {self._lost(index)}; copy or download the file again")
        return self._current[1]

    def _jumped_in_vain(self) -> bool:
        """Whether the decoder gave no picture at the key frame jumped to, as at H.264's points of recovery."""
        if self._sought is None or (self._current and self._current[0] < self._sought):
            return False
        missed = self._current is None or self._current[0] > self._sought
        self._sought = None
        return missed

    def _position(self) -> int:
        """Index of the frame that the decoder gave last; -1 before the first."""
        return -1 if self._current is None else int(self._keys.searchsorted(self._current[0]))

    def _time(self, index: int) -> float:
        return self._info.times[min(index, self._info.total - 1)]

    def _lost(self, index: int) -> str:
        return f"the frame at {self._info.times[index]:.2f} s cannot be decoded"

    def _approach(self, index: int) -> None:
        """Moves to the start of the file or to a key frame if running on would not reach `index` or cost more."""
        back = self._container is None or index < self._asked
        if not back and index - self._asked <= SEEK_FRAMES:
            return
        keyframes = self._info.keyframes
        before = int(keyframes.searchsorted(index, side="right")) - 1
        start = int(keyframes[before]) if before >= 0 else 0
        if not back and start - self._position() <= SEEK_FRAMES:
            return
        if self._seekable and start > SEEK_FRAMES:
            self._seek(start)
        elif back:
            self._open()

    def _seek(self, start: int) -> None:
        from av import FFmpegError

        if self._container is None:
            self._open()
        target = int(self._keys[start])
        try:
            self._container.seek(target, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
        except FFmpegError:
            first = None
        if first is None or not first.is_keyframe or first.pts is None or first.pts > target:
            self._seekable = False  # the index of this file misleads: read on without it
            return self._open()
        self._frames, self._current, self._sought = self._decode(itertools.chain([first], packets)), None, target

    def _open(self) -> None:
        self._file.close()
        self._container, self._stream = self._file.enter_context(open_video(self._info.path))
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = self._threads
        self._frames, self._current, self._sought = self._decode(self._container.demux(self._stream)), None, None

    def _decode(self, packets) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (key, frame) in display order, where the key is the pts or, without usable pts, a running count."""
        from av import FFmpegError

        counted, count = self._info.pts is None, 0
        context = self._stream.codec_context
        # H.264 marks the pictures that no other one refers to; unwanted ones of these need not be decoded. The
        # packet's pts says which are wanted. HEVC's mark means less than that, so other codecs decode everything.
        skips, skipping = context.name == "h264" and not counted, None
        started = not len(self._info.keyframes)
        try:
            for packet in to_the_end(packets):
                if is_empty(packet):  # a decoder would take it for the end
                    continue
                started = started or packet.is_keyframe
                if not started:
                    continue
                before, skipping = skipping, packet.pts not in self._wanted
                if skips and skipping != before:
                    context.skip_frame = "NONREF" if skipping else "DEFAULT"
                for frame in packet.decode():
                    yield (count if counted else frame.pts), frame
                    count += 1
        except FFmpegError as error:
            reason = (error.strerror or type(error).__name__).lower()
            where = f"after {self._time(max(self._position(), 0)):.2f} s"
            message = f"{self._info.name}: cannot be decoded {where} ({reason}); copy or download the file again"
            raise UserError(message) from None


def _rgb_converter() -> Callable[[av.VideoFrame], av.VideoFrame]:
    """Converts frames of one video to RGB, in the thread that asks.

    Setting up takes longer than converting a small picture: `VideoFrame.to_ndarray` would set up for each, and from 17
    on PyAV hands each to threads of its own unless told not to.
    """
    import av
    from av.video.reformatter import VideoReformatter

    alone = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}
    return functools.partial(VideoReformatter().reformat, format="rgb24", **alone)


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """The picture of an RGB frame, uint8 [H, W, 3]: its own memory, which `to_ndarray` copies where rows lie apart."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def decoding_cost(info: VideoInfo, order: np.ndarray) -> np.ndarray:
    """Frames that one reader decodes for each frame of `order`, int64 [n], read one after the other.

    A jump counts as `SEEK_FRAMES` on top of the frames from the key frame on. This is the reader's own policy written
    down, without the pictures that no other one needs: an upper bound, measured in units of one decoded frame.
    """
    order = np.asarray(order, np.int64)
    if info.frames is not None:
        return np.zeros(len(order), np.int64)
    before = np.concatenate([[-1], order[:-1]])
    start = key_starts(info, order)
    back = order < before
    back[:1] = True
    jump = (back | (start - before > SEEK_FRAMES)) & (start > SEEK_FRAMES) & info.seekable
    return np.where(jump, SEEK_FRAMES + order - start + 1, np.where(back, order + 1, order - before))


def key_starts(info: VideoInfo, order: np.ndarray) -> np.ndarray:
    """Where decoding has to start for each frame of `order`: the key frame before it, or the first frame. int64 [n]."""
    starts = np.concatenate([[0], info.keyframes]).astype(np.int64)
    return starts[np.searchsorted(info.keyframes, order, side="right")]


def orient(image: np.ndarray, orientation: Orientation) -> np.ndarray:
    """Turns a decoded image [H, W, 3] the way it is displayed; a view, not a copy."""
    transpose, flip_rows, flip_cols = orientation
    if transpose:
        image = image.swapaxes(0, 1)
    return image[:: -1 if flip_rows else 1, :: -1 if flip_cols else 1]
