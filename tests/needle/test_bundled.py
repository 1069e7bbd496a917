"""The model in the package: what lies beside it, and that the method works on it.

Videos are of the validation split, which the settings were chosen on; figures from test videos are in docs/evidence.md.
"""

import dataclasses
import json

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import needle
from adapttoken_jax.config import BUNDLED, AdaptTokenConfig, checkpoint_directory, read_model_config
from adapttoken_jax.errors import UserError
from adapttoken_jax.pipeline import dry_run

_VIDEOS, _FRAMES = 12, 256


@pytest.fixture(scope="module")
def model():
    return at.load("needle")


@pytest.fixture(scope="module")
def singles():
    return [needle.scene(seed, "validation", _FRAMES) for seed in range(_VIDEOS)]


def _ask(model, scene, method):
    config = AdaptTokenConfig.for_model(model.config, max_frames=_FRAMES)
    asked = scene.question
    return at.answer(model, at.Frames(scene.images(), 4.0), asked.text, asked.options, config, method)


def test_it_is_small_and_says_where_it_comes_from():
    files = {path.name: path.stat().st_size for path in BUNDLED["needle"].iterdir()}
    assert sum(files.values()) <= 10e6
    note = json.loads((BUNDLED["needle"] / "training.json").read_text())
    assert note["command"].startswith("python -m experiments.train_needle") and isinstance(note["seed"], int)
    assert len(note["commit"]) == 40 and "+" not in note["commit"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)


def test_a_directory_of_that_name_goes_first_if_a_checkpoint_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needle").mkdir()
    assert checkpoint_directory("needle") == BUNDLED["needle"]
    (tmp_path / "needle" / "config.json").write_text("{}")
    assert checkpoint_directory("needle").resolve() == tmp_path / "needle"
    with pytest.raises(UserError, match="bundled models: needle"):
        read_model_config("needles")


def test_a_dry_run_takes_its_preset(singles):
    plan = dry_run("needle", at.Frames(singles[0].images(), 4.0), {}, "adapttoken")
    assert plan["tokens_per_slot"] == 4 and plan["groups"] == 16 and plan["budget"] == 8


def test_paper_takes_the_published_values_but_those_of_the_model(model):
    own, paper = (AdaptTokenConfig.for_model(model.config, paper=paper) for paper in (False, True))
    published = AdaptTokenConfig()
    assert paper.temperature == published.temperature != own.temperature
    of_the_model = {"max_pixels", "slots_per_group", "budget", "reference_layer"}
    for field in dataclasses.fields(AdaptTokenConfig):
        expected = own if field.name in of_the_model else published
        assert getattr(paper, field.name) == getattr(expected, field.name), field.name


def test_it_finds_needles_that_uniform_sampling_and_equal_budgets_miss(model):
    right = dict.fromkeys(("uniform", "flexselect", "adapttoken"), 0)
    config = AdaptTokenConfig.for_model(model.config, max_frames=1024)
    for scene in (needle.scene(seed, "validation", 1024) for seed in range(5)):
        video, asked = at.Frames(scene.images(), 4.0), scene.question
        for method in right:
            right[method] += at.answer(model, video, asked.text, asked.options, config, method).option == asked.letter
    assert right["adapttoken"] == 5
    assert right["adapttoken"] >= 2 + max(right["uniform"], right["flexselect"]), right


def test_its_entropy_tells_groups_with_a_needle_from_those_without(model, singles):
    seen, unseen = [], []
    for scene in singles:
        for group in _ask(model, scene, "adapttoken").groups:
            (seen if np.isin(group.slots, scene.needles[0].slots).any() else unseen).append(group.entropy)
    higher = np.asarray(unseen)[:, None] > np.asarray(seen)
    assert higher.mean() >= 0.95
    assert abs(np.mean(unseen) - np.log(4)) < 0.1


def test_lite_visits_fewer_groups(model, singles):
    results = [_ask(model, scene, "lite") for scene in singles]
    assert sum(r.option == scene.question.letter for r, scene in zip(results, singles, strict=True)) >= _VIDEOS - 1
    assert np.mean([r.stop.groups_visited / r.stop.groups_total for r in results]) < 0.6
    assert all(r.stop.reason for r in results if r.stop.early)


def test_open_answers_of_several_words(model, singles):
    right = 0
    for scene in singles:
        config = AdaptTokenConfig.for_model(model.config, max_frames=_FRAMES)
        asked = scene.open_question
        result = at.answer(model, at.Frames(scene.images(), 4.0), asked.text, None, config)
        right += result.answer.strip() == asked.answer
    assert right >= _VIDEOS - 2
