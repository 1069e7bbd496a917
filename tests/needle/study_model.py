"""A very small needle model with random weights, in memory or as a directory: it knows nothing but computes all."""

import jax

from adapttoken_jax import parameters
from adapttoken_jax.config import AdaptTokenConfig, ModelConfig, TextConfig, VisionConfig
from adapttoken_jax.loading import Model
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.needle.export import export
from adapttoken_jax.needle.tokenizer import chat_tokenizer

SETTINGS = {"max_pixels": 56 * 56, "slots_per_group": 4, "budget": 10, "reference_layer": 1, "temperature": 0.02}


def _config() -> ModelConfig:
    tokenizer = chat_tokenizer()
    vocabulary = tokenizer.tokenizer.get_vocab_size()
    vision = VisionConfig(
        layers=2, width=16, heads=2, ff=32, out_width=32, full_attention_layers=(1,), window=28
    )  # fmt: skip
    text = TextConfig(
        layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ff=48, vocab=vocabulary, mrope_sections=(2, 3, 3),
        rope_theta=1e4,
    )  # fmt: skip
    pads = [tokenizer.tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")]
    return ModelConfig(vision, text, tokenizer.vision_start, tokenizer.vision_end, *pads)


def _values(config):
    """Kernels four times their usual size, so that attention is far from flat."""
    values = parameters.initialise(config, jax.random.key(0))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, values)


def small_model() -> Model:
    config = _config()
    return Model(Qwen25VL(config, _values(config)), config, chat_tokenizer(), "random")


def write_small_model(directory):
    """Exports it; returns the directory, which must not exist before."""
    config = _config()
    export(directory, config, _values(config))
    return directory


def settings(model: Model, **changes) -> AdaptTokenConfig:
    """Settings with several groups in a video of 32 frames."""
    return AdaptTokenConfig.for_model(model.config, **{**SETTINGS, **changes})
