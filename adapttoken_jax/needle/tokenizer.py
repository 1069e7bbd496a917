"""The needle model's tokenizer: every byte, the words of its questions and answers, and Qwen's control tokens.

Byte-level BPE without merges whose vocabulary holds whole words (`ignore_merges`): a known word is one token, anything
else falls back to its bytes, so that every text encodes and decodes to itself.
"""

import re
import string
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapttoken_jax import prompt
from adapttoken_jax.needle import questions
from adapttoken_jax.needle.render import COLOURS, SHAPES

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The regular expression of `ByteLevel(use_regex=True)` splits before a space; these are the pieces it makes.
_PIECE = re.compile(r"'s| ?[A-Za-z]+")


def make_tokenizer() -> Tokenizer:
    """Builds the tokenizer; the same ids every time."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted(set(_words()) - set(alphabet))
    vocab = {token: index for index, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL_TOKENS])
    return tokenizer


def chat_tokenizer() -> prompt.ChatTokenizer:
    """The tokenizer as prompts use it, equal to reading an exported model's directory."""
    tokenizer = make_tokenizer()
    tokenizer.encode_special_tokens = True
    names = ("im_start", "im_end", "vision_start", "vision_end", "video_pad")
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in names}
    return prompt.ChatTokenizer(tokenizer, **ids, eos=(ids["im_end"],))


def _words() -> Iterator[str]:
    """Every word as the vocabulary spells it: with and without the space before it (in BPE's alphabet, G with dot)."""
    texts = [prompt.DEFAULT_SYSTEM, prompt.OPTIONS_INSTRUCTION, "system user assistant a and none not"]
    texts += [wording for wordings in questions.WORDINGS.values() for wording in wordings]
    texts += [*questions.DESCRIBE.values(), questions.READING]
    texts += [" ".join(words) for words in (COLOURS, SHAPES, string.ascii_uppercase[:5])]
    for text in texts:
        for piece in _PIECE.findall(text):
            yield piece.strip()
            if piece != "'s":
                yield "\u0120" + piece.strip()
