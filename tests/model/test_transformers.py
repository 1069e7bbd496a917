"""Every stage of the model against transformers in float32, over all tiny shapes and awkward grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from adapttoken_jax import geometry, parameters
from adapttoken_jax.config import read_model_config
from adapttoken_jax.model import Probe, Qwen25VL
from adapttoken_jax.model.block import rms_norm
from adapttoken_jax.model.generation import generate
from adapttoken_jax.model.reference import decode_sequence
from adapttoken_jax.parity import pytorch_method as oracle
from tests import tiny

# The whole stack is float32 on both sides; sums of a few hundred terms in another order differ by some 1e-6 of the
# largest value, and a dozen layers leave that two orders below this bound.
TOLERANCE = 1e-4

# Slots, rows and columns of patches: windows that divide the grid and that do not, more than one slot, not square.
GRIDS = {"one_window": (2, 4, 4), "ragged": (3, 10, 14), "wide": (2, 6, 22), "tall": (4, 18, 4), "exact": (2, 16, 8)}
CASES = [
    (shape, list(GRIDS)[(i + j) % len(GRIDS)])
    for i, shape in enumerate(tiny.SHAPES)
    for j in ((0, 1) if i < 3 else (0,))
]


def relative(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours).reshape(theirs.shape) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    cache = {}

    def load(shape):
        if shape not in cache:
            directory = tiny.write_checkpoint(tmp_path_factory.mktemp(shape), tiny.SHAPES[shape])
            config = read_model_config(directory)
            stored = safetensors.numpy.load_file(directory / "model.safetensors")

            def leaf(parameter):
                layers = [parameter.from_stored(stored[key]) for key in parameter.keys]
                return jnp.asarray(layers[0] if parameter.layers is None else np.stack(layers))

            cache[shape] = Qwen25VL(config, parameters.tree(config, leaf)), tiny.load_torch(directory)
        return cache[shape]

    return load


def random_patches(grid, seed=0):
    slots, height, width = grid
    return np.random.default_rng(seed).normal(size=(slots, height * width, 1176)).astype(np.float32)


@pytest.mark.parametrize(("shape", "grid"), CASES)
def test_vision_tower_and_decoder_match_transformers(load, shape, grid):
    model, torch_model = load(shape)
    grid, config = GRIDS[grid], model.config
    patches = random_patches(grid)
    layout = geometry.window_layout(config.vision, *grid[1:])
    ours = jax.jit(lambda m, p: m.vision(p, layout, return_layers=True))(model, patches)
    theirs = oracle.vision_stages(torch_model, patches.reshape(-1, 1176), grid)
    assert relative(ours["features"], theirs["features"]) < TOLERANCE
    for layer in range(config.vision.layers):
        assert relative(ours["layers"][layer], theirs["layers"][layer]) < TOLERANCE
    unpadded = geometry.window_layout(config.vision, *grid[1:], padded=False)
    features = jax.jit(lambda m, p: m.vision(p, unpadded)["features"])(model, patches)
    assert relative(features, theirs["features"]) < TOLERANCE

    prefix, suffix = [5, 6, 7, config.vision_start], [config.vision_end, 8, 9, 10, 11, 12]
    ids = tiny.position_ids(grid, 4, 6, "legacy")
    embeddings = oracle.prompt_embeddings(
        torch_model, prefix, theirs["features"].reshape(-1, config.text.width), suffix
    )
    stages = oracle.hidden_states(torch_model, embeddings, ids)
    S, layer = ids.shape[1] - 6, config.text.layers - 1

    @jax.jit
    def run(model, x, ids):
        text = model.text
        probe = Probe(layer, lambda p, _: p.max((2, 3)), jnp.ones((1, 6), bool), lambda parts: parts.max(0))
        context, kept = text.prefill(x[None, :S], ids[None, :, :S], jnp.ones((1, S), bool), return_layers=True)
        hidden, _, found = text.extend(
            x[None, None, S:], ids[None, None, :, S:], jnp.ones((1, 1, 6), bool), context,
            text.empty_tail(context, 1, 9), 0, probe=probe, return_layers=True,
        )  # fmt: skip
        layers = jnp.concatenate([kept["layers"][:, 0], found["layers"][:, 0, 0]], 1)
        return layers, text.logits(hidden[0, 0]), found["observed"][0, 0], decode_sequence(text, x, ids)

    layers, logits, observed, reference = run(model, embeddings.numpy(), ids)
    for index in range(config.text.layers):
        assert relative(layers[index], stages["layers"][index]) < TOLERANCE
        assert relative(reference["layers"][index], stages["layers"][index]) < TOLERANCE
    assert relative(logits, stages["logits"][S:]) < TOLERANCE
    assert relative(reference["logits"], stages["logits"]) < TOLERANCE
    # A probability is at most one, so 1e-5 is both absolute and relative to the scale.
    np.testing.assert_allclose(observed, stages["attentions"][layer][:, S:, :S].max((0, 1)), atol=1e-5)
    np.testing.assert_allclose(reference["attention"], stages["attentions"], atol=1e-5)


@pytest.mark.parametrize("shape", ["base", "tied", "seven_per_kv"])
def test_thirty_two_greedy_tokens_match_transformers(load, shape):
    import torch

    model, torch_model = load(shape)
    text, prompt, new = model.text, [3, 1, 4, 1, 5, 9, 2, 6], 32
    theirs = torch_model.generate(
        torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
    )[0, len(prompt) :]

    @jax.jit
    def run(text, ids):
        positions = jnp.broadcast_to(jnp.arange(len(prompt)), (1, 3, len(prompt)))
        context, _ = text.prefill(text.embed(ids[None, :5]), positions[:, :, :5], jnp.ones((1, 5), bool))
        tail = text.empty_tail(context, 1, 3 + new)
        hidden, tail, _ = text.extend(
            text.embed(ids[None, None, 5:]), positions[:, None, :, 5:], jnp.ones((1, 1, 3), bool), context, tail, 0
        )
        return generate(
            text, text.logits(hidden[:, :, -1]), jnp.full((1, 1), len(prompt)), [(context, tail)], 3, tokens=new,
            limit=jnp.array([new]), end_ids=(), measure=lambda logits: logits.max(-1, keepdims=True),
        )  # fmt: skip

    generation = run(text, jnp.array(prompt))
    assert generation.tokens[0, 0].tolist() == theirs.tolist()
    assert bool(generation.counted.all()) and int(generation.step) == new


def test_norms_of_half_precision_are_theirs_bit_for_bit():
    import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

    random = np.random.default_rng(0)
    x, scale = 9 * random.normal(size=(50, 64)), 1 + random.normal(size=64)
    norm = Qwen2_5_VLRMSNorm(64, eps=1e-6).to(torch.bfloat16)
    norm.weight.data = torch.tensor(scale, dtype=torch.bfloat16)
    with torch.no_grad():
        theirs = norm(torch.tensor(x, dtype=torch.bfloat16)).float().numpy()
    ours = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.bfloat16), 1e-6)
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs)
