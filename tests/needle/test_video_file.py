"""Real mp4 files: what is written comes back."""

import av
import numpy as np
import pytest

from adapttoken_jax import needle
from adapttoken_jax.errors import UserError


def _decode(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_round_trip_keeps_frames_and_time(tmp_path):
    scene = needle.scene(0, "test", 301)
    path = needle.write_mp4(scene, tmp_path / "scene.mp4", fps=4)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.mp4"]
    decoded, images = _decode(path), scene.images()
    assert decoded.shape == images.shape == (301, 56, 56, 3)
    assert np.abs(decoded.astype(int) - images).mean() < 4
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        times = [float(packet.pts * packet.time_base) for packet in container.demux(stream) if packet.pts is not None]
    assert np.allclose(np.diff(np.sort(times)), 0.25)


@pytest.mark.parametrize("difficulty", ["normal", "extreme"])
def test_colours_survive_chroma_subsampling(tmp_path, difficulty):
    palette = np.asarray([*needle.COLOURS.values()]) * 255
    names = [*needle.COLOURS]
    for seed in range(8):
        scene = needle.scene(seed, "test", 16, difficulty=difficulty)
        decoded = _decode(needle.write_mp4(scene, tmp_path / "scene.mp4")).astype(float)
        one = scene.needles[0]
        mask = _needle_mask(scene, one)
        background = scene.images()[one.start].astype(float)
        opacity = scene.table.opacity[one.start, 0]
        under = (background[mask] - opacity * np.asarray(needle.COLOURS[one.colour]) * 255).mean(0)
        seen = (decoded[one.start][mask].mean(0) - under) / opacity
        assert names[np.argmin(np.abs(palette - seen).sum(1))] == one.colour
        assert np.abs(seen - palette[names.index(one.colour)]).max() < 40


def _needle_mask(scene, one) -> np.ndarray:
    """Pixels that the needle covers wholly in its first frame."""
    frame = scene.table.take(slice(one.start, one.start + 1))
    black = frame._replace(base=frame.base * 0, amplitude=frame.amplitude * 0, noise=frame.noise * 0)
    white = black._replace(rgb=black.rgb * 0 + 1, opacity=black.opacity * 0 + 1)
    hidden = white._replace(shape=np.where(np.arange(2) == 0, white.shape, -1))
    return needle.render(hidden, scene.height, scene.width)[0, ..., 0] == 255


@pytest.mark.parametrize("size", [(56, 56), (84, 140)])
def test_sizes_that_are_no_multiple_of_a_macroblock(tmp_path, size):
    path = needle.write_mp4(needle.scene(1, "test", 16, size=size), tmp_path / "scene.mp4", fps=2.5)
    assert _decode(path).shape == (16, *size, 3)


def test_long_videos_are_written_in_pieces():
    scene = needle.scene(1, "test", 10_000)
    assert scene.frames == 10_000
    pieces = list(needle.scene(1, "test", 600).image_chunks(256))
    assert [len(piece) for piece in pieces] == [256, 256, 88]
    assert np.array_equal(np.concatenate(pieces), needle.scene(1, "test", 600).images())
    assert scene.images(9_990).shape == (10, 56, 56, 3)


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path):
    scene = needle.scene(0, "test", 16)
    with pytest.raises(UserError, match="fps 0"):
        needle.write_mp4(scene, tmp_path / "a.mp4", fps=0)
    with pytest.raises(UserError, match="no such directory"):
        needle.write_mp4(scene, tmp_path / "missing" / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        needle.write_mp4(scene, tmp_path / "b.mp4")
    assert caught.value.filename == str(tmp_path / "b.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["b.mp4"]
