"""Opens a checkpoint directory as a model that can answer."""

import dataclasses
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adapttoken_jax import memory, sharding
from adapttoken_jax.config import ModelConfig, checkpoint_directory, read_model_config
from adapttoken_jax.errors import UserError
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.model.kernels import Kernel, resolve, resolve_vision
from adapttoken_jax.prompt import ChatTokenizer

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("auto", "xla")


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint in memory.

    Attributes:
      module: the Flax model, laid over `mesh`.
      config: its sizes.
      tokenizer: its chat tokenizer.
      path: the directory it came from.
      mesh: the device mesh; None for one device.
      attention: "auto", the kernels of the devices at hand; "xla", none.
    """

    module: Qwen25VL
    config: ModelConfig
    tokenizer: ChatTokenizer
    path: str
    mesh: Mesh | None = None
    attention: str = "auto"

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the embedding, in which the model computes."""
        return self.module.text.embedding.dtype

    @property
    def kernel(self) -> Kernel:
        """What computes the decoder's attention on the devices at hand."""
        return self._kernel(resolve, self.config.text.head_dim)

    @property
    def vision_kernel(self) -> Kernel:
        """The same of the vision tower."""
        return self._kernel(resolve_vision, self.config.vision.head_dim)

    def _kernel(self, resolver, head_dim: int) -> Kernel:
        return Kernel("xla", self.mesh) if self.attention == "xla" else resolver(self.dtype, head_dim, self.mesh)

    @property
    def wave(self) -> int:
        """Groups that run side by side: the size of the mesh's first axis, `data` or `fsdp`."""
        return 1 if self.mesh is None else self.mesh.shape[self.mesh.axis_names[0]]


@memory.explained(*memory.LOADING)
def load(path, mesh: Mesh | sharding.MeshShape | str | None = None, dtype=None, attention: str = "auto") -> Model:
    """Loads a Hugging Face directory or a converted checkpoint, each parameter straight to its place on the mesh.

    Args:
      path: the checkpoint's directory, or the name of a bundled model, "needle".
      mesh: a mesh with axes data or fsdp, [context,] model, its shape, or a text such as "data=4,model=2"; None for one
        device.
      dtype: float32, bfloat16 or float16; None is float32 on a CPU and the checkpoint's own type elsewhere.
      attention: "auto" uses an accelerator's attention kernels, "xla" none of them.

    Raises:
      UserError: a directory, file, key, type or mesh that cannot be used; the message names it.
    """
    from checkpoints_convert.load import load_parameters  # its readers are needed only here

    if attention not in ATTENTION:
        raise UserError(f"--attention={attention}: choose one of {', '.join(ATTENTION)}")
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"model: {path!r} is no path; give a checkpoint's directory")
    if isinstance(mesh, str):
        mesh = sharding.MeshShape.parse(mesh)
    path = checkpoint_directory(path)
    config = read_model_config(path)
    tokenizer = ChatTokenizer.from_directory(path)
    if isinstance(mesh, sharding.MeshShape):
        mesh = sharding.make_mesh(mesh)
    if not isinstance(mesh, Mesh | None):
        raise UserError(f'mesh: {mesh!r} is no mesh; write one as a text, such as "data=4,model=2"')
    if mesh is not None:
        sharding.check_mesh(config, mesh)
    values = load_parameters(path, config, dtype=_dtype(dtype), mesh=mesh)
    # A program computes in one type. Some checkpoints keep norms and biases in a wider one.
    values = jax.tree.map(lambda x: x.astype(values["text"]["embedding"].dtype), values)
    return Model(Qwen25VL(config, values), config, tokenizer, str(path), mesh, attention)


def _dtype(dtype):
    if dtype is None:
        return jnp.float32 if jax.default_backend() == "cpu" else None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise UserError(f"--dtype={name}: choose one of {', '.join(DTYPES)}")
    return jnp.dtype(name)
