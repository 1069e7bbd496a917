"""Figures with their uncertainty. The unit is the video: questions about one video share its pictures.

Letters: n questions.
"""

import numpy as np

from adapttoken_jax.calibration.statistics import auroc

Z95 = 1.959963984540054


def design_effect(right, video) -> float:
    """How much sharing videos widens the variance of a mean, between 1 and the questions per video.

    The ratio of the cluster-robust variance to that of independent questions. Where all questions have the same outcome
    nothing can be estimated and the largest value is taken.
    """
    right, video = np.asarray(right, np.float64), np.asarray(video)
    _, cluster = np.unique(video, return_inverse=True)
    largest = len(right) / (cluster.max() + 1)
    rest = right - right.mean()
    alone = (rest**2).sum()
    if alone == 0:
        return largest
    return float(np.clip((np.bincount(cluster, rest) ** 2).sum() / alone, 1.0, max(largest, 1.0)))


def wilson(right, video) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, the number of questions divided by the design effect."""
    right = np.asarray(right, np.float64)
    n, p = len(right) / design_effect(right, video), right.mean()
    middle = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def difference(first, second, video) -> tuple[float, float]:
    """Mean of first - second over the same questions, and half the width of its 95 % interval, by video."""
    gap = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    _, cluster = np.unique(np.asarray(video), return_inverse=True)
    sums = np.bincount(cluster, gap - gap.mean())
    clusters = len(sums)
    error = np.sqrt((sums**2).sum() * clusters / max(clusters - 1, 1)) / len(gap)
    return float(gap.mean()), float(Z95 * error)


def auc(scores, positive) -> float | None:
    """Probability that a positive has the higher score, ties counted half; None without both kinds."""
    area = auroc(np.ravel(scores), np.ravel(positive))
    return None if np.isnan(area) else area


def risk_coverage(entropy, right) -> tuple[np.ndarray, np.ndarray]:
    """Share answered, and share wrong among those, when the most certain questions are answered first."""
    order = np.argsort(np.asarray(entropy), kind="stable")
    wrong = ~np.asarray(right, bool)[order]
    answered = np.arange(1, len(wrong) + 1)
    return answered / len(wrong), np.cumsum(wrong) / answered


def area_under_risk(entropy, right) -> float:
    """Mean risk over all coverages: 0 is never wrong; the share wrong itself is an order without information."""
    return float(risk_coverage(entropy, right)[1].mean())
