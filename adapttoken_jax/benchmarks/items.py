"""One question of a benchmark, what a directory holds, and what each benchmark published."""

import dataclasses
import pathlib
import string
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from adapttoken_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SubtitleFile:
    """Subtitles on disk, read when they are needed (`subtitles.read`).

    Attributes:
      path: an .srt file, or LongVideoBench's JSON.
      offset_s: where the video begins on the subtitles' clock.
    """

    path: pathlib.Path
    offset_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Item:
    """One multiple-choice question about one video.

    Attributes:
      id: unique within the benchmark.
      video_id: the benchmark's name of the video; questions with the same one share a video.
      video: the file, or None where it is missing.
      question: the question without its options.
      options: the options' texts without their letters, from A on.
      answer: the letter of the right option; no option's letter where the published answer is none of them.
      duration_s: the video's length, where the benchmark states it in seconds.
      labels: the labels of each of the benchmark's breakdowns; a question may have several of one breakdown.
      time_reference: (start, end) in seconds of the part of the video that holds the answer (LVBench).
      subtitles: None where the video has none.
      extra: further columns of the published files, unchanged.
    """

    id: str
    video_id: str
    video: pathlib.Path | None
    question: str
    options: tuple[str, ...]
    answer: str
    duration_s: float | None = None
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    time_reference: tuple[float, float] | None = None
    subtitles: SubtitleFile | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def letters(self) -> tuple[str, ...]:
        """Of the options, from A on."""
        return tuple(string.ascii_uppercase[: len(self.options)])


@dataclasses.dataclass(frozen=True)
class Report:
    """What a directory holds of a benchmark, beside what was published.

    Attributes:
      counts: rows (what, found, published); published is None where no number was published.
      missing_videos: the videos that some question needs and that are not there.
      warnings: one sentence each; empty for a complete directory.
    """

    benchmark: str
    directory: pathlib.Path
    counts: tuple[tuple[str, int, int | None], ...]
    missing_videos: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def table(self) -> str:
        """The counts, the warnings and the missing videos as lines of text."""
        rows = [("", "found", "published")]
        rows += [
            (what, str(found), "-" if published is None else str(published)) for what, found, published in self.counts
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, *(f"missing: {video}" for video in self.missing_videos)])

    def require_complete(self) -> None:
        """Raises `UserError` with the first warning, if there is one (`--strict`)."""
        if self.warnings:
            more = f" (and {len(self.warnings) - 1} more)" if len(self.warnings) > 1 else ""
            raise UserError(f"--data={self.directory}: {self.warnings[0]}{more}; complete it, or leave out --strict")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A published benchmark and how its files are read.

    Attributes:
      name: as in `--benchmark`.
      title: as its authors write it.
      read: directory -> items, in the published order.
      breakdowns: the keys of `Item.labels`, in the order of tables.
      default_prompt: a key of `PROMPTS[name]`.
      questions: published number of questions.
      videos: published number of videos, where there is one.
      subtitled: published number of videos with subtitles, where there is one.
      expected: published number of questions per label of a breakdown, where there is one.
    """

    name: str
    title: str
    read: Callable[[pathlib.Path], list[Item]]
    breakdowns: tuple[str, ...]
    default_prompt: str
    questions: int
    videos: int | None = None
    subtitled: int | None = None
    expected: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

    def load(self, directory, subtitles: bool = False) -> tuple[list[Item], Report]:
        """The questions of a directory in the published layout, in the published order, and what it lacks.

        Args:
          subtitles: whether they are wanted, so that missing ones are a warning.

        Raises:
          UserError: no such directory, a file that cannot be read, a missing column, no question at all, one without
            text, or an id that stands twice.
        """
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise UserError(f"--data={directory}: no such directory; give the one that holds {self.title}'s files")
        items = self.read(directory)
        _check_questions(items, directory)
        return items, self._report(items, directory, subtitles)

    def check(self, directory, subtitles: bool = False) -> Report:
        """What a directory lacks; arguments and errors as of `load`."""
        return self.load(directory, subtitles)[1]

    def _report(self, items: list[Item], directory: pathlib.Path, subtitles: bool) -> Report:
        videos = {item.video_id: item.video for item in items}
        missing = tuple(name for name, file in videos.items() if file is None)
        counts = [("questions", len(items), self.questions), ("videos", len(videos), self.videos)]
        for breakdown, labels in self.expected.items():
            said = Counter(label for item in items for label in item.labels[breakdown])
            counts += [(f"questions of {label}", said[label], published) for label, published in labels.items()]
        subtitled = ("videos with subtitles", len({item.video_id for item in items if item.subtitles}), self.subtitled)
        warnings = [
            f"{found} {what} instead of the {published} published"
            for what, found, published in (*counts, *([subtitled] if subtitles else []))
            if published is not None and found != published
        ]
        warnings += _item_warnings(items, subtitles)
        if missing:
            warnings.append(f"{len(missing)} of {len(videos)} videos are missing, the first is {missing[0]}")
        counts += [("video files", len(videos) - len(missing), self.videos)]
        counts += [subtitled] if self.subtitled or subtitled[1] else []
        timed = sum(item.time_reference is not None for item in items)
        counts += [("questions with a time reference", timed, None)] if timed else []
        return Report(self.name, directory, tuple(counts), missing, tuple(warnings))


def _item_warnings(items: list[Item], subtitles: bool) -> list[str]:
    no_answer = [item.id for item in items if item.answer not in item.letters]
    unread = [item.id for item in items if item.extra.get("subtitle_path") and not item.subtitles] if subtitles else []
    flaws = {"an answer that is none of their options": no_answer, "subtitles that are missing": unread}
    return [f"{len(ids)} questions have {what}, the first is {ids[0]}" for what, ids in flaws.items() if ids]


def _check_questions(items: list[Item], directory: pathlib.Path) -> None:
    if not items:
        raise UserError(f"--data={directory}: the annotations hold no question; download them again")
    seen: set[str] = set()
    for item in items:
        if wrong := _wrong_with(item):
            raise UserError(f"--data={directory}: the question {item.id} has {wrong}; download the annotations again")
        if item.id in seen:
            raise UserError(f"--data={directory}: the question {item.id} stands twice; keep one layout per directory")
        seen.add(item.id)


def _wrong_with(item: Item) -> str:
    """Why a question cannot be asked; "" if it can."""
    if not item.question.strip():
        return "no text"
    if not 2 <= len(item.options) <= len(string.ascii_uppercase):
        return f"{len(item.options)} options"
    empty = [letter for letter, option in zip(item.letters, item.options, strict=True) if not option.strip()]
    return f"an option {empty[0]} without text" if empty else ""
