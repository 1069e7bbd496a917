"""Configurations of both layouts, the table of parameters, and the counts that follow from them."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

import adapttoken_jax as at
from adapttoken_jax import config as configs
from adapttoken_jax import costs, parameters
from adapttoken_jax.config import SIZES, AdaptTokenConfig, model_config, read_model_config
from adapttoken_jax.errors import UserError
from tests import tiny


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_both_layouts_of_a_config_read_the_same(tmp_path, shape):
    read = [
        read_model_config(tiny.write_checkpoint(tmp_path / layout, tiny.SHAPES[shape], layout))
        for layout in tiny.CONFIG_LAYOUTS
    ]
    wanted = tiny.SHAPES[shape]
    assert read[0] == read[1]
    assert read[0].text.mrope_sections == wanted.sections and read[0].text.tied == wanted.tied
    assert read[0].vision.full_attention_layers == wanted.full_attention_layers
    assert read[0].vision.tokens_per_second == wanted.tokens_per_second


def flat(**changes):
    return {**tiny._flat_config(tiny.SHAPES["base"], "float32"), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "mrope_section [1, 1, 1]"),
    ],
)
def test_a_config_that_is_not_supported_says_why(changes, words):
    with pytest.raises(UserError) as error:
        model_config(flat(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tower", "changes", "words"),
    [
        ({}, {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"num_heads": 3}, {}, "vision_config.hidden_size 32 is no multiple of four times num_heads 3"),
        ({"window_size": 27}, {}, "vision_config.window_size 27 is less than a token's side, 28 pixels"),
        ({"out_hidden_size": 32}, {}, "vision_config.out_hidden_size 32 differs from hidden_size 64"),
    ],
)
def test_sizes_that_do_not_fit_one_another_are_named(tower, changes, words):
    vision = flat()["vision_config"] | tower
    with pytest.raises(UserError, match=f"^DIR/config.json: {re.escape(words)}$"):
        model_config(flat(vision_config=vision, **changes), "DIR/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "mrope", "mrope_section": 3}},
        {"rope_scaling": {"type": "mrope", "mrope_section": [None, 3, 3]}},
        {"hidden_size": "64"},
        {"vocab_size": [320]},
        {"rope_theta": "wide"},
        {"num_hidden_layers": True},
        {"image_token_id": None},
        {"num_attention_heads": 0},
        {"text_config": 3},
        {"vision_config": None},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_one_line(changes):
    with pytest.raises(UserError, match=r"^DIR/config\.json: [^\n]*$"):
        model_config(flat(**changes), "DIR/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 0}, {"patch_size": 0}, {"spatial_merge_size": 0}, {"temporal_patch_size": 0}, {"window_size": 0},
        {"tokens_per_second": "x"}, {"tokens_per_second": -1}, {"fullatt_block_indexes": "x"},
        {"fullatt_block_indexes": [-1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_the_vision_tower_that_no_tower_has_is_named(changes):
    with pytest.raises(UserError, match=rf"^DIR/config\.json: vision_config\.{next(iter(changes))} is .*; it must "):
        model_config(flat(vision_config=flat()["vision_config"] | changes), "DIR/config.json")


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": -1}, {"rms_norm_eps": "x"}, {"hidden_size": True}, {"rope_theta": "x"}, {"head_dim": 1.5},
     {"vision_start_token_id": "x"}, {"num_key_value_heads": 0}, {"vocab_size": None}],
    ids=str,
)  # fmt: skip
def test_a_field_of_the_decoder_that_no_decoder_has_is_named(changes):
    with pytest.raises(UserError, match=rf"^DIR/config\.json: {next(iter(changes))} is .*; it must be a"):
        model_config(flat(**changes), "DIR/config.json")


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": "no"}, {"use_sliding_window": 0}], ids=str)
def test_a_switch_is_true_or_false(changes):
    with pytest.raises(UserError, match=rf"^DIR/config\.json: {next(iter(changes))} is .*; it must be true or false$"):
        model_config(flat(**changes), "DIR/config.json")


@pytest.mark.parametrize("raw", [None, [], "x"])
def test_a_config_is_an_object(raw):
    with pytest.raises(UserError, match=r"config\.json: must hold a JSON object"):
        model_config(raw)


def test_key_heads_default_to_all_and_the_vision_tower_has_a_theta_of_its_own():
    sizes = model_config(flat(num_key_value_heads=None))
    assert (sizes.text.kv_heads, sizes.vision.rope_theta) == (sizes.text.heads, 1e4)
    vision = flat()["vision_config"] | {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}}
    assert model_config(flat(vision_config=vision)).vision.rope_theta == 100


def test_what_the_vision_tower_reads_from_no_file_is_transformers_own():
    """Its norms' epsilon is fixed there, and sizes have defaults."""
    theirs, text = Qwen2_5_VLVisionConfig(), Qwen2_5_VLTextConfig()
    assert {name: list(value) if isinstance(value := getattr(theirs, name), tuple) else value
            for name in configs._VISION_DEFAULTS} == configs._VISION_DEFAULTS  # fmt: skip
    assert {name: getattr(text, name) for name in configs._TEXT_DEFAULTS} == configs._TEXT_DEFAULTS
    vision = model_config(flat()).vision
    norms = [m for m in Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(depth=1)).modules()
             if hasattr(m, "variance_epsilon")]  # fmt: skip
    assert len(norms) == 3 and {norm.variance_epsilon for norm in norms} == {vision.eps}


