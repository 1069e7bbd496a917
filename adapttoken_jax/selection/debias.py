"""Relevance without what attention gives to a place whatever is there: a trend over the group, and sinks.

Attention grows or falls with the distance to the question, and some places draw it without reason. Both come from
the position and not from the picture. A mean across groups would find them too, but interleaved groups hold
neighbouring frames at the same place, so that it would take the evidence itself away.

Axis letters: k slots of a group, M tokens per slot. NumPy, on the host.
"""

import numpy as np

# A cell is a sink if its median over the group's slots is this many times the median cell's.
_SINK_FACTOR = 8.0

_LEAST_SLOTS = 4  # of a group whose trend can be told from its evidence

# Slots without any attention count as this share of the middle slot's: a logarithm of 0 would bend every other slot.
_FLOOR = 1e-3


def debias_relevance(relevance) -> np.ndarray:
    """Divides a group's relevance by a smooth trend over its slots and sets sinks to zero.

    The trend is a parabola, fitted by least squares to the logarithm of each slot's median (a median, so that a few
    tokens with evidence do not bend it), scaled to a geometric mean of 1: relevance keeps its size, and groups stay
    comparable. Fewer than 8 slots get a straight line, and fewer than 4 are left as they are: a curve through so few
    points, or a median of them, would be the evidence itself.

    A sink is a cell (row and column) that stands out through most of the group's slots; less than half of the cells can
    be sinks. What shows the whole time at one place, such as a clock, looks the same and is lost too. The very first
    token, where decoders keep their sink, is judged alone, by the same factor over the median token.

    Args:
      relevance: float[k, M], not negative, not NaN.

    Returns:
      float32[k, M].
    """
    relevance = np.asarray(relevance, np.float64)
    if len(relevance) < _LEAST_SLOTS:
        return relevance.astype(np.float32)
    flat = relevance / position_trend(relevance)[:, None]
    cells = np.median(flat, 0)
    flat[:, cells > _SINK_FACTOR * np.median(cells)] = 0
    if flat[0, 0] > _SINK_FACTOR * np.median(flat):
        flat[0, 0] = 0
    return flat.astype(np.float32)


def position_trend(relevance) -> np.ndarray:
    """The smooth trend of `debias_relevance` over the slots of a group: float64[k], geometric mean 1."""
    level = np.median(np.asarray(relevance, np.float64), 1)
    level = np.log(np.maximum(level, max(_FLOOR * np.median(level), np.finfo(np.float64).tiny)))
    k = len(level)
    degree = 2 if k >= 8 else 1 if k >= _LEAST_SLOTS else 0
    powers = np.vander(np.linspace(-1, 1, k), degree + 1)
    fitted = powers @ np.linalg.lstsq(powers, level, rcond=None)[0]
    return np.exp(fitted - fitted.mean())
