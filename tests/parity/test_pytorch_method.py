"""The PyTorch oracle against closed forms, literal cases, brute-force loops and transformers' own functions."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import safetensors
import tokenizers
import torch
import transformers

from adapttoken_jax.config import METHODS, AdaptTokenConfig, read_model_config
from adapttoken_jax.errors import UserError
from adapttoken_jax.parity import pytorch_method as oracle
from tests import tiny

IDS = tiny.special_ids()
GRID = (10, 6, 4)  # 10 slots of 3 x 2 merged tokens


@pytest.fixture(scope="module")
def model(checkpoint):
    return tiny.load_torch(checkpoint)


def make_inputs(grid=GRID, letters=True, seconds=1.0, seed=0) -> oracle.MethodInputs:
    rng = np.random.default_rng(seed)
    return oracle.MethodInputs(
        patches=rng.standard_normal((math.prod(grid), 1176)).astype(np.float32),
        grid=grid,
        frame_times=np.arange(2 * grid[0]) * seconds / 2,
        seconds_per_slot=seconds,
        prefix_ids=[IDS["<|im_start|>"], 5, 6, IDS["<|vision_start|>"]],
        suffix_ids=[IDS["<|vision_end|>"], 9, 10, 11, IDS["<|im_end|>"], 12],
        question_span=(1, 4),
        letter_ids=[40, 41, 42, 43] if letters else None,
        eos_ids=[IDS["<|im_end|>"]],
    )


def make_config(**fields) -> AdaptTokenConfig:
    return AdaptTokenConfig(
        **{"slots_per_group": 4, "budget": 20, "reference_layer": 2, "max_answer_tokens": 3, **fields}
    )


# ---------------------------------------------------------------------------------------------------------------------
# The tiny checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_every_layout_loads_the_same_weights_without_a_missing_or_unknown_key(tmp_path):
    for name in ("base", "tied"):
        expected = tiny.random_weights(tiny.SHAPES[name])
        for number, (config, keys) in enumerate(itertools.product(tiny.CONFIG_LAYOUTS, tiny.KEY_LAYOUTS)):
            path = tiny.write_checkpoint(tmp_path / f"{name}{number}", tiny.SHAPES[name], config, keys, shards=3)
            loaded, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True
            )
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
            state = loaded.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_keys_on_disk_follow_the_layout_and_shards_follow_the_index(tmp_path):
    path = tiny.write_checkpoint(tmp_path, tiny.SHAPES["tied"], key_layout="old", shards=3)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert {"model.embed_tokens.weight", "model.norm.weight", "visual.merger.ln_q.weight"} <= set(index["weight_map"])
    assert "lm_head.weight" not in index["weight_map"]
    assert not any("language_model" in key for key in index["weight_map"])
    assert len(set(index["weight_map"].values())) == 3
    for key, file in index["weight_map"].items():
        with safetensors.safe_open(path / file, "pt") as shard:
            assert shard.get_tensor(key).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_the_float32_weights_cast_to_the_dtype(tmp_path, dtype):
    shape = tiny.SHAPES["single_layers"]
    loaded = tiny.load_torch(tiny.write_checkpoint(tmp_path, shape, dtype=dtype)).state_dict()
    for key, value in tiny.random_weights(shape).items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], value.to(tiny.DTYPES[dtype]).float())


@pytest.mark.parametrize("name", tiny.SHAPES)
def test_every_shape_loads_and_gives_answers_that_depend_on_the_video(tmp_path, name):
    path = tiny.write_checkpoint(tmp_path, tiny.SHAPES[name])
    sizes, network = read_model_config(path), tiny.load_torch(path)
    assert sizes.text.layers == len(network.model.language_model.layers)
    logits = []
    for seed in (0, 1):
        inputs = make_inputs((2, 10, 14), seed=seed)
        trace = oracle.run(network, inputs, make_config(max_answer_tokens=1, reference_layer=0), "full")
        assert trace["visual_features"].shape == (2, 35, sizes.text.width)
        assert np.isfinite(trace["final_first_logits"]).all()
        assert 0.5 < trace["final_entropy"] < math.log(sizes.text.vocab) - 0.2
        logits.append(trace["final_first_logits"])
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_the_tokenizer_encodes_any_text_and_knows_qwens_tokens(checkpoint):
    tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    for text in ("What is the colour of the video?\n", "naïve 日本 \u0000 🦜", "A. yes\nB. no"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(len(tokenizer.encode(letter).ids) == 1 for letter in "ABCDE")
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids[::5] == [IDS["<|im_start|>"], IDS["<|im_end|>"]]
    config = read_model_config(checkpoint)
    assert config.vision_start == IDS["<|vision_start|>"] and config.video_pad == IDS["<|video_pad|>"]
    assert tokenizer.get_vocab_size() <= min(shape.vocab for shape in tiny.SHAPES.values())


def test_transformers_tokenizer_agrees_with_the_file(checkpoint):
    ours = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is the video?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert theirs(chat)["input_ids"] == ours.encode(chat).ids
    assert theirs.eos_token_id == IDS["<|im_end|>"]


# ---------------------------------------------------------------------------------------------------------------------
# Stages of the model
# ---------------------------------------------------------------------------------------------------------------------


def test_vision_features_are_transformers_video_features(model):
    inputs = make_inputs((3, 10, 14))
    with torch.no_grad():
        theirs = model.get_video_features(torch.tensor(inputs.patches), torch.tensor([[3, 10, 14]])).pooler_output[0]
    ours = oracle.vision_features(model, inputs.patches, inputs.grid)
    assert ours.shape == (3, 35, 64)
    np.testing.assert_array_equal(ours.reshape(105, 64), theirs.numpy())


def test_vision_layers_come_in_the_order_of_the_patches(model):
    """The merger works per token, so applied to the last layer it must give the features in their own order."""
    inputs = make_inputs((2, 10, 14))
    stages = oracle.vision_stages(model, inputs.patches, inputs.grid)
    assert stages["layers"].shape == (4, 280, 32)
    with torch.no_grad():
        merged = model.model.visual.merger(torch.tensor(stages["layers"][-1])).numpy()
    np.testing.assert_allclose(merged.reshape(2, 35, 64), stages["features"], atol=1e-5)


def test_slots_do_not_see_each_other(model):
    inputs = make_inputs((3, 10, 14))
    together = oracle.vision_features(model, inputs.patches, inputs.grid)
    for slot, patches in enumerate(np.split(inputs.patches, 3)):
        alone = oracle.vision_features(model, patches, (1, 10, 14))
        np.testing.assert_allclose(alone[0], together[slot], atol=2e-5)


def test_hidden_states_are_transformers_own(model):
    inputs = make_inputs()
    features = oracle.vision_features(model, inputs.patches, inputs.grid).reshape(-1, 64)
    embeddings = oracle.prompt_embeddings(model, inputs.prefix_ids, features, inputs.suffix_ids)
    ids = oracle.group_position_ids(model, inputs, list(range(10)), make_config())
    ours = oracle.hidden_states(model, embeddings, ids)
    with torch.no_grad():
        theirs = model(
            inputs_embeds=embeddings[None],
            position_ids=torch.tensor(ids)[:, None],
            output_hidden_states=True,
            output_attentions=True,
        )
    np.testing.assert_array_equal(ours["logits"], theirs.logits[0].numpy())
    np.testing.assert_array_equal(ours["attentions"], torch.cat(theirs.attentions).numpy())
    np.testing.assert_array_equal(ours["layers"][:-1], torch.cat(theirs.hidden_states[1:-1]).numpy())
    np.testing.assert_array_equal(ours["norm"], theirs.hidden_states[-1][0].numpy())
    np.testing.assert_allclose(ours["attentions"].sum(-1), 1, atol=1e-5)
    assert not np.triu(ours["attentions"], 1).any()


def test_attention_that_cannot_be_read_is_refused(checkpoint):
    other = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="eager"):
        oracle.hidden_states(other, torch.zeros(2, 64), np.zeros((3, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# M-RoPE
# ---------------------------------------------------------------------------------------------------------------------


def _rope_index(model, inputs, seconds):
    """transformers' own ids of the prompt with the whole video in it, [3, S]."""
    visual = math.prod(inputs.grid) // 4
    tokens = [*inputs.prefix_ids, *[IDS["<|video_pad|>"]] * visual, *inputs.suffix_ids]
    kinds = [2 if token == IDS["<|video_pad|>"] else 0 for token in tokens]
    ids, _ = model.model.get_rope_index(
        torch.tensor([tokens]),
        torch.tensor([kinds]),
        video_grid_thw=torch.tensor([inputs.grid]),
        second_per_grid_ts=torch.tensor([seconds]),
    )
    return ids[:, 0].numpy()


