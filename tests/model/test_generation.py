"""The answer loop: its end, its limits, what it counts, and sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax import parameters
from adapttoken_jax.config import SIZES, model_config
from adapttoken_jax.model import Qwen25VL, block, generation
from adapttoken_jax.model.generation import Sampling, generate, keep_top_p
from adapttoken_jax.model.kernels import Kernel
from adapttoken_jax.sharding import MeshShape, lies_turned, make_mesh, parted
from tests import tiny

PROMPT, NEW = (3, 1, 4, 1, 5), 8


@pytest.fixture(scope="module")
def text():
    config = model_config(tiny._flat_config(tiny.SHAPES["base"], "float32"))
    values = parameters.initialise(config, jax.random.key(1))
    values["text"]["embedding"] = values["text"]["embedding"] * 50  # far apart, so that answers vary
    return Qwen25VL(config, values).text


GREEDY, PLAIN = Sampling(), Sampling(temperature=1.0)


def run(text, end_ids=(), limit=(NEW, NEW), sampling=GREEDY, seed=0):
    """Two questions that differ in their last token."""

    @jax.jit
    def answer(text):
        positions = jnp.broadcast_to(jnp.arange(5), (1, 3, 5))
        context, _ = text.prefill(text.embed(jnp.array([PROMPT[:4]])), positions[..., :4], jnp.ones((1, 4), bool))
        ids = jnp.array([[[PROMPT[4]], [9]]])
        tail = text.empty_tail(context, 2, 1 + NEW)
        where = jnp.full((1, 2, 3, 1), 4)
        hidden, tail, _ = text.extend(text.embed(ids), where, jnp.ones((1, 2, 1), bool), context, tail, 0)
        return generate(
            text, text.logits(hidden[:, :, -1]), jnp.full((1, 2), 5), [(context, tail)], 1, tokens=NEW,
            limit=jnp.array(limit), end_ids=end_ids, measure=lambda x: x.max(-1, keepdims=True), sampling=sampling,
            key=jax.random.key(seed),
        )  # fmt: skip

    return answer(text)


def test_an_answer_from_turned_kernels_is_the_same():
    """On two places that split layers each has [128, 192] of a gate kernel, which a TPU keeps as [192, 128]."""
    shape = dataclasses.replace(tiny.SHAPES["base"], width=128, ff=384, sections=(4, 6, 6))
    config = model_config(tiny._flat_config(shape, "float32"))
    text = Qwen25VL(config, parameters.initialise(config, jax.random.key(1))).text
    meshes = [make_mesh(MeshShape.parse(asked)) for asked in ("data=2,model=1", "data=1,model=2")]
    same, turned = (text.as_it_lies(Kernel("splash", mesh)) for mesh in meshes)
    assert same is text and text.as_it_lies(Kernel("xla", meshes[1])) is text
    assert turned.layers.up_kernel.shape == (config.text.layers, 384, 128)
    ours, theirs = run(turned), run(text)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.measured, theirs.measured, rtol=1e-5)  # the same sums in another order
    split = jax.jit(lambda layer: parted(layer, meshes[1], ("data",)))(turned.layer(0))
    assert split.up_kernel[...].sharding.spec[0] == "model"


@pytest.mark.parametrize(
    ("name", "mesh", "turned"),
    [
        ("72b", "fsdp=8", True),  # 3696 of 29568, 128 times 28.9
        ("72b", "data=1,model=8", True),
        ("72b", "fsdp=2,model=4", True),
        ("7b", "fsdp=8", True),
        ("7b", "data=8", False),
        ("7b", "fsdp=4", False),  # 4736 is 128 times 37
        ("32b", "data=1,model=8", False),
    ],
)
def test_a_tpu_keeps_last_what_128_divides(name, mesh, turned):
    text, shape = SIZES[f"qwen2.5-vl-{name}"].text, MeshShape.parse(mesh)
    assert lies_turned((text.layers, text.width, text.ff), make_mesh(shape)) == turned
    assert not lies_turned((text.layers, text.width, text.ff), None)


def test_an_answer_ends_before_the_end_token(text):
    free = np.asarray(run(text).tokens[0])
    end = next(int(t) for i, t in enumerate(free[0]) if i and t not in free[0][:i])
    stopped = run(text, end_ids=(end,))
    for q in range(2):
        expected = list(free[q]).index(end) if end in free[q] else NEW
        assert int(stopped.counted[0, q].sum()) == max(expected, 1)
        assert stopped.tokens[0, q][: max(expected, 1)].tolist() == free[q][: max(expected, 1)].tolist()


def test_an_end_token_that_comes_first_counts_alone(text):
    first = int(run(text).tokens[0, 0, 0])
    state = run(text, end_ids=(first,), limit=(NEW, 1))
    assert state.counted[0, 0].tolist() == [True] + [False] * (NEW - 1)


def test_each_question_has_its_own_limit_and_the_loop_ends_with_the_longest(text):
    state = run(text, limit=(1, 3))
    assert state.counted[0].sum(-1).tolist() == [1, 3] and int(state.step) == 3


def test_sampling_follows_its_seed(text):
    hot = Sampling(temperature=3.0)
    first, same, other = (run(text, sampling=hot, seed=s).tokens.tolist() for s in (1, 1, 2))
    assert first == same != other


def test_every_token_is_drawn_anew():
    """Sixteen tokens from a thousand alike are not the same one."""
    flat, state = jnp.zeros((1, 1, 1000)), generation._blank((), (1, 1, 16, 1), jax.random.key(0))
    record = generation._Record(PLAIN, (), jnp.array([16]), lambda logits: logits[..., :1])
    for _ in range(16):
        state = record(state, flat)
    assert len(set(state.tokens[0, 0].tolist())) > 8


def test_sampled_tokens_have_the_model_s_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draw = jax.jit(jax.vmap(lambda key: PLAIN(logits, key)))
    share = np.bincount(draw(jax.random.split(jax.random.key(0), 20_000)), minlength=4) / 20_000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.015)  # over four standard errors
    nucleus = jax.vmap(lambda key: Sampling(1.0, top_p=0.7)(logits, key))(jax.random.split(jax.random.key(0), 2000))
    assert set(np.unique(nucleus)) == {0, 1}


def test_temperature_comes_before_the_nucleus():
    logits, keys = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), jax.random.split(jax.random.key(0), 20_000)
    share = np.bincount(jax.vmap(lambda key: Sampling(0.5)(logits, key))(keys), minlength=4) / 20_000
    squares = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365  # of which the first alone is more than 0.6
    np.testing.assert_allclose(share, squares, atol=0.015)
    assert not jax.vmap(lambda key: Sampling(0.5, top_p=0.6)(logits, key))(keys[:2000]).any()


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.96, 4), (0.9, 3), (0.5, 1), (0.51, 2), (1e-6, 1)])
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    logits = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))
    assert int(jnp.isfinite(keep_top_p(logits, top_p)).sum()) == kept


def test_one_row_of_half_precision_is_the_product_in_float64():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 1, 64), (64, 9)))
    ours = block.wide_product(x, y)
    assert ours.shape == (1, 1, 9) and ours.dtype == jnp.float32
    # 64 terms of up to 10, added in float32; products of bfloat16 are exact in it.
    np.testing.assert_allclose(ours, np.asarray(x, np.float64) @ np.asarray(y, np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "rows", "weights", "axis"),
    [
        ("...D,DV->...V", (2, 1, 6), (6, 9), 1),
        ("...D,DF->...F", (2, 1, 1, 6), (6, 9), 2),
        ("...TD,DNH->...TNH", (2, 3, 1, 6), (6, 3, 4), 2),
        ("...TNH,NHD->...TD", (2, 3, 1, 3, 4), (3, 4, 6), 2),
        ("...TNH,NHD->...TD", (2, 1, 5, 3, 4), (3, 4, 6), None),
        ("...D,DF->...F", (1, 7, 6), (6, 9), None),
        ("...D,DF->...F", (6,), (6, 9), None),
        ("TPD,DF->TPF", (3, 1, 6), (6, 9), None),
    ],
)
def test_a_lone_row_beside_zeros_has_the_same_product(spec, rows, weights, axis):
    """What a TPU and a GPU compute, with whole numbers, so that every order of adding gives the same."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.integers(-9, 9, size=shape), jnp.float32) for shape in (rows, weights))
    assert block._lone_row(spec, rows) == axis
    seen = []

    def multiply(x, y):
        seen.append(x.shape)
        return jnp.einsum(spec, x, y)

    np.testing.assert_array_equal(block.beside_zeros(multiply, x, y, axis), np.einsum(spec, x, y))
    assert seen == [tuple(8 if place == axis else size for place, size in enumerate(rows))]
