"""Measures the host memory that `at.load` takes, on a generated checkpoint of a believable shape.

    python -m experiments.load_memory --text_layers=8

Writes random bfloat16 weights in the shapes of Qwen2.5-VL-3B with fewer text layers (8 make 3.2 GB). Loads them as
safetensors and converted to Orbax, each in the types of `_DTYPES`, every time in a fresh process, and prints what that
process held at its peak, at its end, and the bound: beyond the arrays themselves, which lie in host memory on a CPU,
less than twice the largest parameter plus 1 GiB. Exit status 1 when a peak is over it. Linux only
(`/proc/self/status`). The generated files are removed at the end.
"""

import dataclasses
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
from absl import flags

import adapttoken_jax as at
from adapttoken_jax import parameters
from adapttoken_jax.config import SIZES, ModelConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle.export import write_companions
from adapttoken_jax.needle.tokenizer import make_tokenizer
from adapttoken_jax.result import made_directory
from checkpoints_convert import convert, huggingface
from experiments import command

_TEXT_LAYERS = flags.DEFINE_integer("text_layers", 8, "Text layers of the generated checkpoint.", lower_bound=1)
_SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 10**9, "Most bytes per generated safetensors file.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the generated files go for a while; default: the system's.")
_ORBAX = flags.DEFINE_bool("orbax", True, "Measure the checkpoint converted to Orbax too.")
_LOAD = flags.DEFINE_string("load", None, "Only load this directory and print the figures as JSON (the child process).")
_DTYPE = flags.DEFINE_string("dtype", None, "With --load: the type to load in; default: that of at.load.")

_DTYPES = (None, "bfloat16")  # a user's default, which is float32 on a CPU, and the type on disk


def generated_config(text_layers: int) -> ModelConfig:
    """Qwen2.5-VL-3B with another number of text layers and the control tokens of the needle's tokenizer."""
    config, tokenizer = SIZES["qwen2.5-vl-3b"], make_tokenizer()
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in names}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=text_layers), **ids)


def generate(workdir: pathlib.Path, text_layers: int, shard_bytes: int) -> pathlib.Path:
    """Writes the random checkpoint and returns its directory."""
    config = generated_config(text_layers)
    companions, directory = workdir / "companions", workdir / "huggingface"
    companions.mkdir()
    write_companions(companions, config)
    params = jax.jit(parameters.initialise, static_argnums=(0, 2))(config, jax.random.key(0), jnp.bfloat16)
    huggingface.write(directory, config, params, companions=companions, max_shard_bytes=shard_bytes)
    return directory


def load_and_measure(directory: str, dtype: str | None) -> dict:
    """Loads a checkpoint in this process. Bytes before, at the peak, at the end; of all arrays, the largest; dtype."""
    load = at.load  # its modules are imported here
    jnp.zeros(()).block_until_ready()  # the backend's own memory is not the loader's
    before = command.resident("VmRSS")
    model = load(directory, dtype=dtype)
    sizes = [array.nbytes for array in jax.block_until_ready(jax.tree.leaves(model.module))]
    end = {"before": before, "peak": command.resident("VmHWM"), "final": command.resident("VmRSS")}
    return end | {"arrays": sum(sizes), "largest": max(sizes), "dtype": model.dtype.name}


def measure(directory: pathlib.Path, dtype: str | None) -> dict:
    """`load_and_measure` in a fresh process."""
    return command.in_fresh_process("load_memory", f"--load={directory}", *([f"--dtype={dtype}"] if dtype else []))


def report(name: str, figures: dict) -> bool:
    """Prints the figures of one load; True when the peak is within the bound."""
    above, bound = figures["peak"] - figures["arrays"], 2 * figures["largest"] + 2**30
    sizes = {key: value for key, value in figures.items() if key != "dtype"} | {"above": above, "bound": bound}
    gb = {key: f"{value / 1e9:.2f} GB" for key, value in sizes.items()}
    print(f"{name} as {figures['dtype']}: arrays {gb['arrays']}, largest parameter {gb['largest']}")
    print(f"  resident: before {gb['before']}, peak {gb['peak']}, final {gb['final']}")
    print(f"  peak beyond the arrays {gb['above']}, bound {gb['bound']}: {'within' if above < bound else 'OVER'}")
    return above < bound


def run() -> int:
    """The whole run; status 1 where a peak is over the bound."""
    if _LOAD.value:
        print(json.dumps(load_and_measure(_LOAD.value, _DTYPE.value)))
        return 0
    if _DTYPE.value:
        raise UserError("--dtype: goes with --load alone; a whole run takes every type in turn")
    place = made_directory("workdir", _WORKDIR.value) if _WORKDIR.value else None
    with tempfile.TemporaryDirectory(dir=place, prefix="load_memory.") as workdir:
        source = generate(pathlib.Path(workdir), _TEXT_LAYERS.value, _SHARD_BYTES.value)
        good = [report("safetensors", measure(source, dtype)) for dtype in _DTYPES]
        if _ORBAX.value:
            converted = pathlib.Path(workdir) / "converted"
            convert.convert(source, converted)
            good += [report("orbax", measure(converted, dtype)) for dtype in _DTYPES]
    return 0 if all(good) else 1


if __name__ == "__main__":
    command.start("load_memory", run)
