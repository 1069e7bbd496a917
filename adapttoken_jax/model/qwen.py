"""Qwen2.5-VL: the vision tower and the text decoder under one roof."""

import jax

from adapttoken_jax.config import ModelConfig
from adapttoken_jax.model.block import Block
from adapttoken_jax.model.text import TextDecoder
from adapttoken_jax.model.vision import VisionTower


class Qwen25VL(Block):
    """The whole model; `values` is the nested dictionary of `parameters.tree`."""

    def __init__(self, config: ModelConfig, values: dict[str, dict[str, jax.Array]]):
        self.config = config
        self.vision = VisionTower(config.vision, values["vision"])
        self.text = TextDecoder(config.text, values["text"])
