"""Exact statistics of calibration, in plain Python and NumPy.

A stop rule loses on a video when Lite answers one of its questions otherwise than the full run. Losses are 0 or 1 and
videos are independent, so that under the hypothesis "the risk is above alpha" the number of losses in n videos is at
least as large as a Binomial(n, alpha), and P(Binomial(n, alpha) <= losses) is a valid p-value, exact at the boundary.
"""

import math
from collections.abc import Sequence

import numpy as np

from adapttoken_jax.errors import UserError


def binomial_tail(losses: int, n: int, alpha: float) -> float:
    """P(Binomial(n, alpha) <= losses); terms as exponentials of logarithms, so that no n is too large."""
    if losses >= n:
        return 1.0
    log_odds = math.log(alpha), math.log1p(-alpha)
    choose = lambda k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    terms = (math.exp(choose(k) + k * log_odds[0] + (n - k) * log_odds[1]) for k in range(losses + 1))
    return min(1.0, math.fsum(terms))


def required_videos(alpha: float, delta: float, losses: int = 0) -> int:
    """The fewest videos that certify a risk of at most `alpha` with confidence 1 - `delta` in spite of `losses`.

    Raises:
      UserError: `alpha` or `delta` is not between 0 and 1.
    """
    check_levels(alpha, delta)
    low, high = losses, losses + 1  # low fails, high may
    while binomial_tail(losses, high, alpha) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if binomial_tail(losses, middle, alpha) <= delta else (middle, high)
    return high


def allowed_losses(n: int, alpha: float, delta: float) -> int:
    """The most losses in `n` videos that still certify `alpha` at `delta`; -1 if not even none does."""
    check_levels(alpha, delta)
    losses = -1
    while binomial_tail(losses + 1, n, alpha) <= delta:
        losses += 1
    return losses


def certified(losses: Sequence[int], n: int, alpha: float, delta: float) -> int:
    """How many of the thresholds, tested from cautious to bold, are certified; the last of them is the one to use.

    Fixed-sequence testing: each threshold is tested at the full level `delta` and the first failure ends the tests, so
    that the probability of certifying any threshold with a risk above `alpha` is at most `delta`, whatever the risks
    are and however the losses depend on one another. The order must be fixed before the losses are seen.

    Args:
      losses: losses in the same `n` videos under each threshold, in the order of the tests.
    """
    check_levels(alpha, delta)
    for place, lost in enumerate(losses):
        if binomial_tail(lost, n, alpha) > delta:
            return place
    return len(losses)


def resampled_risks(lost, n: int, alpha: float, delta: float, resamples: int, seed: int = 0, fresh=None) -> np.ndarray:
    """Calibrates again and again, and tells the risk of every rule that was certified.

    Calibration sets of `n` are drawn from the logged videos with replacement. The risk of a threshold is its share of
    losses among videos that no calibration saw; without any, the logged videos serve as the whole population, whose
    risk is exactly that. The promise is that at most a share `delta` of the calibrations certify a risk above `alpha`.

    Args:
      lost: bool[videos, thresholds], thresholds from cautious to bold.
      fresh: the same of other videos, or None.

    Returns:
      float64[resamples], NaN where nothing was certified.
    """
    lost = np.asarray(lost, bool)
    allowed, random = allowed_losses(n, alpha, delta), np.random.default_rng(seed)
    risks = np.append((lost if fresh is None else np.asarray(fresh, bool)).mean(0), np.nan)
    found = np.empty(resamples, int)
    for i in range(resamples):
        failed = lost[random.integers(len(lost), size=n)].sum(0) > allowed
        # The last accepted threshold stands before the first that failed; before the first of all stands nothing.
        found[i] = np.argmax(failed) - 1 if failed.any() else lost.shape[1] - 1
    return risks[found]


def check_levels(alpha: float, delta: float) -> None:
    """Raises `UserError` unless both lie between 0 and 1."""
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            raise UserError(f"--{name}={value}: must lie between 0 and 1")


def auroc(scores, positive) -> float:
    """Probability that a positive case scores higher than a negative one, ties half; NaN if a class is empty.

    Args:
      scores: [n], without NaN. positive: bool[n].
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    values, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    positives = np.bincount(place[positive], minlength=len(values))
    negatives = counts - positives
    pairs = int(positives.sum()) * int(negatives.sum())
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else math.nan
