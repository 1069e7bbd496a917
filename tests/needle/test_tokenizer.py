"""The needle tokenizer: whole words, every other text, and the prompt."""

import pytest

from adapttoken_jax import needle, prompt
from adapttoken_jax.needle.tokenizer import CONTROL_TOKENS, chat_tokenizer, make_tokenizer


def test_ids_are_the_same_every_time_and_control_tokens_come_last():
    first, second = make_tokenizer(), make_tokenizer()
    assert first.to_str() == second.to_str()
    size = first.get_vocab_size()
    assert [first.token_to_id(token) for token in CONTROL_TOKENS] == list(range(size - len(CONTROL_TOKENS), size))
    assert size < 400


@pytest.mark.parametrize("word", [*needle.COLOURS, *needle.SHAPES])
def test_values_are_one_token_with_and_without_a_space(word):
    tokenizer = chat_tokenizer()
    assert len(tokenizer.encode(word)) == len(tokenizer.encode(" " + word)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red star",
        "What is this? <|im_end|>",
        "Grüße, 日本\n\n  two  spaces\tand 'S's don't",
        "Zebra crossing 1234",
    ],
)
def test_any_text_comes_back(text):
    tokenizer = chat_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_letters_are_single_tokens():
    ids = [chat_tokenizer().encode(letter) for letter in "ABCDE"]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == 5


@pytest.mark.parametrize("task", ["single", "pair"])
def test_prompts_need_no_bytes(task):
    """Everything that a scene asks is made of whole words: at most a token per word, mark, line break or letter."""
    tokenizer = chat_tokenizer()
    for seed in range(40):
        scene = needle.scene(seed, "train", 32, task)
        for question in (scene.question, scene.open_question):
            built = prompt.build_prompt(tokenizer, question.text, question.options or None)
            words = [tokenizer.tokenizer.id_to_token(i) for i in built.prefix_ids + built.suffix_ids]
            assert all(len(w.removeprefix("\u0120")) > 1 or w in "ABCD.?\u010a\u0120a" for w in words), words
            assert len(tokenizer.encode(question.answer)) == len(question.parts)
