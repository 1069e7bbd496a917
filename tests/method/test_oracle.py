"""The whole method against the plain PyTorch version of it, from decoded frames to answer."""

import dataclasses

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import pipeline
from adapttoken_jax.model import attention
from adapttoken_jax.parity import pytorch_method as oracle
from adapttoken_jax.parity.compare import method_inputs
from adapttoken_jax.prompt import Ask

OPTIONS = ["a red kite", "the old dog", "two cars"]
SETTINGS = {
    "defaults": {},
    "sharp": {"temperature": 0.05, "certainty": "option_entropy"},
    "means": {"relevance_heads": "mean", "relevance_text": "mean", "relevance_queries": "question"},
    "last_token": {"relevance_queries": "last", "certainty": "max_probability", "min_tokens_per_group": 3},
    "real_time": {"group_positions": "real_time", "final_positions": "compact", "certainty": "deepconf"},
    "hf5": {"mrope": "hf5", "similarity": "reference_layer", "proximity": "window"},
    "reversed": {"group_order": "bit_reversed", "over_selection": 1.5, "proximity_scale": 0.7, "reference_layer": 0},
}  # fmt: skip


def random_video(frames=46, height=56, width=84, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return at.Frames(images, 4.0)


def settings(model, **given):
    base = {"slots_per_group": 4, "budget": 30, "max_answer_tokens": 5, "max_pixels": 56 * 84}
    return at.AdaptTokenConfig.for_model(model.config, **{**base, **given})


def ask_both(pair, video, question, options, config, method):
    model, torch_model = pair
    result = at.answer(model, video, question, options, config, method, trace=True)
    clip = pipeline.plan_run(model.config, video, config, method).clip
    inputs = method_inputs(model, clip, result.trace, question, options)
    return result, oracle.run(torch_model, inputs, config, method)


def assert_agree(result, theirs):
    ours, grouped = result.trace, ("groups", "group_position_ids", "budget")
    for exact in (*(() if theirs["direct"] else grouped), "candidates", "selected", "final_position_ids", "answer_ids"):
        np.testing.assert_array_equal(ours[exact], theirs[exact], err_msg=exact)
    scale = np.abs(theirs["visual_features"]).max()
    np.testing.assert_allclose(ours["visual_features"], theirs["visual_features"], atol=1e-4 * scale)
    close_logits(ours["final_first_logits"], theirs["final_first_logits"])
    assert result.entropy == pytest.approx(theirs["final_entropy"], abs=1e-4)
    assert result.stop.early == theirs["stop_early"]
    if theirs["option"] is not None:
        assert ord(result.option) - ord("A") == theirs["option"]

    if theirs["direct"]:
        assert result.groups == () and result.stop.groups_total == 0
        return
    np.testing.assert_allclose(ours["group_entropy"], theirs["group_entropy"], atol=1e-4)
    np.testing.assert_allclose(ours["group_certainty"], theirs["group_certainty"], atol=1e-4)
    np.testing.assert_allclose(ours["group_relevance"], theirs["group_relevance"], atol=1e-5)
    close_logits(ours["group_first_logits"], theirs["group_first_logits"])
    weights = [np.nan if g.weight is None else g.weight for g in result.groups]
    np.testing.assert_allclose(weights, theirs["weights"], atol=1e-5)


def close_logits(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.nanmax(np.abs(theirs)))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_matches(load, name):
    pair = load("base")
    config = settings(pair[0], **SETTINGS[name])
    options = None if name in ("means", "real_time") else OPTIONS
    result, theirs = ask_both(pair, random_video(), "What is in the video?", options, config, "adapttoken")
    assert len(result.groups) == 6 and result.selected.count == 30 < result.selected.candidates
    assert_agree(result, theirs)


@pytest.mark.parametrize("rate", [24.0, 25.0, 30.0])
@pytest.mark.parametrize("kernel", ["exponential", "window"])
def test_redundancy_removal_can_be_computed_again_from_the_trace_of_a_still_picture(load, rate, kernel):
    """Where every pair of one place resembles each other alike, nearness in time decides, down to its last bit."""
    model, _ = load("base")
    still = np.repeat(random_video(1).images, int(40 * rate), 0)
    config = settings(model, max_frames=160, budget=60, temperature=20.0, over_selection=2.0, proximity=kernel)
    result = at.answer(model, at.Frames(still, rate), "What?", OPTIONS, config, trace=True)
    trace, (rows, cols) = result.trace, (2, 3)
    slots, row, col = tokens = trace["candidates"].T
    group, place = slots % len(result.groups), slots // len(result.groups)
    weights = np.asarray([each.weight for each in result.groups])
    score = weights[group] * trace["group_relevance"][group, place * rows * cols + row * cols + col]
    seconds = trace["frame_times"].astype(np.float64)[2 * slots]
    features = trace["visual_features"][slots, row * cols + col]
    pairs = oracle.redundancy(features, np.stack([seconds, row, col], 1), kernel, config.proximity_scale)
    kept = oracle.remove_redundant(pairs, score, config.budget)
    assert len(slots) == 120
    np.testing.assert_array_equal(trace["selected"], tokens.T[kept])


@pytest.mark.parametrize("method", ["lite", "flexselect", "uniform", "full"])
@pytest.mark.parametrize("options", [OPTIONS, None], ids=["options", "open"])
def test_every_method_matches(load, method, options):
    pair = load("tied", config_layout="nested", key_layout="new", shards=3)
    # Random weights are never certain: a threshold inside their range lets Lite stop somewhere.
    config = settings(pair[0], stop_entropy=5.0, stop_groups=2, stop_agreement=False)
    result, theirs = ask_both(pair, random_video(seed=1), "What is in the video?", options, config, method)
    assert_agree(result, theirs)
    assert result.stop.groups_visited == (len(theirs["visited"]) if result.groups else 0)
    assert result.stop.early == (method == "lite")
    assert (result.consensus is None) == (options is None or not result.groups)


@pytest.mark.parametrize(
    ("shape", "size"),
    [("multi_query", (140, 56)), ("seven_per_kv", (56, 56)), ("odd_sizes", (112, 140))],
)
def test_every_shape_matches(load, shape, size):
    pair = load(shape)
    config = settings(pair[0], budget=2 * size[0] * size[1] // 784 + 3, max_pixels=size[0] * size[1])
    video = random_video(34, *size, seed=2)
    result, theirs = ask_both(pair, video, "Why?", OPTIONS[:2], config, "adapttoken")
    assert result.video.grid == (17, size[0] // 14, size[1] // 14)
    assert_agree(result, theirs)


@pytest.mark.parametrize("text", ["max", "mean"])
def test_a_prompt_of_more_rows_than_attend_at_once_matches(load, text):
    """As a prompt with subtitles is."""
    pair = load("base")
    config = settings(pair[0], relevance_text=text)
    result, theirs = ask_both(pair, random_video(), "What is in the video? " * 40, OPTIONS, config, "adapttoken")
    assert len(result.trace["suffix_ids"]) > attention._MOST_ROWS
    assert_agree(result, theirs)


def test_one_group_or_a_large_budget_answers_directly(load):
    pair = load("base")
    for given in ({"slots_per_group": 64}, {"budget": 10_000}):
        config = settings(pair[0], **given)
        result, theirs = ask_both(pair, random_video(), "What?", OPTIONS, config, "adapttoken")
        assert theirs["direct"] and result.groups == () and result.selected.count == result.video.tokens
        assert_agree(result, theirs)


@pytest.mark.parametrize(
    ("questions", "options"),
    [
        (["What is in the video?", "Is it?", "And what of the video is the end of it all?"], [OPTIONS, None, None]),
        ([Ask("What?", system="Be brief."), Ask("Where?", system=""), Ask("Who?", system="Be brief.")], [None] * 3),
    ],
    ids=["options", "words before the video"],
)
def test_several_questions_in_one_scan_are_each_answered_as_if_alone(load, questions, options):
    model, _ = load("base")
    config = settings(model)
    together = at.answer(model, random_video(), questions, options, config)
    for question, choice, joint in zip(questions, options, together, strict=True):
        alone = at.answer(model, random_video(), question, choice, config)
        assert joint.answer == alone.answer and joint.selected == alone.selected
        np.testing.assert_allclose(
            [g.entropy for g in joint.groups], [g.entropy for g in alone.groups], atol=1e-5
        )  # the same sums in another order


def test_lite_stops_where_enough_groups_are_certain(load):
    model, _ = load("base")
    entropies = [g.entropy for g in at.answer(model, random_video(), "What?", OPTIONS, settings(model)).groups]
    config = settings(model, stop_groups=1, stop_agreement=False, stop_entropy=sorted(entropies)[2] + 1e-4)
    first = next(i for i, h in enumerate(entropies) if h <= config.stop_entropy)
    alone = at.answer(model, random_video(), "What?", OPTIONS, config, "lite")
    never = dataclasses.replace(config, stop_entropy=0.0)
    assert alone.stop.groups_visited == first + 1
    assert [g.visited for g in alone.groups] == [i <= first for i in range(len(entropies))]
    assert sum(g.budget for g in alone.groups) == alone.selected.candidates
    assert at.answer(model, random_video(), "What?", OPTIONS, never, "lite").stop.reason == "all groups visited"
