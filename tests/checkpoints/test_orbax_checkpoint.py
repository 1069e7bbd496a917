"""Orbax checkpoints: the same bits back, wherever they lie, and damage reported in one line."""

import gc
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adapttoken_jax import parameters, sharding
from adapttoken_jax.config import read_model_config
from adapttoken_jax.errors import UserError
from checkpoints_convert import orbax_checkpoint, target
from tests import tiny
from tests.checkpoints.random_bits import DTYPES, SMALL, random_array, same_bits


@pytest.fixture(scope="module")
def companions(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("small") / "model", SMALL)


@pytest.fixture(scope="module")
def config(companions):
    return read_model_config(companions)


@pytest.fixture(scope="module")
def params(config):
    """Random bits, in another dtype from one parameter to the next."""
    rng, dtypes = np.random.default_rng(0), list(DTYPES.values())
    leaf = lambda p: jnp.asarray(random_array(p.shape, dtypes[len(p.path[-1]) % 3], rng))
    return parameters.tree(config, leaf)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, config, params, companions):
    directory = tmp_path_factory.mktemp("orbax") / "converted"
    _write(directory, config, params, companions=companions)
    return directory


def _write(directory, config, params, companions=None) -> None:
    with target.new_directory(directory) as partial:
        if companions is not None:
            target.copy_companions(companions, partial)
        orbax_checkpoint.write_weights(partial, config, params)


def _same_tree(a, b) -> bool:
    return jax.tree.all(jax.tree.map(same_bits, a, b))


def test_same_bits_come_back(checkpoint, config, params):
    assert {str(array.dtype) for array in jax.tree.leaves(params)} == set(DTYPES)
    assert _same_tree(orbax_checkpoint.read(checkpoint, config), params)


def _shardings(config, mesh: str) -> dict:
    return sharding.parameter_shardings(config, sharding.make_mesh(sharding.MeshShape.parse(mesh)))


@pytest.mark.parametrize("mesh", ["data=4,model=2", "fsdp=4,model=2", "model=2"])
def test_sharded_reading_equals_unsharded(checkpoint, config, params, mesh):
    shardings = _shardings(config, mesh)
    sharded = orbax_checkpoint.read(checkpoint, config, shardings=shardings)
    assert _same_tree(sharded, params)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), sharded, shardings))


def test_sharded_writing(tmp_path, checkpoint, config, params):
    sharded = orbax_checkpoint.read(checkpoint, config, shardings=_shardings(config, "model=2"))
    _write(tmp_path / "sharded", config, sharded)
    written = orbax_checkpoint.read(tmp_path / "sharded", config)
    assert jax.tree.all(jax.tree.map(_same_numbers, written, params))


def _same_numbers(a, b) -> bool:
    """`same_bits` but for the payload of NaNs: orbax has XLA cut arrays as floats, which need not keep it."""
    wide = lambda x: np.asarray(x).astype(np.float32)
    return a.dtype == b.dtype and np.array_equal(wide(a), wide(b), equal_nan=True)


def test_cast_is_that_of_jax(tmp_path, config):
    params = parameters.initialise(config, jax.random.key(0))
    _write(tmp_path / "float32", config, params)
    for dtype in (jnp.bfloat16, "float16"):
        cast = orbax_checkpoint.read(tmp_path / "float32", config, dtype=dtype)
        assert _same_tree(cast, jax.tree.map(lambda array: np.asarray(array).astype(jnp.dtype(dtype)), params))  # noqa: B023


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_the_largest_parameter_fits_into_the_memory_granted(tmp_path, config, monkeypatch, dtype):
    """Orbax refuses to read what is larger; so it would a large embedding of bfloat16 that is to be float32."""
    _write(tmp_path / "bfloat16", config, parameters.initialise(config, jax.random.key(0), jnp.bfloat16))
    granted, make = [], orbax_checkpoint._checkpointer
    monkeypatch.setattr(orbax_checkpoint, "_checkpointer", lambda largest: granted.append(largest) or make(largest))
    arrays = jax.tree.leaves(orbax_checkpoint.read(tmp_path / "bfloat16", config, dtype))
    assert granted == [max(array.nbytes for array in arrays)]


def test_companions_lie_beside_it(checkpoint, companions):
    names = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"}
    names.add("tokenizer_config.json")
    assert {path.name for path in checkpoint.iterdir()} == names | {"orbax"}
    assert all((checkpoint / name).read_bytes() == (companions / name).read_bytes() for name in names)


def test_no_path_of_this_machine_is_inside(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            assert str(checkpoint.parent).encode() not in path.read_bytes(), path


def test_large_arrays_are_cut_into_pieces(tmp_path, config, monkeypatch):
    monkeypatch.setattr(orbax_checkpoint, "_CHUNK_BYTES", 4096)
    params = parameters.initialise(config, jax.random.key(0))
    _write(tmp_path / "cut", config, params)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(tmp_path / "cut" / "orbax").item_metadata.tree
    embedding = stored["text"]["embedding"]
    assert np.prod(embedding.storage.chunk_shape) * 4 <= 4096
    assert _same_tree(orbax_checkpoint.read(tmp_path / "cut", config), params)


def test_orbax_alone_can_read_it(checkpoint, params):
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
    with ocp.StandardCheckpointer() as checkpointer:
        assert _same_tree(checkpointer.restore(checkpoint / "orbax", abstract), params)


def test_another_model_is_refused(tmp_path, config, params):
    def written(name, **text):
        changed = {**params, "text": {**params["text"], **text}}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name / "orbax", changed)
        return tmp_path / name

    norm = params["text"]["norm"]
    with pytest.raises(UserError, match=r"orbax: unknown parameter 'text\.bonus'"):
        orbax_checkpoint.read(written("unknown", bonus=norm), config)
    with pytest.raises(UserError, match=r"'text\.norm' has shape \[63\], now wanted is \[64\]; convert"):
        orbax_checkpoint.read(written("misshapen", norm=norm[:63]), config)
    without = {key: value for key, value in params["text"].items() if key != "norm"}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "missing" / "orbax", {**params, "text": without})
    with pytest.raises(UserError, match=r"missing parameter 'text\.norm'"):
        orbax_checkpoint.read(tmp_path / "missing", config)


def _largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture
def young_heap():
    """What earlier tests left, seconds of looking through, is not collected."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "_METADATA").unlink(), "lost its metadata"),
        (lambda d: (d / "_METADATA").write_text("garbage", encoding="utf-8"), "lost its metadata"),
        (lambda d: shutil.rmtree(d / "ocdbt.process_0"), "incomplete or damaged"),
        (lambda d: _largest(d).write_bytes(_largest(d).read_bytes()[:1000]), "incomplete or damaged"),
        (lambda d: [path.unlink() for path in d.rglob("*") if path.is_file()], "lost its metadata"),
        (lambda d: [path.unlink() for path in (d / "d").iterdir()], "lost its metadata"),
        (lambda d: (d / "manifest.ocdbt").unlink(), "lost its metadata"),
        (lambda d: (d / "manifest.ocdbt").write_bytes(b"cut"), "lost its metadata"),
    ],
)
def test_damage_is_one_line(tmp_path, checkpoint, config, monkeypatch, caplog, young_heap, damage, message):
    """Orbax abandons its other reads when one fails; they say nothing, then or once they are collected."""
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: lost.append(repr(each)))
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(copy / "orbax")
    with pytest.raises(UserError, match=message) as error:
        orbax_checkpoint.read(copy, config)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)
    del error
    gc.collect()
    assert lost == [] and caplog.messages == []
