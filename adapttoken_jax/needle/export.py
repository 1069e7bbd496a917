"""The needle model as a Hugging Face Qwen2.5-VL directory: weights and all that answering and transformers read."""

import json
import pathlib
import tempfile

from adapttoken_jax.config import ModelConfig
from adapttoken_jax.needle.tokenizer import CONTROL_TOKENS, make_tokenizer
from checkpoints_convert import huggingface

# The least pixels of a frame: one visual token. A released checkpoint would enlarge a needle video many times.
_MIN_PIXELS = 28 * 28
_MAX_PIXELS = 308 * 560
_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def export(directory, config: ModelConfig, values: dict) -> None:
    """Writes a new directory: config, weights, tokenizer, generation and preprocessor settings.

    Args:
      directory: must not exist; it appears only when complete.
      config, values: the model and its parameters, the table's nested dictionary.

    Raises:
      UserError: `directory` exists or cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_companions(pathlib.Path(scratch), config)
        huggingface.write(directory, config, values, companions=scratch)


def write_companions(directory: pathlib.Path, config: ModelConfig) -> None:
    """Writes everything but the weights."""
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in CONTROL_TOKENS}
    files = {
        "config.json": model_json(config, ids),
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
        "preprocessor_config.json": _preprocessor(config),
        "video_preprocessor_config.json": _preprocessor(config) | {"video_processor_type": "Qwen2VLVideoProcessor"},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": [t for t in CONTROL_TOKENS if t != "<|endoftext|>"],
            "model_max_length": 32768,
            "clean_up_tokenization_spaces": False,
            "chat_template": _TEMPLATE,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_json(config: ModelConfig, ids: dict[str, int]) -> dict:
    """`config.json` in the flat layout of the released checkpoints."""
    text, vision = config.text, config.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": config.model_type,
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "intermediate_size": text.ff,
        "vocab_size": text.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": text.eps,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_sections)},
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": text.tied,
        "torch_dtype": "float32",
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": config.vision_start,
        "vision_end_token_id": config.vision_end,
        "image_token_id": config.image_pad,
        "video_token_id": config.video_pad,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision.layers,
            "hidden_size": vision.width,
            "num_heads": vision.heads,
            "intermediate_size": vision.ff,
            "out_hidden_size": vision.out_width,
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "spatial_merge_size": vision.merge,
            "window_size": vision.window,
            "in_channels": vision.channels,
            "tokens_per_second": vision.tokens_per_second,
            "hidden_act": "silu",
        },
    }


def _preprocessor(config: ModelConfig) -> dict:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": _MIN_PIXELS,
        "max_pixels": _MAX_PIXELS,
        "patch_size": config.vision.patch,
        "temporal_patch_size": config.vision.temporal_patch,
        "merge_size": config.vision.merge,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
