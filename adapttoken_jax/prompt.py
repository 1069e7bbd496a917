"""The chat prompt around the video, and what an answer says about the options.

Design decisions:
- `tokenizers` alone; no chat template is run. The layout is Qwen's: a system turn, a user turn that holds the video and
  then the text, and the header of the assistant's turn.
- The prompt comes in two parts, before and after the visual tokens, because the visual tokens never exist as text.
- Control tokens enter as ids. Text from the user is encoded with control tokens switched off, so that a question which
  contains `<|im_end|>` is a question about those characters and cannot close the turn.
- Every special id comes from the checkpoint.
- All wordings end in one `Ask`, so that a benchmark's prompt and the project's own become ids in one place.
"""

import dataclasses
import json
import math
import pathlib
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from adapttoken_jax.errors import UserError, check_no_pointer

DEFAULT_SYSTEM = "You are a helpful assistant."
OPTIONS_INSTRUCTION = "Answer with the option's letter from the given choices directly."

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------

# The text of each control token, and the `config.json` key that also gives its id, where there is one.
_CONTROL_TOKENS = {
    "im_start": ("<|im_start|>", None),
    "im_end": ("<|im_end|>", None),
    "vision_start": ("<|vision_start|>", "vision_start_token_id"),
    "vision_end": ("<|vision_end|>", "vision_end_token_id"),
    "video_pad": ("<|video_pad|>", "video_token_id"),
}

