"""`results.json`: the scores of a finished run under every rule, and its cost. The same samples give the same bytes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from adapttoken_jax.benchmarks import Item, Report, score_all
from adapttoken_jax.result import plain_json

RESULTS_VERSION = 1


def summarise(items: Sequence[Item], samples: Sequence[Mapping[str, Any]], report: Report, run: Mapping) -> dict:
    """The content of `results.json`.

    Args:
      items: the questions that were asked, in the benchmark's order.
      samples: their samples, in the same order.
      report: what the data directory lacks.
      run: the content of `run.json`.
    """
    flags = run["flags"]
    answered = [sample for sample in samples if sample["prediction"] is not None]
    pairs = [(item, sample["prediction"]) for item, sample in zip(items, samples, strict=True)]
    scores = score_all(flags["benchmark"], pairs)
    return plain_json({
        "version": RESULTS_VERSION,
        **{name: flags[name] for name in ("benchmark", "method", "prompt", "subtitles")},
        "model_sha256": run["hashes"]["model"],
        "config": run["config"],
        "questions": len(items),
        "answered": len(answered),
        "videos": len({item.video_id for item in items}),
        "broken_videos": broken_videos(samples),
        "warnings": list(report.warnings),
        "scores": {rule: each.to_json() for rule, each in scores.items()},
        "localisation": mean_localisation(answered),
        "cost": mean_cost(answered),
    })  # fmt: skip


def broken_videos(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Videos that could not be read, why, and how many questions each took along."""
    broken: dict[str, dict] = {}
    for sample in samples:
        if "error" in sample:
            video = broken.setdefault(sample["video_id"], {"error": sample["error"], "questions": 0})
            video["questions"] += 1
    return [{"video_id": name, **rest} for name, rest in broken.items()]


def mean_localisation(answered: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Means of `localisation.localise` over the questions that have a time reference; None without any."""
    found = [sample["localisation"] for sample in answered if "localisation" in sample]
    if not found:
        return None
    return {"questions": len(found)} | {name: statistics.fmean(each[name] for each in found) for name in found[0]}


def mean_cost(answered: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Means per answered question.

    "visual_tokens" are prefilled in all passes that the question needs when it is asked alone; "flops" likewise, vision
    included. "visual_tokens_shared" and "groups_visited" tell what asking a video's questions together leaves: a group
    is prefilled once for all of them. "selected" are in the final prompt.
    """
    if not answered:
        return None
    mean = statistics.fmean
    return {
        "visual_tokens": mean(sample["visual_tokens"]["prefilled"] for sample in answered),
        "visual_tokens_shared": _shared_tokens(answered) / len(answered),
        "selected": mean(sample["visual_tokens"]["selected"] for sample in answered),
        "groups_visited": mean(sample["groups"]["visited"] for sample in answered),
        "groups_total": mean(sample["groups"]["total"] for sample in answered),
        "flops": mean(sample["flops"] for sample in answered),
    }


def _shared_tokens(answered: Sequence[Mapping[str, Any]]) -> int:
    """Visual tokens prefilled when a group serves all questions of its video: per video the longest scan, once."""
    scans: dict[str, int] = {}
    own = 0
    for sample in answered:
        tokens, video = sample["visual_tokens"], sample["video_id"]
        own += tokens["prefilled"] - tokens["scanned"]
        scans[video] = max(tokens["scanned"], scans.get(video, 0))
    return own + sum(scans.values())
