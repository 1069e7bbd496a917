"""Conversion there and back: identical tensors, companions, provenance; nothing left behind when it fails."""

import hashlib
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch

from adapttoken_jax import sharding
from adapttoken_jax.config import SIZES, read_model_config
from adapttoken_jax.errors import UserError
from checkpoints_convert import load, target
from checkpoints_convert.convert import convert
from checkpoints_convert.safetensors_file import read_header
from tests import tiny
from tests.checkpoints import random_bits
from tests.checkpoints.random_bits import SMALL, SMALL_TIED, same_bits

# All layers of the released 3B, at tiny widths.
_KEYS_OF_3B = tiny.TinyShape(
    layers=36, vision_layers=32, full_attention_layers=(7, 15, 23, 31), tied=True, width=32, heads=4,
    sections=(1, 1, 2), ff=24, vision_width=16, vision_ff=20, seed=20,
)  # fmt: skip


def _names(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_key_set_of_the_3b_there_and_back(tmp_path):
    values = random_bits.tensors(_KEYS_OF_3B)
    assert len(values) == 824  # as many as the released checkpoint's index lists
    source = random_bits.write(tmp_path / "source", _KEYS_OF_3B, values, shards=2)
    real = SIZES["qwen2.5-vl-3b"]
    config = read_model_config(source)
    assert (config.text.layers, config.vision.layers, config.text.tied) == (real.text.layers, real.vision.layers, True)
    convert(source, tmp_path / "orbax", to="orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="huggingface")
    back = random_bits.read(tmp_path / "back")
    assert back.keys() == values.keys()
    assert all(same_bits(back[key], array) for key, array in values.items())


@pytest.mark.parametrize("config_layout", tiny.CONFIG_LAYOUTS)
@pytest.mark.parametrize(("key_layout", "dtype"), [("old", "bfloat16"), ("new", "float32")])
def test_transformers_computes_the_same_after_both_ways(tmp_path, config_layout, key_layout, dtype):
    shape = tiny.SHAPES["four_kv"]
    source = tiny.write_checkpoint(tmp_path / "source", shape, config_layout, key_layout, 3, dtype)
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="huggingface")
    before, after = tiny.load_torch(source), tiny.load_torch(tmp_path / "back")
    weights = after.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.state_dict().items())
    ids = torch.arange(12)[None] * 7
    with torch.no_grad():
        assert torch.equal(before(input_ids=ids).logits, after(input_ids=ids).logits)


