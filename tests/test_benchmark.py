"""The speed comparison: its arithmetic by hand, its PyTorch side against the plain one, a whole run in miniature."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from adapttoken_jax import passes
from adapttoken_jax.parity import pytorch_fast as fast
from adapttoken_jax.parity import pytorch_method as plain
from adapttoken_jax.parity import speed
from adapttoken_jax.parity.shapes import SHAPES

# The command with modules blocked that a machine with jax, flax, torch and transformers alone would lack.
_BARE = """
import runpy, sys
for name in ("av", "PIL", "matplotlib", "tensorflow_datasets", "grain"):
    sys.modules[name] = None
runpy.run_module("experiments.benchmark", run_name="__main__")
"""


def run(*arguments, code=_BARE):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("experiments.benchmark", []),
        ("adapttoken_jax.cli", ["compare", "--model=needle", "--video=a.mp4", "--question=Where?"]),
    ],
)
def test_without_pytorch_one_line_says_what_to_install(module, words, missing):
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; runpy.run_module({module!r}, run_name='__main__')"
    ended = run(*words, code=code)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.endswith(f" needs {missing}; in the source tree: pip install -e '.[test]'\n")
    assert ended.stderr.count("\n") == 1


def test_a_row_by_hand():
    stage = speed.Stage(speed.GROUP, lambda: None, lambda: None, flops=6e9)
    row = speed.summary(stage, speed.Times(9.0, [1.0, 3.0, 2.0], [4.0, 3.0, 5.0]), peak=12e9)
    assert (row["ours_s"], row["pytorch_s"], row["compile_s"]) == (2.0, 4.0, 7.0)
    assert row["ratio"] == 2.5  # of 4/1, 3/3 and 5/2, not 4/2
    assert (row["ours_flops_per_s"], row["pytorch_flops_per_s"]) == (3e9, 1.5e9)
    assert (row["ours_share_of_peak"], row["pytorch_share_of_peak"]) == (0.25, 0.125)
    alone = speed.summary(stage, speed.Times(1.0, [2.0], []), peak=None)
    assert alone["pytorch_s"] is alone["ratio"] is alone["pytorch_flops_per_s"] is alone["ours_share_of_peak"] is None
    assert alone["compile_s"] == 0.0


def test_costs_by_hand():
    times = {
        speed.GROUP: speed.Times(0.0, [1.1, 2.2, 4.4], [3.0, 3.0, 3.0]),
        speed.RESIDENT: speed.Times(0.0, [1.0, 2.1, 4.2], []),
        speed.BARE: speed.Times(0.0, [1.0, 2.0, 4.1], []),
        speed.PREFILL: speed.Times(0.0, [1.25, 2.0, 4.0], [2.0, 2.0, 2.0]),
        speed.VISION: speed.Times(0.0, [0.9, 0.8, 0.6], []),
        speed.MORE: speed.Times(0.0, [1.5, 2.6, 4.8], []),
    }
    assert speed.overhead(times) == pytest.approx(
        {"relevance_and_entropy": 4.2 / 4.1 - 1, "ours": 0.05, "pytorch": 0.5}
    )
    # 0.4 s for four more questions: 0.1 s each, of scans that take 2, 3 and 5 s
    assert speed.further_question(times, 5) == pytest.approx({"seconds": 0.1, "share": 0.1 / 3})


def test_a_pass_without_relevance_and_entropy_says_the_same():
    shape = dataclasses.replace(SHAPES["needle"], groups=2, slots_per_group=3, budget=9)
    pair = speed.make_pair(shape, "float32")
    batch, spec = speed.wave_batch(pair, speed.encode_video(pair)), speed.group_spec(pair)
    whole, bare = (run(pair.model.module.text, batch, spec) for run in (passes.run_prompts, speed.bare_pass))
    assert {"relevance", "entropy"} <= set(whole) and set(bare) == {"first_logits", "tokens"}
    np.testing.assert_array_equal(bare["tokens"], whole["tokens"])
    np.testing.assert_allclose(bare["first_logits"], whole["first_logits"], atol=1e-5)
    work = lambda run: run.lower(pair.model.module.text, batch, spec).compile().cost_analysis()["transcendentals"]
    assert work(speed.bare_pass) < work(passes.run_prompts)


def test_both_towers_of_the_pytorch_side_agree():
    """Windows at a frame's border are smaller: batches of several sizes."""
    shape = dataclasses.replace(SHAPES["needle"], groups=2, slots_per_group=3, budget=9, grid=(12, 20))
    pair = speed.make_pair(shape, "float32")
    grid, calls = pair.plan.clip.grid, []
    attend = torch.nn.functional.scaled_dot_product_attention
    count = lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
        ours = fast.encode(pair.torch_model, pair.inputs.patches, grid, pair.chunk)
        batched = len(calls)
        theirs = speed.encode_as_transformers(pair, pair.inputs.patches, grid)
        single = len(calls) - batched
        again = fast.encode(pair.torch_model, pair.inputs.patches, grid, pair.chunk)
    assert single > 2 * batched == 2 * (len(calls) - batched - single)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(again, ours, rtol=0, atol=0)


