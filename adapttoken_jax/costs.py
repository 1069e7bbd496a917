"""Floating-point operations of the model, counted from its sizes: two per multiply-add, products and attention only."""

import math
from typing import NamedTuple

from adapttoken_jax.config import AdaptTokenConfig, ModelConfig
from adapttoken_jax.geometry import window_layout


def text_flops(config: ModelConfig, new: int, past: int = 0) -> float:
    """Decoder layers on `new` tokens that follow `past` ones, causal attention included, the head not."""
    c = config.text
    projections = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.ff
    pairs = new * past + new * (new + 1) / 2
    return c.layers * (2 * new * projections + 4 * pairs * c.heads * c.head_dim)


class Pruned(NamedTuple):
    """The layers after `layer` see only `tokens` tokens of a context, prompt prefix included."""

    layer: int
    tokens: int


def pruned(config: ModelConfig, settings: AdaptTokenConfig, prefix: int, tokens: int) -> Pruned | None:
    """What pruning leaves of a group's `tokens` visual tokens; None where it is off."""
    layer, share = settings.reference_layer, settings.keep_after_reference
    if share == 1 or layer == config.text.layers - 1:
        return None
    return Pruned(layer, prefix + math.ceil(share * tokens))


def context_flops(config: ModelConfig, tokens: int, pruned: Pruned | None = None) -> float:
    """Decoder layers on a context that only later tokens look at: the last one makes keys and values alone."""
    c = config.text
    if pruned is not None:
        lower = text_flops(config, tokens) - text_flops(config, pruned.tokens)
        return context_flops(config, pruned.tokens) + lower * (pruned.layer + 1) / c.layers
    last = 2 * tokens * c.width * c.head_dim * 2 * c.kv_heads
    return text_flops(config, tokens) * (c.layers - 1) / c.layers + last


def question_flops(config: ModelConfig, suffix: int, answer: int, context: int, pruned: Pruned | None = None) -> float:
    """A question after a context: its suffix, the head, and `answer` generated tokens after the first."""
    after = lambda past: text_flops(config, suffix, past) + text_flops(config, answer, past + suffix)
    share = 1.0 if pruned is None else (pruned.layer + 1) / config.text.layers
    upper = 0.0 if pruned is None else (1 - share) * after(pruned.tokens)
    return share * after(context) + upper + head_flops(config, 1 + answer)


def head_flops(config: ModelConfig, tokens: int) -> float:
    """Logits of `tokens` positions."""
    return 2.0 * tokens * config.text.width * config.text.vocab


def vision_flops(config: ModelConfig, slots: int, height: int, width: int) -> float:
    """Vision tower and merger on slots of `height` x `width` patches."""
    c, patches = config.vision, height * width
    layout = window_layout(c, height, width, padded=False)
    windowed = sum(count * (tokens * c.merge**2) ** 2 for count, tokens in layout.windows)
    full = len(c.full_attention_layers)
    pairs = full * patches**2 + (c.layers - full) * windowed
    layers = c.layers * patches * (4 * c.width**2 + 3 * c.width * c.ff)
    merged = c.width * c.merge**2
    merger = patches / c.merge**2 * merged * (merged + c.out_width)
    return slots * (2 * (layers + merger + patches * c.patch_features * c.width) + 4 * pairs * c.width)


def prompt_flops(config: ModelConfig, context: int, suffix: int, answer: int, pruned: Pruned | None = None) -> float:
    """One prompt: its context, and a question after it."""
    return context_flops(config, context, pruned) + question_flops(config, suffix, answer, context, pruned)