def _same_numbers(a, b) -> bool:
    """Equal but for the bits of NaNs, which a cast need not keep."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return bool(np.all((a == b) | ((a != a) & (b != b))))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_bits.write(tmp_path_factory.mktemp("small") / "Small-VL", SMALL, random_bits.tensors(SMALL), shards=2)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, source):
    convert(source, directory := tmp_path_factory.mktemp("converted") / "out")
    return directory


def test_companions_are_copied_byte_for_byte(source, converted):
    companions = {name for name in _names(source) if "safetensors" not in name}
    assert _names(converted) == companions | {"orbax", "provenance.json"}
    assert all((converted / name).read_bytes() == (source / name).read_bytes() for name in companions)


def test_whatever_the_hub_has_beside_weights_is_copied_and_nothing_else(tmp_path):
    names = {
        "LICENSE", "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
        "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json",
        "vocab.json",
    }  # fmt: skip
    for directory in ("source", "target"):
        (tmp_path / directory).mkdir()
    for name in names | {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "notes.txt"}:
        (tmp_path / "source" / name).write_text(name)
    target.copy_companions(tmp_path / "source", tmp_path / "target")
    assert _names(tmp_path / "target") == names


def test_provenance_says_where_from_without_paths(source, converted):
    text = (converted / "provenance.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["source"] == "Small-VL" and str(source.parent) not in text
    files = sorted(source.glob("*.safetensors"))
    assert content["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert content["dtypes"] == ["bfloat16"] and content["versions"]["jax"] == jax.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", content["date"])


def test_mixed_dtypes_survive_both_ways(tmp_path):
    values = random_bits.tensors(SMALL)
    values = {key: a.astype(np.float32) if key.endswith("norm.weight") else a for key, a in values.items()}
    convert(random_bits.write(tmp_path / "source", SMALL, values), tmp_path / "orbax")
    assert json.loads((tmp_path / "orbax" / "provenance.json").read_text())["dtypes"] == ["bfloat16", "float32"]
    convert(tmp_path / "orbax", tmp_path / "back", to="huggingface")
    back = random_bits.read(tmp_path / "back")
    assert all(same_bits(back[key], array) for key, array in values.items())


def test_repeated_head_of_a_tied_checkpoint_is_dropped(tmp_path):
    values = random_bits.tensors(SMALL_TIED)
    head = values["model.embed_tokens.weight"].copy()
    convert(random_bits.write(tmp_path / "source", SMALL_TIED, {**values, "lm_head.weight": head}), tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", to="huggingface")
    back = random_bits.read(tmp_path / "back")
    assert back.keys() == values.keys() and all(same_bits(back[key], array) for key, array in values.items())


# ---------------------------------------------------------------------------------------------------------------------
# Either format
# ---------------------------------------------------------------------------------------------------------------------


def test_load_parameters_reads_both_formats_onto_a_mesh(source, converted):
    config, mesh = read_model_config(source), sharding.make_mesh(sharding.MeshShape(data=2, model=2))
    shardings = sharding.parameter_shardings(config, mesh)
    for dtype in (None, "float32"):
        trees = [load.load_parameters(directory, config, dtype, mesh) for directory in (source, converted)]
        assert jax.tree.all(jax.tree.map(_same_numbers, *trees))
        for tree in trees:
            assert {str(array.dtype) for array in jax.tree.leaves(tree)} == {dtype or "bfloat16"}
            assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), tree, shardings))


def test_load_parameters_without_a_mesh_uses_one_device(converted):
    params = load.load_parameters(converted, read_model_config(converted))
    assert {array.devices() == {jax.devices()[0]} for array in jax.tree.leaves(params)} == {True}


def test_directory_of_both_formats_is_refused(tmp_path, source):
    directory = random_bits.write(tmp_path / "both", SMALL_TIED, random_bits.tensors(SMALL_TIED))
    (directory / "orbax").mkdir()
    with pytest.raises(UserError, match=r"both: holds both orbax/ and \*\.safetensors"):
        load.load_parameters(directory, read_model_config(directory))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes and interruptions
# ---------------------------------------------------------------------------------------------------------------------


def test_existing_target_is_left_alone(tmp_path, source):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: already exists"):
        convert(source, tmp_path / "out")
    assert _names(tmp_path) == {"out"} and not _names(tmp_path / "out")


def test_target_without_a_parent_is_refused(tmp_path, source):
    with pytest.raises(UserError, match=r"absent/out: cannot be created \(No such file or directory\)"):
        convert(source, tmp_path / "absent" / "out")
    assert not _names(tmp_path)


@pytest.mark.parametrize("to", ["orbax", "huggingface"])
def test_same_format_is_refused(tmp_path, source, converted, to):
    with pytest.raises(UserError, match=f"has the format {to} already"):
        convert(converted if to == "orbax" else source, tmp_path / "out", to=to)
    assert not _names(tmp_path)


def test_unknown_format_is_refused(tmp_path, source):
    with pytest.raises(UserError, match="--to=flax: choose one of orbax, huggingface"):
        convert(source, tmp_path / "out", to="flax")


def test_a_bundled_model_is_a_source(tmp_path):
    convert("needle", tmp_path / "out")
    bundled = read_model_config("needle")
    assert read_model_config(tmp_path / "out") == bundled
    assert load.load_parameters(tmp_path / "out", bundled).keys() == {"text", "vision"}


def test_missing_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="absent: no such model directory"):
        convert(tmp_path / "absent", tmp_path / "out")


def test_bad_source_leaves_nothing_behind(tmp_path):
    values = random_bits.tensors(SMALL_TIED)
    del values["model.norm.weight"]
    source = random_bits.write(tmp_path / "source", SMALL_TIED, values)
    with pytest.raises(UserError, match=r"missing key 'model\.norm\.weight'"):
        convert(source, tmp_path / "out")
    assert _names(tmp_path) == {"source"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interruption_leaves_nothing_behind(tmp_path, interruption):
    with pytest.raises(interruption), target.new_directory(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("half", encoding="utf-8")
        assert _names(tmp_path) == {partial.name}
        raise interruption
    assert not _names(tmp_path)


def test_an_interrupted_save_ends_before_it_is_removed(tmp_path, source, monkeypatch):
    real, ended = ocp.Checkpointer.save, []

    def save(*args, **kwargs):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        real(*args, **kwargs)
        ended.append(True)

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert ended and not _names(tmp_path)


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(tmp_path, source, monkeypatch):
    needed = sum(tensor.nbytes for path in source.glob("*.safetensors") for tensor in read_header(path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * needed, needed + 1, needed - 1))
    monkeypatch.setattr(ocp.Checkpointer, "save", None)
    with pytest.raises(UserError, match="out: not written, the disk is full; free some space"):
        convert(source, tmp_path / "out")
    assert not _names(tmp_path)
