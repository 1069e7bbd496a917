"""The mesh and the rules that lay parameters and activations over it.

The mesh has two axes. `data` holds different groups of the video, `model` splits every layer of the decoder: attention
by heads, the feed-forward blocks by F, embedding and head by V. Weights are replicated over `data`. The vision tower is
small and its slots are independent: every device holds all of it and encodes slots of its own.

Where there are more devices than groups, an axis `context` between the two holds pieces of each group's rows, and the
final prompt's, which without it lie on `data` (`model/pieces.py`). Weights are replicated over it. The few rows of an
answer are on all places of a context: each multiplies them with a part of the weights of its own (`parted`).

Where the weights of a decoder leave too little room, the first axis may be `fsdp` in place of `data`: it holds groups
as `data` does, and the decoder's kernels are split over it as well. Whichever is smaller then travels. A context with
its questions is long: every layer's weights are gathered for it (`gathered`), and dropped again. The tokens of answers
are few: all devices share their rows (`shared_rows`) and multiply them with their own parts of the weights; only
attention goes back to where the context lies (`split_rows`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adapttoken_jax import parameters, torus
from adapttoken_jax.config import ModelConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.geometry import LANES

_CONTEXTS = ("data", "fsdp")
_AXES = (*_CONTEXTS, "context", "model")

# Logical axes that `model` splits where it divides them. An axis that it does not divide is replicated; heads (N) must
# divide, because replicated attention would save nothing.
_SPLIT = frozenset("NKFV")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Requested mesh: `--mesh data=4,model=2`, or `--mesh fsdp=8` with weights split over the first axis too."""

    data: int = 1
    model: int = 1
    fsdp: bool = False
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Reads "data=4,model=2", "fsdp=4,model=2" or "data=4,context=2,model=2"; a missing axis is 1.

        Raises:
          UserError: anything else.
        """
        sizes = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if name not in _AXES or name in sizes or not number.isdecimal() or int(number) < 1:
                raise UserError(
                    f"--mesh={text}: write data=N,model=N or fsdp=N,model=N with positive numbers; context=N may join"
                )
            sizes[name] = int(number)
        if sizes.keys() >= {"data", "fsdp"}:
            raise UserError(f"--mesh={text}: the first axis is either data or fsdp, which holds groups as data does")
        first = sizes.get("fsdp", sizes.get("data", 1))
        return cls(first, sizes.get("model", 1), "fsdp" in sizes, sizes.get("context", 1))

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh's axes and their sizes."""
        cut = {"context": self.context} if self.context > 1 else {}
        return {_CONTEXTS[self.fsdp]: self.data, **cut, "model": self.model}

    @property
    def devices(self) -> int:
        """How many it takes."""
        return math.prod(self.sizes.values())

    @property
    def abstract(self) -> AbstractMesh:
        """The mesh without devices, for shapes and places."""
        return AbstractMesh(tuple(self.sizes.values()), tuple(self.sizes))

    def __str__(self):
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items())


def make_mesh(shape: MeshShape, devices=None) -> Mesh:
    """A mesh of these axes over as many devices as it takes, by default the first of those of all processes.

    Raises:
      UserError: more devices asked for than there are, or some left over where the processes of a run share them.
    """
    shared = devices is None and jax.process_count() > 1
    devices = jax.devices() if devices is None else devices
    need, asked = shape.devices, f"--mesh={shape}"
    if need > len(devices):
        raise UserError(f"{asked}: needs {need} devices, {len(devices)} available")
    if shared and need < len(devices):
        owners = f"{jax.process_count()} processes"
        raise UserError(f"{asked}: takes {need} of the {len(devices)} devices of {owners}; their product must be all")
    sizes = tuple(shape.sizes.values())
    return Mesh(_placed(sizes, devices[:need]), tuple(shape.sizes), (AxisType.Auto,) * len(sizes))


def _placed(sizes: tuple[int, ...], devices) -> np.ndarray:
    """Devices at the places of a mesh; chips of a TPU slice as `torus.places` says."""
    if devices[0].platform == "tpu":
        order = torus.places(sizes, np.array([device.coords for device in devices]))
        if order is not None:
            return np.array(devices)[order]
    return create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError unless the axes are ours and `model` divides the decoder's attention heads."""
    first, *cut, last = mesh.axis_names
    if first not in _CONTEXTS or cut not in ([], ["context"]) or last != "model":
        raise UserError(f"--mesh: its axes are {mesh.axis_names}; make one with data or fsdp, [context,] model")
    model, heads = mesh.shape["model"], config.text.heads
    if heads % model:
        raise UserError(f"--mesh: model={model} does not divide the {heads} attention heads")


def parameter_spec(parameter: parameters.Parameter, mesh: Mesh) -> PartitionSpec:
    """How a parameter lies on the mesh: the vision tower's everywhere, the decoder's as the rules say."""
    if parameter.path[0] == "vision":
        return PartitionSpec(*[None] * len(parameter.shape))
    return _split(parameter.axes, parameter.shape, mesh.shape)


