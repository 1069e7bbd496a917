"""LVBench: one line per video, its questions inside, their options inside the questions."""

import pathlib

from adapttoken_jax.benchmarks import columns
from adapttoken_jax.benchmarks.files import find_video, first_file, read_rows
from adapttoken_jax.benchmarks.items import Benchmark, Item
from adapttoken_jax.benchmarks.options import letter_in, split_options
from adapttoken_jax.benchmarks.subtitles import clock_seconds
from adapttoken_jax.errors import UserError

# The abbreviations under which LVBench's leaderboard lists its six abilities.
ABILITIES = {
    "key information retrieval": "KIR",
    "event understanding": "EU",
    "summarization": "Sum",
    "entity recognition": "ER",
    "reasoning": "Rea",
    "temporal grounding": "TG",
}
_VIDEO = {"key": columns.TEXT, "type": columns.TEXT, "video_info": columns.MAPPING, "qa": columns.ROWS}
_QUESTION = {
    "uid": columns.TEXT_OR_NUMBER,
    "question": columns.TEXT,
    "answer": columns.TEXT,
    "question_type": columns.TEXT_OR_TEXTS,
    "time_reference": columns.TEXT,
}


def _read(directory: pathlib.Path) -> list[Item]:
    path = first_file(directory, ("video_info.meta.jsonl", "data/video_info.meta.jsonl"))
    videos = read_rows(path)
    columns.require(videos, _VIDEO, path)
    folders = [directory / "all_videos", directory / "videos", directory / "data"]
    items = []
    for line in videos:
        place = f"{path}: {line['key']}"
        columns.require([line["video_info"]], {"duration_minutes": columns.NUMBER}, place)
        columns.require(line["qa"], _QUESTION, place)
        file = find_video(folders, line["key"])
        items += [_item(row, line, file, path) for row in line["qa"]]
    return items


def _item(row: dict, line: dict, file: pathlib.Path | None, path: pathlib.Path) -> Item:
    question, options = split_options(row["question"])
    if not options:
        raise UserError(f"{path}: the question {row['uid']} has no (A) … lines with its options")
    kinds = row["question_type"]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return Item(
        id=str(row["uid"]),
        video_id=line["key"],
        video=file,
        question=question,
        options=options,
        answer=letter_in(row["answer"], options),
        duration_s=60.0 * float(line["video_info"]["duration_minutes"]),
        labels={"question_type": tuple(ABILITIES.get(kind, kind) for kind in kinds), "type": (line["type"],)},
        time_reference=parse_time_reference(row["time_reference"]),
        extra={"question": row["question"], "time_reference": row["time_reference"]},
    )


def parse_time_reference(text: str) -> tuple[float, float] | None:
    """`mm:ss-mm:ss` (or with hours) in seconds; a single time is both ends. None if it is no such text."""
    try:
        times = [clock_seconds(part) for part in text.split("-")]
    except ValueError:
        return None
    return (times[0], times[-1]) if len(times) <= 2 and times[0] <= times[-1] else None


BENCHMARK = Benchmark(
    name="lvbench",
    title="LVBench",
    read=_read,
    breakdowns=("question_type", "type"),
    default_prompt="lmms-eval",
    questions=1549,
    videos=103,
)
