"""Measures the host memory that loading a checkpoint takes, on a generated checkpoint of a believable shape.

    python -m experiments.load_memory --text_layers=8

Writes random bfloat16 weights in the shapes of Qwen2.5-VL-3B with fewer text layers (8 make 3.1 GB), loads them in a
fresh process per format, and prints what that process held at its peak, at its end, and the bound: beyond the arrays
themselves, which lie in host memory on a CPU, less than twice the largest parameter plus 1 GiB. Exit status 1 when a
format is over it. Linux only (`/proc/self/status`). The generated files are removed at the end.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from absl import flags

from adapttoken_jax import parameters
from adapttoken_jax.config import SIZES, ModelConfig, read_model_config
from adapttoken_jax.needle.export import write_companions
from adapttoken_jax.result import made_directory
from checkpoints_convert import convert, huggingface, load
from experiments import command

_TEXT_LAYERS = flags.DEFINE_integer("text_layers", 8, "Text layers of the generated checkpoint.", lower_bound=1)
_SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 10**9, "Most bytes per generated safetensors file.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the generated files go for a while; default: the system's.")
_ORBAX = flags.DEFINE_bool("orbax", True, "Measure the checkpoint converted to Orbax too.")
_LOAD = flags.DEFINE_string("load", None, "Only load this directory and print the figures as JSON (the child process).")


def generated_config(text_layers: int) -> ModelConfig:
    """Qwen2.5-VL-3B with another number of text layers."""
    config = SIZES["qwen2.5-vl-3b"]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=text_layers))


def generate(workdir: pathlib.Path, text_layers: int, shard_bytes: int) -> pathlib.Path:
    """Writes the random checkpoint and returns its directory."""
    config = generated_config(text_layers)
    companions, directory = workdir / "companions", workdir / "huggingface"
    companions.mkdir()
    write_companions(companions, config)
    params = jax.jit(parameters.initialise, static_argnums=(0, 2))(config, jax.random.key(0), jnp.bfloat16)
    huggingface.write(directory, config, params, companions=companions, max_shard_bytes=shard_bytes)
    return directory


def _status(field: str) -> int:
    """A size in bytes from the kernel's record of this process. `ru_maxrss` would include the parent's peak."""
    text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def load_and_measure(directory: str) -> dict[str, int]:
    """Loads a checkpoint in this process; bytes before, at the peak, at the end, of all arrays, of the largest."""
    config = read_model_config(directory)
    jnp.zeros(()).block_until_ready()  # the backend's own memory is not the loader's
    before = _status("VmRSS")
    params = jax.block_until_ready(load.load_parameters(directory, config))
    sizes = [array.nbytes for array in jax.tree.leaves(params)]
    end = {"before": before, "peak": _status("VmHWM"), "final": _status("VmRSS")}
    return end | {"arrays": sum(sizes), "largest": max(sizes)}


def measure(directory: pathlib.Path) -> dict[str, int]:
    """`load_and_measure` in a fresh process."""
    line = [sys.executable, "-m", "experiments.load_memory", f"--load={directory}"]
    done = subprocess.run(line, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return json.loads(done.stdout)


def report(name: str, figures: dict[str, int]) -> bool:
    """Prints one format's figures; True when the peak is within the bound."""
    above, bound = figures["peak"] - figures["arrays"], 2 * figures["largest"] + 2**30
    gb = {key: f"{value / 1e9:.2f} GB" for key, value in (figures | {"above": above, "bound": bound}).items()}
    print(f"{name}: arrays {gb['arrays']}, largest parameter {gb['largest']}")
    print(f"  resident: before {gb['before']}, peak {gb['peak']}, final {gb['final']}")
    print(f"  peak beyond the arrays {gb['above']}, bound {gb['bound']}: {'within' if above < bound else 'OVER'}")
    return above < bound


def run() -> int:
    """The whole run; status 1 where a peak is over the bound."""
    if _LOAD.value:
        print(json.dumps(load_and_measure(_LOAD.value)))
        return 0
    place = made_directory("workdir", _WORKDIR.value) if _WORKDIR.value else None
    with tempfile.TemporaryDirectory(dir=place, prefix="load_memory.") as workdir:
        source = generate(pathlib.Path(workdir), _TEXT_LAYERS.value, _SHARD_BYTES.value)
        good = report("safetensors", measure(source))
        if _ORBAX.value:
            converted = pathlib.Path(workdir) / "converted"
            convert.convert(source, converted)
            good &= report("orbax", measure(converted))
    return 0 if good else 1


if __name__ == "__main__":
    command.start("load_memory", run)
