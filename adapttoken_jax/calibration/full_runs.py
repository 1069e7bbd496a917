"""Logs of full runs: what every group said, and what Lite would have answered had it stopped after v groups.

From such a log every stop rule replays offline. A file is JSON lines: a header with the fingerprint of the settings and
the model, then one line per video, the unit of calibration, and one for the test of its videos. A file can be continued
after an interruption.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapttoken_jax.errors import UserError
from adapttoken_jax.journal import Journal, json_line

LOG_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Said:
    """What one pass said.

    Attributes:
      answer: the option, or the text without capitals, by which answers are compared; None if there is none.
      entropy: of the answer, nats.
      margin: probability of the likeliest first token minus that of the second, among the options if there are any.
      options: probability of each option; None for an open question.
    """

    answer: str | None
    entropy: float
    margin: float
    options: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class QuestionLog:
    """One question of a full run.

    Attributes:
      question: its text.
      blind: the answer without the video.
      groups: the groups' answers in visiting order.
      after: groups visited v -> the final answer from the first v groups; has at least the number of all groups.
      options: its options' texts; None for an open question, and in logs of versions that did not note them.
    """

    question: str
    blind: Said
    groups: tuple[Said, ...]
    after: Mapping[int, Said]
    options: tuple[str, ...] | None = None

    @property
    def full(self) -> Said:
        """The full run's answer."""
        return self.after[len(self.groups)]


@dataclasses.dataclass(frozen=True)
class VideoLog:
    """All questions of one video."""

    video: str
    questions: tuple[QuestionLog, ...]

    def asks(self, questions: Sequence[str], options: Sequence[Sequence[str] | None]) -> bool:
        """Whether these were asked. Of a log that did not note options only their number is held against them."""
        return len(self.questions) == len(questions) and all(
            log.question == question
            and (log.options is None or log.options == tuple(choices or ()))
            and len(log.blind.options or ()) == len(choices or ())
            for log, question, choices in zip(self.questions, questions, options, strict=True)
        )

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "VideoLog":
        """The inverse of `to_json`, from parsed JSON."""
        return cls(content["video"], tuple(_question(question) for question in content["questions"]))


def _question(content) -> QuestionLog:
    return QuestionLog(
        content["question"],
        _said(content["blind"]),
        tuple(_said(said) for said in content["groups"]),
        {int(v): _said(said) for v, said in content["after"].items()},
        tuple(content["options"]) if content.get("options") else None,
    )


def _said(content) -> Said:
    options = content["options"]
    return Said(content["answer"], content["entropy"], content["margin"], options and tuple(options))


@dataclasses.dataclass(frozen=True)
class Log:
    """A log file: the fingerprint under which it was written, its videos, and the test that was made of them."""

    fingerprint: Mapping[str, Any]
    videos: tuple[VideoLog, ...]
    test: Mapping[str, Any] | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the videos' lines."""
        return hashlib.sha256("".join(f"{video.to_json()}\n" for video in self.videos).encode()).hexdigest()

    def written_otherwise(self, fingerprint: Mapping[str, Any]) -> str:
        """The first thing in which a run of this fingerprint differs; "" if nothing."""
        return first_difference(self.fingerprint, json.loads(json.dumps(fingerprint)))

    def only(self, names: Collection[str]) -> "Log":
        """The log of some of its videos."""
        return dataclasses.replace(self, videos=tuple(video for video in self.videos if video.video in names))


def read_log(path) -> Log:
    """Reads a log file.

    Raises:
      UserError: no such file, not a log, damaged, or a video stands in it twice.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; experiments.calibrate_stop writes it")
    content = path.read_bytes()
    first, *lines = content[: content.rfind(b"\n") + 1].splitlines() or [b"{}"]  # a crash may leave part of a line
    header = _header(path, first)
    try:
        lines = [json.loads(line) for line in lines]
        videos = tuple(VideoLog.from_dict(line) for line in lines if "test" not in line)
        tests = [line["test"] for line in lines if "test" in line]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); delete it and log again") from None
    for name, times in collections.Counter(video.video for video in videos).items():
        if times > 1:  # a certificate would count it as often
            raise UserError(f"{path}: holds {name} {times} times; delete it and log again")
    return Log(header["fingerprint"], videos, *tests[:1])


def _header(path: pathlib.Path, line: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("version") != LOG_VERSION or "fingerprint" not in header:
        raise UserError(f"{path}: not a log of full runs, or of another version than {LOG_VERSION}; name another file")
    return header


class LogWriter:
    """Appends videos to a log file; each is on the disk when `append` returns. Continues a file of the same settings.

    A context manager: until it ends no other process can write the file.

    Attributes:
      done: the videos that the file already has, by name.

    Raises:
      UserError: the file is not a log, was written under other settings or by another model, or another process writes
        it.
    """

    def __init__(self, path, fingerprint: Mapping[str, Any]):
        path, header = pathlib.Path(path), {"version": LOG_VERSION, "fingerprint": fingerprint}
        self._check(path, json_line(header).encode("utf-8"))
        with contextlib.ExitStack() as stack:
            self._journal = stack.enter_context(contextlib.closing(Journal(path)))
            if not path.stat().st_size:
                self._journal.append([header])
            log = read_log(path)
            if difference := log.written_otherwise(fingerprint):
                raise UserError(f"--log={path}: written with {difference}; name another file to start afresh")
            self.done = {video.video: video for video in log.videos}
            self._stack = stack.pop_all()

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def append(self, video: VideoLog) -> None:
        """Adds a video."""
        self._journal.append([dataclasses.asdict(video)])
        self.done[video.video] = video

    def record_test(self, test: Mapping[str, Any]) -> None:
        """Writes down, once, that the videos are tested: `test` is `planned_test`'s."""
        self._journal.append([{"test": test}])

    @staticmethod
    def _check(path: pathlib.Path, header: bytes) -> None:
        """Refuses a file that is none of ours before anything in it changes; our first line may be unfinished."""
        first, whole, _ = (path.read_bytes() if path.exists() else b"").partition(b"\n")
        if whole or not header.startswith(first):
            _header(path, first)


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first thing in which two fingerprints differ, as "field=theirs, but this run has ours"; "" if nothing."""
    theirs, ours = ({"model": f.get("model"), **f.get("config", {})} for f in (theirs, ours))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if theirs.get(name) != ours.get(name) or (name in theirs) != (name in ours):
            if name == "model":
                return "another model"
            return f"{name}={theirs.get(name)}, but this run has {name}={ours.get(name)}"
    return ""
