"""From a table of numbers per frame to pixels: one formula, for NumPy (video files) and inside `jax.jit` (training).

Axis letters here: F frames, N sprites per frame, Y image rows, X image columns.
"""

from typing import Any, NamedTuple

import numpy as np

SHAPES = ("disc", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (0.90, 0.15, 0.13),
    "green": (0.15, 0.75, 0.22),
    "blue": (0.20, 0.32, 0.95),
    "yellow": (0.93, 0.85, 0.16),
    "purple": (0.72, 0.22, 0.82),
    "cyan": (0.20, 0.86, 0.90),
}
NO_SHAPE = -1
CELL = 28  # side in pixels of one visual token of the model


class FrameTable(NamedTuple):
    """What each frame shows. Leading axes are free (a clip has [F], a batch of clips [B, F]); all float32 but two.

    base, amplitude: [F, 3] mean colour of the background in 0..1 and the swing of its gradient.
    wave: [F, 2] radians per pixel down and across; phase: [F] radians. The background is a travelling sine.
    shape: int32 [F, N] index into `SHAPES`, or `NO_SHAPE`.
    rgb: [F, N, 3] colour in 0..1; centre: [F, N, 2] pixels (down, across); radius: [F, N] pixels.
    A sprite is drawn in the cell of 28 x 28 pixels around its centre and cut off where it leaves it.
    opacity: [F, N] 0..1, the contrast of the sprite; noise: [F] half-width of the noise in levels (of 255).
    key: uint32 [F] seeds the noise.
    """

    base: Any
    amplitude: Any
    wave: Any
    phase: Any
    shape: Any
    rgb: Any
    centre: Any
    radius: Any
    opacity: Any
    noise: Any
    key: Any

    def take(self, index) -> "FrameTable":
        """The table at `index` of the first axis."""
        return FrameTable(*(field[index] for field in self))


def render(table: FrameTable, height: int, width: int, xp=np):
    """Draws frames.

    Args:
      table: a `FrameTable` with leading axes [..., F].
      height, width: pixels, multiples of 28.
      xp: `numpy` or `jax.numpy`; both give the same image to one level of 255.

    Returns:
      uint8 [..., F, Y, X, 3] RGB.
    """
    return xp.moveaxis(render_planes(table, height, width, xp), -3, -1)


def render_planes(table: FrameTable, height: int, width: int, xp=np):
    """What `render` returns, with the colour before the rows: uint8 [..., F, 3, Y, X]."""
    image = _background(table, height, width, xp)
    for n in range(table.shape.shape[-1]):
        cover = _coverage(table, n, height, width, xp)[..., None, :, :]
        image = image + cover * (table.rgb[..., n, :, None, None] - image)
    levels = image * 255 + _noise(table, height, width, xp)[..., None, :, :]
    return xp.clip(xp.round(levels), 0, 255).astype(xp.uint8)


def _pixels(count: int, xp):
    return xp.arange(count, dtype=xp.float32) + 0.5


def _background(table, height, width, xp):
    down = table.wave[..., 0, None] * _pixels(height, xp) + table.phase[..., None]
    across = table.wave[..., 1, None] * _pixels(width, xp)
    # sin(a + b) from one-dimensional tables: a sine per row and column instead of one per pixel.
    swing = xp.sin(down)[..., :, None] * xp.cos(across)[..., None, :]
    swing = swing + xp.cos(down)[..., :, None] * xp.sin(across)[..., None, :]
    return table.base[..., None, None] + table.amplitude[..., None, None] * swing[..., None, :, :]


def _coverage(table, n, height, width, xp):
    """Share of each pixel that sprite n hides, [..., F, Y, X]; edges are one pixel soft.

    Shapes are evaluated in the sprite's own cell only and set into a frame that is zero elsewhere.
    """
    centre = table.centre[..., n, :]
    cell = xp.floor(centre / CELL)
    down, across = (_pixels(CELL, xp) - (centre - cell * CELL)[..., axis, None] for axis in (0, 1))
    inside = _depth(table.shape[..., n], table.radius[..., n], down[..., :, None], across[..., None, :], xp)
    local = xp.clip(inside + 0.5, 0, 1) * table.opacity[..., n, None, None]  # [..., F, 28, 28]
    row, col = (
        (cell[..., axis, None] == xp.arange(side // CELL)).astype(xp.float32)
        for axis, side in ((0, height), (1, width))
    )
    place = row[..., :, None, None, None] * col[..., None, None, :, None]
    cover = place * local[..., None, :, None, :]  # [..., F, rows, 28, cols, 28]
    return cover.reshape(*cover.shape[:-4], height, width)


def _depth(shape, radius, down, across, xp):
    """Depth in pixels inside the sprite's shape; -1 for `NO_SHAPE`."""
    shape, radius = shape[..., None, None], radius[..., None, None]
    inside = xp.full((), -1.0, dtype=xp.float32)
    for index, name in enumerate(SHAPES):
        inside = xp.where(shape == index, _INSIDE[name](down, across, radius, xp), inside)
    return inside


# Depth of a pixel inside each shape, in pixels (negative outside); all lie within `radius` of the centre.


def _disc(y, x, r, xp):
    return r - xp.sqrt(y * y + x * x)


def _square(y, x, r, xp):
    return 0.72 * r - xp.maximum(xp.abs(y), xp.abs(x))


def _triangle(y, x, r, xp):
    return 0.46 * r - xp.maximum(y, 0.866 * xp.abs(x) - 0.5 * y)


def _star(y, x, r, xp):
    """Five points: a pixel is inside if it is inside at least four of the five lines of the pentagram."""
    lowest = second = None
    for point in range(5):
        angle = 2 * np.pi * point / 5
        line = 0.27 * r - (float(np.cos(angle)) * y + float(np.sin(angle)) * x)
        if lowest is None:
            lowest, second = line, xp.full_like(line, 1e6)
        else:
            second = xp.minimum(second, xp.maximum(lowest, line))
            lowest = xp.minimum(lowest, line)
    return second


def _cross(y, x, r, xp):
    y, x = xp.abs(y), xp.abs(x)
    upright = xp.minimum(0.95 * r - y, 0.3 * r - x)
    return xp.maximum(upright, xp.minimum(0.3 * r - y, 0.95 * r - x))


def _ring(y, x, r, xp):
    distance = xp.sqrt(y * y + x * x)
    return xp.minimum(r - distance, distance - 0.55 * r)


_INSIDE = dict(zip(SHAPES, (_disc, _square, _triangle, _star, _cross, _ring), strict=True))


def _noise(table, height, width, xp):
    """Triangular noise in levels, [..., F, Y, X], grey, the same from NumPy and JAX: a hash of the pixel's number."""
    pixel = xp.arange(height * width, dtype=xp.uint32).reshape(height, width)
    bits = (pixel + table.key[..., None, None]) * xp.uint32(2654435769)
    bits = (bits ^ (bits >> xp.uint32(15))) * xp.uint32(2246822519)
    bits = bits ^ (bits >> xp.uint32(13))
    low, high = bits & xp.uint32(0xFFFF), bits >> xp.uint32(16)
    unit = (low.astype(xp.float32) + high.astype(xp.float32)) * xp.float32(1 / 65535) - 1
    return table.noise[..., None, None] * unit
