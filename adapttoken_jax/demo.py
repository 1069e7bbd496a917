"""`adapttoken demo`: one long needle video, several questions, four methods, one table.

The video is one that the bundled model has never seen: it comes from the test split.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from adapttoken_jax import needle, report
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import OnProgress
from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import load
from adapttoken_jax.needle.questions import choice_question
from adapttoken_jax.pipeline import answer
from adapttoken_jax.result import Result, made_directory, write_result, write_text

METHODS = ("uniform", "flexselect", "adapttoken", "lite")
FPS = 4.0


class Asked(NamedTuple):
    """A question of the demo, its true answer (a letter, or words) and the needles that hold it."""

    text: str
    options: tuple[str, ...] | None
    truth: str
    needles: tuple[needle.Needle, ...]


def run(directory, frames: int, seed: int, on_progress: OnProgress | None = None) -> list[dict]:
    """Makes the video, answers all questions at once by every method and writes what came of it.

    Args:
      directory: made if missing; gets `video.mp4`, `report.html`, `result.json` (AdaptToken on the first question) and
        `results.json` (everything).
      frames: length of the video.
      seed: which video.
      on_progress: called with (stage, done, total).

    Returns:
      The rows of the table.

    Raises:
      UserError: a length that cannot hold the needles, or a directory that cannot be written.
    """
    scene = needle.scene(seed, "test", frames, "pair")
    directory = made_directory("output", directory)
    for name in ("video.mp4", "report.html", "result.json", "results.json"):
        if (directory / name).is_dir():
            raise UserError(f"--output={directory}: {name} in it is a directory; choose another")
    video = needle.write_mp4(scene, directory / "video.mp4", FPS)
    model = load("needle")
    config = AdaptTokenConfig.for_model(model.config, fps=FPS, max_frames=frames)
    asked, found = list(questions(scene, seed)), {}
    for method in METHODS:  # every scan answers all questions
        found[method] = answer(model, video, [q.text for q in asked], [q.options for q in asked], config, method)
        if on_progress:
            on_progress("answer", len(found), len(METHODS))
    answers = [(question, method, found[method][q]) for q, question in enumerate(asked) for method in METHODS]
    rows = [_row(*each) for each in answers]
    entries = [_entry(model, video, question, result) for question, _, result in answers]
    report.write(directory / "report.html", entries, title="AdaptToken on a needle video")
    write_result(directory / "result.json", found["adapttoken"][0])
    _write_all(directory / "results.json", rows, [result for *_, result in answers])
    return rows


def questions(scene: needle.Scene, seed: int) -> Iterator[Asked]:
    """Questions about a pair scene, from easy to hard: each needle alone, both at once, and both in words."""
    pair = scene.question
    for number, one in enumerate(scene.needles):
        key, value = (one.shape, one.colour) if pair.asked == "colour" else (one.colour, one.shape)
        single = choice_question(np.random.default_rng([seed, number]), pair.asked, [key], [value])
        yield Asked(single.text, single.options, single.letter, (one,))
    yield Asked(pair.text, pair.options, pair.letter, scene.needles)
    words = scene.open_question
    yield Asked(words.text, None, words.answer, scene.needles)


def is_right(question: Asked, result: Result) -> bool:
    """Whether the option, or the text of an open answer, is the true one."""
    return question.truth == (result.option if question.options else result.answer.strip())


def _row(question: Asked, method: str, result: Result) -> dict:
    options = dict(zip("ABCDE", question.options or (), strict=False))
    return {
        "question": question.text if question.options else f"{question.text} (open)",
        "method": method,
        "answer": options.get(result.option, result.answer),
        "right": is_right(question, result),
        "entropy": round(result.entropy, 3),
        "groups": f"{result.stop.groups_visited} of {result.stop.groups_total}" if result.groups else "-",
        "tokens": result.selected.count,
        "seconds": round(result.cost.seconds.total, 2),
    }


def _entry(model, video, question: Asked, result: Result) -> report.ReportEntry:
    evidence = tuple(report.Evidence(one.start / FPS, one.stop / FPS, "needle") for one in question.needles)
    return report.entry(
        model.config, video, result, question.text, question.options, truth=question.truth,
        correct=is_right(question, result), evidence=evidence,
    )  # fmt: skip


def _write_all(path: pathlib.Path, rows: list[dict], results: Iterable[Result]) -> None:
    content = {"rows": rows, "results": [result.to_dict() for result in results]}
    write_text(path, json.dumps(content, allow_nan=False))