def test_a_nested_part_may_leave_out_what_is_the_default():
    """As some versions of transformers write it: of the vision tower of 32B and the text of 72B what differs."""
    top = {
        "model_type": "qwen2_5_vl", "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40,
        "num_hidden_layers": 64, "num_key_value_heads": 8, "vocab_size": 152064, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"hidden_size": 1280, "in_chans": 3, "intermediate_size": 3456, "out_hidden_size": 5120,
                          "spatial_patch_size": 14, "tokens_per_second": 2, "model_type": "qwen2_5_vl"},
    }  # fmt: skip
    assert model_config(top) == SIZES["qwen2.5-vl-32b"]
    vision = {"hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 8192, "tokens_per_second": 2}
    nested = {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": {"rms_norm_eps": 1e-6}}
    assert model_config(nested) == SIZES["qwen2.5-vl-72b"]


def test_a_tower_that_was_cut_may_name_layers_that_it_had():
    tower = flat()["vision_config"] | {"depth": 2, "fullatt_block_indexes": [1, 7, 15]}
    assert model_config(flat(vision_config=tower)).vision.full_attention_layers == (1,)


@pytest.mark.parametrize("sections", [[4, 4], [8], [2, 2, 2, 2], ["2", 3, 3], [-1, 4, 5], None])
def test_there_are_three_sections_of_mrope(sections):
    scaling = {"type": "mrope", "mrope_section": sections}
    with pytest.raises(UserError, match=r"^config\.json: mrope_section is .*; it must be three whole numbers$"):
        model_config(flat(rope_scaling=scaling))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("models--Qwen/snapshots/0f/config.json", r": no config\.json; give a directory below it, \S+/snapshots/0f$"),
        ("models--Qwen/adapter_config.json", r": no config\.json; it holds an adapter \(LoRA\); merge that"),
        ("other/config.json", r": no such model directory \(download a model of the hub first\)"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_what_it_is(tmp_path, made, words):
    (tmp_path / made).parent.mkdir(parents=True)
    (tmp_path / made).write_text("{}")
    with pytest.raises(UserError, match=f"^{tmp_path}/models--Qwen{words}"):
        read_model_config(tmp_path / "models--Qwen")


def test_a_quantised_checkpoint_is_refused_by_its_config():
    assert model_config(flat(quantization_config=None))
    with pytest.raises(UserError, match=r"^config\.json: a quantised checkpoint \(awq\); give the one that it"):
        model_config(flat(quantization_config={"quant_method": "awq", "bits": 4}))


def test_a_directory_is_not_the_bundled_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.checkpoint_directory("needle") == configs.BUNDLED["needle"]
    for name in ("./needle", pathlib.Path("needle")):
        with pytest.raises(UserError, match=r"^needle: no such model directory"):
            read_model_config(name)
        with pytest.raises(UserError, match=r"^needle: no such model directory"):
            at.load(name)


def test_a_checkpoint_of_two_types_computes_in_that_of_its_embedding(tmp_path, monkeypatch):
    path = tiny.write_checkpoint(tmp_path, tiny.SHAPES["base"], dtype="bfloat16") / "model.safetensors"
    wider = lambda name, x: x.float() if "norm" in name or name.endswith("bias") else x
    save_file({name: wider(name, x) for name, x in load_file(path).items()}, path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where the checkpoint's own type is the default
    model = at.load(tmp_path, attention="xla")
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model.module))} == {"bfloat16"}


def test_a_missing_field_is_named():
    raw = flat()
    del raw["num_key_value_heads"]
    with pytest.raises(UserError, match="num_key_value_heads"):
        model_config(raw)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen2.5-vl-3b", 3.754623), ("qwen2.5-vl-7b", 8.292167), ("qwen2.5-vl-32b", 33.452718),
     ("qwen2.5-vl-72b", 73.410777)],
)  # fmt: skip
def test_real_sizes_have_the_published_number_of_parameters(name, billions):
    assert parameters.count(SIZES[name]) / 1e9 == pytest.approx(billions, abs=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    import transformers

    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(hf_config(SIZES[name]))
    theirs = {parameters.canonical_key(key): tuple(value.shape) for key, value in model.state_dict().items()}
    if SIZES[name].text.tied:
        del theirs["lm_head.weight"]
    ours = {key: p.stored_shape for p in parameters.parameters(SIZES[name]) for key in p.keys}
    assert ours == theirs


def hf_config(size):
    import transformers

    text, vision = size.text, size.vision
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": text.width, "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads, "intermediate_size": text.ff, "vocab_size": text.vocab,
        },
        vision_config={
            "depth": vision.layers, "hidden_size": vision.width, "num_heads": vision.heads,
            "intermediate_size": vision.ff, "out_hidden_size": vision.out_width,
        },
        tie_word_embeddings=text.tied,
    )  # fmt: skip


