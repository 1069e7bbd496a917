"""Hugging Face safetensors directories: read straight to shardings, written in the layout of the hub.

Reading checks every key and shape from the headers alone, then goes layer by layer. A layer's tensors are copied from
disk in their stored order (only the parts that this process's devices hold), put on the devices, and there cast,
transposed and set into their slices of the stacked parameters. The host holds two layers at most, the one on its way
to the devices and the next; embedding and head are read alone.
"""

import functools
import itertools
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from adapttoken_jax import parameters
from adapttoken_jax.config import ModelConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.parameters import Parameter
from checkpoints_convert import target
from checkpoints_convert.safetensors_file import StoredTensor, read_header, write_file

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# ---------------------------------------------------------------------------------------------------------------------
# Which files, which tensors
# ---------------------------------------------------------------------------------------------------------------------


def weight_files(directory) -> list[pathlib.Path]:
    """The safetensors files of a directory: those its index names, else the one file of a whole model, else all.

    Without an index other files may lie beside these: an adapter that was merged, the optimizer, another precision.

    Raises:
      UserError: no weights, only pickle files, a broken index, a missing shard, or an index beside weights that it
        does not name.
    """
    directory = pathlib.Path(directory)
    found = sorted(directory.glob("*.safetensors"))
    if (directory / _INDEX).is_file():
        named = sorted({directory / name for name in _weight_map(directory).values()})
        missing = [path.name for path in named if not path.is_file()]
        if missing:
            raise UserError(f"{directory / missing[0]}: named by {_INDEX} but not there; fetch the missing shard")
        if directory / _SINGLE in found and directory / _SINGLE not in named:
            raise UserError(f"{directory}: holds both {_SINGLE} and the shards of {_INDEX}; remove one of the two")
        return named
    if directory / _SINGLE in found:
        return [directory / _SINGLE]
    if not found:
        raise UserError(f"{directory}: {_no_weights(directory)}")
    return found


def _no_weights(directory: pathlib.Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLE)
    if not pickles:
        return "no *.safetensors in it; give the directory of a Hugging Face or converted checkpoint"
    return f"only pickle weights ({pickles[0]}), which can run code when read; save them as safetensors first"


def _weight_map(directory: pathlib.Path) -> dict[str, str]:
    try:
        mapping = json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = set(mapping.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory / _INDEX}: not a safetensors index; fetch it again") from None
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{directory / _INDEX}: names {name!r}, which is not a safetensors file beside it")
    return mapping


def stored_tensors(directory, config: ModelConfig) -> dict[str, StoredTensor]:
    """Canonical key -> tensor on disk, for exactly the keys of the model's table. Reads headers only.

    A tied checkpoint may store `lm_head.weight` too, if its bytes equal those of the embedding.

    Raises:
      UserError: what `weight_files` and `read_header` raise; a key of the index that its shard lacks; an unknown,
        duplicate, missing or misshapen key.
    """
    directory = pathlib.Path(directory)
    tensors = [tensor for path in weight_files(directory) for tensor in read_header(path)]
    _check_index(directory, config, tensors)
    times = Counter(parameters.canonical_key(tensor.key) for tensor in tensors)
    twice = next((key for key, count in times.items() if count > 1), None)
    if twice:
        files = sorted({tensor.file.name for tensor in tensors if parameters.canonical_key(tensor.key) == twice})
        raise UserError(f"{directory}: duplicate key '{twice}' (in {', '.join(files)}); keep one copy")
    stored = {parameters.canonical_key(tensor.key): tensor for tensor in tensors}
    _check_tied_head(directory, config, stored)
    _check_keys(directory, config, stored)
    return stored


def _check_index(directory: pathlib.Path, config: ModelConfig, tensors: list[StoredTensor]) -> None:
    if not (directory / _INDEX).is_file():
        return
    indexed, present = set(_weight_map(directory).items()), {(tensor.key, tensor.file.name) for tensor in tensors}
    for key, name in sorted(indexed - present):
        if config.text.tied and parameters.canonical_key(key) == _HEAD:
            continue  # named, and left out as the embedding's
        raise UserError(f"{directory / name}: has no tensor '{key}', which {_INDEX} expects there; fetch both again")
    for key, name in sorted(present - indexed):
        raise UserError(f"{directory / name}: holds '{key}', which {_INDEX} does not list there; fetch both again")


