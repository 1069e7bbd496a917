"""Small real video files for tests, written with PyAV.

Every frame carries its index as a 4 x 4 board of dark and bright cells that survives compression and resizing, so a
test can read from a decoded image which frame it is. The board has no symmetry: a wrongly turned image reads as
another number.
"""

import fractions
import functools
import io
import pathlib
import struct
import types

import av
import numpy as np
from PIL import ExifTags, Image

from adapttoken_jax.video import VideoInfo, probe

_CELLS = 4


def stamped(index: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 [height, width, 3] image that shows `index` (0 to 16383)."""
    rows, cols = (np.arange(size) * _CELLS // size for size in (height, width))
    bright = np.where(_board(index), 215, 40).astype(np.uint8)[np.ix_(rows, cols)]
    return np.stack([bright, 255 - bright, np.full_like(bright, 128)], axis=-1)


@functools.lru_cache(maxsize=4096)
def _board(index: int) -> np.ndarray:
    bits = (2 * index + 1) >> np.arange(_CELLS**2)  # the first cell is always bright, the last always dark
    return (bits & 1).reshape(_CELLS, _CELLS).astype(bool)


def read_stamp(image: np.ndarray) -> int:
    """The index that an image made by `stamped` shows, at any size from 8 x 8 pixels."""
    height, width = image.shape[:2]
    rows, cols = (((np.arange(_CELLS) + 0.5) * size / _CELLS).astype(int) for size in (height, width))
    cells = image[np.ix_(rows, cols)].astype(int)
    bits = (cells[..., 0] > cells[..., 1]).reshape(-1)
    return int(bits @ (1 << np.arange(_CELLS**2))) // 2


def write(
    path,
    count: int = 50,
    size: tuple[int, int] = (64, 96),
    fps: int = 25,
    *,
    codec: str = "libx264",
    gop: int = 12,
    milliseconds=None,
    rotation: int = 0,
    pix_fmt: str = "yuv420p",
    container_options: dict | None = None,
    **options: str,
) -> pathlib.Path:
    """Writes `count` stamped frames; the suffix of `path` chooses the container.

    `milliseconds` gives each frame's time where the rate varies. `rotation` is the display rotation in degrees
    counter-clockwise. `options` go to the encoder.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), **options})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        if milliseconds is not None:
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(stamped(index, *size), format="rgb24")
            frame.pts = index if milliseconds is None else int(milliseconds[index])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return pathlib.Path(path)


def intra_refresh(path, count: int = 60) -> pathlib.Path:
    """A picture is renewed column by column over 24 frames; containers mark where that begins as key frames."""
    return write(path, count, **{"x264-params": "intra-refresh=1:keyint=24:scenecut=0"})


def open_gop(path, count: int = 60) -> pathlib.Path:
    """B-frames before a key frame in display order refer across it."""
    settings = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
    return write(path, count, **{"x264-params": settings})


def never_reordered(path, count: int = 60) -> pathlib.Path:
    """An encoder that could reorder pictures, and is told to make none that need it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(stamped(index), format="rgb24")
            frame.pts, frame.pict_type = index, av.video.frame.PictureType.P if index else av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return pathlib.Path(path)


def long_clip(path, minutes: int = 20, fps: int = 5) -> pathlib.Path:
    """Many minutes in a second or two of encoding: few, small frames and a key frame every ten seconds."""
    return write(path, minutes * 60 * fps, (32, 32), fps, gop=10 * fps, preset="ultrafast", tune="zerolatency")


def photographs(path, count: int = 5, orientation: int = 1) -> pathlib.Path:
    """Stamped JPEG pictures that carry EXIF data, as cameras write them; `orientation` is EXIF's."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for index in range(count):
            picture = io.BytesIO()
            Image.fromarray(stamped(index)).save(picture, "JPEG", exif=exif)
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, fractions.Fraction(1, 25), True
            packet.pts = packet.dts = index
            container.mux(packet)
    return pathlib.Path(path)


def audio_only(path, seconds: float = 0.5) -> pathlib.Path:
    """A file with a sound track and no pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac" if str(path).endswith("mp4") else "pcm_s16le", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, int(16000 * seconds)), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return pathlib.Path(path)


def with_audio(path, count: int = 50, seconds: float = 2.0) -> pathlib.Path:
    """Stamped pictures and a silent sound track of its own length."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "12"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        sound = container.add_stream("aac" if str(path).endswith(("mp4", "flv")) else "pcm_s16le", rate=16000)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(stamped(index), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        silence = np.zeros((1, int(16000 * seconds)), np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux([*sound.encode(frame), *sound.encode(), *stream.encode()])
    return pathlib.Path(path)


def with_late_track(source, path) -> pathlib.Path:
    """A transport stream whose last picture became a track of its own."""
    content = bytearray(pathlib.Path(source).read_bytes())
    track = lambda at: int.from_bytes(content[at + 1 : at + 3]) & 0x1FFF
    begins = lambda at: content[at + 1] & 0x40
    last = max(at for at in range(0, len(content), 188) if begins(at) and track(at) == 0x100)
    content[last + 1 : last + 3] = (0x4200).to_bytes(2)
    pathlib.Path(path).write_bytes(content)
    return pathlib.Path(path)


