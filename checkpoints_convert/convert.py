"""Hugging Face safetensors <-> Orbax, every bit kept."""

import pathlib

import jax

from adapttoken_jax.config import checkpoint_directory, read_model_config
from adapttoken_jax.errors import UserError
from checkpoints_convert import huggingface, load, orbax_checkpoint, target

FORMATS = ("orbax", "huggingface")


def convert(source, target_directory, to: str = "orbax") -> None:
    """Converts the checkpoint `source`, a directory or a bundled model, into the new directory `target_directory`.

    The companion files are copied byte for byte, every parameter keeps its dtype and its bits, and `provenance.json`
    records the source's files by SHA-256. `lm_head.weight` of a tied checkpoint, a copy of the embedding, is dropped.
    One process does it, with the whole model in the memory of its default device (or the host's, on a CPU).

    Raises:
      UserError: a source that cannot be read, is already of format `to`, or stacks layers of different dtypes; a
        target that exists or cannot be written. Nothing is left at the target then, nor after an interruption.
    """
    source = checkpoint_directory(source)
    if to not in FORMATS:
        raise UserError(f"--to={to}: choose one of {', '.join(FORMATS)}")
    config = read_model_config(source)
    if load.checkpoint_format(source) == to:
        raise UserError(f"{source}: has the format {to} already; choose the other format with --to")
    with target.new_directory(target_directory) as partial:
        params = load.load_parameters(source, config)
        writer = orbax_checkpoint if to == "orbax" else huggingface
        writer.write_weights(partial, config, params)
        target.copy_companions(source, partial)
        dtypes = {str(array.dtype) for array in jax.tree.leaves(params)}
        target.write_provenance(partial, source, _weight_files(source), dtypes)


def _weight_files(source: pathlib.Path) -> list[pathlib.Path]:
    if load.checkpoint_format(source) == "huggingface":
        return huggingface.weight_files(source)
    return sorted(path for path in (source / load.ORBAX_DIRECTORY).rglob("*") if path.is_file())
