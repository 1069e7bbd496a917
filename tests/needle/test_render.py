"""Rendering: NumPy against JAX, and shapes against literal facts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax import needle
from adapttoken_jax.needle.render import NO_SHAPE


def _plain(shape: int, radius: float = 12.0, opacity: float = 1.0) -> needle.FrameTable:
    """One black frame with a white sprite in the middle of 28 x 28 pixels."""
    return needle.FrameTable(
        base=np.zeros((1, 3), np.float32),
        amplitude=np.zeros((1, 3), np.float32),
        wave=np.zeros((1, 2), np.float32),
        phase=np.zeros(1, np.float32),
        shape=np.full((1, 1), shape, np.int32),
        rgb=np.ones((1, 1, 3), np.float32),
        centre=np.full((1, 1, 2), 14, np.float32),
        radius=np.full((1, 1), radius, np.float32),
        opacity=np.full((1, 1), opacity, np.float32),
        noise=np.zeros(1, np.float32),
        key=np.zeros(1, np.uint32),
    )


@pytest.mark.parametrize("difficulty", sorted(needle.DIFFICULTIES))
@pytest.mark.parametrize("size", [(56, 56), (84, 140)])
def test_jax_renders_what_numpy_renders(difficulty, size):
    tables = [needle.scene(seed, "test", 32, "pair", difficulty, size).table for seed in range(3)]
    batch = needle.FrameTable(*(np.stack(field) for field in zip(*tables, strict=True)))
    draw = jax.jit(lambda table: needle.render(table, *size, xp=jnp))
    ours, theirs = np.asarray(draw(batch)), needle.render(batch, *size)
    assert ours.dtype == theirs.dtype == np.uint8 and ours.shape == (3, 32, *size, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


# Share of the circumscribed circle, from plane geometry: a square of half-side 0.72 r, an equilateral triangle (sides
# 0.46 r from the centre), the pentagram with lines at 0.27 r, two crossed bars, a ring with a hole of 0.55 r.
_AREA = {
    "disc": 1.0,
    "square": (2 * 0.72) ** 2 / np.pi,
    "triangle": 0.92**2 * 3 * np.sqrt(3) / 4 / np.pi,
    "star": 10 * np.tan(np.pi / 10) / (3 - np.tan(np.pi / 10) ** 2) / np.pi * (0.27 / np.cos(2 * np.pi / 5)) ** 2,
    "cross": (2 * 1.9 * 0.6 - 0.6**2) / np.pi,
    "ring": 1 - 0.55**2,
}


@pytest.mark.parametrize("index,name", list(enumerate(needle.SHAPES)))
def test_shapes_have_their_area_and_stay_in_their_circle(index, name):
    cover = needle.render(_plain(index), 28, 28)[0, ..., 0] / 255
    assert abs(cover.sum() / (np.pi * 12**2) / _AREA[name] - 1) < 0.08
    y, x = np.mgrid[:28, :28] + 0.5 - 14
    assert np.all(cover[np.hypot(y, x) > 12 + 1.3] == 0)
    assert cover[14, 14] == (0 if name == "ring" else 1)
    assert np.abs(cover - cover[:, ::-1]).max() < 0.01  # every shape is the same from left and right


def test_opacity_mixes_and_no_shape_draws_nothing():
    assert needle.render(_plain(0, opacity=0.4), 28, 28)[0, 14, 14].tolist() == [102, 102, 102]
    assert not needle.render(_plain(NO_SHAPE), 28, 28).any()


def test_noise_is_triangular_around_the_image_and_differs_between_frames():
    table = _plain(NO_SHAPE)._replace(base=np.full((1, 3), 0.5, np.float32), noise=np.asarray([20], np.float32))
    draws = [needle.render(table._replace(key=np.asarray([k], np.uint32)), 56, 56)[0, ..., 0] for k in (1, 12345)]
    for draw in draws:
        off = draw.astype(float) - 127.5
        assert abs(off.mean()) < 0.7 and abs(off.std() - 20 / np.sqrt(6)) < 0.5 and np.abs(off).max() <= 20.5
    correlation = np.corrcoef(draws[0].ravel(), draws[1].ravel())[0, 1]
    assert abs(correlation) < 0.1
