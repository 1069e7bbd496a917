"""LongVideoBench, validation split: JSON with a list of candidates, or parquet with option0 … option4."""

import pathlib

from adapttoken_jax.benchmarks import columns
from adapttoken_jax.benchmarks.files import find_video, first_file, read_rows
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
_ABSENT = (None, "", "N/A")
_BREAKDOWNS = ("duration_group", "question_category", "topic_category")


def _read(directory: pathlib.Path) -> list[Item]:
    path = first_file(directory, ("lvb_val.json", "validation-*.parquet", "*/validation-*.parquet", "*.parquet"))
    rows = read_rows(path)
    columns.require(rows, _COLUMNS | _SUBTITLES, path, nullable=tuple(_SUBTITLES))
    options = {"candidates": columns.TEXTS} if path.suffix == ".json" else dict.fromkeys(_OPTIONS, columns.TEXT)
    columns.require(rows, options, path, nullable=_OPTIONS[2:])
    return [_item(row, directory, path) for row in rows]


def _item(row: dict, directory: pathlib.Path, path: pathlib.Path) -> Item:
    published = row.get("candidates") or [row.get(name) for name in _OPTIONS]
    options, right = tuple(o for o in published if o not in _ABSENT), row["correct_choice"]
    if not 0 <= right < len(published) or published[right] in _ABSENT:
        raise UserError(f"{path}: question {row['id']} has no option {right}, its correct_choice")
    before = sum(option not in _ABSENT for option in published[:right])
    return Item(
        id=row["id"],
        video_id=row["video_id"],
        video=find_video([directory / "videos"], row["video_path"]),
        question=row["question"],
        options=options,
        answer=chr(ord("A") + before),
        duration_s=float(row["duration"]),
        labels={name: (str(row[name]),) for name in _BREAKDOWNS},
        subtitles=_subtitles(row, directory),
        extra={"correct_choice": right},
    )


def _subtitles(row: dict, directory: pathlib.Path) -> SubtitleFile | None:
    path = directory / "subtitles" / (row["subtitle_path"] or "")
    return SubtitleFile(path, float(row["starting_timestamp_for_subtitles"] or 0)) if path.is_file() else None


BENCHMARK = Benchmark(
    name="longvideobench",
    title="LongVideoBench",
    read=_read,
    breakdowns=_BREAKDOWNS,
    default_prompt="lmms-eval",
    questions=1337,
)
