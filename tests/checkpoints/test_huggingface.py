"""Hugging Face directories: every layout, every mistake, every sharding."""

import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapttoken_jax import parameters, sharding
from adapttoken_jax.config import read_model_config
from adapttoken_jax.errors import UserError
from checkpoints_convert import huggingface
from checkpoints_convert.safetensors_file import StoredTensor, read_header
from tests import tiny
from tests.checkpoints import random_bits
from tests.checkpoints.random_bits import SMALL, SMALL_TIED, same_bits


def _read(directory, **options):
    return huggingface.read(directory, read_model_config(directory), **options)


def _same_tree(a, b) -> bool:
    return jax.tree.all(jax.tree.map(same_bits, a, b))


@pytest.fixture(scope="module")
def values():
    return random_bits.tensors(SMALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, values):
    return random_bits.write(tmp_path_factory.mktemp("small") / "model", SMALL, values, shards=3)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return _read(checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------------------------------


def test_every_element_is_where_the_model_expects_it(values, loaded):
    """Element by element from the meaning of the axes, not through the table."""
    heads, size, width = 4, 16, 64
    q = values["model.layers.2.self_attn.q_proj.weight"].reshape(heads, size, width)
    layers = jax.tree.map(np.asarray, loaded["text"]["layers"])
    assert same_bits(layers["q_kernel"][2], np.einsum("nhd->dnh", q.view(np.uint16)).view(q.dtype))
    k = values["model.layers.1.self_attn.k_proj.bias"]
    assert same_bits(layers["k_bias"][1], np.stack(np.split(k, 4)))
    out = values["model.layers.0.self_attn.o_proj.weight"]
    ours = layers["o_kernel"][0]
    for n, h, d in itertools.product(range(heads), (0, 7, 15), (0, 33)):
        assert same_bits(ours[n, h, d], out[d, n * size + h])
    qkv = values["visual.blocks.1.attn.qkv.weight"]
    ours = np.asarray(loaded["vision"]["layers"]["qkv_kernel"][1])
    for part, n, h, d in itertools.product(range(3), range(2), (0, 9), (0, 31)):
        assert same_bits(ours[d, part * 32 + n * 16 + h], qkv[part * 32 + n * 16 + h, d])
    patch = values["visual.patch_embed.proj.weight"]
    assert same_bits(loaded["vision"]["patch_kernel"], patch.reshape(32, 3 * 2 * 14 * 14).T)
    assert same_bits(loaded["text"]["embedding"], values["model.embed_tokens.weight"])
    assert same_bits(loaded["text"]["head"], values["lm_head.weight"].T)


def test_all_tensors_are_read_exactly_once(values, loaded):
    total = sum(array.size for array in jax.tree.leaves(loaded))
    assert total == sum(array.size for array in values.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 4])
def test_layouts_hold_the_same_weights(tmp_path, dtype, shards):
    shape = tiny.SHAPES["single_layers"]
    trees = []
    for config_layout, key_layout in itertools.product(tiny.CONFIG_LAYOUTS, tiny.KEY_LAYOUTS):
        directory = tmp_path / config_layout / key_layout
        tiny.write_checkpoint(directory, shape, config_layout, key_layout, shards, dtype)
        trees.append(_read(directory))
    assert {str(array.dtype) for array in jax.tree.leaves(trees[0])} == {dtype}
    assert all(_same_tree(trees[0], tree) for tree in trees[1:])
    stored = random_bits.read(tmp_path / "flat" / "old")
    up = trees[0]["text"]["layers"]["up_kernel"][0]
    assert same_bits(up, stored["model.layers.0.mlp.up_proj.weight"].T)


def test_shards_without_an_index(tmp_path, checkpoint, loaded):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "model.safetensors.index.json").unlink()
    assert _same_tree(_read(copy), loaded)


def test_cast_rounds_to_nearest_even(tmp_path):
    rng = np.random.default_rng(3)
    values = {key: rng.standard_normal(a.shape, np.float32) for key, a in random_bits.tensors(SMALL_TIED).items()}
    directory = random_bits.write(tmp_path / "model", SMALL_TIED, values)
    bias = values["model.layers.0.self_attn.q_proj.bias"].reshape(4, 16)
    for dtype, code in ((jnp.bfloat16, ml_dtypes.bfloat16), ("float16", np.float16)):
        params = _read(directory, dtype=dtype)
        assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(code)}
        assert same_bits(params["text"]["layers"]["q_bias"][0], bias.astype(code))


