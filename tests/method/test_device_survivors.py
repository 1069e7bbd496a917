"""The compiled selection in the whole method against its NumPy twin: the same tokens, and an answer from the device."""

import dataclasses

import jax
import numpy as np
import pytest

from adapttoken_jax import device_survivors, pipeline, survivors
from adapttoken_jax.encoding import encode_video
from adapttoken_jax.prompt import build_prompt
from tests.method.test_oracle import OPTIONS, random_video, settings

SETTINGS = {
    "defaults": {},
    "sharp": {"temperature": 0.05, "min_tokens_per_group": 3, "group_order": "bit_reversed"},
    "beyond": {"coverage": 0.3, "debias": True, "temperature_target": 2.0},
    "full_group": {"coverage": 0.3, "temperature": 1e-3},
    "hidden": {"similarity": "reference_layer", "proximity": "window", "proximity_scale": 0.7, "over_selection": 1.5},
    "lite": {"stop_groups": 2, "stop_agreement": False, "stop_entropy": 9.0, "budget": 60},
    "flexselect": {"coverage": 0.3, "debias": True, "over_selection": 1.5, "temperature_target": 2.0},  # and heeds none
    "everything": {"over_selection": 100.0, "max_frames": 64},  # more candidates than the longest video has tokens
}


def scanned(model, name):
    method = name if name in ("lite", "flexselect") else "adapttoken"
    config = settings(model, **SETTINGS[name]).resolve(model.config)
    plan = pipeline.plan_run(model.config, random_video(), config, method)
    prompt = build_prompt(model.tokenizer, "What is in the video?", OPTIONS)
    return pipeline.scan_video(model, plan, encode_video(model, plan.clip), [prompt], config, method)[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_tokens(model, name):
    run = scanned(model, name)
    ours, features = device_survivors.select(run)
    theirs = survivors.select(run)
    # Sizes are those of the longest video, in slots of two frames: other videos compile nothing.
    assert device_survivors._scanned(run, 0)[1] == run.config.max_frames // 2 * run.video.per_slot
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-12)
    for field in ("budgets", "candidates", "tokens"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
    n = len(theirs.tokens)
    np.testing.assert_array_equal(features[:n], run.video.gather(theirs.tokens))
    assert isinstance(features, jax.Array) and not np.asarray(features[n:]).any()


def test_no_bound_on_frames_is_no_bound_on_memory(model):
    run = scanned(model, "defaults")
    endless = dataclasses.replace(run, config=dataclasses.replace(run.config, max_frames=10**10))
    np.testing.assert_array_equal(device_survivors.select(endless)[0].tokens, survivors.select(run).tokens)


def test_the_answer_from_features_on_the_device(model, monkeypatch):
    run = scanned(model, "defaults")
    monkeypatch.setattr(pipeline.jax, "default_backend", lambda: "gpu")  # where the compiled selection is the default
    ours, theirs = pipeline.conclude(run), pipeline.conclude(dataclasses.replace(run, loop="host"))
    np.testing.assert_array_equal(ours.selected.tokens, theirs.selected.tokens)
    np.testing.assert_array_equal(ours.reply.answer_ids, theirs.reply.answer_ids)
    np.testing.assert_array_equal(ours.reply.first_logits, theirs.reply.first_logits)
