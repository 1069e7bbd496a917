"""The groups' answers taken together: a second answer for free, to hold against the final one.

Axis letters: g groups, O options. NumPy, float64; JAX arrays are accepted.
"""

import numpy as np


def option_consensus(probabilities, weights) -> np.ndarray:
    """The groups' option distributions, mixed by weight (the linear opinion pool).

    Args:
      probabilities: [g, O], each row sums to 1.
      weights: [g] of any positive sum, for example the budget's softmax weights.

    Returns:
      float64[O], sums to 1.

    Raises:
      ValueError: shapes that do not fit, a negative weight, or weights without a positive, finite sum.
    """
    probabilities, weights = _checked(probabilities, weights)
    return weights @ probabilities


def pooled_evidence(probabilities, blind=None) -> np.ndarray:
    """What the groups say together if each one's evidence is independent: p ~ blind * product of (p_g / blind).

    Where the linear pool can never be more certain than its most certain group, this one can: two groups that each see
    one half of the answer leave one option. It also sums up small common leanings, so it must be calibrated before
    a threshold on it means anything.

    Args:
      probabilities: [g, O], each row sums to 1. Zeros count as the least float32 probability.
      blind: [O], what the question alone says; None: all options alike.

    Returns:
      float64[O], sums to 1.
    """
    tiny = np.finfo(np.float32).tiny
    log_p = np.log(np.maximum(np.asarray(probabilities, np.float64), tiny))
    prior = np.zeros(log_p.shape[-1]) if blind is None else np.log(np.maximum(np.asarray(blind, np.float64), tiny))
    total = prior + (log_p - prior).sum(0)
    pooled = np.exp(total - total.max())
    return pooled / pooled.sum()


def _checked(probabilities, weights):
    probabilities, weights = np.asarray(probabilities, np.float64), np.asarray(weights, np.float64)
    if probabilities.ndim != 2 or weights.shape != probabilities.shape[:1]:
        raise ValueError(f"{weights.shape} weights do not fit distributions of shape {probabilities.shape}")
    total = weights.sum()
    if (weights < 0).any() or not 0 < total < np.inf:
        raise ValueError(f"weights must not be negative and must have a positive sum: {weights.tolist()}")
    return probabilities, weights / total