def song_with_cover(path) -> pathlib.Path:
    """A sound track with one picture attached, which is not a video."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(stamped(1, 32, 32), format="rgb24")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, picture.pts = 16000, 0, 0
        container.mux([*cover.encode(picture), *cover.encode(), *sound.encode(frame), *sound.encode()])
    return pathlib.Path(path)


def with_picture_first(path, count: int = 50) -> pathlib.Path:
    """A picture as an ordinary track of one frame, before the track of stamped pictures."""
    with av.open(str(path), "w") as container:
        picture, stream = container.add_stream("mjpeg", rate=25), container.add_stream("libx264", rate=25)
        picture.height, picture.width, picture.pix_fmt = 48, 48, "yuvj420p"
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        packets = picture.encode(av.VideoFrame.from_ndarray(stamped(9999, 48, 48), format="rgb24")) + picture.encode()
        for index in range(count):
            packets += stream.encode(av.VideoFrame.from_ndarray(stamped(index), format="rgb24"))
        container.mux(packets + stream.encode())
    return pathlib.Path(path)


def without_frames(path) -> pathlib.Path:
    """A video track with a description but no pictures."""
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        container.start_encoding()
    return pathlib.Path(path)


def truncated(source, path, share: float = 0.6) -> pathlib.Path:
    """The first `share` of a file's bytes."""
    content = pathlib.Path(source).read_bytes()
    pathlib.Path(path).write_bytes(content[: int(len(content) * share)])
    return pathlib.Path(path)


def with_second_chunk(source, path) -> pathlib.Path:
    """An AVI as those beyond a gigabyte are: the pictures come once more, in a chunk of their own."""
    content = bytearray(pathlib.Path(source).read_bytes())
    chunk = lambda name, data: name + len(data).to_bytes(4, "little") + data
    pictures, length = content.index(b"movi"), content.index(b"strh") + 40
    size = int.from_bytes(content[pictures - 4 : pictures], "little")
    content += chunk(b"RIFF", b"AVIX" + chunk(b"LIST", content[pictures : pictures + size]))
    content[length : length + 4] = (2 * int.from_bytes(content[length : length + 4], "little")).to_bytes(4, "little")
    pathlib.Path(path).write_bytes(content)
    return pathlib.Path(path)


def streamed(source, path) -> pathlib.Path:
    """A copy whose header was written before anything was known of what follows, as into a pipe."""
    with av.open(str(source)) as reader, open(path, "wb") as file:
        pipe = types.SimpleNamespace(write=file.write)
        with av.open(pipe, "w", format=reader.format.name.split(",")[0]) as writer:
            stream = writer.add_stream_from_template(reader.streams.video[0])
            for packet in reader.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    writer.mux(packet)
    return pathlib.Path(path)


def without_packets(source, path, dropped: range) -> pathlib.Path:
    """Copies a video without some of its packets, as a recorder that was switched on late or stumbled does."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(video=0)):
            if packet.dts is not None and number not in dropped:
                packet.stream = stream
                writer.mux(packet)
    return pathlib.Path(path)


def damaged_since(path, count: int, dropped: range, size: tuple[int, int] = (64, 96)) -> VideoInfo:
    """What `probe` found in a video that lost packets since."""
    info = probe(write(path, count, size, codec="ffv1", pix_fmt="bgr0", gop=1))
    without_packets(path, f"{path}.part.mkv", dropped).replace(path)
    return info


def stamped_as_decoded(source, path) -> pathlib.Path:
    """Copies a video whose packets lose their display times for those of decoding, as on the way through an AVI."""
    with av.open(str(source)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.dts is not None]
        begin = packets[0].dts
        for packet in packets:
            packet.pts = packet.dts = packet.dts - begin
            packet.stream = stream
            writer.mux(packet)
    return pathlib.Path(path)


def emptied(source, path, *numbers: int) -> pathlib.Path:
    """A QuickTime file of JPEG pictures some of which are left out: samples without a byte."""
    content = bytearray(pathlib.Path(source).read_bytes())
    sizes = content.index(b"stsz") + 16
    size = lambda number: slice(sizes + 4 * number, sizes + 4 * number + 4)
    for number in numbers:  # what follows the picture before is not looked at
        together = sum(int.from_bytes(content[size(each)]) for each in (number - 1, number))
        content[size(number - 1)], content[size(number)] = together.to_bytes(4), bytes(4)
    pathlib.Path(path).write_bytes(content)
    return pathlib.Path(path)


def trimmed(source, path, first: int, count: int, fps: int = 25) -> pathlib.Path:
    """Rewrites the edit list of an mp4 so that players show only `count` frames from frame `first` on."""
    content = bytearray(pathlib.Path(source).read_bytes())
    entry = content.index(b"elst") + 12  # name, version, entry count
    _, start, rate = struct.unpack(">IiI", content[entry : entry + 12])
    ticks = _media_timescale(content)
    edit = struct.pack(">IiI", count * 1000 // fps, start + first * ticks // fps, rate)
    content[entry : entry + 12] = edit
    pathlib.Path(path).write_bytes(content)
    return pathlib.Path(path)


def turned(source, path, matrix: tuple[int, int, int, int]) -> pathlib.Path:
    """Rewrites an mp4's display matrix (a, b, c, d): a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    content = bytearray(pathlib.Path(source).read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    pathlib.Path(path).write_bytes(content)
    return pathlib.Path(path)


def _media_timescale(content: bytes) -> int:
    place = content.index(b"mdhd") + 16  # name, version and flags, creation, modification
    return struct.unpack(">I", content[place : place + 4])[0]
