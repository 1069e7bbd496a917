"""What a video is, found by reading its packets once: frame times, key frames, size, orientation. No pass of decoding.

Headers are not trusted: a frame count may be 0 or count frames that an edit list hides, and a frame rate may be an
average. The timestamps (pts) of the packets are what a player shows, so everything is derived from them.

PyAV is imported where a file is opened: frames in memory need no decoder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import numbers
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from adapttoken_jax.errors import UserError

if TYPE_CHECKING:
    import av

# AVI stores no presentation times and its key-frame flags are wrong for some codecs.
_FORMATS_WITHOUT_PTS = {"avi"}
# Containers whose header says how long the longest track is, unless it was written without going back to it.
_FORMATS_WITH_DURATION = {"matroska", "flv", "mxf"}
# Containers whose index leads to a real key frame; anything else is decoded straight through.
_SEEKABLE_FORMATS = {"mov", "matroska"}
# FFmpeg plays text files as a terminal recording. The files that a playlist names may change without it, or not end.
_NOT_VIDEO_FORMATS = {"tty", "hls", "dash", "concat"}

_FIRST_FRAMES = 250  # enough to see whether a decoder reorders frames

_SLOWEST = 1e-6  # frames per second, as of `AdaptTokenConfig.fps`

Orientation = tuple[bool, bool, bool]
_TURNED: dict[int, Orientation] = {90: (True, True, False), 180: (False, True, True), 270: (True, False, True)}


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """A video in memory, accepted wherever a path is.

    Attributes:
      images: uint8 [N, H, W, 3], RGB, in display order.
      fps: frames per second at which `images` were taken.

    Raises:
      UserError: on construction, for another shape or type, no image, or a rate that is no number or too small.
    """

    images: np.ndarray = dataclasses.field(repr=False)
    fps: float

    def __post_init__(self):
        images = self.images
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            raise UserError("Frames.images: give a NumPy array of uint8")
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise UserError(
                f"Frames.images: shape {images.shape}; give [frames, height, width, 3] with a frame or more"
            )
        if not (isinstance(self.fps, numbers.Real) and _SLOWEST <= self.fps < math.inf):
            raise UserError(f"Frames.fps={self.fps!r}: give frames per second, a number of at least {_SLOWEST:g}")
        object.__setattr__(self, "fps", float(self.fps))  # PyAV gives rates as fractions


@dataclasses.dataclass(frozen=True, eq=False)
class VideoInfo:
    """Timing and shape of a video.

    Attributes:
      path: the file, or None for `Frames`.
      duration_s: seconds from the first frame's start to the last frame's end.
      source_fps: frames per second, an average if the rate varies.
      times: float64 [total] seconds of each frame in display order; the first is 0.
      keyframes: int64 [k], ascending indices of the frames at which decoding can start.
      width, height: pixels after the display orientation has been applied. Pixel aspect ratios are not applied, as in
        the published preprocessing codes.
      pts: int64 [total] timestamps in the container's units, or None when they cannot be relied on: frames are then
        counted and never sought.
      orientation: (transpose, flip rows, flip columns), applied in this order to every decoded frame.
      seekable: whether decoding may start at a key frame other than the first.
      frames: the video itself if it is in memory.
    """

    path: str | None
    duration_s: float
    source_fps: float
    times: np.ndarray = dataclasses.field(repr=False)
    keyframes: np.ndarray = dataclasses.field(repr=False)
    width: int
    height: int
    pts: np.ndarray | None = dataclasses.field(default=None, repr=False)
    orientation: Orientation = (False, False, False)
    seekable: bool = False
    frames: Frames | None = dataclasses.field(default=None, repr=False)

    @property
    def total(self) -> int:
        """Frames that a player shows."""
        return len(self.times)

    @property
    def name(self) -> str:
        """What error messages call this video."""
        return self.path or "the given frames"


def probe(source: str | os.PathLike | Frames | VideoInfo) -> VideoInfo:
    """Reads the timing and shape of a video; what is known already is returned as it is.

    Packets are read once and not decoded, except the first frame (for its orientation). Only where a container has no
    usable timestamps (AVI, raw streams) are the frames counted by decoding them.

    Raises:
      UserError: neither a path nor frames, no such file, not a video, audio only, no frames, or a file that ends before
        its last frame.
    """
    if isinstance(source, VideoInfo):
        return source
    if isinstance(source, Frames):
        return _probe_frames(source)
    if not isinstance(source, str | bytes | os.PathLike):
        raise UserError(f"video: {type(source).__name__} is no path; give one, or images as adapttoken_jax.Frames")
    path = os.fsdecode(source)
    with open_video(path) as (container, stream):
        packets = _scan(container, stream)
        _check(path, container, stream, packets)
        if packets.timed and _out_of_order(path, stream, packets):
            packets.timed, packets.dts = False, packets.pts
        pts, keyframes = _displayed(packets)
        orientation = _orientation(packets.first_frame)
        timing = _timing(path, stream, pts, packets)
        seekable = pts is not None and bool(_formats(container) & _SEEKABLE_FORMATS)
    sides = packets.first_frame.height, packets.first_frame.width
    height, width = reversed(sides) if orientation[0] else sides
    return VideoInfo(path, *timing, keyframes, width, height, pts, orientation, seekable)


def _probe_frames(frames: Frames) -> VideoInfo:
    total, height, width = frames.images.shape[:3]
    times = np.arange(total) / frames.fps
    return VideoInfo(None, total / frames.fps, float(frames.fps), times, np.arange(total), width, height, frames=frames)


def _check_file(path: str) -> None:
    if not path:
        raise UserError("video: the name is empty; give a file")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # a name may hold a character that none can
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise UserError(f"{path}: {'no such file' if missing else getattr(error, 'strerror', error)}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a directory; name a file in it")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is no plain file, which a video must be")


@contextlib.contextmanager
def open_video(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its video track, of several the one that FFmpeg finds best (a cover picture is none).

    Raises:
      UserError: no such file, not a video, or audio only; inside the block, any error of the demuxer or decoder.
    """
    import av

    _check_file(path)
    # Tags in another encoding than UTF-8 are none of our business; from version 19 on PyAV never fails on them.
    options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        # A name with a colon would be an address without a directory before it.
        with av.open(os.path.join(os.curdir, path), **options) as container:
            yield container, _video_stream(path, container)
    except av.FFmpegError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise UserError(f"{path}: cannot be read as a video ({reason}); check the file or give another") from None


