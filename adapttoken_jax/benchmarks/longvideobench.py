"""LongVideoBench, validation split: JSON with a list of candidates, or parquet with option0 … option4."""

import pathlib

from adapttoken_jax.benchmarks import columns
from adapttoken_jax.benchmarks.files import existing, find_video, first_file, read_rows
from adapttoken_jax.benchmarks.items import Benchmark, Item, SubtitleFile
from adapttoken_jax.errors import UserError

_COLUMNS = {
    **dict.fromkeys(("id", "video_id", "video_path", "question", "question_category", "topic_category"), columns.TEXT),
    "correct_choice": columns.WHOLE_NUMBER,
    "duration": columns.NUMBER,
    "duration_group": columns.TEXT_OR_NUMBER,
}
_SUBTITLES = {"subtitle_path": columns.TEXT, "starting_timestamp_for_subtitles": columns.NUMBER}
_OPTIONS = tuple(f"option{i}" for i in range(5))
_ABSENT = (None, "", "N/A")  # in the parquet
_BREAKDOWNS = ("duration_group", "question_category", "topic_category")


def _read(directory: pathlib.Path) -> list[Item]:
    path = first_file(directory, ("lvb_val.json", "validation-*.parquet", "*/validation-*.parquet", "*.parquet"))
    rows = read_rows(path)
    columns.require(rows, _COLUMNS | _SUBTITLES, path, nullable=tuple(_SUBTITLES))
    options = {"candidates": columns.TEXTS} if path.suffix == ".json" else dict.fromkeys(_OPTIONS, columns.TEXT)
    columns.require(rows, options, path, nullable=_OPTIONS[2:])
    return [_item(row, directory, path) for row in rows]


def _item(row: dict, directory: pathlib.Path, path: pathlib.Path) -> Item:
    listed, right = "candidates" in row, row["correct_choice"]
    published = row["candidates"] if listed else [row.get(name) for name in _OPTIONS]
    absent = ("N/A",) if listed else _ABSENT
    if not 0 <= right < len(published) or published[right] in absent:
        raise UserError(f"{path}: question {row['id']} has no option {right}, its correct_choice")
    options = tuple(option for option in published if option not in absent)
    file = directory / "subtitles" / (row["subtitle_path"] or "")
    before = sum(option not in absent for option in published[:right])
    return Item(
        id=row["id"],
        video_id=row["video_id"],
        video=find_video([directory / "videos"], row["video_path"]),
        question=row["question"],
        options=options,
        answer=chr(ord("A") + before),
        duration_s=float(row["duration"]),
        labels={name: (str(row[name]),) for name in _BREAKDOWNS},
        subtitles=SubtitleFile(file, float(row["starting_timestamp_for_subtitles"] or 0)) if existing(file) else None,
        extra={"correct_choice": right, "subtitle_path": row["subtitle_path"]},
    )


BENCHMARK = Benchmark(
    name="longvideobench",
    title="LongVideoBench",
    read=_read,
    breakdowns=_BREAKDOWNS,
    default_prompt="lmms-eval",
    questions=1337,
)
