"""Tiny random Qwen2.5-VL checkpoints for the tests, in every layout that is met on disk.

The names and sizes of the weights come from transformers' own model class, so that a test which reads such a checkpoint
has an oracle that shares no code with this library. Weights depend only on the shape's `seed` and on the tensor's name:
two checkpoints of one shape hold the same numbers whatever their layout, up to the rounding of their dtype.
"""

import dataclasses
import json
import math
import pathlib
import zlib

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

from adapttoken_jax import geometry
from adapttoken_jax.parity import pytorch_method

# At these sizes a second thread only adds overhead, and test workers share the cores.
torch.set_num_threads(1)

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
# A leading space is written as byte-level BPE stores it. No word starts with a capital letter, so that the option
# letters stay tokens of their own.
_WORDS = ("Ġthe", "Ġwhat", "Ġis", "Ġof", "Ġvideo", "Ġand", "ing", "ou")

CONFIG_LAYOUTS = ("flat", "nested")
KEY_LAYOUTS = ("old", "new")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class TinyShape:
    """Sizes of one tiny checkpoint; `window` in pixels. transformers needs a vision head size divisible by 4."""

    width: int = 64
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ff: int = 96
    sections: tuple[int, int, int] = (2, 3, 3)
    vocab: int = 320
    tied: bool = False
    rope_theta: float = 1e6
    vision_width: int = 32
    vision_layers: int = 4
    vision_heads: int = 2
    vision_ff: int = 48
    full_attention_layers: tuple[int, ...] = (1, 3)
    window: int = 112
    tokens_per_second: int = 2
    seed: int = 0


SHAPES: dict[str, TinyShape] = {
    "base": TinyShape(),
    "tied": TinyShape(tied=True, layers=3, seed=1),
    "multi_head": TinyShape(width=48, heads=6, kv_heads=6, sections=(2, 1, 1), ff=80, seed=2),
    "multi_query": TinyShape(width=64, heads=4, kv_heads=1, sections=(4, 2, 2), window=56, seed=3),
    "seven_per_kv": TinyShape(width=112, heads=14, kv_heads=2, sections=(2, 1, 1), layers=3, seed=4),
    "four_kv": TinyShape(width=96, heads=8, kv_heads=4, sections=(2, 2, 2), layers=2, tied=True, seed=5),
    "odd_sizes": TinyShape(
        ff=37, vocab=307, vision_width=40, vision_ff=45, window=84, tokens_per_second=3, rope_theta=1e4, seed=6
    ),
    "only_windows": TinyShape(full_attention_layers=(), window=84, vision_width=24, vision_layers=2, seed=7),
    "only_full": TinyShape(full_attention_layers=(0, 1, 2), vision_layers=3, window=28, vision_width=48, seed=8),
    "single_layers": TinyShape(layers=1, vision_layers=1, full_attention_layers=(0,), kv_heads=1, seed=9),
    "deep": TinyShape(layers=7, vision_layers=5, full_attention_layers=(2, 4), window=56, width=32, sections=(1, 1, 2),
                      seed=10),
    "needle": TinyShape(
        width=128, sections=(4, 6, 6), rope_theta=1e4, ff=192, vision_width=64, vision_heads=4, vision_layers=2,
        vision_ff=128, full_attention_layers=(1,), window=56, seed=11,
    ),
}  # fmt: skip


def write_checkpoint(directory, shape: TinyShape, config_layout="flat", key_layout="old", shards=1, dtype="float32"):
    """Writes a checkpoint directory with configuration, weights and tokenizer; returns its path.

    Args:
      directory: created if need be.
      shape: sizes and seed.
      config_layout: `flat` (transformers 4, the hub's) or `nested` (transformers 5).
      key_layout: `old` (`model.layers`, `visual`) or `new` (`model.language_model.layers`, `model.visual`).
      shards: number of safetensors files; from 2 on with an index. Neighbouring tensors fall into different files.
      dtype: `float32`, `bfloat16` or `float16` on disk.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"flat": _flat_config, "nested": _nested_config}[config_layout](shape, dtype)
    _write_json(directory / "config.json", config)
    _write_weights(directory, _on_disk(random_weights(shape), shape.tied, key_layout, DTYPES[dtype]), shards)
    write_tokenizer(directory)
    return directory


def load_torch(directory) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """The checkpoint as transformers reads it: float32, eager attention, evaluation mode."""
    return pytorch_method.load_model(directory)


def video_arguments(inputs: pytorch_method.MethodInputs) -> dict:
    """The prompt with the whole video in it, as transformers' forward and generate take it."""
    video_pad, visual = special_ids()["<|video_pad|>"], math.prod(inputs.grid) // 4
    prompt = [*inputs.prefix_ids, *[video_pad] * visual, *inputs.suffix_ids]
    return {
        "input_ids": torch.tensor([prompt]),
        "mm_token_type_ids": torch.tensor([[2 if token == video_pad else 0 for token in prompt]]),
        "pixel_values_videos": torch.tensor(inputs.patches),
        "video_grid_thw": torch.tensor([inputs.grid]),
        "second_per_grid_ts": torch.tensor([inputs.seconds_per_slot]),
    }


