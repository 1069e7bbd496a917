"""Orbax checkpoints: the parameters as we hold them, under `orbax/` of a directory that also has the companions.

config.json, tokenizer.json, …   copied from the source, byte for byte
orbax/                           the nested dictionary of the parameter table, each array in its own dtype
provenance.json                  where the weights come from
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from adapttoken_jax import parameters
from adapttoken_jax.config import ModelConfig
from adapttoken_jax.errors import UserError
from checkpoints_convert.load import ORBAX_DIRECTORY

# Arrays are cut into pieces of at most this many bytes on disk, so that a process that needs one device's part of a
# large stack does not fetch and hold all of it.
_CHUNK_BYTES = 1 << 26


def write_weights(directory: pathlib.Path, config: ModelConfig, params: dict) -> None:
    """Writes the parameters under `orbax/` of an existing directory; an interruption waits for its end.

    Raises:
      OSError: too little space on the disk.
    """
    chunks = parameters.tree(config, lambda p: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
    sizes = [array.nbytes for array in jax.tree.leaves(params)]
    if sum(sizes) > shutil.disk_usage(directory).free:  # Orbax fails late, in many threads with a message each
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place, content = directory.absolute() / ORBAX_DIRECTORY, ocp.args.PyTreeSave(params, chunks)
    # In a thread, so that a signal is heard only when Orbax has ended: its own threads would write on.
    with _checkpointer(max(sizes)) as checkpointer, concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(checkpointer.save, place, args=content).result()
    # Orbax puts the absolute path it wrote to into its marker of success; only the marker's presence means anything.
    marker = directory / ORBAX_DIRECTORY / "commit_success.txt"
    if marker.exists():
        marker.write_text("Complete.\n", encoding="utf-8")


def read(directory, config: ModelConfig, dtype=None, shardings: dict | None = None) -> dict:
    """Reads the Orbax checkpoint of a converted directory into the nested dictionary of the table.

    Args:
      directory: the converted directory; `config` is made from its `config.json`.
      dtype: dtype of all parameters; None keeps each parameter's own.
      shardings: nested dictionary of shardings; None puts all on the default device.

    Raises:
      UserError: an incomplete or damaged checkpoint; an unknown, missing or misshapen parameter.
    """
    path = pathlib.Path(directory).absolute() / ORBAX_DIRECTORY
    stored = _stored_dtypes(path, config)
    shardings = shardings or parameters.tree(config, lambda p: jnp.zeros(()).sharding)
    places = dict(parameters.leaves(config, shardings))
    wanted = {p: np.dtype(dtype or stored_dtype) for p, stored_dtype in stored.items()}
    abstract = parameters.tree(config, lambda p: jax.ShapeDtypeStruct(p.shape, wanted[p], sharding=places[p]))
    restore = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
    # Orbax counts a parameter in the type in which it arrives.
    largest = max(math.prod(p.shape) * max(stored[p].itemsize, wanted[p].itemsize) for p in stored)
    with _checkpointer(largest) as checkpointer, _damage_reported(path):
        return checkpointer.restore(path, args=restore)


@contextlib.contextmanager
def _damage_reported(path: pathlib.Path) -> Iterator[None]:
    """Turns any failure to read into a UserError: Orbax raises plain `Exception` for a damaged file, among others.

    What it logs of it meanwhile, and what its abandoned reads would print, is left out.
    """
    log, silent = logging.getLogger("absl"), lambda record: False
    log.addFilter(silent)
    make, asyncio.new_event_loop = asyncio.new_event_loop, _QuietLoop
    try:
        yield
    except jax.errors.JaxRuntimeError:  # the devices' failure, such as too little memory, not the checkpoint's
        raise
    except Exception as error:
        raise UserError(f"{path}: incomplete or damaged; convert the source again") from error
    finally:
        asyncio.new_event_loop = make
        log.removeFilter(silent)


class _QuietLoop(asyncio.SelectorEventLoop):
    """An event loop for Orbax, which closes it when one of its reads fails and abandons the others."""

    def close(self):
        """Ends them first: later, when they are collected, each would print a traceback."""
        if abandoned := asyncio.all_tasks(self):
            for task in abandoned:
                task.cancel()
            self.run_until_complete(asyncio.gather(*abandoned, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(self, *args, **kwargs):
        with contextlib.suppress(RuntimeError):  # the loop is closed, and TensorStore's threads still call it
            return super().call_soon_threadsafe(*args, **kwargs)


def _checkpointer(largest: int) -> ocp.Checkpointer:
    """A checkpointer that holds about one parameter in host memory besides the arrays themselves.

    `largest` is the size of the largest parameter in bytes: Orbax refuses a limit that is not above it.
    """
    limit = int(largest) // 10**9 + 1
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=limit, save_device_host_concurrent_gb=limit, restore_concurrent_gb=limit
        )
    )


def _stored_dtypes(path: pathlib.Path, config: ModelConfig) -> dict[parameters.Parameter, np.dtype]:
    """Reads the checkpoint's own list of arrays and holds it against the table."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, _damage_reported(path):
        metadata = checkpointer.metadata(path).item_metadata
    if metadata is None:
        raise UserError(f"{path}: not an Orbax checkpoint, or one that lost its metadata; convert it again")
    stored = traverse_util.flatten_dict(metadata.tree, sep=".")
    expected = {".".join(p.path): p for p in parameters.parameters(config)}
    if unknown := sorted(stored.keys() - expected.keys()):
        raise UserError(f"{path}: unknown parameter '{unknown[0]}'; the model of config.json has none")
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{path}: missing parameter '{missing[0]}'; convert the checkpoint again")
    for name, p in expected.items():
        if tuple(stored[name].shape) != p.shape:
            got, want = list(stored[name].shape), list(p.shape)
            raise UserError(f"{path}: '{name}' has shape {got}, now wanted is {want}; convert the source again")
    return {p: np.dtype(stored[name].dtype) for name, p in expected.items()}