# How Qwen2's byte-level BPE splits text into words; needed only when there is no tokenizer.json to say so.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class ChatTokenizer:
    """A checkpoint's tokenizer with the ids of its control tokens. `eos` holds every id that ends an answer."""

    tokenizer: Tokenizer = dataclasses.field(repr=False)
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    video_pad: int
    eos: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory) -> "ChatTokenizer":
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt`, and the ids in `config.json` where it gives them.

        Answers end at `eos_token_id` of `generation_config.json`, else of `config.json`, else at `eos_token` of
        `tokenizer_config.json`, else at `<|im_end|>`.

        Raises:
          UserError: missing or unreadable files, a control token that the tokenizer lacks, an id on which
            `config.json` and the tokenizer disagree, or no end of an answer within the vocabulary.
        """
        directory = pathlib.Path(directory)
        tokenizer = _read_tokenizer(directory)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # control tokens inside a text are plain characters
        config = _read_json(directory / "config.json")
        ids = {name: _control_id(tokenizer, config, name, directory) for name in _CONTROL_TOKENS}
        eos = _eos_ids(tokenizer, directory, ids["im_end"], config)
        return cls(tokenizer, **ids, eos=eos)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added; control tokens that it spells are encoded as plain characters."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without control tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content


def _read_tokenizer(directory: pathlib.Path) -> Tokenizer:
    whole, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.is_file():
        return _parsed(whole, lambda: Tokenizer.from_file(str(whole)))
    if vocab.is_file() and merges.is_file():
        return _parsed(vocab, lambda: _byte_level_bpe(vocab, merges, directory))
    raise UserError(f"{directory}: no tokenizer.json (nor vocab.json with merges.txt); copy it from the original model")


def _parsed(path: pathlib.Path, read: Callable[[], Tokenizer]) -> Tokenizer:
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        check_no_pointer(path)
        raise UserError(f"{path}: not a readable tokenizer ({error})") from None


def _byte_level_bpe(vocab: pathlib.Path, merges: pathlib.Path, directory: pathlib.Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for index, content, special in _added_tokens(directory):
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
        if tokenizer.token_to_id(content) != index:
            raise UserError(f"{directory}: the added token {content} cannot have id {index}; give a tokenizer.json")
    return tokenizer


def _added_tokens(directory: pathlib.Path) -> list[tuple[int, str, bool]]:
    """(id, text, special) of the tokens beside `vocab.json`, by id; files without the flag hold only special tokens."""
    declared = _read_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    tokens = [(int(i), token["content"], bool(token.get("special", True))) for i, token in declared.items()]
    if not tokens:
        tokens = [(i, content, True) for content, i in _read_json(directory / "added_tokens.json").items()]
    return sorted(tokens)


def _control_id(tokenizer: Tokenizer, config: dict[str, Any], name: str, directory: pathlib.Path) -> int:
    text, key = _CONTROL_TOKENS[name]
    index = tokenizer.token_to_id(text)
    if index is None:
        raise UserError(f"{directory}: the tokenizer has no {text} token; this is not a Qwen2.5-VL tokenizer")
    declared = _declared(config, key)
    if declared is not None and declared != index:
        raise UserError(f"{directory}: {text} is {index} in the tokenizer but {key} in config.json is {declared}")
    size = _declared(config, "vocab_size")
    if size is not None and index >= size:
        raise UserError(f"{directory}: {text} has id {index}, beyond config.json's vocab_size {size}")
    return index


def _declared(config: dict[str, Any], key: str | None) -> int | None:
    """A number of `config.json`, at the top or in `text_config`, as the two layouts have it."""
    inner = config.get("text_config") or {}
    return config[key] if config.get(key) is not None else inner.get(key)


def _eos_ids(tokenizer: Tokenizer, directory: pathlib.Path, fallback: int, config: dict) -> tuple[int, ...]:
    size = _declared(config, "vocab_size")
    for settings in (directory / "generation_config.json", directory / "config.json"):
        if (declared := _declared(_read_json(settings), "eos_token_id")) is not None:
            return _checked_eos(settings, declared, size)
    settings = directory / "tokenizer_config.json"
    token = _read_json(settings).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise UserError(f"{settings}: eos_token is {text!r}; it must be a token's text")
    index = tokenizer.token_to_id(text) if text else None
    return (fallback if index is None else index,)


def _checked_eos(settings: pathlib.Path, declared, size: int | None) -> tuple[int, ...]:
    ids = declared if isinstance(declared, list) else [declared]
    if not all(type(index) is int for index in ids):
        raise UserError(f"{settings}: eos_token_id is {declared!r}; give token ids")
    if not any(0 <= index < (size or math.inf) for index in ids):  # a spare one beside may be beyond
        raise UserError(f"{settings}: eos_token_id is {declared!r}, none within config.json's vocab_size {size}")
    return tuple(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Prompt
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids around the visual tokens.

    Attributes:
      prefix_ids: ids before the visual tokens; the last is vision_start.
      suffix_ids: ids after the visual tokens; the first is vision_end.
      question_span: (start, stop) in `suffix_ids` of the tokens that hold a character of the question.
      letters: one letter per option, from A; empty for an open question.
      letter_ids: the token id of each letter as an answer's first token.
      options: the options' texts without their letters.
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    question_span: tuple[int, int]
    letters: tuple[str, ...] = ()
    letter_ids: tuple[int, ...] = ()
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a prompt says, as ready text: for prompts whose wording is not ours, such as a benchmark's.

    Attributes:
      question: the question itself.
      before: what the user's turn says between the video and the question.
      after: what it says after the question, options included.
      options: the options' texts without their letters, which run from A; empty for an open question.
      system: replaces the default system message; None keeps it.
      begin: how the assistant's turn begins. The model goes on from there, and its answer is what it adds.
    """

    question: str
    before: str = ""
    after: str = ""
    options: tuple[str, ...] = ()
    system: str | None = None
    begin: str = ""

    @property
    def text(self) -> str:
        """The user's turn after the video."""
        return self.before + self.question + self.after


def plain_ask(question: str, options: Sequence[str] | None = None, system: str | None = None) -> Ask:
    """The project's own wording: an open question as it is; with options one line `A. text` each and the instruction.

    Raises:
      UserError: as `check_question`.
    """
    options = _texts(options)
    check_question(question, options)
    texts = _option_texts(options)
    lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False)]
    after = "\n".join(["", *lines, OPTIONS_INSTRUCTION]) if lines else ""
    return Ask(question, after=after, options=texts, system=system)


def build_prompt(
    tokenizer: ChatTokenizer, question: str | Ask, options: Sequence[str] | None = None, system: str | None = None
) -> Prompt:
    """The chat prompt of one question about one video.

    A question in words is put by `plain_ask`; an `Ask` is put to the letter and brings its own options and system
    message. `system` replaces the default system message.

    Raises:
      UserError: an empty question or option, one option alone, more than 26, options that are one text, text that is
        not valid Unicode, or options or a system message beside an `Ask`.
    """
    if isinstance(question, Ask):
        ask = question
        _check_ask(ask, options, system)
    else:
        ask = plain_ask(question, options, system)
    letters = tuple(string.ascii_uppercase[: len(ask.options)])
    for name, text in (("system", ask.system or ""), ("begin", ask.begin)):
        _check_characters(name, text)
    span, text_ids = _text_ids(tokenizer, ask)
    turn_end = [tokenizer.im_end, *tokenizer.encode("\n")]
    prefix = [
        *_header(tokenizer, "system", DEFAULT_SYSTEM if ask.system is None else ask.system),
        *turn_end,
        *_header(tokenizer, "user"),
        tokenizer.vision_start,
    ]
    suffix = [tokenizer.vision_end, *text_ids, *turn_end, *_header(tokenizer, "assistant", ask.begin)]
    letter_ids = tuple(_letter_id(tokenizer, letter) for letter in letters)
    return Prompt(tuple(prefix), tuple(suffix), span, letters, letter_ids, ask.options)


def check_question(question: str, options: Sequence[str] | None = None) -> None:
    """Raises `UserError` for a question or options from which no prompt can be built."""
    if not isinstance(question, str):
        raise UserError(f"question: {question!r} is no text; write what you want to know about the video")
    if not question.strip():
        raise UserError("--question: the question is empty; write what you want to know about the video")
    options = _texts(options)
    if len(options) == 1:
        raise UserError("--option: one option leaves nothing to choose; give at least two, or none")
    if len(options) > len(string.ascii_uppercase):
        raise UserError(f"--option: {len(options)} options, but only 26 letters; give at most 26")
    for letter, option in zip(string.ascii_uppercase, options, strict=False):
        if not option.strip():
            raise UserError(f"--option: option {letter} is empty; give each option a text")
    for text in (question, *options):
        _check_characters("--question" if text is question else "--option", text)


def _check_characters(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{name}: {text!r} is no text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name}: the text is not valid UTF-8; where the locale is not UTF-8, set PYTHONUTF8=1")


def _texts(options: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(options, str):  # a sequence of letters, each of which would become an option
        raise UserError(f"options: {options!r} is one text; give a list of texts, one list per question")
    if not isinstance(options, Iterable | None) or isinstance(options, Mapping | Set):  # of which no order is meant
        raise UserError("options: give a list of texts, in the order of their letters")
    texts = () if options is None else tuple(options)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"options: {text!r} is no text; give a list of texts")
    return texts


def _check_ask(ask: Ask, options: Sequence[str] | None, system: str | None) -> None:
    for name in ("before", "after"):
        _check_characters(name, getattr(ask, name))
    for text in (ask.question, ask.text):
        check_question(text, ask.options)
    if _texts(options) or system is not None:
        raise UserError("options: an Ask brings its own options and system message; give them there")


def _option_texts(options: Sequence[str]) -> tuple[str, ...]:
    """The options without letters of their own, if every one of them starts with the letter it would get anyway."""
    matches = [
        re.match(rf"\s*(?:{letter}[.):]|\({letter}\))\s+(?=\S)", option)
        for letter, option in zip(string.ascii_uppercase, options, strict=False)
    ]
    if matches and all(matches):
        return tuple(option[match.end() :].strip() for option, match in zip(options, matches, strict=True))
    return tuple(option.strip() for option in options)


def _header(tokenizer: ChatTokenizer, role: str, content: str = "") -> list[int]:
    return [tokenizer.im_start, *tokenizer.encode(f"{role}\n{content}")]


def _text_ids(tokenizer: ChatTokenizer, ask: Ask) -> tuple[tuple[int, int], list[int]]:
    """Ids of the user's text, and the question's span counted from vision_end, which stands before them."""
    begin, end = len(ask.before), len(ask.before) + len(ask.question)
    encoding = tokenizer.tokenizer.encode(ask.text, add_special_tokens=False)
    # A token may hold the question's last characters and the line break, so the parts are not encoded one by one.
    inside = [i for i, (start, stop) in enumerate(encoding.offsets) if start < end and stop > begin]
    return (1 + inside[0], 2 + inside[-1]), encoding.ids


def _letter_id(tokenizer: ChatTokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise UserError(f"--option: this checkpoint's tokenizer has no single token for the letter {letter}")
    return ids[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reading the option out of an answer
# ---------------------------------------------------------------------------------------------------------------------

# What surrounds a letter: brackets and closing marks. Quotes and Markdown are gone by then (`_plain`).
_OPEN = r"[(\[{<]*"
_CLOSE = r"[)\]}>]*"
# A letter that goes on with another one ("B or C", "A, B", "A. B.") is a list, not an answer.
_NOT_A_LIST = r"(?![.)\]\s]*(?:\b(?:or|and)\b|[&/,]|\s)\s*[(\[]?[A-Z](?:[.,)\]:]|\s*$))"
# Scripts that have no spaces between words, or whose particles stand at a word: a letter beside them is by itself.
_CJK = r"\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = rf"[^\W{_CJK}]"
# "A" and "I" are words too: among other words they count only before a mark, a line's end or one of these.
_AFTER_LETTER = r"(?:is|because|since|as|or|and)\b"
_WORDLIKE = rf"[AI](?={_CLOSE}[^\S\n]*(?:$|[^\w\s'\-]|[{_CJK}]|\n)|\s+{_AFTER_LETTER})"
_MENTION = rf"(?<!{_WORD})(?<!['.\-])([B-HJ-Z]|{_WORDLIKE})(?!{_WORD}|['\-]|\.\w)"
_ANSWER_IS = r"\b(?:answer|(?:answer|choice|option)\s*(?:is|would be|should be|must be|[:=]))\s*:?\s*"
_CUE = re.compile(
    rf"(?i:{_ANSWER_IS}(?:option\s+|choice\s+|letter\s+)?){_OPEN}"
    rf"(?:{_MENTION}|([a-z])(?={_CLOSE}\s*(?:[.:;!\n]|$))){_NOT_A_LIST}"
)
_ALONE = re.compile(r"[\s(\[{<]*([A-Za-z])[\s.,:;!)\]}>]*")
_LEADING = re.compile(
    rf"\s*[(\[{{]?(?:([A-Z])(?:\s*[)\]}}:,;!]|\s*\.(?![A-Za-z]\b)|\s+-+\s)|([a-z])[.)\]:](?=\s)){_NOT_A_LIST}"
)
_NEGATION = re.compile(
    r"\b(?:not|never|neither|nor|cannot|wrong|incorrect|except|ruled? out|eliminated?)\b|n't\b"
    r"|[不非错錯]|ない|ません|아[니닌닙]|않",
    re.IGNORECASE,
)
_TYPEWRITER = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})


def parse_option(text: str, letters: Sequence[str], options: Sequence[str] | None = None) -> str | None:
    """The letter that a model's answer chooses, or None if it names none or more than one.

    In this order: the letter alone (`b`, `(B).`), on its own or on the first line; an option's text and nothing else;
    the last "answer is B" or "Answer: B"; a letter with a mark in front (`B. foo`, `(B) foo`); else the only letter or
    option text that the answer mentions, unless those two differ or the answer says "not", "wrong" and the like.

    The article is not a letter: "A dog runs" gives None (or an option's letter, if `options` has "A dog runs"), while
    "A", "A. dog", "(A) dog", "A is right" and "The answer is A" give A. The same holds for the pronoun "I". Apart from
    them a capital letter may stand without a mark: "B foo" gives B. Small letters count only alone or before a mark.
    """
    letters = tuple(letters)
    if not letters:
        return None
    plain, first_line = _plain(text), _plain(text.strip().partition("\n")[0])
    named = (
        _first(_ALONE.fullmatch(plain))
        or _first(_ALONE.fullmatch(first_line))
        or _whole_option(plain, letters, options)
        or _first(([None, *_CUE.finditer(plain)])[-1])
        or _whole_option(first_line, letters, options)
        or _first(_LEADING.match(plain))
        or _only_mention(plain, letters, options)
    )
    return named if named in letters else None


def _plain(text: str) -> str:
    """`text` without tags, Markdown and quotes, so that `**B**`, `"B"`, `'B'` and `<answer>B</answer>` read as B."""
    text = unicodedata.normalize("NFKC", text).translate(_TYPEWRITER).replace("\\", " ")
    text = re.sub(r"</?[A-Za-z]\w+>", " ", text)
    return re.sub(r"[*`\"]|(?<!\w)['_]|['_](?!\w)", "", text).strip()


