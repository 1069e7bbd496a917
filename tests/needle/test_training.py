"""Training: patches, losses, and a micro model that learns, stops and goes on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax import needle
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import training
from adapttoken_jax.needle.clips import ClipMaker, ClipSettings, Labels, QuestionBlock
from adapttoken_jax.needle.tokenizer import chat_tokenizer
from adapttoken_jax.video import PIXEL_MEAN, PIXEL_STD
from experiments import train_needle

_TOKENIZER = chat_tokenizer()


def _micro_config():
    config = training.needle_config(_TOKENIZER, width=32, layers=1, ff=32, vision_width=16)
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=2, ff=16))


@pytest.mark.parametrize("size", [(56, 56), (84, 140)])
def test_patches_are_cut_in_merge_order(size):
    """Against loops over the preprocessor's axes, one number at a time for a few random places."""
    images = needle.scene(0, "test", 16, size=size).images()
    planes = jnp.asarray(images.transpose(0, 3, 1, 2))[None]
    patches = np.asarray(training.cut_patches(planes))
    assert patches.shape == (8, size[0] * size[1] // 196, 1176)
    columns, rng = size[1] // 28, np.random.default_rng(0)
    for _ in range(300):
        slot, t, c, i, j = rng.integers([8, 2, 3, 14, 14])
        row, col, r, k = rng.integers([size[0] // 28, columns, 2, 2])
        level = images[2 * slot + t, 28 * row + 14 * r + i, 28 * col + 14 * k + j, c]
        found = patches[slot, (row * columns + col) * 4 + r * 2 + k, ((c * 2 + t) * 14 + i) * 14 + j]
        mean, deviation = PIXEL_MEAN[c], PIXEL_STD[c]
        assert np.isclose(found, (level - mean) / deviation, rtol=1e-5, atol=1e-6)


def test_block_metrics_of_literal_logits():
    half = np.log([0.5, 0.5, 1e-9, 1e-9]).astype(np.float32)
    sure = np.log([1e-9, 1e-9, 1.0, 1e-9]).astype(np.float32)
    block = QuestionBlock(
        ids=None,
        position_ids=None,
        valid=None,
        answer=Labels(
            read=None,
            targets=jnp.asarray([[[[2, 0], [0, 1], [3, 0]]]]),
            beliefs=jnp.asarray([[[[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]]]),
            weight=jnp.asarray([[[1.0, 1.0, 0.0]]]),
        ),
        value=jnp.asarray([[[True, True, False]]]),
        hints=None,
        matches=None,
    )
    found = training.block_metrics(jnp.asarray([[[sure, half, half]]]), block)
    expected = {"excess": 0.0, "accuracy": 1.0, "entropy_known": 0.0, "entropy_open": np.log(2), "gap": 0.0}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.isclose(found[name], value, atol=1e-5), name
    wrong = training.block_metrics(jnp.asarray([[[half, sure, half]]]), block)
    assert wrong["accuracy"] == 0 and np.isclose(wrong["gap"], np.log(2), atol=1e-5)
    assert np.isclose(wrong["excess"], (-np.log(1e-9) - np.log(1e-9) - np.log(2)) / 2, rtol=1e-3)


def test_dropped_tokens_and_other_questions_change_nothing():
    config, settings = _micro_config(), ClipSettings(slots=2, choice=2, open=0)
    maker = ClipMaker(_TOKENIZER, 0)
    values = training.initial_state(config, 0, training.Schedule(1e-3, 10)).values
    batch = maker.batch(0, 4, settings)

    @jax.jit
    def logits(batch, planes):
        model = training.Qwen25VL(config, values)
        context = training.context_of(model, planes, batch, maker.prefix_ids)
        return training.read_logits(model, context, batch.blocks["choice"])[0]

    planes = training.draw(batch.table, settings.size)
    moved = batch._replace(
        position_ids=np.where(batch.valid[:, None], batch.position_ids, 7),
        order=np.where(batch.valid[:, len(maker.prefix_ids) :], batch.order, 0),
        blocks={"choice": jax.tree.map(lambda x: x[:, ::-1], batch.blocks["choice"])},
    )
    assert not batch.valid.all()
    assert np.allclose(logits(batch, planes), logits(moved, planes)[:, ::-1], atol=1e-5)


def _run() -> train_needle.Run:
    """Eight steps of a micro model; all tests share it, so that its step is compiled once."""
    return train_needle.Run(
        config=_micro_config(),
        maker=ClipMaker(_TOKENIZER, 0),
        checker=ClipMaker(_TOKENIZER, 0, "validation"),
        phases=[train_needle.parse_phase("steps=4,slots=1,choice=0,open=1,hints=0.5")] * 2,
        schedule=training.Schedule(5e-3, 80, warmup=5),
        clips=2,
        seed=0,
        log_every=1,
        save_every=3,
        validate_every=100,
    )


def test_a_micro_model_learns_one_batch():
    run = _run()
    settings = run.phases[0].settings
    state, batch = training.initial_state(run.config, 0, run.schedule), run.maker.batch(0, run.clips, settings)
    found = []
    for _ in range(80):
        state, metrics = run.learn(state, batch, settings)
        found.append(float(metrics["loss"]))
    assert found[0] > 3 and found[-1] < 0.1 * found[0]


class _Stopped(Exception):
    """Stands for the kill: nothing after the step in which it is raised is done."""


@dataclasses.dataclass(frozen=True)
class _StoppingRun(train_needle.Run):
    stop_after: int = 10**9

    def learn(self, state, batch, settings):
        if int(state.step) == self.stop_after:
            raise _Stopped
        return super().learn(state, batch, settings)


def test_a_stopped_run_goes_on_with_the_same_numbers(tmp_path):
    run = _run()
    whole = _train(run, tmp_path / "whole")
    stopping = _StoppingRun(**vars(run), stop_after=5)
    with pytest.raises(_Stopped):
        _train(stopping, tmp_path / "stopped")
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "half a li')  # what a kill in the middle of a line leaves behind
    resumed = _train(run, tmp_path / "stopped")
    assert [r["step"] for r in resumed] == [r["step"] for r in whole] == list(range(1, 9))
    for a, b in zip(whole, resumed, strict=True):
        assert {k: v for k, v in a.items() if "seconds" not in k} == {k: v for k, v in b.items() if "seconds" not in k}


def _train(run, workdir) -> list[dict]:
    workdir.mkdir(exist_ok=True)
    train_needle.train(run, workdir)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("width", 64, "--width=64: the run in {} began with --width=128; give that, or another --workdir"),
        ("seed", 3, "--seed=3: the run in {} began with --seed=0; give that, or another --workdir"),
        ("phase", ["steps=3"], "--phase=steps=3: the run in {} began with --phase=steps=2; give that, or another "),
        ("phase", ["steps=2", "steps=3"], "--phase=steps=3: the run in {} began with no further --phase; give that"),
        ("phase", [], "no further --phase: the run in {} began with --phase=steps=2; give that"),
    ],
)
def test_a_run_that_goes_on_refuses_other_flags(tmp_path, monkeypatch, name, value, message):
    train_needle.flags.FLAGS.mark_as_parsed()
    give = lambda name, value: monkeypatch.setattr(train_needle.flags.FLAGS[name], "value", value)
    give("phase", ["steps=2"])
    begun = train_needle.note_start(tmp_path)
    assert train_needle.note_start(tmp_path) == begun
    give(name, value)
    with pytest.raises(UserError) as error:
        train_needle.note_start(tmp_path)
    assert str(error.value).startswith(message.format(tmp_path))
    assert json.loads((tmp_path / "training.json").read_text()) == begun


@pytest.mark.parametrize(
    "text", ["steps=0", "slots=2", "steps=3,slot=1", "steps=x", "steps=3,choice=0,open=0", "steps"]
)
def test_bad_phases_are_named(text):
    with pytest.raises(UserError, match="--phase"):
        train_needle.parse_phase(text)


@pytest.mark.parametrize("width", [16, 100])
def test_widths_that_heads_do_not_fill_are_named(width):
    with pytest.raises(UserError, match=f"--width={width}"):
        training.needle_config(_TOKENIZER, width=width)
