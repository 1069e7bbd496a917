"""A benchmark of needle videos in published layouts: the road from files to a table, for everyone to walk.

A video has two needles and three questions: what both are, and what each is. The same directory is in Video-MME's
layout (`videomme/test-00000-of-00001.parquet`, `data/`) and in LVBench's (`video_info.meta.jsonl`), where the questions
about one needle come with the time at which it is seen.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from adapttoken_jax.needle import Needle, Scene, scene, write_mp4
from adapttoken_jax.needle.questions import LETTERS, Question, choice_question
from adapttoken_jax.result import atomic_file, write_text

FPS = 4.0
_PURPOSE_QUESTIONS = 2


def write_benchmark(
    directory,
    videos: int,
    frames: int,
    first_seed: int = 0,
    split: str = "test",
    difficulty: str = "normal",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Writes `videos` files of `frames` frames each and both annotations; files that are there already are kept.

    Raises:
      UserError: a length that cannot hold the needles, or an unknown split or difficulty.
    """
    directory = pathlib.Path(directory)
    (directory / "data").mkdir(parents=True, exist_ok=True)
    rows, lines = [], []
    for number in range(videos):
        made = scene(first_seed + number, split, frames, "pair", difficulty)
        name = f"needle-{split}-{difficulty}-{frames}-{made.seed}"
        path = directory / "data" / f"{name}.mp4"
        if not path.exists():
            write_mp4(made, path, FPS)
        asked = list(questions(made))
        rows += [_videomme_row(number, name, made, place, *each) for place, each in enumerate(asked, 1)]
        lines.append(_lvbench_line(name, made, asked))
        if on_progress:
            on_progress("videos", number + 1, videos)
    _write_parquet(directory / "videomme" / "test-00000-of-00001.parquet", rows)
    write_text(directory / "video_info.meta.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def questions(made: Scene) -> Iterator[tuple[Question, tuple[Needle, ...]]]:
    """The multiple-choice questions of a pair scene, and the needles that each is about."""
    yield made.question, made.needles
    for number, needle in enumerate(made.needles):
        rng = np.random.default_rng([_PURPOSE_QUESTIONS, made.seed, number])
        key, value = needle.shape, needle.colour
        if made.question.asked == "shape":
            key, value = value, key
        yield choice_question(rng, made.question.asked, [key], [value]), (needle,)


def _videomme_row(number: int, name: str, made: Scene, place: int, question: Question, needles) -> dict[str, Any]:
    return {
        "video_id": f"{number + 1:03}",
        "duration": "short",
        "domain": "Needle",
        "sub_category": f"{made.frames} frames",
        "url": "",
        "videoID": name,
        "question_id": f"{number + 1:03}-{place}",
        "task_type": f"{question.asked} of {'both' if len(needles) == 2 else 'one'}",
        "question": question.text,
        "options": [f"{letter}. {text}" for letter, text in zip(LETTERS, question.options, strict=False)],
        "answer": question.letter,
    }


def _lvbench_line(name: str, made: Scene, asked: Sequence) -> dict[str, Any]:
    single = [(place, question, needles[0]) for place, (question, needles) in enumerate(asked, 1) if len(needles) == 1]
    return {
        "key": name,
        "type": "needle",
        "video_info": {
            "duration_minutes": made.frames / FPS / 60,
            "fps": FPS,
            "resolution": {"width": made.width, "height": made.height},
        },
        "qa": [_lvbench_question(f"{name}-{place}", question, needle) for place, question, needle in single],
    }


def _lvbench_question(uid: str, question: Question, needle: Needle) -> dict[str, Any]:
    options = [f"({letter}) {text}" for letter, text in zip(LETTERS, question.options, strict=False)]
    begin, end = math.floor(needle.start / FPS), math.ceil(needle.stop / FPS)
    return {
        "uid": uid,
        "question": "\n".join([question.text, *options]),
        "answer": question.letter,
        "question_type": ["key information retrieval"],
        "time_reference": f"{_clock(begin)}-{_clock(end)}",
    }


def _clock(seconds: int) -> str:
    return f"{seconds // 60:02}:{seconds % 60:02}"


def _write_parquet(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as file:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