@pytest.mark.parametrize("grid", [(1, 2, 2), (5, 4, 6), (3, 10, 4), (9, 2, 8)])
@pytest.mark.parametrize("seconds", [1.0, 0.5, 0.26, 2.7])
def test_hf5_ids_are_those_of_transformers(model, grid, seconds):
    inputs = make_inputs(grid, seconds=seconds)
    config = make_config(mrope="hf5", group_positions="real_time", slots_per_group=64)
    ours = oracle.group_position_ids(model, inputs, list(range(grid[0])), config)
    np.testing.assert_array_equal(ours, _rope_index(model, inputs, seconds))


def test_text_after_a_video_of_32_slots_starts_at_67_or_at_7():
    """32 slots two ids apart and 4 prefix tokens: the last slot has id 4 + 62; the 4 x 6 patches span 3 ids."""
    tokens = oracle.tokens_of(range(32), 2, 3)
    times = oracle.time_ids(tokens[:, 0], 1.0, 2)
    starts = {}
    for rule in ("legacy", "hf5"):
        ids = oracle.position_ids(4, times, tokens[:, 1], tokens[:, 2], 5, (32, 4, 6), rule)
        assert ids.shape == (3, 4 + 32 * 6 + 5)
        assert ids[:, 195].tolist() == [66, 5, 6]
        assert (np.diff(ids[:, -5:]) == 1).all()
        starts[rule] = ids[:, -5].tolist()
    assert starts == {"legacy": [67] * 3, "hf5": [7] * 3}


