"""Models of random weights, in sizes that are worth timing; what they say has no meaning, how long they take has."""

import dataclasses

import jax
import jax.numpy as jnp

from adapttoken_jax import parameters
from adapttoken_jax.config import SIZES, ModelConfig, TextConfig, VisionConfig, read_model_config
from adapttoken_jax.loading import Model
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.needle.tokenizer import chat_tokenizer


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a video for it.

    Attributes:
      model: sizes.
      grid: rows and columns of patches of a frame.
      slots_per_group, groups: of the video.
      budget: visual tokens of the final prompt.
    """

    model: ModelConfig
    grid: tuple[int, int]
    slots_per_group: int
    groups: int
    budget: int


_MIDDLE = ModelConfig(
    VisionConfig(layers=8, width=384, heads=6, ff=1024, out_width=768, full_attention_layers=(1, 3, 5, 7)),
    TextConfig(12, 768, 12, 4, 64, 2048, 32768, mrope_sections=(8, 12, 12), tied=True),
)
SHAPES = {
    "needle": Shape(read_model_config("needle"), (4, 4), 8, 64, 32),
    "118m": Shape(_MIDDLE, (8, 16), 64, 4, 1024),
    "3b": Shape(SIZES["qwen2.5-vl-3b"], (22, 40), 64, 32, 7040),
    "7b": Shape(SIZES["qwen2.5-vl-7b"], (22, 40), 64, 32, 7040),
}


def random_model(config: ModelConfig, dtype="float32", seed: int = 0) -> Model:
    """Random weights of a seed, on JAX's default device, and the needle videos' tokenizer."""
    # "rbg" keys compile in a second where the default ones take ten.
    key = jax.random.key(seed, impl="rbg")
    values = jax.jit(parameters.initialise, static_argnums=(0, 2))(config, key, jnp.dtype(dtype))
    return Model(Qwen25VL(config, values), config, chat_tokenizer(), "random weights")
