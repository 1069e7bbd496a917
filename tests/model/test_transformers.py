"""Every stage of the model against transformers in float32, over all tiny shapes and awkward grids."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import geometry, pipeline
from adapttoken_jax.model import Probe
from adapttoken_jax.model.block import rms_norm
from adapttoken_jax.model.reference import decode_sequence
from adapttoken_jax.parity import pytorch_method as oracle
from adapttoken_jax.parity.compare import method_inputs
from tests import tiny

# The whole stack is float32 on both sides; sums of a few hundred terms in another order differ by some 1e-6 of the
# largest value, and a dozen layers leave that two orders below this bound.
TOLERANCE = 1e-4

# Slots, rows and columns of patches: windows that divide the grid and that do not, more than one slot, not square.
GRIDS = {"one_window": (2, 4, 4), "ragged": (3, 10, 14), "wide": (2, 6, 22), "tall": (4, 18, 4), "exact": (2, 16, 8)}
CASES = [*zip(tiny.SHAPES, itertools.cycle(GRIDS))]


def relative(ours, theirs) -> float:
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours).reshape(theirs.shape) - theirs).max() / np.abs(theirs).max())


def random_patches(grid, seed=0):
    slots, height, width = grid
    return np.random.default_rng(seed).normal(size=(slots, height * width, 1176)).astype(np.float32)


@pytest.mark.parametrize(("shape", "grid"), CASES)
def test_vision_tower_and_decoder_match_transformers(load, shape, grid):
    loaded, torch_model = load(shape)
    model, grid, config = loaded.module, GRIDS[grid], loaded.config
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


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_thirty_two_greedy_tokens_about_a_video_match_transformers(load, shape):
    """From the same pixels on, by the whole method without selection and by transformers' own `generate`."""
    model, torch_model = load(shape)
    # A seed whose answers come to no end and pass no near-tie, as is asserted below, in any of the shapes.
    images = np.random.default_rng(5).integers(0, 256, (6, 84, 140, 3), dtype=np.uint8)
    video, question = at.Frames(images, 1.0), "What is in the video?"  # slots two seconds apart
    config = at.AdaptTokenConfig.for_model(model.config, mrope="hf5", max_answer_tokens=32, max_pixels=84 * 140)
    ours = at.answer(model, video, question, config=config, method="full", trace=True)
    clip = pipeline.plan_run(model.config, video, config, "full").clip
    assert clip.grid == (3, 6, 10)
    inputs = method_inputs(model, clip, ours.trace, question, None)
    theirs, logits = tiny.generate(torch_model, inputs, 32)
    assert len(theirs) == 32 and len(set(theirs)) > 8
    # Each logit may be off by TOLERANCE of the largest: closer than twice that, two tokens could change places.
    second, first = np.sort(logits)[:, -2:].T
    assert (first - second).min() > 2 * TOLERANCE * np.abs(logits).max()
    assert ours.trace["answer_ids"].tolist() == theirs


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
