"""`adapttoken evaluate`, between its flags and `session`: what it prints."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from adapttoken_jax import terminal
from adapttoken_jax.evaluation import session


def check(values: flags.FlagValues) -> int:
    """`--check`: prints what the data directory holds and lacks."""
    print(session.check(values.benchmark, values.data, bool(values.strict), bool(values.subtitles)).table())
    return terminal.OK


def evaluate(values: flags.FlagValues, settings: Mapping[str, Any]) -> int:
    """Runs or continues an evaluation and prints its scores."""
    names = {field.name for field in dataclasses.fields(session.Evaluation)} - {"settings"}
    given = {name: values[name].value for name in names if values[name].value is not None}
    asked = session.Evaluation(settings=settings, **given)
    results = session.evaluate(asked)
    if results is not None:
        sys.stdout.write(terminal.table(score_rows(results)))
        print(summary_line(results), file=sys.stderr)
    return terminal.OK


def score_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per rule: accuracy and its interval in percent, questions that count, responses without a letter."""
    percent = lambda share: None if share is None else round(100 * share, 2)
    return [
        {
            "rule": rule,
            "accuracy": percent(scores["overall"]["accuracy"]),
            "low": percent(scores["overall"]["low"]),
            "high": percent(scores["overall"]["high"]),
            "questions": scores["overall"]["n"],
            "unread": scores["unread"],
            "missing": scores["missing"],
        }
        for rule, scores in results["scores"].items()
    ]


def summary_line(results: Mapping[str, Any]) -> str:
    """One line about a finished run."""
    parts = [f"{results['answered']} of {results['questions']} questions about {results['videos']} videos answered"]
    broken = results["broken_videos"]
    if broken:
        parts.append(
            f"{len(broken)} videos could not be read, the first is {broken[0]['video_id']}: {broken[0]['error']}"
        )
    if results["cost"]:
        parts.append(f"{results['cost']['visual_tokens']:.0f} visual tokens per question")
    return ", ".join(parts)
