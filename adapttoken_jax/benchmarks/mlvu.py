"""MLVU, the multiple-choice questions of its development set: one JSON per task, or one re-packed parquet."""

import dataclasses
import pathlib
from collections import Counter

from adapttoken_jax.benchmarks import columns
from adapttoken_jax.benchmarks.files import find_video, first_file, read_rows
from adapttoken_jax.benchmarks.items import Benchmark, Item
from adapttoken_jax.benchmarks.options import letter_in, letter_of_text, split_options
from adapttoken_jax.errors import UserError

# The tasks' files, and how many questions each published.
_FILES = {
    "plotQA": ("1_plotQA", 539),
    "needle": ("2_needle", 355),
    "ego": ("3_ego", 352),
    "count": ("4_count", 206),
    "order": ("5_order", 259),
    "anomaly_reco": ("6_anomaly_reco", 200),
    "topic_reasoning": ("7_topic_reasoning", 264),
}
_OTHER_NAMES = {"findNeedle": "needle"}

_PUBLISHED = {
    **dict.fromkeys(("video", "question", "question_type"), columns.TEXT),
    "duration": columns.NUMBER,
    "candidates": columns.TEXTS_OR_NUMBERS,
    "answer": columns.TEXT_OR_NUMBER,
}
_REPACKED = dict.fromkeys(("video_name", "question", "answer", "task_type"), columns.TEXT)


def _read(directory: pathlib.Path) -> list[Item]:
    """Tasks have folders of their own; where a file serves several, it is one video, called as in the first."""
    names: dict[pathlib.Path, str] = {}
    return [
        dataclasses.replace(item, video_id=names.setdefault(item.video, item.video_id)) if item.video else item
        for item in _questions(directory)
    ]


def _questions(directory: pathlib.Path) -> list[Item]:
    for root in (directory, directory / "MLVU"):
        files = {task: root / "json" / f"{stem}.json" for task, (stem, _) in _FILES.items()}
        there = {task: path for task, path in files.items() if path.is_file()}
        if there:
            return [item for task, path in there.items() for item in _task(task, path, root)]
    path = first_file(directory, ("json/1_plotQA.json", "test-*.parquet", "*/test-*.parquet", "*.parquet"))
    return _repacked(path, directory)


def _task(task: str, path: pathlib.Path, root: pathlib.Path) -> list[Item]:
    rows = read_rows(path)
    columns.require(rows, _PUBLISHED, path)
    return [
        _item(task, number, row["video"], root, row["question"], tuple(map(str, row["candidates"])), row)
        for number, row in enumerate(rows)
    ]


def _repacked(path: pathlib.Path, directory: pathlib.Path) -> list[Item]:
    rows = read_rows(path)
    lengths = {"duration": columns.NUMBER} if "duration" in rows[0] else {}
    columns.require(rows, _REPACKED | lengths, path, nullable=tuple(lengths))
    items, seen = [], Counter()
    for row in rows:
        task = _OTHER_NAMES.get(row["task_type"], row["task_type"])
        question, options = split_options(row["question"].removeprefix("Question: "))
        question = question.removesuffix("Options:").rstrip()
        if not options:
            raise UserError(f"{path}: the question about {row['video_name']} has no (A) … lines with its options")
        items.append(_item(task, seen[task], row["video_name"], directory, question, options, row))
        seen[task] += 1
    return items


def _item(
    task: str, number: int, video: str, root: pathlib.Path, question: str, options: tuple[str, ...], row: dict
) -> Item:
    stem = _FILES[task][0] if task in _FILES else task
    folders = [root / "video" / stem, root / "video", root / "videos", root]
    # The re-packed answers are letters, the published ones are texts.
    repacked = "video_name" in row
    return Item(
        id=f"{stem}_{number}",
        video_id=f"{stem}/{video.rpartition('/')[2]}",
        video=find_video(folders, video),
        question=question,
        options=options,
        answer=(letter_in if repacked else letter_of_text)(row["answer"], options),
        duration_s=float(row["duration"]) if row.get("duration") is not None else None,
        labels={"task": (task,)},
        extra={"question": row["question"]} if repacked else {},
    )


BENCHMARK = Benchmark(
    name="mlvu",
    title="MLVU",
    read=_read,
    breakdowns=("task",),
    default_prompt="lmms-eval",
    questions=sum(count for _, count in _FILES.values()),
    expected={"task": {task: count for task, (_, count) in _FILES.items()}},
)