def test_stored_tensors_come_back_from_our_layout():
    for parameter in parameters.parameters(small()):
        tensor = np.arange(np.prod(parameter.stored_shape)).reshape(parameter.stored_shape)
        ours = parameter.from_stored(tensor)
        assert ours.shape == parameter.layer_shape
        np.testing.assert_array_equal(parameter.to_stored(ours), tensor)


def small():
    return model_config(flat())


def test_the_query_kernel_literally():
    query = next(p for p in parameters.parameters(small()) if p.path[-1] == "q_kernel")
    config = small().text
    stored = np.random.default_rng(0).normal(size=query.stored_shape)
    ours = query.from_stored(stored)
    for head in range(config.heads):
        for unit in range(config.head_dim):
            np.testing.assert_array_equal(ours[:, head, unit], stored[head * config.head_dim + unit])


def test_initialisation_follows_the_table():
    config = small()
    values = parameters.initialise(config, jax.random.key(0))
    for parameter, value in parameters.leaves(config, values):
        assert value.shape == parameter.shape and value.dtype == jnp.float32
    assert bool((values["text"]["norm"] == 1).all()) and not values["text"]["layers"]["q_bias"].any()
    assert float(values["text"]["layers"]["down_kernel"].std()) == pytest.approx(config.text.ff**-0.5, rel=0.05)
    again = parameters.initialise(config, jax.random.key(0))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), values, again)))


@pytest.mark.parametrize(("name", "gflop"), [("3b", 5.55), ("7b", 13.05), ("32b", 62.4), ("72b", 140.4)])
def test_prefill_costs_the_published_flops_per_token(name, gflop):
    config = SIZES[f"qwen2.5-vl-{name}"]
    attention = 4 * config.text.layers * config.text.heads * config.text.head_dim
    assert (costs.text_flops(config, 1) - attention) / 1e9 == pytest.approx(gflop, rel=2e-3)
    split = costs.text_flops(config, 100) + costs.text_flops(config, 23, 100)
    assert split == pytest.approx(costs.text_flops(config, 123))


