"""`experiments.load_memory`: a checkpoint that a user could open, loaded as a user does."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

import adapttoken_jax as at
from adapttoken_jax.config import read_model_config
from adapttoken_jax.prompt import ChatTokenizer
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
# In a process of its own: experiments that define a flag of one name cannot be imported together.
COMPANIONS = """
import pathlib, sys
from experiments import load_memory
load_memory.write_companions(pathlib.Path(sys.argv[1]), load_memory.generated_config(3))
"""


def python(*argv) -> str:
    return subprocess.run(
        [sys.executable, *map(str, argv)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ).stdout


def test_the_generated_tokenizer_and_config_agree(tmp_path):
    python("-c", COMPANIONS, tmp_path)
    config, tokenizer = read_model_config(tmp_path), ChatTokenizer.from_directory(tmp_path)  # which refuses other ids
    assert (tokenizer.vision_start, tokenizer.video_pad) == (config.vision_start, config.video_pad)
    assert (config.text.layers, config.text.vocab) == (3, 151936)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_measured_is_a_users_load(tmp_path, dtype):
    directory = tiny.write_checkpoint(tmp_path, tiny.SHAPES["base"], dtype="bfloat16")
    argv = [f"--dtype={dtype}"] if dtype else []
    figures = json.loads(python("-m", "experiments.load_memory", f"--load={directory}", *argv))
    sizes = [array.nbytes for array in jax.tree.leaves(at.load(directory, dtype=dtype).module)]
    assert figures["dtype"] == (dtype or "float32")
    assert (figures["arrays"], figures["largest"]) == (sum(sizes), max(sizes))
    assert figures["before"] < figures["final"] <= figures["peak"]
