"""Rows that the places of `model` share between products, against every place with all rows."""

import functools

import jax
import numpy as np
import pytest

from adapttoken_jax import parameters, sharding
from adapttoken_jax.config import model_config
from adapttoken_jax.model import Probe, Qwen25VL, spread
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.model.spread import Spread
from adapttoken_jax.model.text import Rows
from tests import tiny

B, S, Q, T = 2, 300, 3, 20
SHAPE = tiny.TinyShape(width=512, heads=4, kv_heads=2, sections=(16, 24, 24), layers=3, seed=13)  # heads of 128


def on(mesh: str):
    return sharding.make_mesh(sharding.MeshShape.parse(mesh))


@functools.cache
def weights():
    config = model_config(tiny._flat_config(SHAPE, "float32"))
    return config, parameters.initialise(config, jax.random.key(5))


def rows(config):
    random = np.random.default_rng(1)
    draw = lambda *shape: random.normal(size=(*shape, config.text.width)).astype(np.float32)
    context = Rows(draw(B, S), random.integers(0, 99, (B, 3, S)), np.arange(S) < np.array([[S], [S - 20]]))
    valid = np.broadcast_to(np.arange(T) < np.array([[T], [3], [12]]), (B, Q, T))
    return context, Rows(draw(B, Q, T), random.integers(99, 130, (B, Q, 3, T)), valid)


def read(mesh=None, keep_layer=1):
    """What `read` gives with splash on a mesh, or with XLA on one device, and how often sums are scattered."""
    config, values = weights()
    if mesh is None:
        kernel = XLA
    else:
        kernel = Kernel("splash", mesh)
        values = jax.device_put(values, sharding.parameter_shardings(config, mesh))
    text = Qwen25VL(config, values).text
    context, suffixes = rows(config)
    together = S + Q * T
    context = context.padded(kernel.rows(B, together) - together)

    @jax.jit
    def run(text, context, suffixes):
        probe = Probe(1, lambda p, _: p[..., :S].max((2, 3)), np.ones((Q, T), bool), lambda parts: parts.max(0))
        hidden, _, found = text.read(context, suffixes, keep_layer=keep_layer, probe=probe, kernel=kernel)
        return hidden, found["kept"][:, :S], found["observed"]

    lowered = run.lower(text, context, suffixes)
    return [np.asarray(each) for each in run(text, context, suffixes)], lowered.as_text().count("reduce_scatter")


@functools.cache
def alone(keep_layer):
    return read(None, keep_layer)


# The two sums of a layer of the loop, in so many parts. None where `model` splits nothing, or where fewer contexts than
# places of `fsdp` leave the weights in parts.
@pytest.mark.parametrize(
    ("mesh", "scattered"),
    [
        ("data=2,model=2", 6),
        ("data=2,model=4", 6),
        ("data=1,model=4", 6),
        ("fsdp=2,model=2", 6),
        ("data=2,context=2,model=2", 6),
        ("data=2,context=2,model=1", 0),
        ("fsdp=4,model=2", 0),
    ],
)
def test_spread_rows_are_the_rows(mesh, scattered, monkeypatch):
    assert_spread_rows_are_the_rows(mesh, scattered, 1, monkeypatch)


# Rows spread, spread in pieces, and in pieces alone.
@pytest.mark.parametrize(
    ("mesh", "scattered"), [("data=2,model=2", 6), ("data=2,context=2,model=2", 6), ("data=2,context=2,model=1", 0)]
)
def test_so_are_those_kept_of_the_last_layer(mesh, scattered, monkeypatch):
    assert_spread_rows_are_the_rows(mesh, scattered, 2, monkeypatch)


def assert_spread_rows_are_the_rows(mesh, scattered, keep_layer, monkeypatch):
    monkeypatch.setattr(spread, "PART_ROWS", 160)
    ours, count = read(on(mesh), keep_layer)
    theirs, none = alone(keep_layer)
    assert (count, none) == (scattered, 0)
    context, suffixes = rows(weights()[0])
    (hidden, kept, observed), (same_hidden, same_kept, same_observed) = ours, theirs
    # Float32 on both sides, other orders of adding; relative to the largest number of the array.
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    close(hidden[suffixes.valid], same_hidden[suffixes.valid])
    close(kept[context.valid], same_kept[context.valid])
    close(observed, same_observed)


def test_rows_are_spread_only_where_every_place_gets_whole_tiles():
    mesh = on("data=2,model=4")
    of = lambda *sizes: Spread.of(mesh, ("data",), *sizes)
    assert of(64, 8, 96) == of(2048, 4, 4) == Spread(mesh, ("data",), ("model",))
    assert of(2048 + 64, 8, 96) == Spread(mesh, ("data",), ("model",), cuts=(1024,))  # 16 and 17 tiles of four places
    assert of(63, 8, 96) == of(32, 8, 96) == of(64, 8, 98) == of(64, 6, 96) == Spread(mesh, ("data",))
    mesh = on("data=8,model=1")
    assert of(64, 8, 96) == Spread(mesh, ("data",))


def test_each_place_adds_up_its_own_rows():
    mesh = on("data=2,model=4")
    laid = Spread(mesh, ("data",), ("model",))
    random = np.random.default_rng(2)
    x, y = random.normal(size=(2, 64, 8, 3)).astype(np.float32), random.normal(size=(8, 3, 5)).astype(np.float32)
    run = jax.jit(lambda x, y: laid.sums("...TNH,NHD->...TD", x, y))
    sums = run(x, y)
    np.testing.assert_allclose(sums, np.einsum("btnh,nhd->btd", x, y), atol=1e-5)
    assert sums.sharding.spec == jax.sharding.PartitionSpec("data", "model")
    assert "all-reduce" not in run.lower(x, y).compile().as_text()