def test_both_sides_run_in_turn():
    calls = []
    stages = [
        speed.Stage("a", lambda: calls.append("A"), lambda: calls.append("a"), 0.0),
        speed.Stage("b", lambda: calls.append("B"), None, 0.0),
    ]
    times = speed.measure(stages, 2, least_seconds=0)
    assert "".join(calls) == "AaA" + "BB" + "AaB" + "aAB"
    calls.clear()
    speed.measure([dataclasses.replace(stages[0], warm=True)], 1, least_seconds=0)
    assert "".join(calls) == "A" + "Aa"
    assert [len(times["a"].ours), len(times["a"].theirs), len(times["b"].ours), len(times["b"].theirs)] == [2, 2, 2, 0]


def test_fast_removal_is_the_plain_one():
    rng = np.random.default_rng(0)
    for n in (2, 9, 40):
        pairs = np.round(rng.random((n, n)), 1)  # full of ties
        pairs, scores = np.maximum(pairs, pairs.T), np.round(rng.random(n), 1)
        for keep in {1, n // 2, n - 1, n}:
            expected = plain.remove_redundant(pairs, scores, keep)
            np.testing.assert_array_equal(fast.remove_redundant(pairs, scores, keep), expected)


def test_a_whole_run_in_miniature_without_a_decoder():
    small = ("--models=needle", "--groups=2", "--slots_per_group=3", "--budget=9", "--repetitions=1", "--questions=2")
    done = run(*small, "--dtypes=float32", "--threads=1", "--json=-")
    assert done.returncode == 0, done.stderr
    assert "the two sides agree" in done.stderr
    content = json.loads(done.stdout)
    (found,) = content["models"]
    assert content["about"]["threads"] == 1 and {"jax", "torch"} <= set(content["about"]["versions"])
    assert found["visual_tokens_per_group"] == 12 and found["agreement"]["selected_in_common"] == 1.0
    assert found["agreement"]["ok"] and found["agreement"]["same_answer"]
    stages = {row["stage"]: row for row in found["stages"]}
    assert list(stages) == [speed.VISION, speed.UNCHANGED, speed.GROUP, speed.RESIDENT, speed.BARE, speed.PREFILL,
                            speed.SELECT, speed.FINAL, speed.WHOLE, speed.PRUNED, speed.MORE]  # fmt: skip
    for row in (row for row in stages.values() if row["pytorch_all_s"]):
        assert row["ratio"] == pytest.approx(row["pytorch_all_s"][0] / row["ours_all_s"][0])
    group = stages[speed.GROUP]
    assert group["ours_flops_per_s"] == pytest.approx(group["flops"] / group["ours_s"])
    assert group["ours_share_of_peak"] == pytest.approx(group["ours_flops_per_s"] / found["peak_flops_per_s"])
    assert stages[speed.PRUNED]["flops"] < group["flops"] < stages[speed.MORE]["flops"]
    assert found["further_question"]["entropy"] < 1e-5  # the same sums in another order


def test_what_was_measured_stays_when_the_rest_is_cut_off(tmp_path):
    code = """
import sys
from experiments import benchmark
benchmark.time_model = lambda name, dtype: {"model": name, "dtype": dtype} if dtype == "float32" else sys.exit(9)
benchmark.time_models([("7b", "float32"), ("7b", "bfloat16")], {"models": []}, sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "found.json"], timeout=600)
    assert done.returncode == 9
    assert json.loads((tmp_path / "found.json").read_text()) == {"models": [{"model": "7b", "dtype": "float32"}]}
