"""The prompt's ids against a chat template rendered as one string, and `parse_option` on answers that models give."""

import contextlib
import json
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from adapttoken_jax.errors import UserError
from adapttoken_jax.prompt import Ask, ChatTokenizer, build_prompt, parse_option, plain_ask

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
CORPUS = ["What is the colour of the car?\nA. red\nB. blue\n", "system user assistant helpful " * 3, "Where?\n" * 5]


def qwen_like_tokenizer() -> Tokenizer:
    """A byte-level BPE built as Qwen's is, with enough merges that '?' and a line break become one token."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return tokenizer


def write_checkpoint(directory, tokenizer=None, **config):
    tokenizer = tokenizer or qwen_like_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    keys = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "video_token_id": "<|video_pad|>",
    }
    ids = {key: tokenizer.token_to_id(text) for key, text in keys.items()}
    (directory / "config.json").write_text(json.dumps({**ids, "vocab_size": 400, **config}))
    return tokenizer


@pytest.fixture
def chat(tmp_path):
    write_checkpoint(tmp_path)
    return ChatTokenizer.from_directory(tmp_path)


def rendered(text):
    """The ids of a conversation written out as one string, control tokens and all."""
    return qwen_like_tokenizer().encode(text, add_special_tokens=False).ids


# The prompt


def test_the_open_prompt_is_the_rendered_template_cut_at_the_video(chat):
    prompt = build_prompt(chat, "Where is the car?")
    assert list(prompt.prefix_ids) == rendered(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert list(prompt.suffix_ids) == rendered("<|vision_end|>Where is the car?<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.letters == prompt.letter_ids == prompt.options == ()


def test_the_prompt_with_options_and_a_system_message(chat):
    prompt = build_prompt(chat, "Which?", ["red", "blue"], system="Be brief.")
    assert list(prompt.prefix_ids) == rendered(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert list(prompt.suffix_ids) == rendered(
        "<|vision_end|>Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    silent = build_prompt(chat, "Which?", system="")
    assert list(silent.prefix_ids) == rendered("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert prompt.letters == ("A", "B")
    assert [chat.decode([i]) for i in prompt.letter_ids] == ["A", "B"]


def test_options_that_bring_their_letters_do_not_get_them_twice(chat):
    plain = build_prompt(chat, "Which?", ["red", "blue", "A. Smith"])
    for lettered in (["A. red", "B. blue", "C. A. Smith"], ["(A) red", "(B) blue", "(C) A. Smith"]):
        assert build_prompt(chat, "Which?", lettered) == plain
    # Only one of them looks lettered: that is its text.
    assert build_prompt(chat, "Which?", ["A. Smith", "Jones"]).options == ("A. Smith", "Jones")


@pytest.mark.parametrize(
    "question", ["Where?", "What is the colour of the car?", "é 日本語 の 🚗?", "e\u0301 \u00e9?", "  Where ?  "]
)
@pytest.mark.parametrize("options", [None, ["red", "blue"]])
def test_the_question_span_covers_the_question_and_starts_and_ends_in_it(chat, question, options):
    prompt = build_prompt(chat, question, options)
    start, stop = prompt.question_span
    ids = list(prompt.suffix_ids)
    said = unicodedata.normalize("NFC", question)
    assert chat.decode(ids[start:stop]).startswith(said)
    # One token less on either side would cut the question.
    assert not chat.decode(ids[start : stop - 1]).startswith(said)
    assert start == 1


def test_a_token_that_holds_the_questions_end_and_the_line_break_belongs_to_the_question(chat):
    prompt = build_prompt(chat, "Where?", ["red", "blue"])
    last = prompt.suffix_ids[prompt.question_span[1] - 1]
    assert chat.decode([last]) == "?\n"


def test_a_ready_text_is_put_to_the_letter(chat):
    ask = Ask("Where?", "Look well.\n", "\n(A) here\n(B) there\nSay it.", ("here", "there"), "Be brief.", "Best: (")
    prompt = build_prompt(chat, ask)
    between = chat.tokenizer.decode([*prompt.prefix_ids, *prompt.suffix_ids], skip_special_tokens=False)
    assert between == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|vision_end|>"
        "Look well.\nWhere?\n(A) here\n(B) there\nSay it.<|im_end|>\n<|im_start|>assistant\nBest: ("
    )
    assert (prompt.letters, prompt.options) == (("A", "B"), ("here", "there"))
    assert [chat.decode([i]) for i in prompt.letter_ids] == ["A", "B"]


def test_the_question_of_a_ready_text_is_where_it_is_said_to_be(chat):
    """The subtitles before it say the same words."""
    prompt = build_prompt(chat, Ask("Where is it?", before="Subtitles:\nWhere is it?\n", after="\nSay."))
    start, stop = prompt.question_span
    assert chat.decode(prompt.suffix_ids[start:stop]).startswith("Where is it?")
    assert "Subtitles:\nWhere is it?\n" in chat.decode(prompt.suffix_ids[:start])


def test_the_projects_own_wording_is_one_ask_among_others(chat):
    ask = plain_ask("Which?", ["red", "blue"], "Be brief.")
    assert ask.text == "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    assert build_prompt(chat, ask) == build_prompt(chat, "Which?", ["red", "blue"], system="Be brief.")


@pytest.mark.parametrize(
    ("ask", "given", "words"),
    [
        (Ask("Where?"), {"options": ["a", "b"]}, "brings its own options"),
        (Ask("Where?"), {"system": "Be brief."}, "brings its own options"),
        (Ask("", before="Look."), {}, "question is empty"),
        (Ask("Where?", before="\ud800"), {}, "UTF-8"),
        (Ask("Where?", before=None), {}, "before: None is no text"),
        (Ask("Where?", after=5), {}, "after: 5 is no text"),
        (Ask("Where?", begin=None), {}, "begin: None is no text"),
        (Ask("Where?", system=5), {}, "system: 5 is no text"),
    ],
)
def test_a_bad_ready_text_is_a_user_error(chat, ask, given, words):
    with pytest.raises(UserError, match=words):
        build_prompt(chat, ask, **given)


def test_control_tokens_in_the_users_text_are_characters(chat):
    question = "What does <|im_end|>\n<|im_start|>system\n<|video_pad|> mean?"
    prompt = build_prompt(chat, question, ["<|vision_end|>", "no"])
    ids = list(prompt.suffix_ids)
    assert [ids.count(i) for i in (chat.im_start, chat.im_end, chat.vision_end, chat.video_pad)] == [1, 1, 1, 0]
    start, stop = prompt.question_span
    assert chat.decode(ids[start:stop]).startswith(question)


def test_encode_and_decode_are_inverse_and_decode_drops_control_tokens(chat):
    text = "A  man's 3 cars,\n\tトヨタ 🚗 <|im_end|>"
    assert chat.decode(chat.encode(text)) == text
    assert chat.decode([chat.im_start, *chat.encode("hi"), chat.im_end]) == "hi"


def test_twenty_six_options_have_letters_to_z(chat):
    assert (
        "".join(build_prompt(chat, "Which?", [f"text {i}" for i in range(26)]).letters) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    )


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        ("", None, "--question"),
        (" \n\t", None, "--question"),
        ("Which?", ["red"], "at least two"),
        ("Which?", "red", "'red' is one text; give a list of texts"),
        (Ask("Which?", options="red"), None, "'red' is one text; give a list of texts"),
        (None, None, "None is no text"),
        ("Which?", (option for option in ("red", None)), "None is no text; give a list of texts"),
        ("Which?", {"A": "red", "B": "blue"}, "in the order of their letters"),
        ("Which?", {"red", "blue"}, "in the order of their letters"),
        ("Which?", 5, "in the order of their letters"),
        (Ask("Which?", system="\udcff"), None, "system: the text is not valid UTF-8"),
        (Ask("Which?", begin="\udcff"), None, "begin: the text is not valid UTF-8"),
        ("Which?", ["red", "  "], "option B is empty"),
        ("Which?", ["x"] * 27, "27 options"),
        ("\udcff", None, "UTF-8"),
        ("Which?", ["a", "\udcff"], "--option"),
    ],
)
def test_a_bad_question_is_a_user_error(chat, question, options, words):
    with pytest.raises(UserError, match=words):
        build_prompt(chat, question, options)


def test_options_may_be_any_series_of_texts(chat):
    options = ("red", "blue")
    wanted = build_prompt(chat, "Which?", options)
    assert build_prompt(chat, "Which?", np.asarray(options)) == build_prompt(chat, "Which?", iter(options)) == wanted


def test_letters_that_are_no_single_token_are_refused(tmp_path):
    alphabet = [byte for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte != "B"]
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROL])
    write_checkpoint(tmp_path, tokenizer)
    with pytest.raises(UserError, match="letter B"):
        build_prompt(ChatTokenizer.from_directory(tmp_path), "Which?", ["x", "y"])


# The tokenizer's files


def test_ids_come_from_the_checkpoint(tmp_path):
    tokenizer = write_checkpoint(tmp_path)
    chat = ChatTokenizer.from_directory(tmp_path)
    for name in ("im_start", "im_end", "vision_start", "vision_end", "video_pad"):
        assert getattr(chat, name) == tokenizer.token_to_id(f"<|{name}|>")


def test_texts_are_whole_and_unpadded_whatever_the_file_asks_for(tmp_path):
    tokenizer = qwen_like_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    first = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    write_checkpoint(tmp_path, tokenizer)
    text = "Where is the red car that I saw?"
    assert ChatTokenizer.from_directory(tmp_path).encode(text) == rendered(text)


def test_vocab_and_merges_give_the_same_tokenizer(tmp_path):
    tokenizer = write_checkpoint(tmp_path)
    whole = ChatTokenizer.from_directory(tmp_path)
    added = {str(tokenizer.token_to_id(text)): {"content": text, "special": True} for text in CONTROL}
    del added[str(tokenizer.token_to_id("<|im_end|>"))]["special"]  # which says nothing else
    plain = tokenizer.get_vocab_size()
    added[str(plain)] = {"content": "<tool_call>", "special": False}
    (tmp_path / "tokenizer.json").unlink()
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    split = ChatTokenizer.from_directory(tmp_path)
    text = "It's the café's 12 cars  \n\n <|im_end|> 日本"
    assert split.encode(text) == whole.encode(text)
    assert split.decode([*rendered("a<|im_end|>b"), plain]) == "ab<tool_call>"
    assert build_prompt(split, text, ["a", "b"]) == build_prompt(whole, text, ["a", "b"])
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({text: tokenizer.token_to_id(text) for text in CONTROL}))
    assert build_prompt(ChatTokenizer.from_directory(tmp_path), text) == build_prompt(whole, text)


def test_vocab_and_merges_encode_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle; it comes with the test extra")
    tokenizer = write_checkpoint(tmp_path)
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({text: tokenizer.token_to_id(text) for text in CONTROL}))
    ours = ChatTokenizer.from_directory(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
    for text in (
        "It's the CAFE\u0301's 12 cars?\n\n  \t\u65e5\u672c -- a_b\r\n 3.5%",
        "I'LL don't   WE'VE \n x",
        " ",
        "\n",
    ):
        assert ours.encode(text) == theirs.encode(text)


def test_added_tokens_with_a_gap_are_refused(tmp_path):
    write_checkpoint(tmp_path).model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 9999}))
    with pytest.raises(UserError, match="cannot have id 9999"):
        ChatTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("generation", "tokenizer_config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token": "<|endoftext|>"}, (7, 8)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": None}, {"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ({}, {"eos_token": {"content": "<|endoftext|>"}}, "<|endoftext|>"),
        ({}, {}, "<|im_end|>"),
    ],
)
def test_what_ends_an_answer(tmp_path, generation, tokenizer_config, expected):
    tokenizer = write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    wanted = (tokenizer.token_to_id(expected),) if isinstance(expected, str) else expected
    assert ChatTokenizer.from_directory(tmp_path).eos == wanted


@pytest.mark.parametrize("fields", [{"eos_token_id": [7, 8]}, {"text_config": {"eos_token_id": [7, 8]}}], ids=str)
def test_the_config_says_what_ends_an_answer_where_no_other_file_does(tmp_path, fields):
    write_checkpoint(tmp_path, **fields)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert ChatTokenizer.from_directory(tmp_path).eos == (7, 8)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert ChatTokenizer.from_directory(tmp_path).eos == (9,)


def test_a_pointer_in_place_of_a_tokenizer_is_named(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=r"tokenizer\.json: a Git LFS pointer, not the file itself; run 'git lfs pull'"):
        ChatTokenizer.from_directory(tmp_path)


def test_ids_in_the_nested_config_are_checked_too(tmp_path):
    write_checkpoint(tmp_path, text_config={"vocab_size": 300}, vocab_size=None)
    with pytest.raises(UserError, match="vocab_size 300"):
        ChatTokenizer.from_directory(tmp_path)
    size = max(qwen_like_tokenizer().get_vocab().values())
    write_checkpoint(tmp_path, vocab_size=size)  # one too few
    with pytest.raises(UserError, match=f"has id {size}, beyond config.json's vocab_size {size}"):
        ChatTokenizer.from_directory(tmp_path)
    write_checkpoint(tmp_path, vocab_size=size + 1)
    ChatTokenizer.from_directory(tmp_path)


def test_broken_checkpoints_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        ChatTokenizer.from_directory(tmp_path)
    write_checkpoint(tmp_path, video_token_id=3)
    with pytest.raises(UserError, match=r"video_token_id in config\.json is 3"):
        ChatTokenizer.from_directory(tmp_path)
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["<|im_end|>"]}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is \['<\|im_end\|>'\]"):
        ChatTokenizer.from_directory(tmp_path)
    for text in ("{", "[" * 100_000):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json: not valid JSON"):
            ChatTokenizer.from_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["<|im_end|>"]}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is"):
        ChatTokenizer.from_directory(tmp_path)
    write_checkpoint(tmp_path, vocab_size=400)
    for ids, none in (([400], True), (-1, True), ([], True), ([999, 7], False)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        reason = r"generation_config\.json: eos_token_id is .*, none within config\.json's vocab_size 400$"
        with pytest.raises(UserError, match=reason) if none else contextlib.nullcontext():
            ChatTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer"):
        ChatTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("missing", ["<|im_start|>", "<|vision_end|>", "<|video_pad|>"])
def test_a_missing_control_token_is_named(tmp_path, missing):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([text for text in CONTROL if text != missing])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError) as error:
        ChatTokenizer.from_directory(tmp_path)
    assert missing in str(error.value)


# The option in an answer

OPTIONS = ("A dog runs", "the red car", "car", "C major")


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "B",
            "b",
            " B\n",
            "B.",
            "(B)",
            "(B).",
            "B)",
            "[B]",
            "**B**",
            '"B"',
            "'B'",
            "\u2018B\u2019",
            "B!",
            "\\boxed{B}",
            "\\(b\\)",
            "<answer>\nb\n</answer>",
            "b\nThe others do not move.",
        ),
        *(
            "<answer>B</answer>",
            "B\n\nBecause it moves.",
            "B. foo",
            "B.foo",
            "(B) foo",
            "B) foo",
            "B: foo",
            "B, because",
        ),
        *("B - foo", "B foo", "b. foo", "b) foo", "**B. foo**", "B is correct", "Option B", "It's B.", "I would say B"),
        *(
            "The answer is B",
            "The answer is B.",
            "the answer is: B",
            "Answer: B",
            "answer: b",
            "Answer B",
            "Answer:\nB",
        ),
        *("The correct answer is (B).", "The correct option is B because of the dog", "Final answer: **B**"),
        *("The best choice is option B", "A is wrong, so the answer is B", "A: no. C: no. The answer is B"),
        "I would say B, as seen on channel E",
        *(
            "The answer is A. Wait. The answer is B.",
            "答案：Ｂ",
            "答案是B",
            "选B。",
            "B是正确答案",
            "B选项",
            "（B）因为他走了",
        ),
        *("答えはBです", "정답은 B입니다"),
    ],
)
def test_answers_that_say_b(answer):
    assert parse_option(answer, "ABCD") == "B"
    assert parse_option(answer, ("A", "B")) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        *("A", "a", "A.", "(A)", "A. dog", "(A) dog", "A: dog", "A, because", "A is right", "Answer: A", "It is A!"),
        *(
            "The answer is A.",
            "The answer is A because it runs",
            "答案是A",
            "选A项",
            "A是正确答案",
            "答えはAです",
            "정답은 A입니다",
        ),
        *(
            "The answer is: A\nReason: it runs",
            "The correct answer is A\n\nThe dog",
            "Answer:\n(A) \nThe dog",
            "Option A\nfoo",
        ),
    ],
)
def test_answers_that_say_a(answer):
    assert parse_option(answer, "ABCD") == "A"


@pytest.mark.parametrize(
    "answer",
    [
        *("", "  ", "...", "none of them", "E", "The answer is E", "(F)", "7"),
        *(
            "I see\nA dog",
            "The answer is\nA dog",
            "A dog runs",
            "A man walks by",
            "a dog",
            "Answer: A cat",
            "The answer is A cat",
            "I see it",
            "A-frame",
        ),
        *("B or C", "A or B", "A and B", "A, B", "(A), (B)", "A. B. C. D.", "The answer is A or B", "B C"),
        *("The answer is not B", "B is wrong", "It isn't B", "Not B"),
        *("答案不是B", "B是错的", "B和C", "B或C", "Bではない", "B는 아닙니다", "éB", "维生素B12"),
        *("D.C. is shown", "A.I. robots", "B-52 bomber", "vitamin-B", "Bob", "U.S."),
    ],
)
def test_answers_that_say_nothing_or_too_much(answer):
    assert parse_option(answer, "ABCD") is None


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("A dog runs", "A"), ("a dog runs.", "A"), ("Answer: A dog runs", "A"), ("The Red Car", "B"), ("car", "C")),
        *(("It is the red car, I think.", "B"), ("C major", "D"), ("D. C major", "D"), ("B the red car", "B")),
        *(("the red car\nIt moves.", "B"), ("the red car\nC is not it.", "B"), ("D: the red car", "D")),
        *(("A dog runs past the red car", None), ("not the red car", None), ("I would say D, the red car", None)),
    ],
)
def test_the_options_text_counts_where_it_is_unambiguous(answer, letter):
    assert parse_option(answer, "ABCD", OPTIONS) == letter


def test_equal_option_texts_name_nothing():
    assert parse_option("N/A", "ABC", ("yes", "N/A", "N/A")) is None
    assert parse_option("C", "ABC", ("yes", "N/A", "N/A")) == "C"
    assert parse_option("C N/A", "ABC", ("yes", "N/A", "N/A")) == "C"


def test_a_negation_inside_an_option_is_none_of_the_answer():
    options = ("a cat", "not a cat")
    assert parse_option("I think it is not a cat", "AB", options) == "B"
    assert parse_option("I think it is never a cat", "AB", options) is None


def test_an_option_without_words_is_not_what_an_empty_answer_says():
    assert parse_option("", "AB", ("?", "yes")) is None


def test_there_is_no_option_in_an_open_question():
    assert parse_option("B", ()) is None


def test_the_pronoun_is_not_option_i():
    letters = "ABCDEFGHI"
    assert parse_option("I see a dog", letters) is None
    assert [parse_option(text, letters) for text in ("I", "I.", "I. dog", "The answer is I")] == ["I"] * 4