def _video_stream(path: str, container) -> av.VideoStream:
    from av.stream import Disposition

    pictures = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams and container.streams.audio:
        raise UserError(f"{path}: has audio only; give a file with a video track")
    if not streams or _formats(container) & _NOT_VIDEO_FORMATS:
        raise UserError(f"{path}: not a video; give a video file")
    # A single picture may stand before the video as an ordinary track.
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _formats(container) -> set[str]:
    return set(container.format.name.split(","))


@dataclasses.dataclass
class _Packets:
    """What the pass over the packets collects; lists run in file order over the packets of the video track."""

    pts: list = dataclasses.field(default_factory=list)
    dts: list = dataclasses.field(default_factory=list)  # of a container without pts
    key: list = dataclasses.field(default_factory=list)
    discard: list = dataclasses.field(default_factory=list)
    last_duration: int = 0
    end_s: float = 0.0
    timed: bool = True
    started: bool = False
    first_frame: av.VideoFrame | None = None


def _scan(container, stream) -> _Packets:
    found = _Packets(timed=not _formats(container) & _FORMATS_WITHOUT_PTS)
    # The others are needed to see whether the longest track is complete.
    tracks = container.demux() if _formats(container) & _FORMATS_WITH_DURATION else container.demux(stream)
    ends = {}  # of each track, in its own unit: fractions of a second would take longer than reading the packets
    for packet in to_the_end(tracks):
        track, pts = packet.stream_index, packet.pts
        if track == stream.index:
            _collect(packet, found)
        end = ends.get(track, 0)
        start = packet.dts if pts is None else pts
        ends[track] = max(end, (end if start is None else start) + (packet.duration or 0))
    found.end_s = max((float(end * container.streams[track].time_base) for track, end in ends.items()), default=0.0)
    return found


def to_the_end(demuxed: Iterator) -> Iterator:
    """The packets or frames that PyAV reads; it fails after the last where tracks came that it did not know at first.

    A transport stream shows its tracks only as they come, and a damaged one may show tracks that it has not.
    """
    with contextlib.suppress(IndexError):
        yield from demuxed


def is_empty(packet) -> bool:
    """Whether a packet only says that the frame before stays; one without a time is the end."""
    return packet.size == 0 and packet.pts is not None


def _collect(packet, found: _Packets) -> None:
    if is_empty(packet):
        return
    end_mark = packet.size == 0
    if not end_mark:
        found.pts.append(packet.pts)
        if not found.timed:
            found.dts.append(packet.dts)
        found.key.append(packet.is_keyframe)
        found.discard.append(packet.is_discard)
        found.last_duration = packet.duration or found.last_duration
        found.started |= packet.is_keyframe
    if found.started and found.first_frame is None:
        found.first_frame = next(iter(packet.decode()), None)


def _out_of_order(path: str, stream, packets: _Packets) -> bool:
    """Whether the packets of reordered frames bear the times of the order in which they are decoded.

    So they do in copies from a format without display times. Packets in order alone do not say it: streams may declare
    that frames are reordered and hold none that are.
    """
    if not stream.codec_context.has_b_frames or None in packets.pts or packets.pts != sorted(packets.pts):
        return False
    stamps = _decoded_pts(path, _FIRST_FRAMES)
    return None not in stamps and stamps != sorted(stamps)


