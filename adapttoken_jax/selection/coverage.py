"""A floor of coverage: some of the budget as one token per stretch of time, so that no part of the video is unseen.

Tokens are kept or dropped, never merged: a merged token would have no right M-RoPE position.
"""

import numpy as np


def coverage_count(coverage: float, budget: int) -> int:
    """Tokens of the budget that are set aside: floor(coverage * budget)."""
    return int(coverage * budget + 1e-9)


def coverage_tokens(slots, score, num_slots: int, count: int) -> np.ndarray:
    """Marks the best token of each of `count` stretches of equal length that make up the video.

    Slot s belongs to stretch floor(s * count / num_slots). A stretch without tokens gives none, so that fewer than
    `count` may come out: with more stretches than slots, or where no group was visited.

    Args:
      slots: int[n], slot of each token in the whole video, in 0 .. num_slots - 1.
      score: [n]; among equals the token with the lower index wins.
      num_slots: slots of the whole video.
      count: stretches; 0 marks nothing.

    Returns:
      bool[n].
    """
    slots, score = np.asarray(slots, np.int64), np.asarray(score, np.float64)
    marked = np.zeros(len(slots), bool)
    if count == 0:
        return marked
    stretch = slots * count // num_slots
    best_first = np.lexsort((-score, stretch))  # stable: equals stay in order
    _, first = np.unique(stretch[best_first], return_index=True)
    marked[best_first[first]] = True
    return marked
