"""`probe`: what it finds must be what a player would show, or one clear error."""

import decimal
import fractions

import av
import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.video import FrameReader, Frames, probe
from adapttoken_jax.video.probe import _continued
from tests import media


def test_constant_rate_with_b_frames(tmp_path):
    info = probe(media.write(tmp_path / "a.mp4", 50, gop=10, sc_threshold="0"))
    assert info.total == 50
    assert info.source_fps == 25
    assert info.duration_s == pytest.approx(2.0)
    assert (info.height, info.width) == (64, 96)
    np.testing.assert_allclose(info.times, np.arange(50) / 25)
    np.testing.assert_array_equal(info.keyframes, [0, 10, 20, 30, 40])


def test_no_frame_count_in_the_header(tmp_path):
    path = media.write(tmp_path / "a.mkv", 50, fps=30)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    info = probe(path)
    assert info.total == 50
    assert info.source_fps == 30  # although Matroska rounds the times to milliseconds
    np.testing.assert_allclose(info.times, np.arange(50) / 30, atol=5.1e-4)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rate_times_come_from_pts(tmp_path, name):
    milliseconds = [0, 40, 80, 1000, 1040, 3000]
    info = probe(media.write(tmp_path / name, 6, milliseconds=milliseconds))
    np.testing.assert_allclose(info.times, np.asarray(milliseconds) / 1000)
    assert info.duration_s >= 3.0
    assert info.source_fps == pytest.approx(6 / info.duration_s)


def test_a_rate_in_the_header_that_the_times_contradict_is_not_taken(tmp_path):
    path = media.write(tmp_path / "a.mkv", 50, milliseconds=range(0, 2100, 42))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 25
    info = probe(path)
    assert info.source_fps == pytest.approx(50 / info.duration_s) == pytest.approx(1 / 0.042, rel=1e-3)


def test_times_start_at_zero_where_the_container_does_not(tmp_path):
    info = probe(media.write(tmp_path / "a.ts", 30))
    assert info.pts[0] > 0
    np.testing.assert_allclose(info.times, np.arange(30) / 25, atol=1e-9)


def test_edit_list_hides_frames(tmp_path):
    path = media.trimmed(media.write(tmp_path / "a.mp4", 50, bf="2"), tmp_path / "b.mp4", first=15, count=20)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 20
        assert container.streams.video[0].frames == 50
    info = probe(path)
    assert info.total == 20
    np.testing.assert_allclose(info.times, np.arange(20) / 25)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("b.avi", "libx264"), ("c.h264", "libx264")])
def test_without_timestamps_frames_are_counted(tmp_path, name, codec):
    info = probe(media.write(tmp_path / name, 40, codec=codec, bf="2"))
    assert info.pts is None
    assert not info.seekable
    assert info.total == 40
    np.testing.assert_allclose(info.times, np.arange(40) / 25)


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_frames_that_an_avi_leaves_out_take_their_time(tmp_path, codec):
    milliseconds, pix_fmt = [0, 40, 80, 1000, 1040, 3000], "yuvj420p" if codec == "mjpeg" else "yuv420p"
    info = probe(media.write(tmp_path / "a.avi", 6, milliseconds=milliseconds, codec=codec, pix_fmt=pix_fmt))
    np.testing.assert_allclose(info.times, np.asarray(milliseconds) / 1000)


def test_two_frames_of_one_time_leave_the_others_theirs(tmp_path):
    milliseconds = [*range(0, 1200, 40), 1160, *range(1600, 8000, 400)]
    path = media.write(tmp_path / "a.mkv", len(milliseconds), milliseconds=milliseconds, codec="ffv1", pix_fmt="bgr0")
    np.testing.assert_allclose(probe(path).times, np.asarray(milliseconds) / 1000)


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ([5, 6, 7, 8, 9, 0, 1, 2, 3, 4], range(10)),
        ([0, 1, 1, *range(2, 9)], [0, 1, 1, *range(2, 9)]),
        ([0, 1, 1, 2, 2, *range(3, 8)], None),  # two of ten do not come after the one before
        ([0, 1, 2, 0, 1, 2, 0, 1, 2, 3], None),
        ([0, 1, None], None),
        ([0], None),
    ],
)
def test_stamps_are_relied_on_where_nearly_all_rise(stamps, times):
    found = _continued(stamps, len(stamps))
    assert found is None if times is None else found.tolist() == [*times]
    assert _continued(stamps, len(stamps) + 1) is None


