"""Scores: every rule against values worked out by hand, oddities included."""

import pytest

from adapttoken_jax.benchmarks import BENCHMARKS, SCORERS, Item, answers, score_all
from tests.benchmarks import layouts


def item(options=("red", "blue", "green", "white"), answer="B", **given):
    return Item("1", "video", None, "Which?", tuple(options), answer, **given)


# (response, letter) under each reading.
READINGS = {
    "videomme_official": [
        ("B", "B"),
        ("(B) blue", "B"),
        ("The best answer is B.", "B"),
        ("The answer: C", "C"),
        # "Answer:" is no known beginning here: its A is the first letter.
        ("Answer: B", "A"),
        # Neither is "The best option is", for want of a comma; no harm is done, since it has no capital A to D.
        ("The best option is D", "D"),
        ("Best option: C", "B"),
        ("Best answer:Best option: C", "C"),
        ("Because of the dog", "B"),
        ("b", None),
        ("", None),
        ("I do not know", None),
        ("E", None),
    ],
    "longvideobench_official": [
        ("E", "E"),
        ("Best option: C", "C"),
        ("I say Best option: C", "C"),
        ("The correct option is D", "D"),
        ("Answer: B", "A"),
        ("unknown", None),
    ],
    "lvbench_official": [
        ("B", "B"),
        ("(B) blue", "B"),
        ("B) blue", "B"),
        ("It is (C)", "C"),
        ("B. blue", "B"),
        ("The answer is B", None),
        ("(blue) B", None),
        ("(B (C) blue", "B"),
        ("", None),
        (" ( D", "D"),
    ],
    "mlvu_official": [
        ("B", "B"),
        ("B) blue", "B"),
        ("(B) blue", "B"),
        ("the (C) one", "C"),
        ("B.", None),
        ("blue (the sea) B", None),
        ("", None),
        ("b", None),
    ],
    "lmms_eval_ranked": [
        ("B", "B"),
        ("b", None),
        ("B. blue", "B"),
        # The start counts more than the phrase.
        ("A dog. The answer is B, I think", "A"),
        ("It is not A. but the answer is C maybe", "C"),
        # Each stronger mark beside the next weaker one: start, end, phrase, (A), A., A:, A), A.
        ("A because it is B", "A"),
        ("The answer is B. A, surely B", "B"),
        ("(C) no. The answer is A here", "A"),
        ("(A) vs B. here", "A"),
        ("Is A: or B. it", "B"),
        ("so A) or B: it", "B"),
        ("so B) or A it", "B"),
        # The last of equally strong marks, and the last place of each letter.
        ("Between (A) and (D) this", "D"),
        ("(B) no (A) yes (B) it", "B"),
        ("HBO, HAM, HBO", "B"),
        # What follows the phrase: its own A is none.
        ("THE ANSWER IS C, not A, I say", "A"),
        # The phrase counts where it is said first, and each letter where it stands first after it.
        ("so the answer is C if not B, the answer is C maybe", "B"),
        # A letter that ends a word is not alone; one in quotes is.
        ("(B) in the SPA", "B"),
        ('"B" is it, not (A) here', "B"),
        ("It must be C", "C"),
        ("Because", "B"),
        ("An Apple", "A"),
        ("", None),
        ("nothing here", None),
    ],
    "vlmevalkit": [
        ("Answer: B", "B"),
        ("Option: C", "C"),
        ("it is green", "C"),
        ("green or white", None),
        ("it is none of them", None),
    ],
}


@pytest.mark.parametrize(
    ("reading", "response", "letter"),
    [(reading, response, letter) for reading, cases in READINGS.items() for response, letter in cases],
)
def test_what_each_reading_finds(reading, response, letter):
    assert getattr(answers, reading)(response, item()) == ((letter,) if letter else ())


@pytest.mark.parametrize(
    ("response", "letters"),
    [
        ("B", ("B", "B")),
        # The bracket gives C, the words give nothing, the text gives B.
        ("blue (C) is it", ("C", "C")),
        ("something blue", ("B",)),
        ("A is what I would have said before the end", ()),
        ("my answer is C here", ("C",)),
        # One of the last four words, not of the last five.
        ("now C is what I", ("C",)),
        ("C is what I see", ()),
        ("red and blue", ()),
        ("Z blue", ()),
        ("A or B or Z: blue", ("B",)),
        ("Cannot determine the answer: blue", ()),
        ("cannot determine the answer: blue", ("B",)),
        # A refusal takes back the letter among the words, not the one before a bracket.
        ("I can't process this file. C", ()),
        ("B) I'm sorry, but without the image provided it is C", ("B",)),
        # Up to twice as long as all options together, 17 characters.
        ("blue" + "." * 30, ("B",)),
        ("blue" + "." * 31, ()),
        # The bracket gives C, a letter too early among the words; the text gives B.
        ("(C) is what they all say of blue", ("C", "B")),
    ],
)
def test_vlmevalkits_second_reading(response, letters):
    assert answers.vlmevalkit_mlvu(response, item()) == letters


