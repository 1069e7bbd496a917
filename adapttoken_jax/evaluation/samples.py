"""The records of one question: its line in `samples.jsonl`, and its line in `costs.jsonl`.

A sample holds nothing that differs between two runs of the same thing: no times, no dates, no places. What was measured
with a clock stands in the costs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from adapttoken_jax.evaluation.localisation import localise
from adapttoken_jax.result import Result, plain_json
from adapttoken_jax.video import Clip


def answered_sample(number: int, item, result: Result, clip: Clip) -> dict[str, Any]:
    """The sample of an answered question.

    Args:
      number: place of the question in the benchmark, from 0.
      item: the question, a `benchmarks.Item`.
      clip: the video as sampled.

    Returns:
      "doc_id", "id", "video_id", "target" (the right letter), "prediction" (the answer's text), "option" (the letter
      read from it, else the likeliest one), "option_probabilities", "entropy" (nats), "groups", "stop", "visual_tokens"
      (of the video, candidates, selected, scanned in the groups visited, and prefilled in all passes of the question),
      "flops"; and with a time reference "localisation".
    """
    per_slot = result.video.tokens // result.video.slots
    sample = head(number, item) | {
        "prediction": result.answer,
        "option": result.option,
        "option_probabilities": result.option_probabilities,
        "entropy": result.entropy,
        "groups": {"visited": result.stop.groups_visited, "total": result.stop.groups_total},
        "stop": result.stop.reason,
        "visual_tokens": {
            "video": result.video.tokens,
            "candidates": result.selected.candidates,
            "selected": result.selected.count,
            "scanned": per_slot * sum(len(group.slots) for group in result.groups if group.visited),
            "prefilled": result.cost.visual_tokens_prefilled,
        },
        "flops": result.cost.flops,
    }
    if item.time_reference is not None:
        sample["localisation"] = localise(result, clip.slot_times, clip.info.duration_s, item.time_reference)
    return plain_json(sample)


def broken_sample(number: int, item, reason: str) -> dict[str, Any]:
    """The sample of a question whose video cannot be read: no prediction, and why in "error"."""
    return head(number, item) | {"prediction": None, "option": None, "error": reason}


def head(number: int, item) -> dict[str, Any]:
    """What every sample of a question begins with, whatever came of it."""
    return {"doc_id": number, "id": item.id, "video_id": item.video_id, "target": item.answer}


def another_question(ours: Mapping[str, Mapping], theirs: Mapping[str, Mapping]) -> str | None:
    """The first id by which two runs' samples have another video or another right answer; None if there is none."""
    asked = lambda sample: (sample["video_id"], sample["target"])
    both = ours.keys() & theirs.keys()
    return min((name for name in both if asked(ours[name]) != asked(theirs[name])), default=None)


def costs(items: Sequence, results: Sequence[Result], wall: float) -> list[dict[str, Any]]:
    """Seconds of a video's questions.

    "amortised" is a question's share of `wall`, the seconds that the video took but for writing these records.
    "seconds" are those of the stages as `Result` has them: decode, vision and groups once for all questions of the
    video, final for this one.
    """
    return [
        {
            "id": item.id,
            "questions_of_video": len(items),
            "amortised": wall / len(items),
            "seconds": result.to_dict()["cost"]["seconds"],
        }
        for item, result in zip(items, results, strict=True)
    ]