def test_times_that_start_anew_run_on(tmp_path):
    """Two recordings, the bytes of one after those of the other: their times lie between each other's."""
    first, second = media.write(tmp_path / "a.ts", 20), media.write(tmp_path / "b.ts", 20, fps=24)
    path = tmp_path / "c.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    info = probe(path)
    np.testing.assert_allclose(info.times, [*np.arange(20) / 25, *0.8 + np.arange(20) / 24])
    with FrameReader(info, range(40)) as reader:
        assert [media.read_stamp(image) for _, image in reader.read(range(40))] == [*range(20), *range(20)]


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_size_is_after_rotation(tmp_path, rotation):
    info = probe(media.write(tmp_path / "a.mp4", 3, (64, 96), rotation=rotation))
    assert (info.height, info.width) == ((96, 64) if rotation % 180 else (64, 96))


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_recording_that_starts_inside_a_group_of_pictures(tmp_path, suffix):
    path = media.open_gop(tmp_path / f"a.{suffix}", 60)
    info = probe(media.without_packets(path, tmp_path / f"b.{suffix}", range(5)))
    assert info.total == 48  # from the second key frame on, without the pictures shown before it
    assert info.keyframes.tolist() == [0, 12, 24, 36]


def test_without_any_key_frame(tmp_path):
    path = media.write(tmp_path / "a.webm", 30, codec="libvpx", gop=60)
    path = media.without_packets(path, tmp_path / "b.webm", range(5))
    with pytest.raises(UserError, match=r"b\.webm: no frame can be decoded"):
        probe(path)


def test_sound_of_another_length_changes_nothing(tmp_path):
    for name, seconds in (("a.mkv", 2.0), ("b.mkv", 6.0), ("c.mp4", 6.0), ("d.avi", 6.0), ("e.flv", 6.0)):
        info = probe(media.with_audio(tmp_path / name, 50, seconds))
        assert info.total == 50
        assert info.duration_s == pytest.approx(2.0)


def test_a_track_that_comes_late(tmp_path):
    path = media.with_late_track(media.write(tmp_path / "a.ts", 50), tmp_path / "b.ts")
    info = probe(path)
    assert info.total == 49
    with FrameReader(info, range(49)) as reader:
        assert [media.read_stamp(image) for _, image in reader.read(range(49))] == list(range(49))


def test_frames_in_memory():
    images = np.zeros((5, 30, 40, 3), np.uint8)
    info = probe(Frames(images, fps=2.5))
    assert (info.path, info.total, info.source_fps, info.duration_s) == (None, 5, 2.5, 2.0)
    assert (info.height, info.width) == (30, 40)
    np.testing.assert_allclose(info.times, [0, 0.4, 0.8, 1.2, 1.6])


@pytest.mark.parametrize(
    ("images", "fps"),
    [
        (np.zeros((5, 30, 40, 3), np.float32), 1.0),
        (np.zeros((30, 40, 3), np.uint8), 1.0),
        (np.zeros((0, 30, 40, 3), np.uint8), 1.0),
        (np.zeros((5, 3, 30, 40), np.uint8), 1.0),
        (np.zeros((5, 30, 40, 3), np.uint8), 0.0),
        (np.zeros((5, 30, 40, 3), np.uint8), float("nan")),
        (np.zeros((5, 30, 40, 3), np.uint8), 1e-300),
        (np.zeros((5, 30, 40, 3), np.uint8), decimal.Decimal(4)),
        ([[1]], 1.0),
    ],
)
def test_bad_frames_in_memory(images, fps):
    with pytest.raises(UserError, match="Frames"):
        Frames(images, fps)


