"""TFDS builders of the four benchmarks: questions and paths, no pixels, stored as array_record without TensorFlow.

    builder = prepare("videomme", source="/data/Video-MME", data_dir="/data/tfds")
    source = builder.as_data_source("test")        # indexable, for grain or a loop
    items = read_items(builder)                    # the same as BENCHMARKS["videomme"].load("/data/Video-MME")[0]

TFDS keeps what it prepared: after a change of the source, remove the data set's folder. The videos' paths are absolute.
TFDS writes its messages to stdout, where this project has its answers, so that `prepare` sends them to stderr.
"""

import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from adapttoken_jax.benchmarks import BENCHMARKS
from adapttoken_jax.benchmarks.items import Benchmark, Item, SubtitleFile
from adapttoken_jax.errors import UserError

_NAN = float("nan")


class _Questions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One benchmark's questions, as `Item`s."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Give the directory of the published files as `manual_dir`."
    benchmark: Benchmark

    def __init__(self, *, file_format="array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(features_of(self.benchmark))
        metadata = tfds.core.MetadataDict()
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True, metadata=metadata)

    def _split_generators(self, dl_manager):
        source = pathlib.Path(dl_manager.manual_dir).absolute()
        items, _ = self.benchmark.load(source)
        self.info.metadata["source"] = str(source)
        return {"test": self._generate_examples(items)}

    def _generate_examples(self, items: list[Item]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(map(to_record, items))


class VideoMME(_Questions):
    """Video-MME: 2700 questions about 900 videos."""

    name, benchmark = "adapttoken_videomme", BENCHMARKS["videomme"]


class LongVideoBench(_Questions):
    """LongVideoBench, validation split: 1337 questions."""

    name, benchmark = "adapttoken_longvideobench", BENCHMARKS["longvideobench"]


class LVBench(_Questions):
    """LVBench: 1549 questions about 103 videos, with the times at which the answers are seen."""

    name, benchmark = "adapttoken_lvbench", BENCHMARKS["lvbench"]


class MLVU(_Questions):
    """MLVU, the 2175 multiple-choice questions of its development set."""

    name, benchmark = "adapttoken_mlvu", BENCHMARKS["mlvu"]


BUILDERS: dict[str, type[_Questions]] = {
    builder.benchmark.name: builder for builder in (VideoMME, LongVideoBench, LVBench, MLVU)
}


def prepare(benchmark: str, source, data_dir) -> tfds.core.DatasetBuilder:
    """The builder of a benchmark after it has read `source` (unless it had before) and written to `data_dir`.

    Raises:
      UserError: as `Benchmark.load`; no such benchmark; or `data_dir` has it from another source.
    """
    if benchmark not in BUILDERS:
        raise UserError(f"benchmark={benchmark}: choose one of {', '.join(BUILDERS)}")
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = BUILDERS[benchmark](data_dir=data_dir)
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=source))
    known = builder.info.metadata.get("source")
    if known != str(pathlib.Path(source).absolute()):
        raise UserError(f"data_dir={data_dir}: was prepared from {known}; remove it, or name another")
    return builder


def read_items(builder: tfds.core.DatasetBuilder) -> list[Item]:
    """The items of a prepared builder, in the published order."""
    return [to_item(record) for record in builder.as_data_source("test")]


# ---------------------------------------------------------------------------------------------------------------------
# Items as records: absent numbers are NaN, absent texts are empty
# ---------------------------------------------------------------------------------------------------------------------


def features_of(benchmark: Benchmark) -> dict[str, Any]:
    """The features of a record of `benchmark`: the fields of `Item`."""
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    seconds = tfds.features.Scalar(np.float64)
    return {
        **dict.fromkeys(("id", "video_id", "video", "question", "answer", "extra"), text),
        "options": texts,
        "duration_s": seconds,
        "labels": dict.fromkeys(benchmark.breakdowns, texts),
        "time_reference": tfds.features.Tensor(shape=(2,), dtype=np.float64),
        "subtitles": {"path": text, "offset_s": seconds},
    }


def to_record(item: Item) -> dict[str, Any]:
    """An item as TFDS stores it; `extra` as JSON."""
    subtitles = item.subtitles
    return {
        "id": item.id,
        "video_id": item.video_id,
        "video": "" if item.video is None else str(item.video),
        "question": item.question,
        "options": list(item.options),
        "answer": item.answer,
        "duration_s": _NAN if item.duration_s is None else item.duration_s,
        "labels": {name: list(labels) for name, labels in item.labels.items()},
        "time_reference": np.array(item.time_reference or (_NAN, _NAN), np.float64),
        "subtitles": {"path": str(subtitles.path), "offset_s": subtitles.offset_s}
        if subtitles
        else {"path": "", "offset_s": _NAN},
        "extra": json.dumps(item.extra, ensure_ascii=False),
    }


def to_item(record: dict[str, Any]) -> Item:
    """The item of a record as a data source gives it, with texts as bytes."""
    text = lambda name: record[name].decode()
    texts = lambda values: tuple(value.decode() for value in values)
    begin, end = map(float, record["time_reference"])
    duration = float(record["duration_s"])
    path = record["subtitles"]["path"].decode()
    return Item(
        id=text("id"),
        video_id=text("video_id"),
        video=pathlib.Path(text("video")) if text("video") else None,
        question=text("question"),
        options=texts(record["options"]),
        answer=text("answer"),
        duration_s=None if math.isnan(duration) else duration,
        labels={name: texts(values) for name, values in record["labels"].items()},
        time_reference=None if math.isnan(begin) else (begin, end),
        subtitles=SubtitleFile(pathlib.Path(path), float(record["subtitles"]["offset_s"])) if path else None,
        extra=json.loads(text("extra")),
    )
