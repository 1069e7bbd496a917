"""Prompts, to the letter."""

import dataclasses

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax.benchmarks import BENCHMARKS, PROMPTS
from adapttoken_jax.prompt import ChatTokenizer, build_prompt
from tests import tiny
from tests.benchmarks import layouts


def first_item(benchmark, directory):
    return BENCHMARKS[benchmark].load(getattr(layouts, benchmark)(directory))[0][0]


VIDEOMME_QUESTION = """\
What is in video 1, question 1?
A. Apples.
B. Candles.
C. Berries.
D. A (B) sign.
"""
SELECT = "Select the best answer to the following multiple-choice question based on the video"
LETTER_ONLY = "Respond with only the letter (A, B, C, or D) of the correct option."

# (name, subtitles) -> the text after the video.
VIDEOMME = {
    ("official", None): f"{SELECT}. {LETTER_ONLY}\n{VIDEOMME_QUESTION}The best answer is:",
    ("official", ""): f"{SELECT}. {LETTER_ONLY}\n{VIDEOMME_QUESTION}The best answer is:",
    ("official", "Hello.\nBye."): (
        "This video's subtitles are listed below:\nHello.\nBye.\n"
        f"{SELECT} and the subtitles. {LETTER_ONLY}\n{VIDEOMME_QUESTION}The best answer is:"
    ),
    ("lmms-eval", None): (
        f"{SELECT} and the subtitles. {LETTER_ONLY}\n{VIDEOMME_QUESTION}"
        "\nAnswer with the option's letter from the given choices directly."
    ),
    ("lmms-eval", "Hello."): (
        "This video's subtitles are listed below: \nHello.\n"
        f"{SELECT} and the subtitles. {LETTER_ONLY}\n{VIDEOMME_QUESTION}The best answer is:"
    ),
    # The video has a file, and no line of it falls on a sampled frame.
    ("lmms-eval", ""): (
        "This video's subtitles are listed below: \n\n"
        f"{SELECT} and the subtitles. {LETTER_ONLY}\n{VIDEOMME_QUESTION}The best answer is:"
    ),
    ("qwen", ""): (
        "This video's subtitles are listed below: \n\n"
        "Question: What is in video 1, question 1?\nOptions:\nA. Apples.\nB. Candles.\nC. Berries.\nD. A (B) sign.\n"
        "Answer with the option letter only."
    ),
    ("flexselect", None): (
        f"{SELECT} and the subtitles. {LETTER_ONLY}\n{VIDEOMME_QUESTION}"
        "\nAnswer with the option's letter from the given choices directly."
    ),
    ("qwen", None): (
        "Question: What is in video 1, question 1?\nOptions:\nA. Apples.\nB. Candles.\nC. Berries.\nD. A (B) sign.\n"
        "Answer with the option letter only."
    ),
    ("qwen", "Hello."): (
        "This video's subtitles are listed below: \nHello.\n"
        "Question: What is in video 1, question 1?\nOptions:\nA. Apples.\nB. Candles.\nC. Berries.\nD. A (B) sign.\n"
        "Answer with the option letter only."
    ),
}
LONGVIDEOBENCH_QUESTION = "Which is number 0?\nA. red\nB. blue\nC. green\nD. white\n"
LONGVIDEOBENCH = {
    ("official", None): (
        f"Question: {LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly."
    ),
    ("official", "Hello."): (
        f"Hello.\nQuestion: {LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly."
    ),
    # No line falls on a sampled frame: nothing is said of subtitles, not even an empty line.
    ("official", ""): (
        f"Question: {LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly."
    ),
    ("lmms-eval", ""): (f"{LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly.\n"),
    ("lmms-eval", None): (
        f"{LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly.\n"
    ),
    ("lmms-eval", "Hello."): (
        f"Hello.\n{LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly.\n"
    ),
    ("flexselect", None): (
        f"{LONGVIDEOBENCH_QUESTION}Answer with the option's letter from the given choices directly.\n"
    ),
    ("qwen", None): (
        "Question: Which is number 0?\nOptions:\nA. red\nB. blue\nC. green\nD. white\n"
        "Answer with the option letter only."
    ),
}
LVBENCH_QUESTION = "What colour is it?\n(A) red\n(B) blue\n(C) a (B) flag\n(D) green"
LVBENCH = {
    ("official", None): LVBENCH_QUESTION,
    ("lmms-eval", None): f"{LVBENCH_QUESTION}\nAnswer the question with the option letter",
    ("flexselect", None): (
        f"{SELECT}. {LETTER_ONLY}\nWhat colour is it?\nA red\nB blue\nC a B flag\nD green\n"
        "\nAnswer with the option's letter from the given choices directly."
    ),
    ("qwen", None): (
        "Question: What colour is it?\nOptions:\nA. red\nB. blue\nC. a (B) flag\nD. green\n"
        "Answer with the option letter only."
    ),
}
MLVU_QUESTION = "What of plotQA 0?\n(A) a horse\n(B) a house\n(C) a boat\n(D) B\n"
MLVU = {
    ("official", None): (
        "Question: What of plotQA 0?\nOptions:\n(A) a horse\n(B) a house\n(C) a boat\n(D) B\nOnly give the best option."
    ),
    ("lmms-eval", None): f"{MLVU_QUESTION}Only give the best option.\nBest option: (",
    ("flexselect", None): (
        f"\n{MLVU_QUESTION}Answer with the best option's letter from the given choices directly.\nBest option: ("
    ),
    ("qwen", None): (
        "Question: What of plotQA 0?\nOptions:\nA. a horse\nB. a house\nC. a boat\nD. B\n"
        "Answer with the option letter only."
    ),
}
EXPECTED = {"videomme": VIDEOMME, "longvideobench": LONGVIDEOBENCH, "lvbench": LVBENCH, "mlvu": MLVU}


