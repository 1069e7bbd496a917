"""Intervals and paired tests for accuracies whose questions come in clusters, one per video.

Questions about one video share its difficulties, so that they count for less than as many independent ones. Each
estimate here is a weighted mean; its variance is the sum over videos of the squared sum of the questions' influences,
times C / (C - 1) for C videos (the linearised cluster variance), and its quantiles are Student's t with C - 1 degrees
of freedom. With one question per video and equal weights this is the usual interval of a mean.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from adapttoken_jax.errors import UserError


def clustered_error(influences: Sequence[float], clusters: Sequence[str]) -> tuple[float, int]:
    """(standard error, degrees of freedom) of an estimate from its questions' influences; NaN with one cluster."""
    _, index = np.unique(np.asarray(clusters, object).astype(str), return_inverse=True)
    sums = np.bincount(index, np.asarray(influences, np.float64))
    count = len(sums)
    if count < 2:
        return float("nan"), 0
    return float(np.sqrt(count / (count - 1) * np.sum(sums**2))), count - 1


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
    right = np.asarray(correct, np.float64)
    _, task, sizes = np.unique(
        np.zeros(len(right)) if strata is None else np.asarray(strata), return_inverse=True, return_counts=True
    )
    means = np.bincount(task, right) / sizes
    error, freedom = clustered_error((right - means[task]) / (len(sizes) * sizes[task]), clusters)
    half = error * float(stats.t.ppf(0.5 + level / 2, freedom)) if freedom else float("nan")
    estimate = float(means.mean())
    return estimate, float(np.maximum(estimate - half, 0)), float(np.minimum(estimate + half, 1))


@dataclasses.dataclass(frozen=True)
class Paired:
    """A comparison of two runs over the questions that both count.

    Attributes:
      n: questions in common.
      clusters: their videos.
      difference: the second run's accuracy minus the first's.
      low, high: its 95 % interval.
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
    first: Mapping[str, bool], second: Mapping[str, bool], clusters: Mapping[str, str], level: float = 0.95
) -> Paired:
    """Compares two runs question by question, clustered by video.

    Args:
      first, second: whether each question, by its id, was answered rightly.
      clusters: the video of each question.

    Raises:
      UserError: no question in common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise UserError("the two runs have no question in common; compare runs of one benchmark")
    gains = np.array([float(second[i]) - float(first[i]) for i in common])
    videos = [clusters[i] for i in common]
    mean = float(gains.mean())
    error, freedom = clustered_error((gains - mean) / len(gains), videos)
    half = error * float(stats.t.ppf(0.5 + level / 2, freedom)) if freedom else float("nan")
    return Paired(
        n=len(common),
        clusters=len(set(videos)),
        difference=mean,
        low=mean - half,
        high=mean + half,
        p_value=_p_value(mean, error, freedom),
        only_first=int((gains < 0).sum()),
        only_second=int((gains > 0).sum()),
    )


def _p_value(mean: float, error: float, freedom: int) -> float:
    if not freedom:
        return float("nan")
    if error == 0:  # every video has the same gain
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom))
