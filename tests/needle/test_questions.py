"""Questions and beliefs, against literal cases."""

import numpy as np
import pytest

from adapttoken_jax.needle import questions
from adapttoken_jax.needle.questions import Part, Question, option_distribution, word_distributions
from adapttoken_jax.needle.render import COLOURS, SHAPES

_PAIR = Question(
    text="What colours are the star and the disc?",
    asked="colour",
    keys=("star", "disc"),
    parts=(Part("red", 0, tuple(COLOURS)), Part("and"), Part("blue", 1, tuple(COLOURS))),
    options=("green and blue", "red and cyan", "red and blue", "green and cyan"),
    correct=2,
    beliefs=(("green", "blue"), ("red", "cyan"), ("red", "blue"), ("green", "cyan")),
)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ((True, True), [0, 0, 1, 0]),
        ((True, False), [0, 0.5, 0.5, 0]),
        ((False, True), [0.5, 0, 0.5, 0]),
        ((False, False), [0.25] * 4),
    ],
)
def test_pair_beliefs(visible, expected):
    assert option_distribution(_PAIR, visible).tolist() == expected


def test_open_beliefs_word_by_word():
    assert word_distributions(_PAIR, (True, True)) == [{"red": 1.0}, {"and": 1.0}, {"blue": 1.0}]
    seen, blind = word_distributions(_PAIR, (True, False))[0], word_distributions(_PAIR, (True, False))[2]
    assert seen == {"red": 1.0} and blind == {colour: 1 / 6 for colour in COLOURS}


def test_describing_leaves_only_the_unknown_word_open():
    colour = questions.describe_question("colour", "star", "red")
    assert (colour.text, colour.answer) == ("Describe the star.", "a red star")
    assert [len(d) for d in word_distributions(colour, (False,))] == [1, 6, 1]
    shape = questions.describe_question("shape", "red", "star")
    assert (shape.text, shape.answer) == ("Describe the red object.", "a red star")
    assert word_distributions(shape, (False,))[2] == {name: 1 / 6 for name in SHAPES}


@pytest.mark.parametrize("asked", ["colour", "shape"])
def test_single_options_hold_the_truth_once_and_blind_belief_is_a_quarter(asked):
    rng = np.random.default_rng(0)
    for _ in range(50):
        key, value = rng.choice(questions.VALUES[questions.OTHER[asked]]), rng.choice(questions.VALUES[asked])
        question = questions.choice_question(rng, asked, [key], [value])
        assert len(set(question.options)) == 4 and question.options[question.correct] == value == question.answer
        assert question.letter == "ABCD"[question.correct]
        assert option_distribution(question, (False,)).tolist() == [0.25] * 4
        assert option_distribution(question, (True,)).sum() == 1


@pytest.mark.parametrize("options", [2, 3, 4, 5])
def test_number_of_options_and_reading(options):
    rng = np.random.default_rng(3)
    question = questions.reading_question(rng, "shape", ["star"], options)
    assert question.text == "Which option says star?" and len(question.options) == options
    assert question.options[question.correct] == "star"


def test_pair_options_are_the_four_combinations():
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = [str(v) for v in rng.choice(SHAPES, 2)]
        question = questions.choice_question(rng, "shape", ["red", "blue"], values)
        firsts, seconds = ({belief[i] for belief in question.beliefs} for i in range(2))
        assert len(firsts) == len(seconds) == 2 and len(set(question.beliefs)) == 4
        assert question.options[question.correct] == " and ".join(values) == question.answer


def test_every_option_is_as_likely_to_be_the_truth():
    """No shortcut: neither the letter nor the options' texts betray the answer."""
    rng = np.random.default_rng(2)
    asked = [questions.choice_question(rng, "colour", ["star"], [rng.choice([*COLOURS])]) for _ in range(2000)]
    letters = np.bincount([q.correct for q in asked], minlength=4)
    assert letters.min() > 430
    ranks = np.bincount([sorted(q.options).index(q.answer) for q in asked], minlength=4)
    assert ranks.min() > 430