def test_ids_of_a_small_prompt_literally():
    tokens = oracle.tokens_of([0, 1], 1, 2)
    assert tokens.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    ids = oracle.position_ids(2, [0, 0, 2, 2], tokens[:, 1], tokens[:, 2], 2, (2, 2, 4), "legacy")
    assert ids.tolist() == [[0, 1, 2, 2, 4, 4, 5, 6], [0, 1, 2, 2, 2, 2, 5, 6], [0, 1, 2, 3, 2, 3, 5, 6]]


def test_a_wide_frame_can_push_the_legacy_suffix_further_than_time_does():
    tokens = oracle.tokens_of([0], 1, 9)
    ids = oracle.position_ids(3, np.zeros(9), tokens[:, 1], tokens[:, 2], 1, (1, 2, 18), "legacy")
    assert ids[:, -1].tolist() == [12, 12, 12]


def test_time_ids_are_floored_float32_products():
    assert oracle.time_ids(np.arange(6), 0.26, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert oracle.time_ids(np.array([7]), 1.5, 3).tolist() == [31]
    assert oracle.time_ids(np.array([100]), 0.29, 1).tolist() == [29]  # 28.999999999999996 in float64
    assert oracle.time_ids(np.array([300]), 0.13, 3).tolist() == [117]  # 116.99999 if 0.13 * 3 came first


def test_real_time_groups_keep_the_slots_distance(model):
    inputs = make_inputs((9, 2, 2), seconds=1.5)
    compact, real = (
        oracle.group_position_ids(model, inputs, [1, 4, 7], make_config(group_positions=positions))
        for positions in ("compact", "real_time")
    )
    assert compact[0].tolist() == [0, 1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14]
    assert real[0].tolist() == [0, 1, 2, 3, 7, 16, 25, 26, 27, 28, 29, 30, 31]


def test_final_ids_are_the_survivors_own_or_renumbered(model):
    inputs = make_inputs((9, 4, 6), seconds=2.0)
    selected = np.array([[2, 0, 1], [2, 1, 2], [5, 1, 0], [8, 0, 0]])
    original = oracle.final_position_ids(model, inputs, selected, "original", make_config())
    assert original[:, 4:9].tolist() == [[12, 12, 24, 36, 37], [4, 5, 5, 4, 37], [5, 6, 4, 4, 37]]
    compact = oracle.final_position_ids(model, inputs, selected, "compact", make_config())
    assert compact[:, 4:9].tolist() == [[4, 4, 6, 8, 9], [4, 5, 5, 4, 9], [5, 6, 4, 4, 9]]
    hf5 = oracle.final_position_ids(model, inputs, selected, "original", make_config(mrope="hf5"))
    assert hf5[:, 8].tolist() == [7, 7, 7]


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def _answer_whole_video(model, inputs, config, steps) -> oracle.Answer:
    features = oracle.vision_features(model, inputs.patches, inputs.grid).reshape(-1, 64)
    embeddings = oracle.prompt_embeddings(model, inputs.prefix_ids, features, inputs.suffix_ids)
    ids = oracle.final_position_ids(model, inputs, oracle.tokens_of(range(10), 3, 2), "original", config)
    return oracle.answer_greedily(model, embeddings, ids, steps, inputs.eos_ids)


@pytest.mark.parametrize("seconds", [1.0, 0.5])
def test_hf5_answers_are_those_of_generate_with_its_own_ids(model, seconds):
    inputs = make_inputs(seconds=seconds)
    tokens, logits = tiny.generate(model, inputs, 8)
    answer = _answer_whole_video(model, inputs, make_config(mrope="hf5"), 8)
    assert list(answer.ids) == tokens and len(set(tokens)) > 3
    np.testing.assert_allclose(answer.logits, logits, atol=2e-4)


@pytest.mark.parametrize("seconds", [1.0, 0.5])
def test_legacy_answers_are_those_of_generate_with_the_ids_given(model, seconds):
    """The ids come from a second formula, written out here: video from 4 on, text after its largest id."""
    inputs = make_inputs(seconds=seconds)
    slots, rows, columns = (axis.ravel() for axis in np.indices((10, 3, 2)))
    vision = 4 + np.stack([np.floor(slots * 2 * seconds), rows, columns])
    text = vision.max() + 1 + np.arange(6)
    ids = np.concatenate([np.tile(np.arange(4), (3, 1)), vision, np.tile(text, (3, 1))], axis=1).astype(int)
    tokens, logits = tiny.generate(model, inputs, 8, position_ids=torch.tensor(ids)[:, None])
    answer = _answer_whole_video(model, inputs, make_config(), 8)
    assert list(answer.ids) == tokens
    np.testing.assert_allclose(answer.logits, logits, atol=2e-4)
    trace = oracle.run(model, inputs, make_config(max_answer_tokens=8), "full")
    assert tuple(trace["answer_ids"]) == answer.ids


def test_the_two_rules_give_different_logits(model):
    legacy, hf5 = (_answer_whole_video(model, make_inputs(), make_config(mrope=rule), 1) for rule in ("legacy", "hf5"))
    assert np.abs(legacy.logits - hf5.logits).max() > 0.01


def test_an_answer_ends_before_the_end_token_unless_it_comes_first(model):
    inputs = make_inputs(letters=False)
    config = make_config(max_answer_tokens=6)
    free = oracle.run(model, dataclasses.replace(inputs, eos_ids=[]), config, "full")["answer_ids"].tolist()
    stop = next(i for i in range(1, 6) if free[i] not in free[:i])
    assert oracle.run(model, dataclasses.replace(inputs, eos_ids=[free[stop]]), config, "full")["answer_ids"].tolist() \
        == free[:stop]  # fmt: skip
    assert oracle.run(model, dataclasses.replace(inputs, eos_ids=[7, free[0]]), config, "full")["answer_ids"].tolist() \
        == free[:1]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Steps 2 to 7
# ---------------------------------------------------------------------------------------------------------------------


def test_groups_are_interleaved():
    assert oracle.interleaved_groups(10, 4) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert oracle.interleaved_groups(5, 4) == [[0, 2, 4], [1, 3]]
    assert len(oracle.interleaved_groups(1024, 64)) == 16
    assert oracle.interleaved_groups(3, 4) == [[0, 1, 2]]


def test_visiting_orders():
    assert oracle.visiting_order(5, "sequential") == [0, 1, 2, 3, 4]
    assert oracle.visiting_order(8, "bit_reversed") == [0, 4, 2, 6, 1, 5, 3, 7]
    assert oracle.visiting_order(6, "bit_reversed") == [0, 4, 2, 1, 5, 3]
    assert oracle.visiting_order(1, "bit_reversed") == [0]


def test_relevance_reduces_heads_before_text():
    attention = np.zeros((2, 4, 4), np.float32)
    attention[0, 2:, 1:3] = [[0.1, 0.2], [0.5, 0.0]]
    attention[1, 2:, 1:3] = [[0.3, 0.0], [0.1, 0.4]]
    expected = {
        ("max", "max"): [0.5, 0.4],
        ("mean", "max"): [0.3, 0.2],
        ("max", "mean"): [0.4, 0.3],
        ("mean", "mean"): [0.25, 0.15],
    }
    for (heads, text), values in expected.items():
        np.testing.assert_allclose(oracle.relevance(attention, [2, 3], slice(1, 3), heads, text), values, atol=1e-7)


def test_query_rows():
    assert oracle.query_rows("after_vision", 20, 6, (1, 4)) == [14, 15, 16, 17, 18, 19]
    assert oracle.query_rows("question", 20, 6, (1, 4)) == [15, 16, 17]
    assert oracle.query_rows("last", 20, 6, (1, 4)) == [19]


def test_relevance_is_the_softmax_over_the_whole_key_sequence(model):
    """Recomputed from the layer's input with its own projections and rotary angles, head by head."""
    inputs, config = make_inputs(), make_config(relevance_queries="last")
    features = oracle.vision_features(model, inputs.patches, inputs.grid)
    group = oracle.pass_group(model, inputs, features, [0, 3, 6, 9], config)
    ids = oracle.group_position_ids(model, inputs, [0, 3, 6, 9], config)
    embeddings = oracle.prompt_embeddings(
        model, inputs.prefix_ids, features[[0, 3, 6, 9]].reshape(24, -1), inputs.suffix_ids
    )
    states = torch.tensor(oracle.hidden_states(model, embeddings, ids)["layers"][1])
    np.testing.assert_allclose(group.relevance, _last_row_attention(model, states, ids)[4:28], atol=1e-5)


def _last_row_attention(model, states, ids) -> np.ndarray:
    """Largest attention over heads from the last position to each position at layer 2, float64."""
    layer = model.model.language_model.layers[2]
    with torch.no_grad():
        normed = layer.input_layernorm(states)
        query, key = (getattr(layer.self_attn, name)(normed).double().numpy() for name in ("q_proj", "k_proj"))
    inverse = 1e6 ** (-np.arange(8) / 8)
    angles = np.concatenate([ids[0, :, None] * inverse[:2], ids[1, :, None] * inverse[2:5],
                             ids[2, :, None] * inverse[5:]], axis=1)  # fmt: skip
    rotation = np.exp(1j * angles)

    def rotate(head):
        return (head[:, :8] + 1j * head[:, 8:]) * rotation

    rows = []
    for head in range(4):
        keys = rotate(key[:, 16 * (head // 2) : 16 * (head // 2) + 16])
        scores = np.real(keys.conj() @ rotate(query[:, 16 * head : 16 * head + 16])[-1]) / 4
        rows.append(np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum())
    return np.max(rows, axis=0)


def test_entropy_in_closed_form():
    assert oracle.entropy(np.zeros(100)) == pytest.approx(math.log(100))
    assert oracle.entropy(np.array([0.0, 1000.0])) == pytest.approx(0)
    assert oracle.entropy(np.log([0.5, 0.25, 0.25])) == pytest.approx(1.5 * math.log(2))
    assert oracle.entropy(np.array([3.0] * 4 + [-1e4] * 50)) == pytest.approx(math.log(4))


def test_the_least_certain_share_counts_and_at_least_one_token():
    values = np.array([-0.1, -0.9, -0.2, -0.8, -0.3, -0.4, -0.5, -0.6, -0.7, -1.0])
    assert oracle.mean_of_least(values, 0.1) == -1.0
    assert oracle.mean_of_least(values, 0.3) == pytest.approx(-0.9)
    assert oracle.mean_of_least(-np.arange(1.0, 101), 0.29) == -86  # 29 tokens, though 0.29 * 100 is under 29 in binary
    assert oracle.mean_of_least(values, 0.0) == -1.0
    assert oracle.mean_of_least(values, 1.0) == pytest.approx(-0.55)


def test_certainty_forms_in_closed_form():
    probabilities = np.array([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]])
    logits = np.log(probabilities) + 3
    first = 1.75 * math.log(2)
    assert oracle.certainty(logits, "neg_entropy", None, 0.1) == pytest.approx(-first)
    assert oracle.answer_entropy(logits, 0.1) == pytest.approx(first)
    assert oracle.certainty(logits, "max_probability", None, 0.1) == pytest.approx(0.5)
    assert oracle.certainty(logits, "option_entropy", [2, 3], 0.1) == pytest.approx(-math.log(2))
    assert oracle.certainty(logits, "option_entropy", None, 0.1) == pytest.approx(-first)
    assert oracle.certainty(logits, "deepconf", None, 0.1) == pytest.approx(9 / 4 * math.log(2))
    many = np.array([[0.0] * 19 + [-2.0] + [-5.0] * 30])
    log_total = math.log(19 + math.exp(-2) + 30 * math.exp(-5))
    assert oracle.certainty(many, "deepconf", None, 0.1) == pytest.approx(log_total + 2 / 20)


def test_stop_rule():
    config = make_config(stop_groups=2, stop_entropy=0.25)
    assert oracle.stop_reason([0.1, 0.3], [1, 1], config) is None
    assert oracle.stop_reason([0.1, 0.2], [1, 2], config) is None
    assert oracle.stop_reason([0.1, 0.2, 0.25], [1, 2, 1], config) == "agreement"
    loose = dataclasses.replace(config, stop_agreement=False)
    assert oracle.stop_reason([0.1, 0.2], [1, 2], loose) == "certain"
    assert oracle.stop_reason([], [], loose) is None


def test_a_group_is_a_short_video_of_its_own(model):
    """Compact positions: the group's answer is the one that its slots give as a video at 1 s a slot."""
    inputs = make_inputs(seconds=3.0)
    trace = oracle.run(model, inputs, make_config(), "adapttoken")
    patches = inputs.patches.reshape(10, 24, 1176)
    for group, slots in enumerate(oracle.interleaved_groups(10, 4)):
        short = dataclasses.replace(
            inputs, patches=patches[slots].reshape(-1, 1176), grid=(len(slots), 6, 4), seconds_per_slot=1.0,
            frame_times=np.arange(2 * len(slots)),
        )  # fmt: skip
        alone = oracle.run(model, short, make_config(max_answer_tokens=1), "full")
        np.testing.assert_allclose(trace["group_first_logits"][group], alone["final_first_logits"], atol=1e-4)
        assert trace["group_entropy"][group] == pytest.approx(alone["final_entropy"], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 8 to 10
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_of_the_papers_figure():
    np.testing.assert_allclose(oracle.group_weights([-0.14, -1.22], 2.0), [0.632, 0.368], atol=5e-4)


def test_no_group_outweighs_another_by_more_than_the_entropy_range_allows():
    weights = oracle.group_weights(-np.linspace(0, 1.4, 16), 2.0)
    assert weights.max() / weights.min() == pytest.approx(math.exp(0.7))


@pytest.mark.parametrize(
    ("weights", "capacity", "total", "minimum", "expected"),
    [
        ([0.5, 0.3, 0.2], [100, 100, 100], 10, 0, [5, 3, 2]),
        ([1 / 3] * 3, [9, 9, 9], 10, 0, [4, 3, 3]),  # a tie goes to the lower index
        ([0.8, 0.1, 0.1], [4, 100, 100], 10, 0, [4, 3, 3]),  # the cap's excess goes by weight
        ([0.7, 0.2, 0.1], [4, 3, 100], 12, 0, [4, 3, 5]),
        ([0.9, 0.09, 0.01], [100] * 3, 20, 3, [14, 3, 3]),
        ([0.5, 0.5], [2, 3], 50, 0, [2, 3]),  # all there is
        ([1.0, 0.0], [2, 3], 4, 0, [2, 2]),  # a vanished weight still takes what nobody else can
        ([0.5, 0.5], [1, 9], 6, 2, [1, 5]),  # a minimum never exceeds what a group has
        ([0.4, 0.3, 0.3], [3, 2, 1], 5, 2, [2, 2, 1]),
    ],
)
def test_budgets(weights, capacity, total, minimum, expected):
    assert oracle.allocate(weights, capacity, total, minimum).tolist() == expected


def test_budgets_add_up_and_follow_the_weights():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 12))
        weights, capacity = rng.dirichlet(np.ones(count)), rng.integers(1, 30, count)
        minimum = int(rng.integers(0, 3))
        total = int(rng.integers(minimum * count, capacity.sum() + 5)) if capacity.sum() > minimum * count else 99
        budget = oracle.allocate(weights, capacity, total, minimum)
        assert budget.sum() == min(total, capacity.sum())
        assert (budget <= capacity).all() and (budget >= np.minimum(minimum, capacity)).all()
        free = (budget < capacity) & (budget > minimum)
        ratio = budget[free] / weights[free]
        error = 1 / weights[free]
        assert (np.abs(ratio[:, None] - ratio) <= error[:, None] + error + 1e-9).all()


def test_a_budget_below_the_minimum_is_the_users_mistake(model):
    with pytest.raises(UserError, match="--budget"):
        oracle.run(model, make_inputs(), make_config(budget=4, min_tokens_per_group=2), "adapttoken")
    equal = oracle.run(model, make_inputs(), make_config(budget=4, min_tokens_per_group=2), "flexselect")
    assert len(equal["selected"]) == 4  # equal shares know no minimum


def test_most_relevant_ties_go_to_the_lower_index():
    assert oracle.most_relevant(np.array([0.1, 0.9, 0.5, 0.9, 0.5]), 3).tolist() == [1, 2, 3]
    assert oracle.most_relevant(np.array([1.0, 2.0]), 0).tolist() == []


def test_redundancy_literally():
    features = np.array([[1, 0], [2, 0], [0, 3], [-1, 0]], np.float32)
    positions = np.array([[0, 0, 0], [4, 3, 4], [0, 1, 0], [0, 0, 0]], np.float64)
    pairs = oracle.redundancy(features, positions, "exponential", 2.0)
    assert pairs[0, 1] == pytest.approx(math.exp(-7))
    assert pairs[0, 2] == 0 and pairs[0, 3] == 0 and pairs[0, 0] == pytest.approx(1)
    window = oracle.redundancy(np.ones((4, 2)), np.array([[0, 0, 0], [2, 1, 1], [2.5, 0, 0], [1, 0, 2]]), "window", 2.0)
    np.testing.assert_allclose(
        window, [[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 1]], atol=1e-12
    )  # fmt: skip


def test_removal_drops_the_less_relevant_of_the_most_redundant_pair():
    pairs = np.array([[1, 0.9, 0.2, 0], [0.9, 1, 0.8, 0], [0.2, 0.8, 1, 0.5], [0, 0, 0.5, 1]])
    assert oracle.remove_redundant(pairs, np.array([2.0, 1, 3, 4]), 3).tolist() == [True, False, True, True]
    assert oracle.remove_redundant(pairs, np.array([2.0, 2, 3, 4]), 2).tolist() == [True, False, False, True]
    assert oracle.remove_redundant(np.zeros((3, 3)), np.array([1.0, 1, 1]), 1).tolist() == [True, False, False]


def test_removal_is_what_a_plain_loop_over_pairs_gives():
    rng = np.random.default_rng(1)
    for _ in range(20):
        count = int(rng.integers(2, 14))
        pairs = np.round(rng.random((count, count)), 1)  # rounded, so that ties are common
        pairs, scores = np.maximum(pairs, pairs.T), np.round(rng.random(count), 1)
        kept = list(range(count))
        keep = int(rng.integers(1, count + 1))
        while len(kept) > keep:
            i, j = max(itertools.combinations(kept, 2), key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
            kept.remove(i if scores[i] < scores[j] else j)
        assert np.flatnonzero(oracle.remove_redundant(pairs, scores, keep)).tolist() == kept


# ---------------------------------------------------------------------------------------------------------------------
# The whole method
# ---------------------------------------------------------------------------------------------------------------------

TRACE_KEYS = {
    "frame_indices", "frame_times", "grid", "patches", "visual_features", "groups", "prefix_ids", "suffix_ids",
    "group_position_ids", "group_first_logits", "group_entropy", "group_certainty", "group_relevance", "budget",
    "candidates", "selected", "final_position_ids", "final_first_logits", "answer_ids",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_has_every_key_with_the_shapes_of_the_contract(model, method):
    trace = oracle.run(model, make_inputs(), make_config(), method)
    assert trace.keys() >= TRACE_KEYS
    shapes = {key: trace[key].shape for key in TRACE_KEYS}
    count = len(trace["selected"])
    assert shapes["visual_features"] == (10, 6, 64) and shapes["patches"] == (240, 1176)
    groups = 0 if trace["direct"] else 3
    assert shapes["groups"] == (groups, 4) and shapes["group_position_ids"] == (groups, 3, 4 + 24 + 6)
    assert shapes["group_first_logits"] == (groups, 320) and shapes["group_relevance"] == (groups, 24)
    assert shapes["group_entropy"] == shapes["group_certainty"] == shapes["budget"] == (groups,)
    assert shapes["selected"] == (count, 3) and shapes["final_position_ids"] == (3, 4 + count + 6)
    assert trace["groups"].tolist() == [[0, 3, 6, 9], [1, 4, 7, -1], [2, 5, 8, -1]][:groups]
    for key, value in trace.items():
        if isinstance(value, np.ndarray):
            assert value.dtype in (np.float32, np.int64), key
    assert trace["direct"] == (method in ("uniform", "full"))
    assert count == (60 if trace["direct"] else 20)
    assert trace["option_probabilities"].sum() == pytest.approx(1)


def test_adapttoken_selects_within_its_own_rules(model):
    config = make_config(temperature=0.2, budget=18, over_selection=1.5)
    trace = oracle.run(model, make_inputs(), config)
    assert trace["stop_reason"] == "all_groups" and not trace["stop_early"]
    assert trace["budget"].sum() == 27 == len(trace["candidates"]) and len(trace["selected"]) == 18
    assert np.argmax(trace["budget"]) == np.argmin(trace["group_entropy"])
    np.testing.assert_allclose(trace["group_certainty"], -trace["group_entropy"])
    np.testing.assert_allclose(trace["weights"].sum(), 1, rtol=1e-6)
    candidates, selected = ([tuple(token) for token in trace[key]] for key in ("candidates", "selected"))
    assert candidates == sorted(candidates) and selected == sorted(selected) and set(selected) <= set(candidates)
    assert np.isnan(trace["group_relevance"]).sum() == 2 * 6
    for group in range(3):
        scores = trace["group_relevance"][group].reshape(4, 3, 2)
        taken = [scores[s // 3, r, c] for s, r, c in candidates if s % 3 == group]
        assert sorted(taken) == sorted(scores[~np.isnan(scores)])[-trace["budget"][group] :]


def test_lite_stops_and_leaves_the_rest_unvisited(model):
    config = make_config(stop_entropy=99.0, stop_groups=2, stop_agreement=False, group_order="bit_reversed", budget=30)
    trace = oracle.run(model, make_inputs(), config, "lite")
    assert trace["visited"].tolist() == [0, 2]
    assert trace["stop_reason"] == "certain" and trace["stop_early"]
    assert np.isnan(trace["group_entropy"]).tolist() == [False, True, False] == np.isnan(trace["weights"]).tolist()
    assert (trace["group_position_ids"][1] == -1).all()
    assert (trace["group_position_ids"][2] == -1).all(0).tolist() == [False] * 28 + [True] * 6
    assert np.isnan(trace["group_relevance"][1]).all() and np.isnan(trace["group_first_logits"][1]).all()
    assert trace["budget"][1] == 0 and trace["budget"].sum() == 33
    assert not (trace["selected"][:, 0] % 3 == 1).any() and len(trace["selected"]) == 30


def test_lite_that_becomes_certain_at_the_last_group_stops_nothing(model):
    config = make_config(stop_entropy=99.0, stop_groups=3, stop_agreement=False)
    trace = oracle.run(model, make_inputs(), config, "lite")
    assert trace["stop_reason"] == "all_groups" and not trace["stop_early"] and len(trace["visited"]) == 3


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_final_prompt_has_the_positions_asked_for(model, positions):
    """Budget 3 of 60 tokens, so that some slots vanish; slots are 2 s, that is 4 ids, apart."""
    trace = oracle.run(model, make_inputs(seconds=2.0), make_config(budget=3, final_positions=positions))
    slots = trace["selected"][:, 0]
    assert len(set(slots)) < 10
    expected = 4 + 4 * slots if positions == "original" else 4 + 2 * np.searchsorted(np.unique(slots), slots)
    np.testing.assert_array_equal(trace["final_position_ids"][0, 4:7], expected)


def test_lite_that_never_is_certain_is_the_full_method(model):
    config = make_config(stop_entropy=0.0)
    lite, full = (oracle.run(model, make_inputs(), config, method) for method in ("lite", "adapttoken"))
    np.testing.assert_array_equal(lite["selected"], full["selected"])
    np.testing.assert_array_equal(lite["final_first_logits"], full["final_first_logits"])


@pytest.mark.parametrize("order", ["sequential", "bit_reversed"])
def test_flexselect_has_equal_budgets_and_no_removal(model, order):
    trace = oracle.run(model, make_inputs(), make_config(group_order=order), "flexselect")
    assert trace["budget"].tolist() == [7, 7, 6]
    np.testing.assert_array_equal(trace["candidates"], trace["selected"])


@pytest.mark.parametrize("fields", [{"slots_per_group": 10}, {"budget": 60}])
def test_one_group_or_few_tokens_are_answered_directly(model, fields):
    config = make_config(final_positions="compact", **fields)
    trace = oracle.run(model, make_inputs(seconds=2.0), config)
    full = oracle.run(model, make_inputs(seconds=2.0), config, "full")
    assert trace["stop_reason"] == "direct" and trace["visited"].size == 0
    np.testing.assert_array_equal(trace["final_position_ids"], full["final_position_ids"])
    assert trace["final_position_ids"][0, 4:64].max() == 4 + 9 * 2 * 2
    np.testing.assert_array_equal(trace["answer_ids"], full["answer_ids"])


def _redundancy_of_pair(a, b, kernel, scale) -> float:
    """Redundancy of two tokens given as (features, seconds, row, column)."""
    cosine = max(0.0, float(np.dot(a[0], b[0]) / math.sqrt(np.dot(a[0], a[0]) * np.dot(b[0], b[0]))))
    seconds, rows, columns = (abs(x - y) for x, y in zip(a[1:], b[1:], strict=True))
    if kernel == "window":
        return cosine if seconds <= scale and rows <= 1 and columns <= 1 else 0.0
    return cosine * math.exp(-seconds / scale - math.sqrt(rows**2 + columns**2))


@pytest.mark.parametrize("kernel", ["exponential", "window"])
def test_survivors_recomputed_pair_by_pair_from_the_trace(model, kernel):
    """Frames at irregular times, so that a slot's time can only be that of its first frame."""
    times = np.cumsum(np.random.default_rng(4).uniform(0.2, 3.0, 20))
    inputs = dataclasses.replace(make_inputs(), frame_times=times)
    config = make_config(over_selection=2.0, proximity=kernel, proximity_scale=6.0, temperature=0.1)
    trace = oracle.run(model, inputs, config)
    tokens, scores = [], []
    for slot, row, column in trace["candidates"]:
        group, index = slot % 3, (slot // 3) * 6 + row * 2 + column
        scores.append(trace["weights"][group] * trace["group_relevance"][group, index])
        features = trace["visual_features"][slot, row * 2 + column].astype(np.float64)
        tokens.append((features, times[2 * slot], row, column))
    kept = list(range(40))
    while len(kept) > 20:
        i, j = max(
            itertools.combinations(kept, 2),
            key=lambda pair: (_redundancy_of_pair(tokens[pair[0]], tokens[pair[1]], kernel, 6.0), -pair[0], -pair[1]),
        )
        kept.remove(i if scores[i] < scores[j] else j)
    np.testing.assert_array_equal(trace["selected"], trace["candidates"][kept])


def test_similarity_of_hidden_states_uses_the_reference_layers_output(model):
    inputs = make_inputs()
    features = oracle.vision_features(model, inputs.patches, inputs.grid)
    group = oracle.pass_group(model, inputs, features, [1, 4, 7], make_config())
    embeddings = oracle.prompt_embeddings(
        model, inputs.prefix_ids, features[[1, 4, 7]].reshape(18, -1), inputs.suffix_ids
    )
    ids = torch.tensor(oracle.group_position_ids(model, inputs, [1, 4, 7], make_config()))
    with torch.no_grad():
        states = model(inputs_embeds=embeddings[None], position_ids=ids[:, None], output_hidden_states=True)
    np.testing.assert_array_equal(group.hidden, states.hidden_states[3][0, 4:22].numpy())
    kept = {
        form: oracle.run(model, inputs, make_config(similarity=form, over_selection=2.0, max_answer_tokens=1))
        for form in ("projector", "reference_layer")
    }
    np.testing.assert_array_equal(kept["projector"]["candidates"], kept["reference_layer"]["candidates"])
    assert not np.array_equal(kept["projector"]["selected"], kept["reference_layer"]["selected"])


def test_open_questions_take_several_tokens_per_group_and_the_worst_ones_entropy(model):
    inputs = make_inputs(letters=False)
    config = make_config(bottom_fraction=0.5, max_answer_tokens=4)
    trace = oracle.run(model, inputs, config)
    assert trace["option"] is None and trace["option_probabilities"] is None
    assert [len(ids) for ids in trace["group_answer_ids"].values()] == [4, 4, 4]
    assert trace["group_answers"] == trace["group_answer_ids"]
    assert (trace["group_entropy"] >= oracle.entropy(trace["group_first_logits"]) * 0.5).all()


def test_an_option_is_the_letter_answered_or_the_most_probable_one():
    logits = np.array([[0.0, 3.0, 1.0, 5.0]])
    assert oracle.chosen_option(oracle.Answer((2,), logits, {}), [0, 1, 2]) == 2
    assert oracle.chosen_option(oracle.Answer((3,), logits, {}), [0, 1, 2]) == 1


@pytest.mark.parametrize(
    ("fields", "method", "error", "words"),
    [
        ({}, "best", UserError, "--method=best"),
        ({"sampling_temperature": 1.0}, "full", UserError, "--sampling_temperature"),
        ({"reference_layer": -1}, "full", ValueError, "resolve"),
    ],
)
def test_mistakes_are_named(model, fields, method, error, words):
    with pytest.raises(error, match=words):
        oracle.run(model, make_inputs(), make_config(**fields), method)


@pytest.mark.parametrize(
    "given",
    [{"debias": True}, {"coverage": 0.1}, {"keep_after_reference": 0.5}, {"give_up_groups": 2}, {"stop_rule": "rerun"}],
)
def test_options_beyond_the_paper_are_refused(model, given):
    with pytest.raises(UserError, match=f"--{next(iter(given))}"):
        oracle.run(model, make_inputs(), make_config(**given), "lite")
