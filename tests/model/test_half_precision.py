"""Programs in bfloat16 on a CPU: they widen a layer at a time and never hold all weights in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from adapttoken_jax.config import AdaptTokenConfig, ModelConfig, TextConfig, VisionConfig
from adapttoken_jax.model.kernels import XLA
from adapttoken_jax.passes import PassSpec, encode_slots, run_prompts
from adapttoken_jax.planning import programs
from adapttoken_jax.sharding import MeshShape, make_mesh

# Weights outweigh everything else: few tokens, many layers.
CONFIG = ModelConfig(
    VisionConfig(layers=24, width=256, heads=4, ff=1024, out_width=256, full_attention_layers=(7, 23)),
    TextConfig(24, 256, heads=4, kv_heads=2, head_dim=64, ff=1024, vocab=4096, mrope_sections=(8, 12, 12), tied=True),
)


@pytest.fixture(scope="module")
def model():
    return programs.abstract_model(CONFIG, make_mesh(MeshShape(1, 1)), jnp.bfloat16)


def passes():
    config = AdaptTokenConfig(reference_layer=16)
    one, several = (PassSpec.answering(config, tokens, (4094, 4095), XLA) for tokens in (1, 4))
    return {"group": one.of_groups(config), "pruned": dataclasses.replace(one.of_groups(config), keep_share=0.5),
            "final": several.final(config)}  # fmt: skip


@pytest.mark.parametrize("name", [*passes()])
def test_a_pass_holds_less_than_a_fifth_of_the_weights_besides_them(model, name):
    batch = programs.abstract_batch(model, contexts=1, tokens=64, prefix=8, question=16, questions=1)
    memory = run_prompts.lower(model.module.text, batch, passes()[name]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < programs.parameter_bytes(model, "text") / 5


def test_the_vision_tower_holds_less_than_a_fifth_of_its_weights_besides_them(model):
    patches = jax.ShapeDtypeStruct((1, 8 * 8, CONFIG.vision.patch_features), jnp.uint8)
    memory = encode_slots.lower(model.module.vision, patches, 8, 8, XLA).compile().memory_analysis()
    assert memory.temp_size_in_bytes < programs.parameter_bytes(model, "vision") / 5
