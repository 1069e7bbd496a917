"""Parameters from a directory of either format, straight to their places on a mesh."""

import pathlib

from jax.sharding import Mesh

from adapttoken_jax import sharding
from adapttoken_jax.config import ModelConfig
from adapttoken_jax.errors import UserError
from checkpoints_convert import huggingface

ORBAX_DIRECTORY = "orbax"


def checkpoint_format(directory) -> str:
    """ "orbax" for a directory with an `orbax` subdirectory, else "huggingface".

    Raises:
      UserError: no such directory, or one that holds weights in both formats.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such model directory")
    if not (directory / ORBAX_DIRECTORY).is_dir():
        return "huggingface"
    if any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: holds both {ORBAX_DIRECTORY}/ and *.safetensors; remove one of the two")
    return "orbax"


def load_parameters(directory, config: ModelConfig, dtype=None, mesh: Mesh | None = None) -> dict:
    """Reads all parameters of a Hugging Face directory or a converted checkpoint.

    Args:
      directory: the checkpoint; `config` is made from its `config.json`.
      dtype: dtype of all parameters; None keeps each parameter's own.
      mesh: over which the rules of `sharding` lay the parameters; None is the default device.

    Returns:
      The nested dictionary of the parameter table, of `jax.Array`.

    Raises:
      UserError: what is wrong with the checkpoint, or a mesh that does not divide the heads.
    """
    shardings = None if mesh is None else sharding.parameter_shardings(config, mesh)
    if checkpoint_format(directory) == "huggingface":
        return huggingface.read(directory, config, dtype, shardings)
    from checkpoints_convert import orbax_checkpoint  # costs most of a second, which safetensors need not pay

    return orbax_checkpoint.read(directory, config, dtype, shardings)
