"""Options that stand inside a question, or bring their own letters."""

import re
import string
from collections.abc import Sequence


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """(question, options) of a text whose options stand at its end as `(A) …` or `A. …`, one per line.

    Options in one line are found too if their letters are in brackets. A text without options comes back whole, with
    none. The letters must run from A without a gap, so that a "B." inside an option does not cut it.
    """
    for marker in (r"(?:^|\n)[ \t]*\({}\)", r"(?:^|\n)[ \t]*{}[.):]", r"\({}\)"):
        marks = _marks(text, marker)
        if len(marks) >= 2:
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            options = tuple(text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True))
            return text[: marks[0].start()].strip(), options
    return text.strip(), ()


def _marks(text: str, marker: str) -> list[re.Match]:
    marks: list[re.Match] = []
    for letter in string.ascii_uppercase:
        found = re.compile(marker.format(letter)).search(text, marks[-1].end() if marks else 0)
        if not found:
            break
        marks.append(found)
    return marks


def without_letter(option: str) -> str:
    """`A. red`, `A) red` and `(A) red` without the letter; anything else as it is, stripped."""
    return re.sub(r"^\s*(?:[A-Z][.):]|\([A-Z]\))\s*(?=\S)", "", option).strip()


def letter_in(answer: str, options: Sequence[str]) -> str:
    """The letter that `A`, `(A)` or `A.` says, or "" where no option has it."""
    letter = str(answer).strip("(). \n")
    return letter if letter in set(string.ascii_uppercase[: len(options)]) else ""


def letter_of_text(answer: str, options: Sequence[str]) -> str:
    """The letter of the first option whose text is `answer`, or "" where none is."""
    said = str(answer).strip()
    return next(
        (letter for letter, option in zip(string.ascii_uppercase, options, strict=False) if option.strip() == said), ""
    )
