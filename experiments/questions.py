"""Files of questions about videos, JSON lines, read and checked as a whole before anything costly begins."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from adapttoken_jax.errors import UserError
from adapttoken_jax.prompt import check_question

# start and stop in seconds; top, left, bottom and right as shares of the frame
Box = tuple[float, float, float, float, float, float]
_NEEDLE = '{"start": seconds, "stop": seconds, "box": [top, left, bottom, right]}'


@dataclasses.dataclass(frozen=True)
class Line:
    """One question.

    Attributes:
      where: names the line in errors.
      video: as the line spells it.
      path: of the video, the same however a line spells it.
      question: its text.
      options: their texts; None for an open question.
      content: the whole line.
    """

    where: str
    video: str
    path: pathlib.Path
    question: str
    options: tuple[str, ...] | None
    content: Mapping[str, Any]


def read_questions(path: str) -> list[Line]:
    """The questions of the file `--data`; empty lines are left out.

    Raises:
      UserError: no such file, no question, a line that is not as it must be, or a video that is not there.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"--data={path}: no such file")
    # Bytes that are not UTF-8 become what no text can hold, so that the error names their line.
    lines = pathlib.Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    folder = pathlib.Path(path).parent
    found = [
        _read_line(f"--data={path}, line {number}", line, folder)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"--data={path}: holds no question")
    return found


def read_needles(path: str) -> list[tuple[Line, list[Box]]]:
    """The questions of the file `--data`, each with the needles that its line tells.

    Raises:
      UserError: as `read_questions`, needles that are not as they must be, or none in the whole file.
    """
    found = [(line, _read_boxes(line)) for line in read_questions(path)]
    if not any(boxes for _, boxes in found):
        raise UserError(f"--data={path}: holds no needle")
    return found


def _read_boxes(line: Line) -> list[Box]:
    needles = line.content.get("needles")
    if not isinstance(needles, list):
        raise UserError(f'{line.where}: "needles" must be a list of {_NEEDLE}')
    return [_read_box(f"{line.where}: needle {number}", needle) for number, needle in enumerate(needles, 1)]


def _read_box(where: str, needle) -> Box:
    try:
        numbers = needle["start"], needle["stop"], *needle["box"]
    except (KeyError, TypeError):
        numbers = ()
    if len(numbers) != 6 or not all(map(_is_number, numbers)):
        raise UserError(f"{where} must be {_NEEDLE}, all of them finite numbers")
    start, stop, top, left, bottom, right = map(float, numbers)
    if start > stop or top > bottom or left > right:
        raise UserError(f"{where} ends before it begins; give {_NEEDLE}")
    return start, stop, top, left, bottom, right


def _is_number(value) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _read_line(where: str, line: str, folder: pathlib.Path) -> Line:
    try:
        line.encode()
        content = json.loads(line)
        video, question, options = content["video"], content["question"], content.get("options")
    except UnicodeEncodeError:
        raise UserError(f"{where}: is not valid UTF-8") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{where}: must be a JSON object with "video" and "question" ({error})') from None
    texts = [video, question, *(options or [])] if isinstance(options, list | None) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: "video" and "question" must be texts, "options" a list of texts')
    try:
        check_question(question, options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    path = _video_path(where, folder, video)
    return Line(where, video, path, question, tuple(options) if options else None, content)


def _video_path(where: str, folder: pathlib.Path, video: str) -> pathlib.Path:
    try:
        video.encode()  # logs hold its name
        if (folder / video).is_file():
            return (folder / video).resolve()
    except (ValueError, OSError):  # no name that a file can have
        pass
    raise UserError(f"{where}: {folder / video.encode('utf-8', 'replace').decode()}: no such file")