def _check_tied_head(directory: pathlib.Path, config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    """Drops the head of a tied checkpoint from `stored` after comparing it with the embedding."""
    if not config.text.tied or _HEAD not in stored or _EMBEDDING not in stored:
        return
    head, embedding = stored.pop(_HEAD), stored[_EMBEDDING]
    same = head.dtype == embedding.dtype and head.shape == embedding.shape
    if not (same and all(np.array_equal(a, b) for a, b in zip(_blocks(head), _blocks(embedding), strict=True))):
        raise UserError(f"{directory}: '{_HEAD}' differs from the embedding, but config.json ties the two; fix either")


def _blocks(tensor: StoredTensor, block: int = 1 << 24) -> Iterator[np.ndarray]:
    """The bytes of a tensor, 16 MiB at a time."""
    raw = StoredTensor(tensor.file, tensor.key, np.dtype(np.uint8), (tensor.nbytes,), tensor.offset)
    for start in range(0, tensor.nbytes, block):
        yield raw.read(raw.shape, (slice(start, start + block),))


def _check_keys(directory: pathlib.Path, config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    expected = {key: p.stored_shape for p in parameters.parameters(config) for key in p.keys}
    more = lambda keys: f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    if unknown := sorted(stored.keys() - expected.keys()):
        tensor = stored[unknown[0]]
        raise UserError(f"{tensor.file}: unknown key '{tensor.key}'{more(unknown)}; the model of config.json has none")
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{directory}: missing key '{missing[0]}'{more(missing)}; fetch the weights again")
    for key, shape in expected.items():
        if (tensor := stored[key]).shape != shape:
            got, want = list(tensor.shape), list(shape)
            raise UserError(f"{tensor.file}: '{tensor.key}' has shape {got}, config.json makes it {want}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read(directory, config: ModelConfig, dtype=None, shardings: dict | None = None) -> dict:
    """Reads a Hugging Face directory (one file or shards, either key layout) into the nested dictionary of the table.

    Args:
      directory: holds the safetensors; `config` is made from its `config.json`.
      dtype: dtype of all parameters; None keeps each parameter's own.
      shardings: nested dictionary of `NamedSharding` or `SingleDeviceSharding`; None puts all on the default device.

    Raises:
      UserError: what `stored_tensors` raises; layers of one stack stored in different dtypes while `dtype` is None.
    """
    stored = stored_tensors(directory, config)
    shardings = shardings or parameters.tree(config, lambda p: jnp.zeros(()).sharding)
    places = {p: sharding for p, sharding in parameters.leaves(config, shardings)}
    dtypes = {p: _dtype([stored[key] for key in p.keys], dtype) for p in places}
    values = {}
    for group in _groups(config):
        tensors = [[stored[p.keys[layer]] for p in group] for layer in range(group[0].layers or 1)]
        arrays = _read_group(group, tensors, tuple(dtypes[p] for p in group), tuple(places[p] for p in group))
        values |= dict(zip(group, arrays, strict=True))
    return parameters.tree(config, values.__getitem__)


def _groups(config: ModelConfig) -> list[tuple[Parameter, ...]]:
    """Parameters that are read and written together: the stacks of a tower, layer by layer; the others alone."""
    table = parameters.parameters(config)
    stacks = [tuple(p for p in table if p.layers and p.path[0] == tower) for tower in ("text", "vision")]
    return [(p,) for p in table if not p.layers] + stacks


def _dtype(tensors: list[StoredTensor], dtype) -> np.dtype:
    if dtype is not None:
        return jnp.dtype(dtype)
    for tensor in tensors:
        if tensor.dtype != tensors[0].dtype:
            problem = f"'{tensor.key}' is {tensor.dtype} while '{tensors[0].key}' is {tensors[0].dtype}"
            raise UserError(f"{tensor.file}: {problem}; layers stack in one: save them alike, or answer with --dtype")
    return tensors[0].dtype


def _read_group(group, tensors: list[list[StoredTensor]], dtypes, shardings) -> list[jax.Array]:
    """Reads the stacks of `group`, given the tensors of each layer; or one parameter outside the stacks."""
    layout = dict(group=group, dtypes=dtypes, shardings=shardings)
    if not group[0].layers:
        return jax.block_until_ready(_arrange(_stage(group, tensors[0], shardings), **layout))
    stacks = _zeros(**layout)
    for layer, of_layer in enumerate(tensors):
        staged = _stage(group, of_layer, shardings)
        jax.block_until_ready(stacks)  # the layer before is in place and its copy on the host is free again
        stacks = _set_layer(stacks, staged, layer, **layout)
    return jax.block_until_ready(stacks)


def _stage(group, tensors: list[StoredTensor], shardings) -> list[jax.Array]:
    """Stored tensors, reshaped to `split`, on the devices. Each process reads the parts of its own devices, once."""

    def stage(p: Parameter, tensor: StoredTensor, sharding: Sharding) -> jax.Array:
        parts: dict[str, np.ndarray] = {}  # JAX asks again for every device that holds the same part

        def part(index) -> np.ndarray:
            if str(index) not in parts:
                parts[str(index)] = tensor.read(p.split, index)
            return parts[str(index)]

        return jax.make_array_from_callback(p.split, sharding, part)

    return list(map(stage, group, tensors, map(_staging_sharding, group, shardings)))


def _staging_sharding(p: Parameter, sharding: Sharding) -> Sharding:
    """Where a stored tensor, reshaped to `p.split`, lies before it is transposed: `sharding`, axis by axis.

    An axis of ours that merges several stored ones, and the stack's own axis, are staged unsplit.
    """
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec, groups = [None] * len(p.split), iter(p.order)
    unsplit = (None,) * (len(p.axes) - len(sharding.spec))
    for names, place in zip(p.axes, (*sharding.spec, *unsplit), strict=True):
        if names == "L":
            continue
        merged = [next(groups) for _ in names]
        if len(merged) == 1:
            spec[merged[0]] = place
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@functools.partial(jax.jit, static_argnames=("group", "dtypes", "shardings"))
def _arrange(staged, *, group, dtypes, shardings):
    """Stored tensors, reshaped to `split` -> our layout, dtype and sharding."""
    arrays = [_moved(p.from_stored, x.astype(dtype)) for p, x, dtype in zip(group, staged, dtypes, strict=True)]
    return jax.lax.with_sharding_constraint(arrays, list(shardings))


@functools.partial(jax.jit, static_argnames=("group", "dtypes", "shardings"))
def _zeros(*, group, dtypes, shardings):
    """Empty stacks, each on its devices."""
    arrays = [jnp.zeros(p.shape, dtype) for p, dtype in zip(group, dtypes, strict=True)]
    return jax.lax.with_sharding_constraint(arrays, list(shardings))


@functools.partial(jax.jit, static_argnames=("group", "dtypes", "shardings"), donate_argnames="stacks")
def _set_layer(stacks, staged, layer, *, group, dtypes, shardings):
    """Sets one layer of every stack in place; the stacks' old buffers are given up."""

    def set_one(stack, p, x, dtype):
        move = lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, p.from_stored(x), layer, 0)
        return _moved(move, stack, x.astype(dtype))

    return jax.lax.with_sharding_constraint(list(map(set_one, stacks, group, staged, dtypes)), list(shardings))


def _moved(move, *arrays: jax.Array) -> jax.Array:
    """`move` of arrays of one dtype, whose elements it only puts elsewhere.

    On a CPU they are moved as integers: XLA there moves bfloat16 through float32, which alters NaNs and is slower. A
    TPU's compiler would lay copies of whole stacks aside for that.
    """
    as_integers = lambda *arrays: jax.lax.bitcast_convert_type(move(*map(_bits, arrays)), arrays[0].dtype)
    return jax.lax.platform_dependent(*arrays, cpu=as_integers, default=move)


# The barrier keeps the compiler from taking a bitcast there and one back for nothing.
def _bits(array: jax.Array) -> jax.Array:
    integers = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return jax.lax.optimization_barrier(integers)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write(directory, config: ModelConfig, params: dict, companions=None, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes a new Hugging Face directory: hub keys, every parameter's dtype kept, one tensor in host memory at a time.

    Args:
      directory: must not exist; it appears only when complete.
      params: nested dictionary of arrays that this process can address in full.
      companions: directory whose `config.json`, tokenizer and other companion files are copied along, if given.
      max_shard_bytes: most bytes of tensors per file; one tensor larger than that has a file to itself.

    Raises:
      UserError: `directory` exists or cannot be written.
    """
    with target.new_directory(directory) as partial:
        if companions is not None:
            target.copy_companions(companions, partial)
        write_weights(partial, config, params, max_shard_bytes)


def write_weights(directory: pathlib.Path, config: ModelConfig, params: dict, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes the safetensors files of `write` into an existing directory, and an index if there are several."""
    shards = _shards(_layout(config, params), max_shard_bytes)
    data = _stored_arrays(config, params)
    for name, layout in shards.items():
        write_file(directory / name, layout, itertools.islice(data, len(layout)))
    if len(shards) > 1:
        size = sum(_bytes(tensor) for layout in shards.values() for tensor in layout)
        weight_map = {key: name for name, layout in shards.items() for key, _, _ in layout}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _layout(config: ModelConfig, params: dict) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """Key, dtype and stored shape of every tensor, in the order of `_stored_arrays`."""
    dtypes = {p: array.dtype for p, array in parameters.leaves(config, params)}
    steps = ((p, layer) for group in _groups(config) for layer in range(group[0].layers or 1) for p in group)
    return [(p.keys[layer], dtypes[p], p.stored_shape) for p, layer in steps]


def _stored_arrays(config: ModelConfig, params: dict) -> Iterator[np.ndarray]:
    values = dict(parameters.leaves(config, params))
    for group in _groups(config):
        arrays = [values[p] for p in group]
        for layer in range(group[0].layers or 1):
            yield from map(np.asarray, _stored_layer(arrays, layer, group=group))


@functools.partial(jax.jit, static_argnames="group")
def _stored_layer(arrays, layer, *, group):
    """One layer of every stack in `group`, or the one parameter outside the stacks -> tensors as stored."""

    def stored(p, array):
        layer_of = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False) if p.layers else x
        return _moved(lambda x: p.to_stored(layer_of(x)), array)

    return list(map(stored, group, arrays))


def _shards(layout: list[tuple], max_shard_bytes: int) -> dict[str, list[tuple]]:
    """Cuts the layout into files, in order, each as full as it may be; file name -> its part."""
    shards, room = [], 0
    for tensor in layout:
        if not shards or _bytes(tensor) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= _bytes(tensor)
    if len(shards) == 1:
        return {_SINGLE: layout}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _bytes(tensor: tuple[str, np.dtype, tuple[int, ...]]) -> int:
    _, dtype, shape = tensor
    return math.prod(shape) * dtype.itemsize