def test_vision_costs_the_published_flops_per_merged_token():
    # 22 x 40 patches: 220 merged tokens per slot.
    per_token = costs.vision_flops(SIZES["qwen2.5-vl-7b"], 10, 22, 40) / 10 / 220
    assert per_token / 1e9 == pytest.approx(5.1, rel=0.05)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "other"}, "--preset=other"), ({"fps": 0.0}, "--fps=0.0"), ({"budget": 0}, "--budget=0"),
        ({"bottom_fraction": 1.5}, "--bottom_fraction=1.5"), ({"temperature": float("nan")}, "--temperature=nan"),
        ({"reference_layer": 4}, "--reference_layer=4"), ({"colour": 1}, "colour"),
        ({"over_selection": float("inf")}, "--over_selection=inf: must be a finite number"),
        ({"budget": float("inf")}, "--budget=inf: must be a whole number"),
        ({"max_frames": 2.5}, "--max_frames=2.5: must be a whole number"),
        ({"fps": "4"}, "--fps=4: must be a number"), ({"fps": True}, "--fps=True: must be a number"),
        ({"budget": True}, "--budget=True: must be a whole number"), ({"budget": 10**400}, "must be at most"),
        ({"preset": np.arange(2)}, "--preset=.0 1.: choose one of"), ({"preset": None}, "--preset=None: choose one of"),
        ({"debias": "no"}, "--debias=no: must be true or false"),
        ({"seed": 2**32}, "--seed=4294967296: must be at most 4294967295"),  # JAX would take the lower 32 bits
        ({"stop_groups": 2**31}, "--stop_groups=2147483648: must be at most 2147483647"),
        ({"give_up_groups": 2**31}, "--give_up_groups=2147483648: must be at most 2147483647"),
        ({"max_answer_tokens": 2**20 + 1}, "--max_answer_tokens=1048577: must be at most 1048576"),
        ({"sampling_temperature": 1e-7}, "--sampling_temperature=1e-07: must be 0 .greedy. or at least"),
    ],
)  # fmt: skip
def test_a_setting_out_of_bounds_names_its_flag(given, words):
    with pytest.raises(UserError, match=words):
        AdaptTokenConfig.for_model(small(), **given)


def test_numbers_of_numpy_become_plain_ones():
    config = AdaptTokenConfig(budget=np.int64(8), fps=np.float32(0.5), temperature=1, debias=np.bool_(True))
    assert [type(value) for value in (config.budget, config.fps, config.temperature)] == [int, float, float]
    assert (config.budget, config.fps, config.temperature, config.debias) == (8, 0.5, 1.0, True)
    keys = [jax.random.key_data(jax.random.key(AdaptTokenConfig(seed=seed).seed)) for seed in (0, 1, 2**32 - 1)]
    assert len({tuple(key.tolist()) for key in keys}) == 3


def test_the_defaults_are_the_documented_ones():
    config = AdaptTokenConfig()
    assert (config.fps, config.max_frames, config.max_pixels, config.slots_per_group) == (4.0, 4096, 308 * 560, 64)
    assert (config.budget, config.over_selection, config.temperature, config.bottom_fraction) == (7040, 1.1, 2.0, 0.1)
    assert (config.stop_groups, config.stop_entropy, config.stop_agreement) == (3, 0.25, True)
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)


@pytest.mark.parametrize(("name", "layer"), [("3b", 26), ("7b", 20), ("32b", 46), ("72b", 57)])
def test_the_reference_layer_has_the_same_relative_depth(name, layer):
    model = SIZES[f"qwen2.5-vl-{name}"]
    assert AdaptTokenConfig.for_model(model).reference_layer == layer
    assert AdaptTokenConfig.for_model(model, reference_layer=3).reference_layer == 3
