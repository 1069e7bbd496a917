"""Video-MME: one parquet of questions, one file per video, subtitles for most of them."""

import pathlib

from adapttoken_jax.benchmarks import columns
from adapttoken_jax.benchmarks.files import existing, find_video, first_file, read_rows
from adapttoken_jax.benchmarks.items import Benchmark, Item, SubtitleFile
from adapttoken_jax.benchmarks.options import letter_in, without_letter

_TEXTS = (
    "video_id", "duration", "domain", "sub_category", "url", "videoID", "question_id", "task_type", "question",
    "answer",
)  # fmt: skip
_COLUMNS = dict.fromkeys(_TEXTS, columns.TEXT) | {"options": columns.TEXTS}
_BY_DURATION = ("domain", "sub_category", "task_type")


def _read(directory: pathlib.Path) -> list[Item]:
    path = first_file(directory, ("videomme/test-*.parquet", "test-*.parquet", "videomme/*.parquet", "*.parquet"))
    rows = read_rows(path)
    columns.require(rows, _COLUMNS, path)
    return [_item(row, directory) for row in rows]


def _item(row: dict, directory: pathlib.Path) -> Item:
    options = tuple(without_letter(option) for option in row["options"])
    labels = {"duration": (row["duration"],), **{name: (row[name],) for name in _BY_DURATION}}
    labels |= {f"duration × {name}": (f"{row['duration']} / {row[name]}",) for name in _BY_DURATION}
    subtitles = directory / "subtitle" / f"{row['videoID']}.srt"
    return Item(
        id=row["question_id"],
        video_id=row["videoID"],
        video=find_video([directory / "data", directory / "video"], row["videoID"]),
        question=row["question"],
        options=options,
        answer=letter_in(row["answer"], options),
        labels=labels,
        subtitles=SubtitleFile(subtitles) if existing(subtitles) else None,
        extra={name: row[name] for name in ("video_id", "url", "options")},
    )


BENCHMARK = Benchmark(
    name="videomme",
    title="Video-MME",
    read=_read,
    breakdowns=("duration", *_BY_DURATION, *(f"duration × {name}" for name in _BY_DURATION)),
    default_prompt="lmms-eval",
    questions=2700,
    videos=900,
    subtitled=744,
    expected={"duration": {"short": 900, "medium": 900, "long": 900}},
)
