"""The two reference resizers: float32 bicubic with antialiasing (qwen-vl-utils) and Pillow's bicubic (transformers).

Both widen the bicubic kernel (a = -0.5) by the reduction factor. The first works in float32 and rounds once at the end,
as `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` followed by clamp and round does; the second rounds
to uint8 between its two passes with fixed-point weights. On noise they differ by up to 23 levels.
"""

import functools

import numpy as np

# Output rows (columns) per matrix product. A weight matrix is a narrow band, so a product over few outputs touches few
# inputs; smaller blocks than this cost more in calls than they save in arithmetic.
_BLOCK = 4
# OpenBLAS runs products of at most this many multiplications on one thread; waking more costs more than it gives.
_SINGLE_THREAD_PRODUCT = 2**18


def resize_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W, C] to uint8 [height, width, C] in float32: rows, then columns, clamp, round half to even."""
    rows, cols, channels = image.shape
    if (rows, cols) == (height, width):
        return image
    source = image.astype(np.float32, order="C").reshape(rows, cols * channels)
    middle = np.empty((height, cols * channels), np.float32)
    for weights, taken, made, part in _products(rows, height, 1, cols * channels):
        np.matmul(weights.T, source[taken, part], out=middle[made, part])
    result = np.empty((height, width * channels), np.float32)
    for weights, taken, made, part in _products(cols, width, channels, height):
        np.matmul(middle[part, taken], weights, out=result[part, made])
    np.clip(np.rint(result, out=result), 0, 255, out=result)
    return result.astype(np.uint8).reshape(height, width, channels)


def resize_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to uint8 [height, width, 3] with Pillow's BICUBIC.

    Within 2 levels of transformers' at usual sizes of videos; on noise, at some sizes, within 23.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=64)
def bicubic_weights(size: int, new_size: int) -> np.ndarray:
    """Weights float32 [new_size, size] of the antialiased bicubic kernel; each row sums to 1.

    Positions and kernel are evaluated in float32, as the torch kernel does: float64 weights move one value in
    two thousand across a rounding boundary.
    """
    scale = np.float32(size) / np.float32(new_size)
    stretch = np.maximum(scale, np.float32(1))
    reach = np.float32(2) * stretch
    centre = (scale.astype(np.float64) * (np.arange(new_size) + 0.5)).astype(np.float32)[:, None]
    low = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + reach + 0.5).astype(np.int64), size)
    index = np.arange(size)
    offset = (index.astype(np.float32) - centre).astype(np.float64) + 0.5
    weights = _kernel(np.abs(offset * (np.float32(1) / stretch).astype(np.float64)).astype(np.float32))
    weights = np.where((index >= low) & (index < high), weights, np.float32(0))
    return weights / weights.cumsum(axis=1, dtype=np.float32)[:, -1:]


def _kernel(x: np.ndarray) -> np.ndarray:
    """The bicubic kernel with a = -0.5 at distances x >= 0, in x's type."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0)).astype(x.dtype)


@functools.lru_cache(maxsize=64)
def _products(size: int, new_size: int, channels: int, length: int) -> list[tuple[np.ndarray, slice, slice, slice]]:
    """A pass over `length` lines as small products: weights, inputs taken, outputs made, and lines.

    A list, made once: every frame of a video goes through it, in many threads of which Python runs one at a time.
    """
    bands = _bands(size, new_size, channels)
    return [(weights, *ends, part) for weights, *ends in bands for part in _parts(length, weights.size)]


def _bands(size: int, new_size: int, channels: int) -> list[tuple[np.ndarray, slice, slice]]:
    """The weight matrix as blocks (weights [input, output], input slice, output slice) for interleaved channels."""
    dense = bicubic_weights(size, new_size)
    bands = []
    for start in range(0, new_size, _BLOCK):
        block = dense[start : start + _BLOCK]
        used = np.flatnonzero(block.any(axis=0))
        low, high = used[0], used[-1] + 1
        weights = np.kron(block[:, low:high].T, np.eye(channels, dtype=np.float32))
        made = slice(start * channels, (start + len(block)) * channels)
        bands.append((weights, slice(low * channels, high * channels), made))
    return bands


def _parts(length: int, weights: int) -> list[slice]:
    step = max(1, _SINGLE_THREAD_PRODUCT // weights)
    return [slice(start, start + step) for start in range(0, length, step)]


RESIZERS = {"float32": resize_bicubic, "pillow": resize_pillow}