def test_parameters_keep_their_own_dtypes(tmp_path, values):
    mixed = {key: a.astype(np.float32) if "norm" in key else a for key, a in values.items()}
    mixed["lm_head.weight"] = values["lm_head.weight"].view(np.float16)
    params = _read(random_bits.write(tmp_path / "model", SMALL, mixed))
    assert params["text"]["layers"]["norm1"].dtype == np.float32
    assert params["text"]["head"].dtype == np.float16
    assert params["text"]["layers"]["up_kernel"].dtype == jnp.bfloat16
    assert same_bits(params["text"]["layers"]["norm2"][2], mixed["model.layers.2.post_attention_layernorm.weight"])


def test_layers_of_different_dtypes_need_a_dtype(tmp_path, values):
    key = "visual.blocks.1.norm2.weight"
    directory = random_bits.write(tmp_path / "model", SMALL, {**values, key: values[key].astype(np.float32)})
    with pytest.raises(UserError, match=rf"'{key}' is float32 while 'visual\.blocks\.0\.norm2\.weight' is bfloat16"):
        _read(directory)
    params = _read(directory, dtype=jnp.float32)
    np.testing.assert_array_equal(params["vision"]["layers"]["norm2"][1], values[key].astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Shardings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["data=4,model=2", "fsdp=4,model=2", "model=2"])
def test_sharded_reading_equals_unsharded(checkpoint, loaded, mesh, monkeypatch):
    """Nothing is read twice, though places of `data` hold the same parts."""
    taken, read = [], StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda *args: (taken.append(read(*args)), taken[-1])[1])
    config, mesh = read_model_config(checkpoint), sharding.make_mesh(sharding.MeshShape.parse(mesh))
    shardings = sharding.parameter_shardings(config, mesh)
    params = huggingface.read(checkpoint, config, shardings=shardings)
    assert sum(part.nbytes for part in taken) == sum(each.nbytes for each in jax.tree.leaves(loaded))
    assert _same_tree(params, loaded)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), params, shardings))


def test_devices_hold_only_their_part(checkpoint):
    config, mesh = read_model_config(checkpoint), sharding.make_mesh(sharding.MeshShape(data=4, model=2))
    params = huggingface.read(checkpoint, config, shardings=sharding.parameter_shardings(config, mesh))
    shapes = lambda array: {shard.data.shape for shard in array.addressable_shards}
    assert shapes(params["text"]["layers"]["q_kernel"]) == {(3, 64, 2, 16)}
    assert shapes(params["text"]["layers"]["down_kernel"]) == {(3, 48, 64)}
    assert shapes(params["vision"]["layers"]["qkv_kernel"]) == {(2, 32, 96)}  # whole


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("text.layers.q_kernel", ("model", None, None)),  # (N H) D, split over N
        ("text.layers.down_kernel", (None, "model")),  # D F, over F
        ("vision.layers.qkv_kernel", (None,) * 4),  # (3 N H) D, whole
        ("text.layers.up_kernel", ("model", None)),  # F D, over F
        ("vision.patch_kernel", (None,) * 5),
    ],
)
def test_a_process_reads_only_the_part_of_its_devices(checkpoint, path, spec):
    """The stored tensor, its merged axes apart, is split where the parameter is."""
    config, mesh = read_model_config(checkpoint), sharding.make_mesh(sharding.MeshShape(data=4, model=2))
    (p,) = (p for p in parameters.parameters(config) if ".".join(p.path) == path)
    staged = huggingface._staging_sharding(p, jax.NamedSharding(mesh, sharding.parameter_spec(p, mesh)))
    assert tuple(staged.spec) == spec