def test_a_rate_may_be_a_fraction():
    assert type(Frames(np.zeros((5, 30, 40, 3), np.uint8), fractions.Fraction(30000, 1001)).fps) is float


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.avi", "mpeg4"),
        ("b.avi", "libx264"),
        ("c.avi", "mjpeg"),
        ("d.mxf", "mpeg2video"),
        ("e.mxf", "libx264"),  # without timestamps
        ("f.flv", "libx264"),
    ],
)
def test_a_file_that_ends_before_its_header_says(tmp_path, name, codec, share):
    path = media.write(tmp_path / name, 200, codec=codec, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p")
    assert probe(path).total == 200
    with pytest.raises(UserError, match=r": ends after \d of 8 seconds; copy or download the file again$"):
        probe(media.truncated(path, path, share))


def test_a_large_avi_that_ends_in_its_second_chunk(tmp_path):
    path = media.with_second_chunk(media.write(tmp_path / "a.avi", 100, codec="mpeg4"), tmp_path / "b.avi")
    assert probe(path).total == 200
    with pytest.raises(UserError, match="ends after 6 of 8 seconds"):
        probe(media.truncated(path, path, 0.85))


def test_a_header_that_counts_too_many_frames_is_no_sign_of_a_cut(tmp_path):
    """Pictures that repeat the one before take no bytes in an AVI, and FFmpeg does not tell of those at the end."""
    path = media.write(tmp_path / "a.avi", 50, codec="mpeg4")
    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 40
    content[length : length + 4] = (500).to_bytes(4, "little")
    path.write_bytes(content)
    assert probe(path).total == 50


@pytest.mark.parametrize(
    ("suffix", "codec"), [("avi", "mpeg4"), ("mxf", "mpeg2video"), ("flv", "libx264"), ("mkv", "libx264")]
)
def test_a_recording_whose_header_was_never_completed(tmp_path, suffix, codec):
    path = media.write(tmp_path / f"a.{suffix}", 200, codec=codec, bf="0")
    path = media.streamed(path, tmp_path / f"b.{suffix}")
    assert probe(path).total == 200
    assert 50 < probe(media.truncated(path, path)).total < 200


def _not_videos(tmp_path):
    good = media.write(tmp_path / "good.mp4", 100, container_options={"movflags": "faststart"})
    plain = media.write(tmp_path / "plain.mp4", 20)
    long_mkv = media.write(tmp_path / "long.mkv", 200)
    text, empty, binary = tmp_path / "notes.txt", tmp_path / "empty.mp4", tmp_path / "noise.mp4"
    text.write_text("some words that make no picture\n" * 4000)
    hls, concat = tmp_path / "list.m3u8", tmp_path / "list.ffconcat"
    media.write(tmp_path / "part.ts", 20)
    hls.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.8,\npart.ts\n#EXT-X-ENDLIST\n")
    concat.write_text("ffconcat version 1.0\nfile part.ts\n")
    empty.write_bytes(b"")
    binary.write_bytes(np.random.default_rng(0).bytes(5000))
    return [
        (tmp_path / "missing.mp4", "no such file"),
        (tmp_path, "is a directory"),
        (text, "not a video"),
        (empty, "cannot be read as a video"),
        (binary, "cannot be read as a video"),
        (hls, "not a video"),
        (concat, "not a video"),
        (media.audio_only(tmp_path / "sound.wav"), "audio only"),
        (media.audio_only(tmp_path / "sound.mp4"), "audio only"),
        (media.without_frames(tmp_path / "hollow.mp4"), "without frames"),
        (media.truncated(good, tmp_path / "cut.mp4"), "ends after .* of 100 frames"),
        (media.truncated(plain, tmp_path / "headless.mp4"), "cannot be read as a video"),
        (media.truncated(long_mkv, tmp_path / "cut.mkv"), "ends after .* of 8 seconds"),
    ]


def test_mistakes_are_one_line_that_names_the_file(tmp_path):
    for path, pattern in _not_videos(tmp_path):
        with pytest.raises(UserError, match=pattern) as caught:
            probe(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message, message


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "2024-01-01T12:30:00.mp4", "file:a.mp4", "http:a.mp4", "-a.mp4", "%03d.mp4"]
)
def test_a_name_is_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    media.write(tmp_path / name, 5)
    info = probe(name)
    with FrameReader(info, [4]) as reader:
        assert [media.read_stamp(image) for _, image in reader.read([4])] == [4]


def test_streams_that_could_reorder_frames_and_do_not(tmp_path):
    path = media.never_reordered(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
        assert container.streams.video[0].codec_context.has_b_frames and stamps == sorted(stamps)
    assert probe(path).seekable


def test_a_file_that_the_system_refuses_is_named_once(tmp_path):
    path = str(tmp_path / ("x" * 300))
    with pytest.raises(UserError) as caught:
        probe(path)
    assert str(caught.value) == f"{path}: File name too long"


def test_cover_picture_is_not_a_video(tmp_path):
    with pytest.raises(UserError, match="audio only"):
        probe(media.song_with_cover(tmp_path / "song.mp4"))


def test_a_picture_in_a_track_before_the_video_is_passed_over(tmp_path):
    info = probe(media.with_picture_first(tmp_path / "a.mkv", 50))
    assert (info.total, info.height, info.width) == (50, 64, 96)
    with FrameReader(info, [0, 49]) as reader:
        assert [media.read_stamp(image) for _, image in reader.read([0, 49])] == [0, 49]


def test_images_without_a_rate_are_no_video():
    with pytest.raises(UserError, match=r"^video: ndarray is no path; give one, or images as adapttoken_jax\.Frames$"):
        probe(np.zeros((4, 8, 8, 3), np.uint8))
