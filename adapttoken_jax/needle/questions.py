"""Questions about needles, their answers, and what an honest answerer believes when it saw only some of the needles.

A needle is a sprite with a shape and a colour. A question names one attribute (the key) of one or two needles and asks
for the other (the value). Values are drawn independently and uniformly, and distractors never share an asked key, so
that whoever has not seen a needle knows nothing about its value: the belief is uniform over all options that agree with
the needles that were seen.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from adapttoken_jax.needle.render import COLOURS, SHAPES

VALUES = {"colour": tuple(COLOURS), "shape": SHAPES}
OTHER = {"colour": "shape", "shape": "colour"}
LETTERS = "ABCDE"

WORDINGS = {
    ("colour", 1): ("What colour is the {}?", "What color is the {}?", "Which colour is the {}?"),
    ("shape", 1): ("What shape is {}?", "Which shape is {}?", "What shape is the {} object?"),
    ("colour", 2): (
        "What colours are the {} and the {}?",
        "What colors are the {} and the {}?",
        "Which colours are the {} and the {}?",
    ),
    ("shape", 2): (
        "What shapes are {} and {}?",
        "Which shapes are {} and {}?",
        "What shapes are the {} object and the {} object?",
    ),
}
# Asks for nothing but reading the options: how a model first learns to answer with a letter.
READING = "Which option says {}?"
DESCRIBE = {"colour": "Describe the {}.", "shape": "Describe the {} object."}


@dataclasses.dataclass(frozen=True)
class Part:
    """One word of an answer: fixed (`needle` is None), or the value of needle number `needle`, one of `values`."""

    word: str
    needle: int | None = None
    values: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about one or two needles.

    asked: "colour" or "shape", the attribute that is asked for. keys: what the question names, one per needle.
    answer: the true answer in words; parts: the same word by word. options: for multiple choice, else empty;
    correct: index of the true option, -1 without options. beliefs: the value of every needle under each option.
    """

    text: str
    asked: str
    keys: tuple[str, ...]
    parts: tuple[Part, ...]
    options: tuple[str, ...] = ()
    correct: int = -1
    beliefs: tuple[tuple[str, ...], ...] = ()

    @property
    def answer(self) -> str:
        """The words of the true answer."""
        return " ".join(part.word for part in self.parts)

    @property
    def letter(self) -> str | None:
        """Letter of the true option, None without options."""
        return LETTERS[self.correct] if self.options else None


def choice_question(
    rng: np.random.Generator, asked: str, keys: Sequence[str], values: Sequence[str], options: int = 4
) -> Question:
    """Multiple choice: one needle and `options` values, or two needles and the four combinations of two values each."""
    wrong = [_draw_other(rng, asked, value, options - 1 if len(keys) == 1 else 1) for value in values]
    candidates = [(value, *others) for value, others in zip(values, wrong, strict=True)]
    beliefs = list(itertools.product(*candidates))
    order = rng.permutation(len(beliefs))
    beliefs = tuple(beliefs[i] for i in order)
    return Question(
        text=_wording(rng, asked, keys),
        asked=asked,
        keys=tuple(keys),
        parts=_value_parts(asked, values),
        options=tuple(" and ".join(belief) for belief in beliefs),
        correct=beliefs.index(tuple(values)),
        beliefs=beliefs,
    )


def reading_question(rng: np.random.Generator, asked: str, values: Sequence[str], options: int = 4) -> Question:
    """Multiple choice that needs no video: the question itself says which option is right."""
    question = choice_question(rng, asked, values, values, options)
    return dataclasses.replace(question, text=READING.format(question.answer))


def open_question(rng: np.random.Generator, asked: str, keys: Sequence[str], values: Sequence[str]) -> Question:
    """An answer of several words: "a red star" for one needle (half of them just "red"), "red and blue" for two."""
    if len(keys) == 2 or rng.random() < 0.5:
        return Question(_wording(rng, asked, keys), asked, tuple(keys), _value_parts(asked, values))
    return describe_question(asked, keys[0], values[0])


def describe_question(asked: str, key: str, value: str) -> Question:
    """ "Describe the star." or "Describe the red object.": the answer is "a red star"."""
    unknown = Part(value, 0, VALUES[asked])
    words = (unknown, Part(key)) if asked == "colour" else (Part(key), unknown)
    return Question(DESCRIBE[asked].format(key), asked, (key,), (Part("a"), *words))


def examples(options: bool) -> Iterator[Question]:
    """One question of every wording: all others differ from one of them in the words that are filled in."""
    rng = np.random.default_rng(0)
    make = choice_question if options else open_question
    for (asked, needles), wordings in WORDINGS.items():
        keys, values = VALUES[OTHER[asked]][:needles], VALUES[asked][:needles]
        for wording in wordings:
            yield dataclasses.replace(make(rng, asked, keys, values), text=wording.format(*keys))
        if not options and needles == 1:
            yield describe_question(asked, keys[0], values[0])


def option_distribution(question: Question, visible: Sequence[bool]) -> np.ndarray:
    """Belief over the options: uniform over those that agree with the truth on every visible needle.

    Args:
      question: with options. visible: one bool per needle of the question.

    Returns:
      float32 [options], sums to 1.
    """
    truth = question.beliefs[question.correct]
    agrees = [
        all(own == true for own, true, seen in zip(belief, truth, visible, strict=True) if seen)
        for belief in question.beliefs
    ]
    return np.asarray(agrees, np.float32) / np.float32(sum(agrees))


def word_distributions(question: Question, visible: Sequence[bool]) -> list[dict[str, float]]:
    """Belief over each word of the answer, given the true words before it. One dict word -> probability per word."""
    return [
        {part.word: 1.0}
        if part.needle is None or visible[part.needle]
        else {value: 1.0 / len(part.values) for value in part.values}
        for part in question.parts
    ]


def _wording(rng, asked, keys) -> str:
    wordings = WORDINGS[asked, len(keys)]
    return wordings[rng.integers(len(wordings))].format(*keys)


def _value_parts(asked, values) -> tuple[Part, ...]:
    parts = [Part(value, needle, VALUES[asked]) for needle, value in enumerate(values)]
    return tuple(parts) if len(parts) == 1 else (parts[0], Part("and"), parts[1])


def _draw_other(rng, asked, value, count) -> tuple[str, ...]:
    others = [other for other in VALUES[asked] if other != value]
    return tuple(others[i] for i in rng.permutation(len(others))[:count])
