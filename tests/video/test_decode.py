"""`FrameReader`: the right frame, from every container, however sparse or unordered the request."""

import av
import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.video import FrameReader, probe
from adapttoken_jax.video.decode import SEEK_FRAMES, orient
from tests import media


def decode_everything(path):
    """The oracle: every frame in display order, converted like the reference readers do."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def read(path, indices):
    with FrameReader(probe(path), indices) as reader:
        return list(reader.read(indices))


class CountingReader(FrameReader):
    """Counts the frames that leave the decoder."""

    decoded = 0

    def _decode(self, packets):
        for item in super()._decode(packets):
            self.decoded += 1
            yield item


CONTAINERS = [
    ("a.mp4", {}),
    ("a.mkv", {}),
    ("a.ts", {}),
    ("fragments.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    ("a.avi", {"codec": "mpeg4", "bf": "2"}),
    ("b.avi", {"bf": "2"}),
    ("a.h264", {}),
    ("a.webm", {"codec": "libvpx", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("hevc.mp4", {"codec": "libx265", "x265-params": "log-level=none:keyint=12"}),
    ("intra.mkv", {"codec": "ffv1", "pix_fmt": "bgr0"}),
]


@pytest.mark.parametrize(("name", "options"), CONTAINERS, ids=[name for name, _ in CONTAINERS])
def test_every_container_gives_the_right_frames(tmp_path, name, options):
    path = media.write(tmp_path / name, 60, **options)
    expected = decode_everything(path)
    for indices in (range(60), [0, 7, 8, 30, 59], [41]):
        got = read(path, indices)
        assert [index for index, _ in got] == list(indices)
        for index, image in got:
            assert media.read_stamp(image) == index
            np.testing.assert_array_equal(image, expected[index])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_open_gop_each_frame_alone(tmp_path, name):
    """After a jump, pictures shown before the key frame cannot be decoded: they need the key frame before it."""
    path = media.open_gop(tmp_path / name, 72)
    expected = decode_everything(path)
    info = probe(path)
    assert len(info.keyframes) == 6
    with FrameReader(info, range(72)) as reader:
        for index in np.random.default_rng(0).permutation(72):
            [(_, image)] = reader.read([index])
            np.testing.assert_array_equal(image, expected[index])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_key_frames_at_which_no_picture_can_be_decoded(tmp_path, name):
    path = media.intra_refresh(tmp_path / name, 240)
    assert len(probe(path).keyframes) > 5
    for indices in (range(5, 240, 60), [239]):
        assert [media.read_stamp(image) for _, image in read(path, indices)] == list(indices)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_packets_with_the_times_of_decoding(tmp_path, name):
    path = media.write(tmp_path / "source.mp4", 60, bf="2", **{"x264-params": "b-adapt=0"})
    path = media.stamped_as_decoded(path, tmp_path / name)
    info = probe(path)
    assert info.total == 60 and np.diff(info.times) == pytest.approx(0.04, abs=1e-3)
    assert [media.read_stamp(image) for _, image in read(path, range(60))] == [*range(60)]
    assert [media.read_stamp(image) for _, image in read(path, [41, 7])] == [41, 7]


def test_frames_left_out_of_a_quicktime_file(tmp_path):
    path = media.write(tmp_path / "a.mov", 30, codec="mjpeg", pix_fmt="yuvj420p")
    path = media.emptied(path, tmp_path / "b.mov", 7, 20)
    shown = [index for index in range(30) if index not in (7, 20)]
    assert probe(path).times == pytest.approx(np.asarray(shown) / 25)
    assert [media.read_stamp(image) for _, image in read(path, range(28))] == shown


def test_unneeded_pictures_are_not_decoded_and_nothing_else_changes(tmp_path):
    path = media.write(tmp_path / "a.mp4", 60, gop=60, bf="3", **{"b-pyramid": "normal", "sc_threshold": "0"})
    expected, wanted = decode_everything(path), [0, 3, 11, 22, 23, 40, 59]
    with CountingReader(probe(path), wanted) as reader:
        for index, image in reader.read(wanted):
            np.testing.assert_array_equal(image, expected[index])
    assert reader.decoded < 45


def test_a_later_call_gets_frames_near_the_end_of_the_call_before(tmp_path):
    """The decoder reads ahead; pictures that a later call wants must not be left out then."""
    path = media.write(tmp_path / "a.mp4", 60, gop=60, bf="3")
    expected = decode_everything(path)
    with FrameReader(probe(path), range(60)) as reader:
        for start in range(0, 60, 5):
            for index, image in reader.read(range(start, start + 5)):
                np.testing.assert_array_equal(image, expected[index])


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    return media.long_clip(tmp_path_factory.mktemp("long") / "long.mp4")


def test_sparse_frames_of_a_long_clip_are_sought(long_clip):
    info = probe(long_clip)
    assert (info.total, info.duration_s) == (6000, pytest.approx(1200.0))
    wanted = [5, 1001, 3000, 5999]
    with CountingReader(info, wanted) as reader:
        assert [media.read_stamp(image) for _, image in reader.read(wanted)] == wanted
    assert reader.decoded < 4 * 50  # a group of pictures is 50 frames


def test_dense_frames_are_read_straight_through(long_clip, monkeypatch):
    info = probe(long_clip)
    wanted = range(0, 1000, SEEK_FRAMES)
    with FrameReader(info, wanted) as reader:
        monkeypatch.setattr(reader, "_seek", lambda start: pytest.fail("sought although the next frame is near"))
        assert [media.read_stamp(image) for _, image in reader.read(wanted)] == list(wanted)


def test_without_seeking_sparse_frames_are_the_same(tmp_path):
    path = media.write(tmp_path / "a.avi", 120, codec="mpeg4", gop=10)
    with FrameReader(probe(path), [0, 100, 50, 110]) as reader:
        for index in (100, 50, 110, 0):  # 50 and 0 lie behind: the file is opened again
            [(_, image)] = reader.read([index])
            assert media.read_stamp(image) == index


def test_edit_list(tmp_path):
    path = media.trimmed(media.write(tmp_path / "a.mp4", 60, bf="2"), tmp_path / "b.mp4", first=15, count=30)
    assert [media.read_stamp(image) for _, image in read(path, range(30))] == list(range(15, 45))
    assert [media.read_stamp(image) for _, image in read(path, [29])] == [44]


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_recording_that_starts_inside_a_group_of_pictures(tmp_path, suffix):
    path = media.open_gop(tmp_path / f"a.{suffix}", 60)
    path = media.without_packets(path, tmp_path / f"b.{suffix}", range(5))
    assert [media.read_stamp(image) for _, image in read(path, range(48))] == list(range(12, 60))


def test_packets_before_the_first_key_frame_are_left_out(tmp_path):
    """A decoder of VP8 refuses them."""
    path = media.write(tmp_path / "a.webm", 60, codec="libvpx", gop=12)
    path = media.without_packets(path, tmp_path / "b.webm", range(5))
    assert [media.read_stamp(image) for _, image in read(path, range(48))] == list(range(12, 60))


def test_a_frame_that_the_decoder_loses_is_replaced_by_the_next(tmp_path):
    info = media.damaged_since(tmp_path / "a.mkv", 60, range(20, 23))
    with FrameReader(info, range(60)) as reader:
        assert [media.read_stamp(image) for _, image in reader.read(range(18, 25))] == [18, 19, 23, 23, 23, 23, 24]


def test_a_hole_in_the_video_is_reported(tmp_path):
    info = media.damaged_since(tmp_path / "a.mkv", 60, range(20, 50))
    broken = pytest.raises(UserError, match=r"a\.mkv: the frame at 0\.80 s cannot be decoded")
    with FrameReader(info, range(60)) as reader, broken:
        list(reader.read([19, 20]))


def test_an_index_that_leads_too_far_is_not_believed(long_clip):
    class Misled:
        """A container whose index is a minute off."""

        def __init__(self, container):
            self.container, self.demux = container, container.demux

        def seek(self, offset, stream):
            self.container.seek(offset + int(60 / stream.time_base), stream=stream)

    with FrameReader(probe(long_clip), [0, 1000, 2000]) as reader:
        list(reader.read([0]))
        reader._container = Misled(reader._container)
        assert [media.read_stamp(image) for _, image in reader.read([1000, 2000])] == [1000, 2000]


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_rotation_is_applied(tmp_path, quarters):
    degrees = [0, 90, 180, -90][quarters]  # counter-clockwise, as np.rot90 turns
    path = media.write(tmp_path / "a.mp4", 6, rotation=degrees)
    plain = decode_everything(path)
    for index, image in read(path, range(6)):
        np.testing.assert_array_equal(image, np.rot90(plain[index], quarters))
        assert media.read_stamp(np.rot90(image, -quarters)) == index


def test_a_phone_held_upright(tmp_path):
    """The matrix that phones write turns the picture clockwise by a quarter: the left column becomes the top row."""
    path = media.turned(media.write(tmp_path / "a.mp4", 2), tmp_path / "b.mp4", (0, 1, -1, 0))
    [(_, image)] = read(path, [1])
    assert image.shape == (96, 64, 3)
    np.testing.assert_array_equal(image[0], decode_everything(path)[1][::-1, 0])


@pytest.mark.parametrize(("orientation", "quarters"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_pictures_of_a_camera_are_turned_by_exif(tmp_path, orientation, quarters):
    """EXIF: 6 is shown a quarter clockwise, 8 counter-clockwise."""
    path = media.photographs(tmp_path / "a.avi", orientation=orientation)
    for index, image in read(path, range(5)):
        upright = np.rot90(media.stamped(index), quarters)
        assert image.shape == upright.shape and media.read_stamp(image) == media.read_stamp(upright)


def test_a_mirrored_picture(tmp_path):
    path = media.turned(media.write(tmp_path / "a.mp4", 2), tmp_path / "b.mp4", (-1, 0, 0, 1))
    [(_, image)] = read(path, [1])
    np.testing.assert_array_equal(image, decode_everything(path)[1][:, ::-1])


def test_orient_follows_the_display_matrix_pixel_by_pixel():
    image = np.arange(6).reshape(2, 3, 1)
    corners = {
        (False, False, False): [[0, 1, 2], [3, 4, 5]],
        (False, True, True): [[5, 4, 3], [2, 1, 0]],
        (True, False, False): [[0, 3], [1, 4], [2, 5]],
        (True, True, False): [[2, 5], [1, 4], [0, 3]],
        (True, False, True): [[3, 0], [4, 1], [5, 2]],
    }
    for orientation, expected in corners.items():
        np.testing.assert_array_equal(orient(image, orientation)[..., 0], expected)


def test_variable_rate(tmp_path):
    times = [0, 40, 80, 1000, 1040, 3000]
    path = media.write(tmp_path / "a.mkv", 6, milliseconds=times)
    assert [media.read_stamp(image) for _, image in read(path, [1, 3, 5])] == [1, 3, 5]


def test_file_that_shrinks_after_the_probe(tmp_path):
    path = media.write(tmp_path / "a.mp4", 200, container_options={"movflags": "faststart"})
    info = probe(path)
    media.truncated(path, path)
    with FrameReader(info, [0, 199]) as reader, pytest.raises(UserError, match="cannot be decoded") as caught:
        list(reader.read([0, 199]))
    assert str(caught.value).startswith(str(path))


def test_damaged_pictures_are_reported_with_the_time(tmp_path):
    path = media.write(tmp_path / "a.mp4", 200, (64, 96), gop=200, sc_threshold="0", bf="0")
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    middle = start + (content.index(b"moov") - start) // 3
    content[middle : content.index(b"moov") - 8] = bytes(content.index(b"moov") - 8 - middle)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be decoded.*s") as caught:
        read(path, [0, 199])
    assert str(caught.value).startswith(str(path))
