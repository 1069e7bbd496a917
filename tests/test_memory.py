"""Running out of memory for real: arrays of 256 TiB, more than a process can address."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import cli, encoding, memory
from checkpoints_convert import load
from tests import media, tiny

NUMBERS = 2**46


def too_much():
    return jnp.zeros(NUMBERS, jnp.float32).block_until_ready()


@pytest.mark.parametrize("allocate", [too_much, lambda: np.ones(NUMBERS, np.float32)])
def test_what_the_runtime_refuses_is_one_line(allocate):
    with pytest.raises(at.UserError) as raised, memory.explained("a test", "ask for less"):
        allocate()
    told = re.fullmatch(
        r"--mesh: too little memory for a test, ([\d.]+) GiB more are needed; ask for less", str(raised.value)
    )
    # What is free here is somewhere between nothing and a terabyte.
    assert told and 2**18 - 1024 < float(told[1]) < 2**18


def test_other_failures_of_the_runtime_stay_what_they_are():
    error = memory.jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(memory.jax.errors.JaxRuntimeError, match="something else"), memory.explained("a", "b"):
        raise error


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Ran out of memory in memory space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.", "6.47"),
        ("Attempting to reserve 10.51G at the bottom of memory. There are 8.97G free, 0B reserved", "1.54"),
        ("Attempting to allocate 1.50G. That was not possible. There are 512.00M free.", "1.00"),
    ],
)
def test_what_a_tpu_says_is_understood(message, told):
    assert memory.shortage(message) == f", {told} GiB more are needed"


def test_memory_that_is_free_but_in_pieces(monkeypatch):
    monkeypatch.setattr(memory, "_free_bytes", lambda: 2**40)
    for message in (
        "Out of memory while trying to allocate 3221225472 bytes.",
        "Failed to allocate request for 3.00GiB",
    ):
        assert memory.shortage(message) == ", 3.00 GiB are not free in one piece"
    assert memory.shortage("no figures") == memory.shortage("Exceeded hbm capacity by 0.00G") == ""


def test_where_nobody_says_what_is_free_nothing_is_said(monkeypatch):
    monkeypatch.setattr(memory, "_free_bytes", lambda: None)
    assert memory.shortage("Failed to allocate 3.00G") == ", 3.00 GiB were asked for"


def test_loading_and_answering_tell_it_in_one_line(tmp_path, capsys, monkeypatch):
    model = tiny.write_checkpoint(tmp_path / "model", tiny.SHAPES["single_layers"])
    video = media.write(tmp_path / "clip.mp4", 12)
    words = ["answer", f"--model={model}", f"--video={video}", "--question=What?", "--max_pixels=4704", "--fps=4"]
    for module, name, purpose in ((encoding, "encode_slots", "a pass"), (load, "load_parameters", "the weights")):
        monkeypatch.setattr(module, name, lambda *_, **__: too_much())
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"adapttoken answer: --mesh: too little memory for {purpose}, ") and err.count("\n") == 1
        assert "model=N" in err and "--dtype=bfloat16" in err
        assert ("--slots_per_group, --max_pixels" in err) == (purpose == "a pass")
