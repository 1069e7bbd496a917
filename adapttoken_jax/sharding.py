"""The mesh and the rules that lay parameters and activations over it.

The mesh has two axes. `data` holds different groups of the video, `model` splits every layer of the decoder: attention
by heads, the feed-forward blocks by F, embedding and head by V. Weights are replicated over `data`. The vision tower is
small and its slots are independent: every device holds all of it and encodes slots of its own.
"""

import dataclasses
import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adapttoken_jax import parameters
from adapttoken_jax.config import ModelConfig
from adapttoken_jax.errors import UserError

AXES = ("data", "model")

# Logical axes that `model` splits where it divides them. An axis that it does not divide is replicated; heads (N) must
# divide, because replicated attention would save nothing.
_SPLIT = frozenset("NKFV")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Requested mesh: `--mesh data=4,model=2`."""

    data: int = 1
    model: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """Reads "data=4,model=2"; a missing axis is 1.

        Raises:
          UserError: anything else.
        """
        sizes = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if name not in AXES or name in sizes or not number.isdigit() or int(number) < 1:
                raise UserError(f"--mesh={text}: write data=N,model=N with positive numbers")
            sizes[name] = int(number)
        return cls(**sizes)


def make_mesh(shape: MeshShape, devices=None) -> Mesh:
    """A (data, model) mesh over the first data x model devices, by default those of all processes.

    Raises:
      UserError: more devices asked for than there are, or some left over where the processes of a run share them.
    """
    shared = devices is None and jax.process_count() > 1
    devices = jax.devices() if devices is None else devices
    need, asked = shape.data * shape.model, f"--mesh=data={shape.data},model={shape.model}"
    if need > len(devices):
        raise UserError(f"{asked}: needs {need} devices, {len(devices)} available")
    if shared and need < len(devices):
        owners = f"{jax.process_count()} processes"
        raise UserError(f"{asked}: takes {need} of the {len(devices)} devices of {owners}; their product must be all")
    # An axis of the mesh need not be a whole axis of a TPU's torus: data=2,model=8 on 4x4 splits one of its axes.
    places = create_device_mesh((shape.data, shape.model), devices[:need], allow_split_physical_axes=True)
    return Mesh(places, AXES, (AxisType.Auto,) * 2)


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError unless `model` divides the decoder's attention heads."""
    model, heads = mesh.shape["model"], config.text.heads
    if heads % model:
        raise UserError(f"--mesh: model={model} does not divide the {heads} attention heads")


def parameter_spec(parameter: parameters.Parameter, mesh: Mesh) -> PartitionSpec:
    """How a parameter lies on the mesh; the decoder's by its first axis that the rules split and `model` divides."""
    model, spec = mesh.shape["model"], [None] * len(parameter.shape)
    if parameter.path[0] == "vision":
        return PartitionSpec(*spec)
    for position, (axis, size) in enumerate(zip(parameter.axes, parameter.shape, strict=True)):
        if axis in _SPLIT and size % model == 0:
            spec[position] = "model"
            break
    return PartitionSpec(*spec)


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """Nested dictionary of `NamedSharding`, one per parameter."""
    check_mesh(config, mesh)
    return parameters.tree(config, lambda p: NamedSharding(mesh, parameter_spec(p, mesh)))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis over `data`, the rest replicated: the groups of a wave."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def slot_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices: the slots of an encoded chunk."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


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


def own_rows(mesh: Mesh | None, rows: int) -> np.ndarray:
    """Which of `rows` entries split by `slot_sharding` lie on devices of this process: bool[rows]."""
    own = np.zeros(rows, bool)
    if mesh is None or not mesh.is_multi_process:
        return ~own
    for index in slot_sharding(mesh).addressable_devices_indices_map((rows,)).values():
        own[index] = True
    return own


def everywhere(tree, mesh: Mesh | None):
    """Device arrays as every process can read them: whole, on each of its devices."""
    return tree if mesh is None or not mesh.is_multi_process else _gather(mesh)(tree)


@functools.lru_cache
def _gather(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def agreed(flag: bool, mesh: Mesh | None) -> bool:
    """What process 0 says, on every process of the mesh."""
    if mesh is None or not mesh.is_multi_process:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))