def generate(model, inputs: pytorch_method.MethodInputs, tokens: int, **arguments) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, an end token included, and logits [tokens, V] of transformers' `generate`, from pixels on.

    `arguments` go to it beside those of `video_arguments`.
    """
    settings = transformers.GenerationConfig(
        max_new_tokens=tokens, eos_token_id=list(inputs.eos_ids), pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    given = {**video_arguments(inputs), **arguments}
    output = model.generate(**given, generation_config=settings)
    return output.sequences[0, given["input_ids"].shape[1] :].tolist(), torch.cat(output.logits).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


def _token_fields() -> dict:
    ids = special_ids()
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def _text_fields(shape: TinyShape) -> dict:
    return {
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.ff,
        "max_position_embeddings": 32768,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def _vision_fields(shape: TinyShape) -> dict:
    return {
        "depth": shape.vision_layers,
        "fullatt_block_indexes": list(shape.full_attention_layers),
        "hidden_act": "silu",
        "hidden_size": shape.vision_width,
        "intermediate_size": shape.vision_ff,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": shape.tokens_per_second,
        "window_size": shape.window,
    }


def _flat_config(shape: TinyShape, dtype: str) -> dict:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_token_fields(),
        **_text_fields(shape),
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.sections)},
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "transformers_version": "4.49.0",
        "vision_config": {**_vision_fields(shape), "in_chans": 3, "spatial_patch_size": 14},
    }


def _nested_config(shape: TinyShape, dtype: str) -> dict:
    """What transformers 5 itself writes for this model."""
    config = {**hf_config(shape).to_dict(), "dtype": dtype}
    for part in ("text_config", "vision_config"):
        config[part] = {**config[part], "dtype": dtype}
    return config


def hf_config(shape: TinyShape) -> transformers.Qwen2_5_VLConfig:
    """The shape as a transformers configuration object."""
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta, "mrope_section": list(shape.sections)}
    tokens = _token_fields()
    text = {**_text_fields(shape), "rope_parameters": rope, "tie_word_embeddings": shape.tied}
    text |= {key: tokens[key] for key in ("bos_token_id", "eos_token_id")}
    return transformers.Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config=text,
        vision_config=_vision_fields(shape),
        tie_word_embeddings=shape.tied,
        **{key: value for key, value in tokens.items() if key not in text},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def random_weights(shape: TinyShape) -> dict[str, torch.Tensor]:
    """Float32 weights under transformers 5's names; `lm_head.weight` is the embedding itself if the shape is tied."""
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(hf_config(shape))
    weights = {name: _random(name, tensor.shape, shape.seed) for name, tensor in model.state_dict().items()}
    if shape.tied:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    return weights


def _random(name: str, shape, seed: int) -> torch.Tensor:
    normal = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(tuple(shape))
    return torch.tensor(normal * _std(name, shape) + _is_norm(name), dtype=torch.float32)


def _is_norm(name: str) -> bool:
    return name.endswith(("norm.weight", "layernorm.weight", "norm1.weight", "norm2.weight", "ln_q.weight"))


def _std(name: str, shape) -> float:
    """Large enough that attention is far from flat and small enough that no softmax saturates."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 0.3
    if _is_norm(name):
        return 0.2
    if name.endswith("patch_embed.proj.weight"):
        return 1 / np.sqrt(np.prod(shape[1:]))
    return 0.15


def _on_disk(weights, tied: bool, key_layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Renamed and rounded; a tied checkpoint has no `lm_head.weight` on disk, like the released 3B."""
    rename = {"old": _old_key, "new": str}[key_layout]
    kept = {name: tensor for name, tensor in weights.items() if not (tied and name == "lm_head.weight")}
    return {rename(name): tensor.to(dtype).contiguous() for name, tensor in kept.items()}


def _old_key(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def _write_weights(directory: pathlib.Path, weights, shards: int) -> None:
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(weights)}
    for file in sorted(set(place.values())):
        part = {name: tensor for name, tensor in weights.items() if place[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    _write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and the other small files
# ---------------------------------------------------------------------------------------------------------------------


def special_ids() -> dict[str, int]:
    """Ids of the special tokens, the same in every tiny checkpoint."""
    first = len(_vocabulary())
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


def _merges() -> list[tuple[str, str]]:
    return list(dict.fromkeys((word[:i], word[i]) for word in _WORDS for i in range(1, len(word))))


def _vocabulary() -> dict[str, int]:
    """All 256 bytes, then what the merges make: any text has an encoding."""
    pieces = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _merges())]
    return {piece: i for i, piece in enumerate(pieces)}


def make_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE with Qwen's special tokens and few merges; every letter is a token of its own."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_vocabulary(), merges=_merges()))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(directory) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `preprocessor_config.json`."""
    directory, ids = pathlib.Path(directory), special_ids()
    make_tokenizer().save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "chat_template": _CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 131072,
        },
    )
    stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    generation = {"bos_token_id": stops[1], "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[1]}
    _write_json(directory / "generation_config.json", generation)
    _write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": 12845056,
            "merge_size": 2,
            "min_pixels": 3136,
            "patch_size": 14,
            "temporal_patch_size": 2,
        },
    )


def position_ids(grid, before: int, after: int, rule: str, seconds_per_slot=1.5, ids_per_second=2.0) -> np.ndarray:
    """M-RoPE ids int32[3, S] of `before` tokens of text, a video of `grid` patches merged by two, `after` tokens."""
    slot, row, col = np.indices((grid[0], grid[1] // 2, grid[2] // 2)).reshape(3, -1)
    visual = geometry.token_position_ids(before, geometry.time_ids(slot, seconds_per_slot, ids_per_second), row, col)
    start = geometry.text_start(rule, before, visual, *grid[1:], 2)
    text = lambda first, length: np.tile(np.arange(first, first + length), (3, 1))
    return np.concatenate([text(0, before), visual, text(start, after)], 1)


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