def test_any_axis_may_be_split(checkpoint, loaded):
    """Also the stack's own axis and one that merges several stored axes, which the rules never split."""
    config, mesh = read_model_config(checkpoint), sharding.make_mesh(sharding.MeshShape(data=2, model=2))
    specs = {("vision", "patch_kernel"): ("model",), ("vision", "layers", "norm1"): ("data", "model")}
    place = lambda p: jax.NamedSharding(mesh, jax.P(*specs.get(p.path, ())))
    params = huggingface.read(checkpoint, config, shardings=parameters.tree(config, place))
    assert _same_tree(params, loaded)
    assert params["vision"]["patch_kernel"].addressable_shards[0].data.shape == (588, 32)
    assert params["vision"]["layers"]["norm1"].addressable_shards[0].data.shape == (1, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def _edit_file(directory: pathlib.Path, edit, name="model-00002-of-00003.safetensors") -> None:
    path = directory / name
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _edit_index(directory: pathlib.Path, edit) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    edit(index)
    path.write_text(json.dumps(index), encoding="utf-8")


def _drop_index(directory: pathlib.Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def _unknown(directory):
    _drop_index(directory)
    _edit_file(directory, lambda t: t.update({"model.layers.0.extra.weight": np.zeros(2, np.float32)}))


def _layer_too_many(directory):
    _drop_index(directory)
    key = "model.layers.3.mlp.up_proj.weight"
    _edit_file(directory, lambda t: t.update({key: np.zeros((96, 64), ml_dtypes.bfloat16)}))


def _duplicate_in_two_files(directory):
    _drop_index(directory)
    tensors = load_file(directory / "model-00001-of-00003.safetensors")
    key = next(key for key in sorted(tensors) if key.startswith("model.layers."))
    _edit_file(directory, lambda t: t.update({key: tensors[key]}))


def _duplicate_in_two_layouts(directory):
    _drop_index(directory)
    both = {key: np.zeros(64, ml_dtypes.bfloat16) for key in ("model.norm.weight", "model.language_model.norm.weight")}
    _edit_file(directory, lambda t: t.update(both))


def _duplicate_in_one_header(directory):
    _drop_index(directory)
    path = next(path for path in directory.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    entries = [f"{json.dumps(key)}:{json.dumps(entry)}" for key, entry in json.loads(raw[8 : 8 + size]).items()]
    entries.append(next(entry for entry in entries if "model.norm.weight" in entry))
    text = f"{{{','.join(entries)}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def _missing(directory):
    _drop_index(directory)
    _edit_file(directory, lambda t: t.pop(sorted(t)[0]))


def _misshapen(directory):
    key = "model.layers.1.self_attn.k_proj.weight"
    for path in directory.glob("*.safetensors"):
        if key in load_file(path):
            _edit_file(directory, lambda t: t.update({key: t[key].T[:, :32].copy()}), path.name)


def _missing_shard(directory):
    (directory / "model-00002-of-00003.safetensors").unlink()


def _truncated(directory):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _no_weights(directory):
    _drop_index(directory)
    for path in directory.glob("*.safetensors"):
        path.unlink()


def _only_pickle(directory):
    _no_weights(directory)
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def _index_promises_more(directory):
    _edit_index(directory, lambda i: i["weight_map"].update({"extra": "model-00001-of-00003.safetensors"}))


def _index_promises_less(directory):
    _edit_index(directory, lambda i: i["weight_map"].pop("model.norm.weight"))


def _index_without_map(directory):
    _edit_index(directory, lambda i: i.pop("weight_map"))


def _index_leaves_the_directory(directory):
    _edit_index(directory, lambda i: i["weight_map"].update({"model.norm.weight": "../other.safetensors"}))


def _index_names_pickle(directory):
    _edit_index(directory, lambda i: i["weight_map"].update({"model.norm.weight": "pytorch_model.bin"}))


def _single_file_beside_shards(directory):
    shutil.copyfile(directory / "model-00001-of-00003.safetensors", directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unknown, r"model-00002-of-00003\.safetensors: unknown key 'model\.layers\.0\.extra\.weight'"),
        (_layer_too_many, r"unknown key 'model\.layers\.3\.mlp\.up_proj\.weight'"),
        (_duplicate_in_two_files, r"duplicate key 'model\.layers\.\S+' \(in model-00001\S+, model-00002\S+\)"),
        (_duplicate_in_two_layouts, r"duplicate key 'model\.norm\.weight'"),
        (_duplicate_in_one_header, r"duplicate key 'model\.norm\.weight'"),
        (_missing, r"missing key '\S+'; fetch"),
        (_misshapen, r"'model\.layers\.1\.self_attn\.k_proj\.weight' has shape \[64, 32\], .* \[64, 64\]"),
        (_missing_shard, r"model-00002-of-00003\.safetensors: named by model\.safetensors\.index\.json"),
        (_truncated, r"model-00002-of-00003\.safetensors: truncated, 1 bytes are missing"),
        (_no_weights, r"no \*\.safetensors in it"),
        (_only_pickle, r"only pickle weights \(pytorch_model\.bin\)"),
        (_index_promises_more, r"model-00001-of-00003\.safetensors: has no tensor 'extra'"),
        (_index_promises_less, r"holds 'model\.norm\.weight', which model\.safetensors\.index\.json does not list"),
        (_index_without_map, r"model\.safetensors\.index\.json: not a safetensors index"),
        (_index_leaves_the_directory, r"names '\.\./other\.safetensors'"),
        (_index_names_pickle, r"names 'pytorch_model\.bin'"),
        (_single_file_beside_shards, r"holds both model\.safetensors and the shards"),
    ],
)
def test_mistake_is_one_line_that_names_it(tmp_path, checkpoint, damage, message):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        _read(copy)
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_untied_checkpoint_needs_its_head(tmp_path, values):
    headless = {key: array for key, array in values.items() if key != "lm_head.weight"}
    with pytest.raises(UserError, match=r"missing key 'lm_head\.weight'"):
        _read(random_bits.write(tmp_path / "model", SMALL, headless))


def test_tied_checkpoint_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    values = random_bits.tensors(SMALL_TIED)
    head = values["model.embed_tokens.weight"].copy()
    repeated = _read(random_bits.write(tmp_path / "same", SMALL_TIED, {**values, "lm_head.weight": head}))
    assert _same_tree(repeated, _read(random_bits.write(tmp_path / "without", SMALL_TIED, values)))
    other = head.copy()
    other.view(np.uint16)[-1, -1] ^= 1
    for name, bad in (("bits", other), ("dtype", head.view(np.float16)), ("shape", head[:-1].copy())):
        directory = random_bits.write(tmp_path / name, SMALL_TIED, {**values, "lm_head.weight": bad})
        with pytest.raises(UserError, match=r"'lm_head\.weight' differs from the embedding"):
            _read(directory)


def test_an_index_may_name_the_head_that_a_tied_checkpoint_has_not(tmp_path, values):
    tied = random_bits.write(tmp_path / "tied", SMALL_TIED, random_bits.tensors(SMALL_TIED), shards=2)
    before = _read(tied)
    named = lambda i: i["weight_map"].update({"lm_head.weight": "model-00002-of-00002.safetensors"})
    _edit_index(tied, named)
    assert _same_tree(_read(tied), before)
    headless = {key: array for key, array in values.items() if key != "lm_head.weight"}
    untied = random_bits.write(tmp_path / "untied", SMALL, headless, shards=2)
    _edit_index(untied, named)
    with pytest.raises(UserError, match=r"has no tensor 'lm_head\.weight', which"):
        _read(untied)


def test_an_index_may_name_the_one_file_of_a_whole_model(tmp_path, values, loaded):
    directory = random_bits.write(tmp_path / "model", SMALL, values)
    index = {"weight_map": dict.fromkeys(values, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert _same_tree(_read(directory), loaded)


def test_what_lies_beside_the_file_of_a_whole_model_is_none_of_it(tmp_path, values, loaded):
    directory = random_bits.write(tmp_path / "model", SMALL, values)
    shutil.copyfile(directory / "model.safetensors", directory / "model.fp16.safetensors")
    save_file({"base_model.lora_A.weight": np.zeros(2, np.float32)}, directory / "adapter_model.safetensors")
    assert _same_tree(_read(directory), loaded)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def test_written_directory_holds_the_same_bits(tmp_path, checkpoint, values, loaded):
    huggingface.write(tmp_path / "out", read_model_config(checkpoint), loaded, companions=checkpoint)
    written = random_bits.read(tmp_path / "out")
    assert written.keys() == values.keys()
    assert all(same_bits(written[key], array) for key, array in values.items())
    for name in ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_sharded_parameters_are_written_whole(tmp_path, checkpoint, values):
    config, mesh = read_model_config(checkpoint), sharding.make_mesh(sharding.MeshShape(data=4, model=2))
    params = huggingface.read(checkpoint, config, shardings=sharding.parameter_shardings(config, mesh))
    huggingface.write(tmp_path / "out", config, params)
    written = random_bits.read(tmp_path / "out")
    assert all(same_bits(written[key], array) for key, array in values.items())


@pytest.mark.parametrize("limit", [30_000, 80_000])
def test_shards_keep_under_the_limit(tmp_path, checkpoint, values, loaded, limit):
    huggingface.write(tmp_path / "out", read_model_config(checkpoint), loaded, max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in values.values())
    assert index["weight_map"].keys() == values.keys()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors" and len(files) > 5
    for path in files:
        tensors = load_file(path)
        assert {key for key, name in index["weight_map"].items() if name == path.name} == tensors.keys()
        assert len(tensors) == 1 or sum(array.nbytes for array in tensors.values()) <= limit


def test_a_file_is_as_full_as_it_may_be():
    a, b, c, d = ((key, np.dtype(np.float32), (size,)) for key, size in (("a", 2), ("b", 2), ("c", 9), ("d", 1)))
    name = "model-{:05d}-of-00003.safetensors".format
    assert huggingface._shards([a, b, c, d], 16) == {name(1): [a, b], name(2): [c], name(3): [d]}
    assert huggingface._shards([a, b], 16) == {"model.safetensors": [a, b]}


@pytest.mark.parametrize("block", [1, 5, 24, 99])
def test_a_tensor_in_blocks_is_all_of_its_bytes(tmp_path, block):
    array = np.arange(6, dtype=np.float32)
    save_file({"a": array}, tmp_path / "model.safetensors")
    [tensor] = read_header(tmp_path / "model.safetensors")
    assert np.concatenate(list(huggingface._blocks(tensor, block))).tobytes() == array.tobytes()


def test_existing_directory_is_left_alone(tmp_path, checkpoint, loaded):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match="out: already exists"):
        huggingface.write(tmp_path / "out", read_model_config(checkpoint), loaded)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
