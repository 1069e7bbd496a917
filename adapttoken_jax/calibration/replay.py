"""Stop rules replayed on logs of full runs: where Lite would have stopped, and whether it would have lost anything."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from adapttoken_jax.calibration.full_runs import QuestionLog, VideoLog
from adapttoken_jax.calibration.statistics import auroc
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.selection import StopRule, pooled_evidence

SIGNALS = ("entropy", "margin", "gain", "agreement", "evidence", "rerun")


def stop_point(question: QuestionLog, rule: StopRule) -> int:
    """Groups that Lite visits under the rule, 1 to all."""
    entropies, answers = [said.entropy for said in question.groups], [said.answer for said in question.groups]
    for v in range(1, len(entropies)):
        asked_again = lambda v=v: _after(question, v).entropy
        if rule.reason(entropies[:v], answers[:v], question.blind.entropy, asked_again):
            return v
    return len(entropies)


def stop_points(question: QuestionLog, config: AdaptTokenConfig, thresholds: Iterable[float]) -> list[int]:
    """All numbers of groups at which the rule may look at a final answer, over the thresholds; ascending, with all."""
    every = len(question.groups)
    if config.stop_rule == "rerun":
        stops = set(range(config.stop_groups, every, config.stop_groups))
        if config.give_up_groups:
            stops |= set(range(config.give_up_groups + 1, every))
    else:
        stops = {stop_point(question, at_threshold(config, threshold)) for threshold in thresholds}
    return sorted(stops | {every})


def at_threshold(config: AdaptTokenConfig, threshold: float) -> StopRule:
    """The configuration's stop rule with another threshold, nats."""
    return StopRule.of(dataclasses.replace(config, stop_entropy=threshold))


def _after(question: QuestionLog, v: int):
    if v not in question.after:
        raise UserError(f"the log has no answer after {v} groups; log again without --stops_only, or with this rule")
    return question.after[v]


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A stop rule on a log.

    Attributes:
      lost: bool[videos], any of the video's questions is answered otherwise than by the full run.
      visited: float64[videos], share of the groups that was visited, mean over the video's questions.
    """

    lost: np.ndarray
    visited: np.ndarray

    @property
    def losses(self) -> int:
        """Number of videos lost."""
        return int(self.lost.sum())

    @property
    def share(self) -> float:
        """Mean share of the groups visited."""
        return float(self.visited.mean())


def replay(videos: Sequence[VideoLog], rule: StopRule) -> Replayed:
    """Replays a rule.

    A video is lost if ANY of its questions is: its questions share the video and are not independent, and a risk per
    video bounds the risk of a question drawn at random from it.
    """
    lost, visited = [], []
    for video in videos:
        stops = [stop_point(question, rule) for question in video.questions]
        pairs = list(zip(video.questions, stops, strict=True))
        lost.append(any(_after(question, v).answer != question.full.answer for question, v in pairs))
        visited.append(np.mean([v / len(question.groups) for question, v in pairs]))
    return Replayed(np.array(lost, bool), np.array(visited, float))


def signals(question: QuestionLog, v: int) -> dict[str, float]:
    """Signals that one might stop on after v groups; higher is more confident. NaN where a signal does not exist.

    entropy: lowest entropy of a group, negated. margin: largest margin of a group. gain: nats that the most certain
    group gained over the question alone. agreement: share of the groups that give the commonest answer. evidence:
    negative entropy of `pooled_evidence` (with options). rerun: negative entropy of the answer from all v groups.
    """
    visited = question.groups[:v]
    lowest = min(said.entropy for said in visited)
    return {
        "entropy": -lowest,
        "margin": max(said.margin for said in visited),
        "gain": question.blind.entropy - lowest,
        "agreement": Counter(said.answer for said in visited).most_common(1)[0][1] / v,
        "evidence": _evidence(question, v),
        "rerun": -_after(question, v).entropy,
    }


def _evidence(question, v) -> float:
    if question.blind.options is None:
        return math.nan
    pooled = pooled_evidence([said.options for said in question.groups[:v]], question.blind.options)
    positive = pooled[pooled > 0]
    return float((positive * np.log(positive)).sum())


def compare_signals(videos: Sequence[VideoLog], resamples: int = 200, seed: int = 0) -> list[dict[str, float]]:
    """How well each signal tells when Lite's answer is already the full run's: AUROC over all (question, v).

    v runs over the logged numbers of groups below all of them. The 95 % interval comes from resampling videos.

    Returns:
      One row per signal: "signal", "auroc", "low", "high", "cases" (pairs of question and v), "right" (share of them in
      which the answer is the full run's already).
    """
    rows = [(i, signals(q, v), q.after[v].answer == q.full.answer) for i, q, v in _cases(videos)]
    owner, right = np.array([row[0] for row in rows], int), np.array([row[2] for row in rows], bool)
    random = np.random.default_rng(seed)
    draws = [random.integers(len(videos), size=len(videos)) for _ in range(resamples)]
    table = []
    for name in SIGNALS:
        scores = np.array([row[1][name] for row in rows], float)
        known = ~np.isnan(scores)
        scores, labels, owners = scores[known], right[known], owner[known]
        spread = [_resampled_auroc(scores, labels, owners, draw) for draw in draws]
        spread = [value for value in spread if not math.isnan(value)] or [math.nan]
        low, high = np.quantile(spread, [0.025, 0.975])
        share = labels.mean() if labels.size else math.nan
        table.append({
            "signal": name, "auroc": auroc(scores, labels), "low": float(low), "high": float(high),
            "cases": len(labels), "right": float(share),
        })  # fmt: skip
    return table


def _cases(videos):
    for i, video in enumerate(videos):
        for question in video.questions:
            for v in sorted(question.after):
                if v < len(question.groups):
                    yield i, question, v


def _resampled_auroc(scores, labels, owners, draw) -> float:
    """AUROC with each case as often as its video was drawn."""
    times = np.bincount(draw, minlength=int(owners.max(initial=-1)) + 1)[owners]
    return auroc(np.repeat(scores, times), np.repeat(labels, times))
