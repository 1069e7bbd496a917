"""Checkpoints of random bit patterns (NaNs, infinities and subnormal numbers among them) under the hub's keys.

Keys and shapes come from transformers' own model class, files from safetensors' own writer.
"""

import json
import pathlib

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

from tests import tiny

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
SMALL = tiny.TinyShape(layers=3, vision_layers=2, full_attention_layers=(1,), vocab=307, kv_heads=4)
SMALL_TIED = tiny.TinyShape(layers=1, vision_layers=1, full_attention_layers=(0,), tied=True)


def random_array(shape, dtype, rng) -> np.ndarray:
    """Uniform over all bit patterns of the dtype."""
    raw = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def tensors(shape: tiny.TinyShape, dtype="bfloat16", seed=0) -> dict[str, np.ndarray]:
    """Hub key -> random bits; no `lm_head.weight` for a tied shape."""
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(tiny.hf_config(shape))
    rng = np.random.default_rng(seed)
    named = {hub_key(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shape.tied:
        named.pop("lm_head.weight", None)
    return {name: random_array(size, DTYPES[dtype], rng) for name, size in named.items()}


def hub_key(name: str) -> str:
    """transformers 5's name -> the published checkpoints'."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write(directory: pathlib.Path, shape: tiny.TinyShape, values: dict[str, np.ndarray], shards=1) -> pathlib.Path:
    """Writes the values, a flat `config.json` and, from two shards on, an index."""
    tiny.write_checkpoint(directory, shape)
    (directory / "model.safetensors").unlink()
    if shards == 1:
        save_file(values, directory / "model.safetensors")
        return directory
    place = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(values)}
    for file in sorted(set(place.values())):
        save_file({name: values[name] for name in values if place[name] == file}, directory / file)
    index = {"metadata": {}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return directory


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of every safetensors file of a directory, as safetensors' own reader sees it."""
    return {key: value for path in sorted(directory.glob("*.safetensors")) for key, value in load_file(path).items()}


def same_bits(a, b) -> bool:
    """Equal dtype, shape and bit pattern."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