def test_every_prompt_has_a_literal():
    written = {benchmark: {name for name, _ in texts} for benchmark, texts in EXPECTED.items()}
    assert written == {benchmark: set(prompts) for benchmark, prompts in PROMPTS.items()}


@pytest.mark.parametrize(
    ("benchmark", "name", "subtitles"), [(b, name, shown) for b, texts in EXPECTED.items() for name, shown in texts]
)
def test_the_text_of_each_prompt(tmp_path, benchmark, name, subtitles):
    item = first_item(benchmark, tmp_path)
    ask = PROMPTS[benchmark][name](item, subtitles)
    assert ask.text == EXPECTED[benchmark][name, subtitles]
    assert ask.question == item.question and ask.options == item.options
    official_mlvu = (benchmark, name) == ("mlvu", "official")
    assert ask.begin == ("Best Option: (" if official_mlvu else "")
    assert ask.system == (
        "Carefully watch this video and pay attention to every detail. Based on your observations, select the best "
        "option that accurately addresses the question."
        if official_mlvu
        else None
    )


@pytest.mark.parametrize("name", ["lmms-eval", "flexselect", "qwen"])
def test_a_video_without_subtitles_is_said_to_have_none(tmp_path, name):
    items, _ = BENCHMARKS["videomme"].load(layouts.videomme(tmp_path))
    with_file, without = items[0], items[-1]
    said = lambda item: PROMPTS["videomme"][name](item, "").text.splitlines()[1]
    assert (said(with_file), said(without)) == ("", "No subtitles available")


def test_a_repacked_question_is_put_as_it_came(tmp_path):
    [item, *_], _ = BENCHMARKS["mlvu"].load(layouts.mlvu_repacked(tmp_path, "{}. {}"))
    ask = PROMPTS["mlvu"]["lmms-eval"](item, None)
    assert ask.text == (
        "What of plotQA 0?\nA. a horse\nB. a house\nC. a boat\nD. B\nOnly give the best option.\nBest option: ("
    )
    assert ask.question == "What of plotQA 0?"


def test_white_space_after_the_last_option_is_not_said(tmp_path):
    item = dataclasses.replace(first_item("mlvu", tmp_path), options=("a horse ", "a house \n"))
    text = PROMPTS["mlvu"]["official"](item, None).text
    assert text.endswith("\nOptions:\n(A) a horse \n(B) a house\nOnly give the best option.")


def test_the_absent_fifth_option_is_not_asked(tmp_path):
    items, _ = BENCHMARKS["longvideobench"].load(layouts.longvideobench(tmp_path, layout="parquet"))
    texts = [PROMPTS["longvideobench"]["lmms-eval"](item, None).text for item in items]
    assert ["E. " in text for text in texts] == [False, True, False]
    assert not any("N/A" in text for text in texts)


def test_the_answer_goes_on_from_the_assistants_beginning(tmp_path):
    """The bracket is the last token before the answer, so that the letter is a token of its own."""
    tiny.write_tokenizer(tmp_path)
    tokenizer = ChatTokenizer.from_directory(tmp_path)
    prompt = build_prompt(tokenizer, PROMPTS["mlvu"]["official"](first_item("mlvu", tmp_path / "data"), None))
    assert tokenizer.decode(prompt.suffix_ids).endswith("assistant\nBest Option: (")
    assert tokenizer.encode("Best Option: (A)")[-2:] == [prompt.letter_ids[0], *tokenizer.encode(")")]
    assert prompt.letters == ("A", "B", "C", "D")


def test_a_model_answers_a_ready_text_alone_and_beside_a_question_in_words(tmp_path):
    model = at.load(tiny.write_checkpoint(tmp_path / "model", tiny.SHAPES["single_layers"]))
    item = first_item("mlvu", tmp_path / "data")
    official = PROMPTS["mlvu"]["official"](item, None)
    frames = at.Frames(np.random.default_rng(0).integers(0, 256, (4, 56, 56, 3), np.uint8), fps=2.0)
    alone = at.answer(model, frames, official, method="full")
    both = at.answer(model, frames, [official, item.question], [None, list(item.options)], method="full")
    assert both[0].entropy == pytest.approx(alone.entropy, rel=1e-5) and both[0].answer == alone.answer
    assert alone.option in item.letters and both[1].entropy != both[0].entropy