def _displayed(packets: _Packets) -> tuple[np.ndarray | None, np.ndarray]:
    """(pts of the shown frames in display order or None, indices of key frames among them)."""
    keys = [pts for pts, key in zip(packets.pts, packets.key, strict=True) if key]
    untimed = not packets.timed or None in packets.pts or len(set(packets.pts)) != len(packets.pts)
    if untimed or keys != sorted(keys):  # times that start anew do not tell the frames' order
        return None, np.zeros(0, np.int64)
    order = np.argsort(packets.pts)
    pts, key = np.asarray(packets.pts, np.int64)[order], np.asarray(packets.key, bool)[order]
    shown = ~np.asarray(packets.discard, bool)[order]
    # A recording may start between two key frames; what is shown before the first one cannot be decoded.
    shown &= np.arange(len(pts)) >= np.argmax(key)
    return pts[shown], np.flatnonzero(key[shown])


def _check(path: str, container, stream, packets: _Packets) -> None:
    """Refuses a file without frames, one that ends before its header says, and one that cannot be decoded at all."""
    from av import time_base

    got, expected, slack, unit = len(packets.pts), 0, 0, "frames"
    if "mov" in _formats(container):
        expected = sum(entry.size > 0 for entry in stream.index_entries)
    elif _formats(container) & _FORMATS_WITH_DURATION and container.duration and packets.end_s:
        got, expected, unit = packets.end_s, container.duration / time_base, "seconds"
        slack = max(1, 0.01 * expected)  # such headers are not exact
    elif "avi" in _formats(container) and _ends_inside_a_chunk(path):
        got, expected, unit = packets.end_s, float(stream.frames * stream.time_base), "seconds"
        slack = max(1, 0.01 * expected)  # the index alone may be missing
    if got + slack < expected:
        raise UserError(f"{path}: ends after {got:.0f} of {expected:.0f} {unit}; copy or download the file again")
    if all(packets.discard):
        raise UserError(f"{path}: has a video track without frames; give another file")
    if packets.first_frame is None:
        raise UserError(f"{path}: no frame can be decoded; the file is damaged, copy or download it again")


def _ends_inside_a_chunk(path: str) -> bool:
    """Whether an AVI file is shorter than its chunks say, one or, beyond a gigabyte, several."""
    size, end = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while end < size:
            file.seek(end)
            name, length = file.read(4), int.from_bytes(file.read(4), "little")
            if name != b"RIFF" or length == 2**32 - 1:  # no chunk, or one written without going back to its start
                return False
            end += 8 + length
    return end > size


def _timing(path: str, stream, pts: np.ndarray | None, packets: _Packets) -> tuple[float, float, np.ndarray]:
    """(duration in s, frames per second, times in s)."""
    nominal = float(stream.average_rate or stream.base_rate or 0)
    if pts is None:
        shown = _decoded_pts(path)
        # The dts of an AVI count its frames, with those that repeat the one before and take no bytes.
        pts = _continued(shown if packets.timed else packets.dts, len(shown))
    if pts is None:
        total, rate = len(shown), nominal or 25.0
        return total / rate, rate, np.arange(total) / rate
    times = (pts - pts[0]) * float(stream.time_base)
    gap = packets.last_duration * float(stream.time_base) or (float(np.median(np.diff(times))) if len(pts) > 1 else 0)
    duration = float(times[-1]) + (gap or 1 / (nominal or 25.0))
    rate = len(pts) / duration
    # Timestamps may be rounded to milliseconds; where the header agrees with them its rate is the exact one.
    return duration, nominal if abs(nominal / rate - 1) < 0.01 else rate, times


def _decoded_pts(path: str, most: int | None = None) -> list[int | None]:
    """The timestamp of every frame that can be decoded, or of the first ones, in display order."""
    with open_video(path) as (container, stream):
        stream.thread_type = "AUTO"
        return [frame.pts for frame in itertools.islice(to_the_end(container.decode(stream)), most)]


def _continued(stamps: list[int | None], total: int) -> np.ndarray | None:
    """Timestamps that start anew, where recordings were put one after the other, as if they ran on.

    None where they are not those of `total` frames, two or more, or one in ten does not come after the one before.
    """
    if None in stamps or len(stamps) != total or total < 2:
        return None
    steps = np.diff(stamps)
    if 10 * (steps <= 0).sum() > total:
        return None
    return np.cumsum([0, *np.where(steps < 0, np.median(steps), steps)])


def _orientation(frame: av.VideoFrame) -> Orientation:
    """Reads the display matrix, which maps a pixel (x, y) to (a x + c y, b x + d y)."""
    from av.sidedata.sidedata import Type

    try:
        side_data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # beside data of a kind that PyAV does not know, as EXIF's, it tells the angle alone
        return _TURNED.get(frame.rotation % 360, (False, False, False))
    if side_data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(side_data, np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
