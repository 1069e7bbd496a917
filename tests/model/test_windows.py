"""The vision tower's kernel for TPUs, in Pallas' interpreter, against the path of XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import sharding
from adapttoken_jax.geometry import window_layout
from adapttoken_jax.model import attention, kernels, rotary, windows
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.passes import encode_slots
from tests import tiny
from tests.model.test_attention import random

# Both round sums of float32 in another order; entries are at most 5.
EXACT = {"atol": 5e-6, "rtol": 0}


def case(T, W, U, N, H):
    """Queries, keys and values, angles, and up to eight places of padding at the end of each window."""
    padding = np.random.default_rng(0).integers(0, 9, size=(W, 1))
    return random(T, W * U, 3 * N * H), 3 * random(W * U, H // 2), (np.arange(U) < U - padding).reshape(-1)


def kernel(qkv, angles, valid, W, N):
    run = jax.jit(lambda qkv, angles: windows.attend(qkv, *rotary.turns(angles), valid, W=W, heads=N))
    return run(qkv, angles)


@functools.partial(jax.jit, static_argnames=("W", "N"))
def reference(qkv, angles, valid, W, N):
    T, P, D = qkv.shape
    q, k, v = jnp.transpose(qkv.reshape(T, P, 3, N, -1), (2, 0, 3, 1, 4))
    q, k = (rotary.rotate(x, rotary.turns(angles)) for x in (q, k))
    rows = (x.reshape(T, N, W, P // W, -1) for x in (q, k, v))
    mixed = attention.window_attention(*rows, valid.reshape(W, -1)).reshape(T, N, P, -1)
    return jnp.moveaxis(mixed, 1, 2).reshape(T, P, D // 3)


@pytest.mark.parametrize(
    ("T", "W", "U", "N", "H"),
    [
        (1, 6, 64, 16, 80),  # windows of the released models: blocks of three, eight heads
        (2, 5, 64, 8, 80),  # no four windows fill a block
        (2, 1, 880, 8, 80),  # a whole slot, in parts of 224 rows that share the rotated keys, the last of 208
        (3, 4, 48, 4, 64),
        (1, 7, 16, 2, 128),
    ],
)
def test_the_kernel_rotates_and_attends_as_the_reference(T, W, U, N, H):
    qkv, angles, valid = case(T, W, U, N, H)
    assert windows.suits(((W, U),), N, H, most=1024)
    ours = kernel(qkv, angles, valid, W, N)
    np.testing.assert_allclose(ours, reference(qkv, angles, valid, W, N), **EXACT)
    assert not np.allclose(ours, kernel(qkv, angles, np.ones_like(valid), W, N), atol=1e-3)


def test_in_bfloat16_it_is_as_close_as_rounding_allows():
    qkv, angles, valid = case(2, 5, 64, 8, 80)
    half = kernel(qkv.astype(jnp.bfloat16), angles, valid, 5, 8)
    assert half.dtype == jnp.bfloat16
    # Eight bits of queries and keys, weights and values, of entries up to 5.
    np.testing.assert_allclose(np.asarray(half, np.float32), reference(qkv, angles, valid, 5, 8), atol=5e-2)


def test_it_takes_windows_of_one_size_in_whole_tiles():
    suits = lambda sizes, heads=16, head_dim=80, most=1024: windows.suits(sizes, heads, head_dim, most)
    assert suits(((15, 64),)) and suits(((1, 880),))
    assert not suits(((10, 64), (5, 48)))  # two sizes
    assert not suits(((3, 20),))  # rows
    assert not suits(((1, 880),), most=256) and suits(((1, 256),), most=256)
    assert suits(((4, 256),)) and not suits(((4, 400),))  # of those in parts one alone
    assert not suits(((15, 64),), heads=12) and not suits(((15, 64),), heads=2, head_dim=16)  # lanes


SHAPE = tiny.TinyShape(vision_width=128, vision_heads=8, window=56, seed=13)
GRIDS = [(4, 8), (6, 10)]  # windows of 16 patches; at both borders of the second some are padded


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return at.load(tiny.write_checkpoint(tmp_path_factory.mktemp("windows"), SHAPE))


def pixels(slots, patches):
    return np.random.default_rng(0).integers(0, 256, (slots, patches, 1176), np.uint8)


def assert_same_features(ours, theirs):
    """Four layers of sums in another order, against the largest feature: some 3e-6 of it."""
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()), rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_tower_with_the_kernel_is_the_tower_without(model, grid, monkeypatch):
    taken = []
    attend = windows.attend
    monkeypatch.setattr(windows, "attend", lambda *args, W, heads: taken.append(W) or attend(*args, W=W, heads=heads))
    patches = pixels(3, grid[0] * grid[1])
    ours = encode_slots(model.module.vision, patches, *grid, Kernel("windows"))
    ((W, _),) = window_layout(model.config.vision, *grid).windows
    assert set(taken) == {W, 1}  # layers within windows, and within the slot
    assert_same_features(ours, encode_slots(model.module.vision, patches, *grid, XLA))


def test_what_does_not_suit_takes_the_path_of_xla(model, monkeypatch):
    monkeypatch.setattr(windows, "attend", None)
    patches = pixels(2, 6 * 6)
    small = dataclasses.replace(Kernel("windows"), largest=8)  # memory for half a window
    ours = encode_slots(model.module.vision, patches, 6, 6, small)
    np.testing.assert_array_equal(ours, encode_slots(model.module.vision, patches, 6, 6, XLA))


def test_on_a_mesh_every_device_has_slots_of_its_own(model):
    mesh = sharding.make_mesh(sharding.MeshShape.parse("data=2,context=2,model=2"))
    patches = pixels(8, 24)
    place = lambda array, where: jax.device_put(array, where(mesh))
    module = jax.tree.map(lambda x: place(x, sharding.replicated), model.module)
    ours = encode_slots(module.vision, place(patches, sharding.slot_sharding), 6, 4, Kernel("windows", mesh))
    assert ours.sharding.is_equivalent_to(sharding.slot_sharding(mesh), ours.ndim)
    assert_same_features(ours, encode_slots(model.module.vision, patches, 6, 4, XLA))


@pytest.mark.parametrize(("W", "U"), [(15, 64), (1, 880)])
def test_it_lowers_for_a_tpu(W, U):
    qkv, angles, valid = case(2, W, U, 16, 80)
    cos, sin = rotary.turns(angles)
    attend = jax.jit(lambda *arrays: windows.attend(*arrays, valid, W=W, heads=16))
    exported = jax.export.export(attend, platforms=["tpu"])(qkv.astype(jnp.bfloat16), cos, sin)
    assert "tpu_custom_call" in exported.mlir_module()


def test_the_resolver_takes_it_for_bfloat16_on_a_tpu():
    chosen = lambda dtype, platform: kernels.resolve_vision(dtype, 80, platform=platform).name
    assert chosen(jnp.bfloat16, "tpu") == "windows" and chosen(jnp.float32, "tpu") == "xla"
    assert chosen(jnp.bfloat16, "gpu") == "cudnn" and chosen(jnp.bfloat16, "cpu") == "xla"