def test_the_second_reading_counts_where_the_first_is_wrong():
    verdict = SCORERS["mlvu"]["VLMEvalKit"].judge(item(answer="B"), "(C) is what they all say of blue")
    assert (verdict.letter, verdict.correct) == ("C", True)


def test_vlmevalkit_knows_five_letters_in_longvideobench_alone():
    """Even of four options: its E is then a wrong answer."""
    assert answers.vlmevalkit_longvideobench("Except B", item()) == ("E",)
    assert answers.vlmevalkit("Except B", item()) == ("B",)


def test_what_could_not_be_asked_counts_nowhere():
    for scorers in SCORERS.values():
        for scorer in scorers.values():
            verdict = scorer.judge(item(), None)
            assert (verdict.letter, verdict.correct, verdict.counted) == (None, False, False)


def test_a_question_without_a_right_option_is_never_right():
    for letter in ("A", "", "nothing"):
        assert not SCORERS["mlvu"]["official"].judge(item(answer=""), letter).correct


def test_a_label_that_stands_twice_counts_once():
    scores = SCORERS["lvbench"]["official"].aggregate([(item(labels={"question_type": ("Sum", "Sum")}), "B")])
    assert accuracy(scores.breakdowns["question_type"]["Sum"]) == (1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def videomme(tmp_path):
    return BENCHMARKS["videomme"].load(layouts.videomme(tmp_path))[0]


def accuracy(cell):
    return cell.correct, cell.n


def test_videomme_under_each_rule(videomme):
    """The right answers are A, B, C, D, A.

    official reads B from "Best option: C"; lmms-eval reads C from it; nothing is in "who knows"; "candles" names an
    option for VLMEvalKit alone.
    """
    responses = ["A", "candles, I think", "Best option: C", "who knows", None]
    scores = score_all("videomme", zip(videomme, responses, strict=True))
    assert {rule: accuracy(each.overall) for rule, each in scores.items()} == {
        "official": (1, 2),
        "lmms-eval": (2, 4),
        "flexselect": (1, 4),
        "VLMEvalKit": (2, 4),
    }
    assert scores["official"].overall.accuracy == 0.5 and scores["flexselect"].overall.accuracy == 0.25
    assert {rule: each.missing for rule, each in scores.items()} == dict.fromkeys(scores, 1)
    assert {rule: each.unread for rule, each in scores.items()} == {
        "official": 2, "lmms-eval": 2, "flexselect": 2, "VLMEvalKit": 1,
    }  # fmt: skip


def test_videomme_breakdowns(videomme):
    scores = SCORERS["videomme"]["lmms-eval"].aggregate(zip(videomme, ["A", "A", "C", "D", "B"], strict=True))
    parts = {
        name: {label: accuracy(cell) for label, cell in cells.items()} for name, cells in scores.breakdowns.items()
    }
    assert parts["duration"] == {"short": (1, 2), "medium": (1, 1), "long": (1, 2)}
    assert parts["task_type"] == {"Counting Problem": (2, 2), "OCR Problems": (1, 3)}
    assert parts["sub_category"] == {"Law": (1, 2), "Food": (1, 1), "Multilingual": (1, 2)}
    assert parts["duration × task_type"]["short / OCR Problems"] == (0, 1)
    assert accuracy(scores.overall) == (3, 5)


def test_longvideobench_with_absent_options_and_guesses(tmp_path):
    """The right answers are B, E, A; guesses are the same in every run and among the question's own letters."""
    items, _ = BENCHMARKS["longvideobench"].load(layouts.longvideobench(tmp_path, layout="parquet"))
    samples = list(zip(items, ["The best answer is B", "no idea", "C"], strict=True))
    scores = score_all("longvideobench", samples)
    assert {rule: accuracy(scores[rule].overall) for rule in ("official", "lmms-eval", "VLMEvalKit")} == {
        "official": (1, 3), "lmms-eval": (1, 3), "VLMEvalKit": (1, 3),
    }  # fmt: skip
    assert {label: accuracy(cell) for label, cell in scores["official"].breakdowns["duration_group"].items()} == {
        "15": (1, 2), "600": (0, 1),
    }  # fmt: skip
    guess = SCORERS["longvideobench"]["lmms-eval-guess"]
    letters = [guess.judge(items[1], "no idea").letter for _ in range(3)]
    assert letters[0] == letters[1] == letters[2] and letters[0] in items[1].letters
    assert guess.judge(items[0], "B").letter == "B"
    assert scores["lmms-eval-guess"].unread == 1


def test_guesses_are_even_over_the_options():
    guess = SCORERS["longvideobench"]["lmms-eval-guess"]
    options = ("red", "blue", "green", "white")
    letters = [guess.judge(Item(str(i), "v", None, "?", options, "A"), "").letter for i in range(2000)]
    # Four standard deviations of a binomial count around 500.
    assert all(abs(letters.count(letter) - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for letter in "ABCD")


def test_lvbench_counts_a_question_under_each_of_its_types(tmp_path):
    """The right answers are A, B, C; the third question is a summary, about events, and about reasons."""
    items, _ = BENCHMARKS["lvbench"].load(layouts.lvbench(tmp_path))
    scores = score_all("lvbench", zip(items, ["(A) red", "D", "C"], strict=True))
    official = {label: accuracy(cell) for label, cell in scores["official"].breakdowns["question_type"].items()}
    assert official == {"ER": (1, 1), "KIR": (1, 1), "Rea": (1, 2), "Sum": (1, 1), "EU": (1, 1)}
    first = {label: accuracy(cell) for label, cell in scores["flexselect"].breakdowns["question_type"].items()}
    assert first == {"ER": (1, 1), "Rea": (0, 1), "Sum": (1, 1)}
    assert accuracy(scores["official"].overall) == (2, 3)
    assert scores["official"].breakdowns["type"]["tv"].accuracy == 1.0
    answered = SCORERS["lvbench"]["official"].aggregate(zip(items, ["A", None, "The answer is C"], strict=True))
    assert accuracy(answered.overall) == (1, 2) and answered.missing == 1


@pytest.mark.parametrize("write", [layouts.mlvu, layouts.mlvu_repacked])
def test_mlvu_is_macro_for_some_and_micro_for_others(tmp_path, write):
    """All of plotQA right, one of two of needle and of order, of the other four tasks nothing.

    The mean of the tasks is (1 + 1/2 + 1/2) / 7; over the questions it is 4 of 14; without order 3 of 12. One question
    of needle is missing, so that its task has one question, which is right.
    """
    items, _ = BENCHMARKS["mlvu"].load(write(tmp_path))
    right = {"plotQA": ["A)", "C"], "needle": ["A) a horse", None], "order": ["B", "(C) a boat"]}
    responses = [answer for task in layouts.MLVU_TASKS for answer in right.get(task, ["D", "who knows"])]
    scores = score_all("mlvu", zip(items, responses, strict=True))
    assert scores["official"].overall.accuracy == pytest.approx((1 + 1 + 1 / 2) / 7)
    assert scores["lmms-eval"].overall.accuracy == pytest.approx((1 + 1 + 1 / 2) / 7)
    assert accuracy(scores["VLMEvalKit"].overall) == (4, 13)
    assert accuracy(scores["VLMEvalKit-printed"].overall) == (3, 11)
    assert scores["official"].breakdowns["task"]["order"].accuracy == 0.5
    assert accuracy(scores["official"].breakdowns["task"]["needle"]) == (1, 1)


def test_a_run_without_answers_has_no_accuracy(videomme):
    scores = SCORERS["videomme"]["official"].aggregate([(each, None) for each in videomme])
    assert scores.overall.accuracy is None and scores.overall.n == 0 and scores.missing == 5
    assert scores.breakdowns == {}


def test_scores_become_plain_json(videomme):
    scores = SCORERS["videomme"]["official"].aggregate([(each, "A") for each in videomme])
    record = scores.to_json()
    assert record["overall"]["correct"] == 2 and record["overall"]["n"] == 5
    assert record["breakdowns"]["duration"]["short"]["accuracy"] == 0.5
    # One video alone has no interval.
    assert record["breakdowns"]["duration"]["short"]["low"] is None