def _first(match: re.Match | None) -> str | None:
    """The group that matched, as a capital letter."""
    return next((group.upper() for group in match.groups() if group), None) if match else None


def _words(text: str) -> str:
    return re.sub(r"[\s.,;:!?()\[\]{}]+", " ", _plain(text)).strip().casefold()


def _whole_option(text: str, letters, options) -> str | None:
    said = _words(text)
    hits = [
        letter
        for letter, option in zip(letters, options or (), strict=False)
        if said and said in (_words(option), _words(f"{letter} {option}"))
    ]
    return hits[0] if len(hits) == 1 else None


def _only_mention(text: str, letters, options) -> str | None:
    said = f" {_words(text)} "
    phrases = [f" {_words(option)} " for option in options or ()]
    # An option inside a longer one that was also said ("car" in "red car") was not meant by itself.
    said_phrases = {p for p in phrases if p.strip() and p in said}
    meant = {p for p in said_phrases if not any(p != q and p in q for q in said_phrases)}
    for phrase in meant:
        said = said.replace(phrase, " ")
    if _NEGATION.search(said):
        return None
    found = {_first(match) for match in re.finditer(_MENTION, text)} & set(letters)
    by_text = {letter for letter, phrase in zip(letters, phrases, strict=False) if phrase in meant}
    named = found | by_text
    return named.pop() if len(named) == 1 else None
