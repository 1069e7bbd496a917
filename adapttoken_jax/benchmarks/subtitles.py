"""Subtitles: SubRip files and LongVideoBench's two JSON shapes, and the lines that sampled frames see."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence

import numpy as np

from adapttoken_jax.benchmarks.items import SubtitleFile
from adapttoken_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Subtitle:
    """One line on the video's clock, in seconds; `end_s` None lasts to the end of the video."""

    start_s: float
    end_s: float | None
    text: str


_CLOCK = r"(-?(?:\d+:)?\d+:\d+[.,]\d+|-?\d+:\d+:\d+)"
_TIMES = re.compile(rf"(?m)^\s*{_CLOCK}.?\s*-->\s*{_CLOCK}.*$")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")


def read(file: SubtitleFile, duration_s: float | None = None) -> tuple[Subtitle, ...]:
    """The lines of a file on the video's clock, in order of time.

    The file's offset is subtracted; lines outside the video are left out and those that reach over an end are cut. An
    empty .srt has no lines.

    Args:
      duration_s: the video's length; None cuts at the beginning alone.

    Raises:
      UserError: a file that cannot be read, or that is in none of the three shapes.
    """
    try:
        text = file.path.read_text(encoding="utf-8-sig")
        lines = _from_srt(text) if file.path.suffix == ".srt" else list(map(_from_json, json.loads(text)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file.path}: no readable subtitles ({type(error).__name__}: {error})") from None
    if file.path.suffix == ".srt" and text.strip() and not _TIMES.search(text):
        raise UserError(f"{file.path}: no readable subtitles (no line as 00:00:01,000 --> 00:00:02,000)")
    until = math.inf if duration_s is None else duration_s
    clipped = [_clip(line, file.offset_s, until) for line in lines if line.text]
    return tuple(sorted((line for line in clipped if line), key=lambda line: line.start_s))


def _from_srt(text: str) -> list[Subtitle]:
    marks = list(_TIMES.finditer(text))
    numbered = bool(marks) and _ends_in_number(text[: marks[0].start()].splitlines())
    lines = []
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        body = text[mark.end() : following.start() if following else len(text)].strip().splitlines()
        # The number of the next entry stands before its times.
        body = body[:-1] if numbered and following and _ends_in_number(body) else body
        lines.append(Subtitle(_srt_seconds(mark[1]), _srt_seconds(mark[2]), _plain(" ".join(body))))
    return lines


def _ends_in_number(lines: list[str]) -> bool:
    return bool(lines) and lines[-1].strip().isdigit()


def _srt_seconds(clock: str) -> float:
    return 0.0 if clock.startswith("-") else clock_seconds(clock)  # of a file that was moved to an earlier time


def _from_json(entry: dict) -> Subtitle:
    if "timestamp" in entry:
        start, end = entry["timestamp"]
        return Subtitle(clock_seconds(start), None if end is None else clock_seconds(end), _plain(entry["text"]))
    return Subtitle(clock_seconds(entry["start"]), clock_seconds(entry["end"]), _plain(entry["line"]))


def _plain(text: str) -> str:
    text.encode("utf-8")  # raises for half a character, which JSON can write and no prompt can hold
    return " ".join(_TAG.sub("", text).split())


def clock_seconds(clock: str | float) -> float:
    """`[hh:]mm:ss[.fff]`, or seconds by themselves, in seconds; a comma is a point. ValueError: no such time."""
    total = 0.0
    for part in str(clock).replace(",", ".").split(":"):
        total = 60 * total + float(part)
    if not math.isfinite(total):
        raise ValueError(f"{clock} is no time")
    return total


def _clip(line: Subtitle, offset_s: float, duration_s: float) -> Subtitle | None:
    start = max(line.start_s - offset_s, 0.0)
    end = duration_s if line.end_s is None else min(line.end_s - offset_s, duration_s)
    if end <= 0 or start >= duration_s or end < start:
        return None
    return Subtitle(start, end if math.isfinite(end) else None, line.text)


def text_at(lines: Sequence[Subtitle], times_s: Sequence[float]) -> str:
    """The texts of the lines that at least one of the times falls into, one per line, in order of time.

    A line holds from its start up to, not including, its end. A text that repeats the one before is said once.
    """
    times = np.sort(np.asarray(times_s, np.float64))
    seen: list[str] = []
    for line in lines:
        first = np.searchsorted(times, line.start_s)
        shown = first < len(times) and (line.end_s is None or times[first] < line.end_s)
        if shown and line.text != (seen[-1] if seen else ""):
            seen.append(line.text)
    return "\n".join(seen)