def _split(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mapping[str, int], further=("fsdp",)) -> PartitionSpec:
    """`model` splits the first of `_SPLIT` that it divides; `further`, of a kernel and where there, that one or D."""
    spec = {axis: () for axis in axes}

    def split(names, candidates):
        for axis, size in zip(axes, shape, strict=True):
            parts = math.prod(mesh[each] for each in (*spec[axis], *names))
            if axis in candidates and size % parts == 0:
                spec[axis] += names
                return True
        return False

    split(("model",), _SPLIT)
    if (further := tuple(axis for axis in further if axis in mesh)) and {"D"} < {*axes} - {"L"}:
        split(further, {axis for axis in axes if spec[axis]}) or split(further, {"D"})
    return PartitionSpec(*(names or None for names in spec.values()))


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """Nested dictionary of `NamedSharding`, one per parameter."""
    check_mesh(config, mesh)
    return parameters.tree(config, lambda p: NamedSharding(mesh, parameter_spec(p, mesh)))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis over `data` or `fsdp`, the rest replicated: the groups of a wave."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]))


def batch_axes(mesh: Mesh, batch: int) -> tuple[str, ...]:
    """Axes of the mesh that split so many contexts, or pieces of contexts."""
    places = mesh.axis_names[:-1]
    fitting = (axes for axes in (places, places[:1]) if batch % math.prod(mesh.shape[axis] for axis in axes) == 0)
    return next(fitting, ())


def slot_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices: the slots of an encoded chunk."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


# ---------------------------------------------------------------------------------------------------------------------
# Where weights and rows lie inside a program; those that speak of `fsdp` change nothing on any other mesh
# ---------------------------------------------------------------------------------------------------------------------


def parted(layer, mesh: Mesh | None, places: tuple[str, ...]):
    """A layer of the decoder of which each of these places takes a part; nothing travels for it.

    For rows that all of them have, so that without this each would read all weights and do what the others do. With an
    axis `fsdp` weights stay as they are, in parts.
    """
    return layer if not places or "fsdp" in mesh.shape else _laid_out(layer, mesh, places)


def gathers(mesh: Mesh | None, contexts: int = 0) -> bool:
    """Whether the mesh has an axis `fsdp`, on whose places so many contexts can lie."""
    return mesh is not None and "fsdp" in mesh.shape and contexts % mesh.shape["fsdp"] == 0


def gathered(layer, mesh: Mesh | None, contexts: int):
    """A layer of the decoder with its weights whole on every place of `fsdp`, for contexts that lie there."""
    if not gathers(mesh, contexts):
        return layer

    # Each gathered once for all that use it: a TPU's compiler would gather some a second time.
    return jax.tree.map(jax.lax.optimization_barrier, _laid_out(layer, mesh))


def lies_turned(shape: tuple[int, int, int], mesh: Mesh | None) -> bool:
    """Whether a TPU keeps a place's part of kernels [L, D, F] with D last, which needs less padding."""
    if mesh is None:
        return False
    _, D, F = NamedSharding(mesh, _split(("L", "D", "F"), shape, mesh.shape)).shard_shape(shape)
    return F % LANES > 0 and D % LANES == 0


def _laid_out(layer, mesh: Mesh, further: tuple[str, ...] = ()):
    """A layer of the decoder with its weights split over `model` and these axes alone."""

    def lay(path, array):
        spec = _split(layer.axes(path[0].name), array.shape, mesh.shape, further)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(lay, layer)


def split_rows(tree, mesh: Mesh | None):
    """Arrays [B, ...] with every batch entry where its context lies."""
    return jax.tree.map(lambda x: _rows(x, mesh, split=True), tree)


def shared_rows(tree, mesh: Mesh | None):
    """Arrays [B, ...] with all batch entries on every place of `fsdp`."""
    return jax.tree.map(lambda x: _rows(x, mesh, split=False), tree)


def _rows(x: jax.Array, mesh: Mesh | None, split: bool) -> jax.Array:
    if not gathers(mesh, len(x)):
        return x
    spec = PartitionSpec(batch_axes(mesh, len(x)) if split else None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays of a mesh that spans several processes; on any other mesh these are what JAX does by itself
# ---------------------------------------------------------------------------------------------------------------------


def place(tree, where: NamedSharding):
    """Host arrays, the same on every process, as device arrays. A process hands over only what its devices hold."""
    if where.is_fully_addressable:
        return jax.device_put(tree, where)
    return jax.tree.map(lambda array: _place(array, where), tree)


def _place(array, where: NamedSharding) -> jax.Array:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(array), where))
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)


def own_rows(mesh: Mesh | None, rows: int, split: Callable[[Mesh], NamedSharding]) -> np.ndarray:
    """Which of `rows` entries lie on devices of this process, by `slot_sharding` or `batch_sharding`: bool[rows]."""
    own = np.zeros(rows, bool)
    if mesh is None or not mesh.is_multi_process:
        return ~own
    for index in split(mesh).addressable_devices_indices_map((rows,)).values():
        own[index] = True
    return own


def everywhere(tree, mesh: Mesh | None):
    """Device arrays as every process can read them: whole, on each of its devices."""
    return tree if mesh is None or not mesh.is_multi_process else _gather(mesh)(tree)


def parts(array: jax.Array) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """A device array piece by piece, as the devices hold it: index and NumPy array of each.

    `np.asarray` would put the pieces together, a copy more. An array that processes share must be `everywhere`.
    """
    shards = {str(shard.index): shard for shard in array.addressable_shards}  # of equal ones, one
    for shard in shards.values():
        yield shard.index, np.asarray(shard.data)


@functools.lru_cache
def _gather(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def agreed(flag: bool, mesh: Mesh | None) -> bool:
    """What process 0 says, on every process of the mesh."""
    if mesh is None or not mesh.is_multi_process:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))
