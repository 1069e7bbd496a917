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
    return float(max(0.0, min(middle - half, p))), float(min(1.0, max(middle + half, p)))  # but for rounding around p


def mean(values, video) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval, by video."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), _half_width((values - values.mean()) / len(values), video)


def difference(first, second, video) -> tuple[float, float]:
    """Mean of first - second over the same questions, and half the width of its 95 % interval, by video."""
    return mean(np.asarray(first, np.float64) - np.asarray(second, np.float64), video)


def auc(scores, positive, video) -> tuple[float | None, float | None]:
    """Probability that a positive has the higher score, ties counted half, and half the width of its 95 % interval, by
    video; None without both kinds.

    The interval is that of Hoeffding's projection: an observation adds the share of the other kind on its right side.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    area = auroc(scores, positive)
    if np.isnan(area):
        return None, None
    share_below = lambda x, others: (
        (np.searchsorted(others, x) + np.searchsorted(others, x, "right")) / (2 * len(others))
    )
    high, low = np.sort(scores[positive]), np.sort(scores[~positive])
    adds = np.where(positive, (share_below(scores, low) - area) / len(high),
                    (1 - share_below(scores, high) - area) / len(low))  # fmt: skip
    return area, _half_width(adds, video)


def _half_width(adds, video) -> float:
    """Of the 95 % interval of an estimate to which observations add so much; those of one video may hang together."""
    _, cluster = np.unique(np.asarray(video), return_inverse=True)
    sums = np.bincount(cluster, adds)
    return float(Z95 * np.sqrt((sums**2).sum() * len(sums) / max(len(sums) - 1, 1)))


def risk_coverage(entropy, right) -> tuple[np.ndarray, np.ndarray]:
    """Share answered, and share wrong among those, when the most certain questions are answered first."""
    order = np.argsort(np.asarray(entropy), kind="stable")
    wrong = ~np.asarray(right, bool)[order]
    answered = np.arange(1, len(wrong) + 1)
    return answered / len(wrong), np.cumsum(wrong) / answered


def area_under_risk(entropy, right) -> float:
    """Mean risk over all coverages: 0 is never wrong; the share wrong itself is an order without information."""
    return float(risk_coverage(entropy, right)[1].mean())
