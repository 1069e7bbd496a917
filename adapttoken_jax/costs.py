"""Floating-point operations of the model, counted from its sizes: two per multiply-add, products and attention only."""

from adapttoken_jax.config import ModelConfig
from adapttoken_jax.geometry import window_layout


def text_flops(config: ModelConfig, new: int, past: int = 0) -> float:
    """Decoder layers on `new` tokens that follow `past` ones, causal attention included, the head not."""
    c = config.text
    projections = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.ff
    pairs = new * past + new * (new + 1) / 2
    return c.layers * (2 * new * projections + 4 * pairs * c.heads * c.head_dim)


def context_flops(config: ModelConfig, tokens: int) -> float:
    """Decoder layers on a context that only later tokens look at: the last one makes keys and values alone."""
    c = config.text
    last = 2 * tokens * c.width * c.head_dim * 2 * c.kv_heads
    return text_flops(config, tokens) * (c.layers - 1) / c.layers + last


def head_flops(config: ModelConfig, tokens: int) -> float:
    """Logits of `tokens` positions."""
    return 2.0 * tokens * config.text.width * config.text.vocab


def vision_flops(config: ModelConfig, slots: int, height: int, width: int) -> float:
    """Vision tower and merger on slots of `height` x `width` patches, without the padding of border windows."""
    c, patches = config.vision, height * width
    layout = window_layout(c, height, width)
    per_window = layout.valid.sum(1) * c.merge**2
    full = len(c.full_attention_layers)
    pairs = full * patches**2 + (c.layers - full) * float((per_window**2).sum())
    layers = c.layers * patches * (4 * c.width**2 + 3 * c.width * c.ff)
    merged = c.width * c.merge**2
    merger = patches / c.merge**2 * merged * (merged + c.out_width)
    return slots * (2 * (layers + merger + patches * c.patch_features * c.width) + 4 * pairs * c.width)


def prompt_flops(config: ModelConfig, context: int, suffix: int, answer: int) -> float:
    """One prompt: its context, the question's suffix, the head, and `answer` generated tokens after the first."""
    total = context_flops(config, context) + text_flops(config, suffix, context) + head_flops(config, 1 + answer)
    return total + text_flops(config, answer, context + suffix)
