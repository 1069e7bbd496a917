"""Intervals and paired tests for accuracies whose questions come in clusters, one per video.

Questions about one video share its difficulties, so that they count for less than as many independent ones. Each
estimate here is a weighted mean; its variance is the sum over videos of the squared sum of the questions' influences,
times C / (C - 1) for C videos (the linearised cluster variance), and its quantiles are Student's t with C - 1 degrees
of freedom. With one question per video and equal weights this is the usual interval of a mean.

Where all C videos score alike, that variance is 0 and tells nothing of the videos that were not seen. The interval is
then the rule of three's: a new video differs with a probability of at most q = 1 - (1 - level)^(1/C), or all C would
seldom agree, and its own score may be any. The test is then the sign test over videos.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special  # `scipy.stats` takes a second to import

from adapttoken_jax.errors import UserError

_ROUNDING = 1e-12  # a standard error below this is none: it is what rounding leaves of equal videos


def clustered_error(influences: Sequence[float], clusters: Sequence[str]) -> tuple[float, int]:
    """(standard error, degrees of freedom) of an estimate from its questions' influences.

    The error is NaN with one cluster, and exactly 0 where all clusters agree.
    """
    _, index = np.unique(np.asarray(clusters, object).astype(str), return_inverse=True)
    sums = np.bincount(index, np.asarray(influences, np.float64))
    count = len(sums)
    if count < 2:
        return float("nan"), 0
    error = float(np.sqrt(count / (count - 1) * np.sum(sums**2)))
    return (error if error > _ROUNDING else 0.0), count - 1


def accuracy_interval(
    correct: Sequence[float], clusters: Sequence[str], strata: Sequence[str] | None = None, level: float = 0.95
) -> tuple[float, float, float]:
    """(estimate, low, high) of an accuracy, cut to 0 … 1.

    Args:
      correct: 1 or 0 per question; at least one.
      clusters: the video of each.
      strata: the task of each for the mean of the tasks' accuracies; None for the accuracy over all questions.
      level: of the interval. With one video its ends are NaN.
    """
    estimate, error, freedom = _mean(correct, clusters, strata)
    return estimate, *_interval(estimate, error, freedom, level, lowest=0.0)


def _mean(values: Sequence[float], clusters: Sequence[str], strata: Sequence[str] | None) -> tuple[float, float, int]:
    """(mean, standard error, degrees of freedom) of values; with strata of the mean of their means."""
    values = np.asarray(values, np.float64)
    _, stratum, sizes = np.unique(
        np.zeros(len(values)) if strata is None else np.asarray(strata), return_inverse=True, return_counts=True
    )
    means = np.bincount(stratum, values) / sizes
    influences = (values - means[stratum]) / (len(sizes) * sizes[stratum])
    return float(means.mean()), *clustered_error(influences, clusters)


def _interval(mean: float, error: float, freedom: int, level: float, lowest: float) -> tuple[float, float]:
    """(low, high) around a mean of values between `lowest` and 1; NaN with one video."""
    if not freedom:
        return float("nan"), float("nan")
    if error == 0:
        differs = 1 - (1 - level) ** (1 / (freedom + 1))
        return mean - differs * (mean - lowest), mean + differs * (1 - mean)
    half = error * float(special.stdtrit(freedom, 0.5 + level / 2))
    return max(mean - half, lowest), min(mean + half, 1.0)


@dataclasses.dataclass(frozen=True)
class Paired:
    """A comparison of two runs over the questions that both count.

    Attributes:
      n: questions in common.
      clusters: their videos.
      difference: the second run's accuracy minus the first's.
      low, high: its 95 % interval, cut to -1 … 1.
      p_value: two-sided, of no difference.
      only_first, only_second: questions that only one of them answers rightly.
    """

    n: int
    clusters: int
    difference: float
    low: float
    high: float
    p_value: float
    only_first: int
    only_second: int


def paired_difference(
    first: Mapping[str, bool],
    second: Mapping[str, bool],
    clusters: Mapping[str, str],
    strata: Mapping[str, str] | None = None,
    level: float = 0.95,
) -> Paired:
    """Compares two runs question by question, clustered by video.

    Args:
      first, second: whether each question, by its id, was answered rightly.
      clusters: the video of each question.
      strata: the task of each where the accuracies are means of the tasks' accuracies; None: over all questions.

    Raises:
      UserError: no question in common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise UserError("the two runs have no question in common; compare runs of one benchmark")
    gains = np.array([float(second[i]) - float(first[i]) for i in common])
    videos = [clusters[i] for i in common]
    mean, error, freedom = _mean(gains, videos, strata and [strata[i] for i in common])
    low, high = _interval(mean, error, freedom, level, lowest=-1.0)
    return Paired(
        n=len(common),
        clusters=len(set(videos)),
        difference=mean,
        low=low,
        high=high,
        p_value=_p_value(mean, error, freedom),
        only_first=int((gains < 0).sum()),
        only_second=int((gains > 0).sum()),
    )


def _p_value(mean: float, error: float, freedom: int) -> float:
    if not freedom:
        return float("nan")
    if error == 0:  # every video has the same gain: the sign test
        return 1.0 if mean == 0 else 2 * 0.5 ** (freedom + 1)
    return float(2 * special.stdtr(freedom, -abs(mean) / error))
