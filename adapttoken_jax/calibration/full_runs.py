"""Logs of full runs: what every group said, and what Lite would have answered had it stopped after v groups.

From such a log every stop rule replays offline. A file is JSON lines: a header with the fingerprint of the settings and
the model, then one line per video, the unit of calibration, and one for the test of its videos. A file can be continued
after an interruption.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapttoken_jax.errors import UserError

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

    def only(self, names: Collection[str]) -> "Log":
        """The log of some of its videos."""
        return dataclasses.replace(self, videos=tuple(video for video in self.videos if video.video in names))


def read_log(path) -> Log:
    """Reads a log file.

    Raises:
      UserError: no such file, not a log, or damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; experiments.calibrate_stop writes it")
    header, *lines = path.read_bytes().splitlines() or [b"{}"]
    try:
        header = json.loads(header)
        if header.get("version") != LOG_VERSION:
            raise UserError(f"{path}: not a log of full runs, or of another version than {LOG_VERSION}")
        lines = [json.loads(line) for line in lines]
        videos = tuple(VideoLog.from_dict(line) for line in lines if "test" not in line)
        tests = [line["test"] for line in lines if "test" in line]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); delete it and log again") from None
    return Log(header["fingerprint"], videos, *tests[:1])


class LogWriter:
    """Appends videos to a log file; each is on the disk when `append` returns. Continues a file of the same settings.

    Attributes:
      done: the videos that the file already has, by name.

    Raises:
      UserError: the file was written under other settings, or by another model.
    """

    def __init__(self, path, fingerprint: Mapping[str, Any]):
        self._path = pathlib.Path(path)
        header = json.dumps({"version": LOG_VERSION, "fingerprint": fingerprint}) + "\n"
        self._path.touch()
        self._drop_partial_line(header.encode())
        if not self._path.stat().st_size:
            self._path.write_text(header, encoding="utf-8")
        log = read_log(self._path)
        difference = first_difference(log.fingerprint, json.loads(header)["fingerprint"])
        if difference:
            raise UserError(f"--log={path}: written with {difference}; name another file to start afresh")
        self.done = {video.video: video for video in log.videos}

    def append(self, video: VideoLog) -> None:
        """Adds a video."""
        _append(self._path, video.to_json())
        self.done[video.video] = video

    def _drop_partial_line(self, header: bytes) -> None:
        """An interruption may have left the beginning of a line, of the header too; any other file stays as it is."""
        content = self._path.read_bytes()
        if not content.endswith(b"\n") and (b"\n" in content or header.startswith(content)):
            with open(self._path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def record_test(path, test: Mapping[str, Any]) -> None:
    """Writes into a log, once, that its videos are tested: `test` is `planned_test`'s."""
    _append(path, json.dumps({"test": test}))


def _append(path, line: str) -> None:
    with open(path, "ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first thing in which two fingerprints differ, as "field=theirs, but this run has ours"; "" if nothing."""
    theirs, ours = ({"model": f.get("model"), **f.get("config", {})} for f in (theirs, ours))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if theirs.get(name) != ours.get(name) or (name in theirs) != (name in ours):
            if name == "model":
                return "another model"
            return f"{name}={theirs.get(name)}, but this run has {name}={ours.get(name)}"
    return ""
