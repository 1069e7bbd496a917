"""Frozen configurations: the model's sizes, read from its checkpoint, and the method's settings, chosen by the user."""

import dataclasses
import json
import math
import numbers
import operator
import pathlib
from collections.abc import Mapping
from typing import Any

from adapttoken_jax.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. `window` is the side of an attention window in pixels, as in `config.json`."""

    layers: int
    width: int
    heads: int
    ff: int
    out_width: int
    full_attention_layers: tuple[int, ...]
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    channels: int = 3
    tokens_per_second: float = 2
    eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """H, channels per attention head of the tower."""
        return self.width // self.heads

    @property
    def patch_features(self) -> int:
        """Numbers per flattened patch: channels x temporal_patch x patch x patch."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def pixels_per_token(self) -> int:
        """Side in pixels of one merged token; frame sides are multiples of it."""
        return self.patch * self.merge


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text decoder. `mrope_sections` are in rotary frequencies: temporal, height, width."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ff: int
    vocab: int
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 1e6
    eps: float = 1e-6
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One Qwen2.5-VL model. Token ids are the checkpoint's own."""

    vision: VisionConfig
    text: TextConfig
    vision_start: int = 151652
    vision_end: int = 151653
    image_pad: int = 151655
    video_pad: int = 151656
    model_type: str = "qwen2_5_vl"


_VISION_7B = VisionConfig(
    layers=32, width=1280, heads=16, ff=3420, out_width=3584, full_attention_layers=(7, 15, 23, 31)
)  # fmt: skip


def _size(width, layers, heads, kv_heads, ff, vocab, vision_ff=3420, tied=False) -> ModelConfig:
    text = TextConfig(layers, width, heads, kv_heads, width // heads, ff, vocab, tied=tied)
    return ModelConfig(dataclasses.replace(_VISION_7B, out_width=width, ff=vision_ff), text)


SIZES: dict[str, ModelConfig] = {
    "qwen2.5-vl-3b": _size(2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-vl-7b": _size(3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-vl-32b": _size(5120, 64, 40, 8, 27648, 152064, vision_ff=3456),
    "qwen2.5-vl-72b": _size(8192, 80, 64, 8, 29568, 152064, vision_ff=3456),
}


def model_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Builds a `ModelConfig` from the content of a Hugging Face `config.json`.

    Reads the flat layout (transformers 4: text sizes at the top, `rope_scaling`) and the nested one (transformers 5:
    `text_config`, `rope_parameters`). `source` names the file in errors.

    Raises:
      UserError: another model type, a missing field, one of the wrong kind, or a feature that this model code does not
        have.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{source}: must hold a JSON object")
    if raw.get("model_type") != "qwen2_5_vl":
        raise UserError(f"{source}: model_type is {raw.get('model_type')!r}; only 'qwen2_5_vl' is supported")
    try:
        text = {**_TEXT_DEFAULTS, **raw, **raw["text_config"]} if "text_config" in raw else raw
        return _model_config(raw, text, {**_VISION_DEFAULTS, **raw["vision_config"]}, source)
    except KeyError as error:
        raise UserError(f"{source}: the field {error} is missing") from None
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source}: a field has a value of the wrong kind ({error})") from None


# What a nested part means that lacks a field: the default of transformers' class, which several of its versions leave
# out. It need not be what a released model has: their tokens_per_second is 2.
_VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
    "window_size": 112, "tokens_per_second": 4,
}  # fmt: skip
_TEXT_DEFAULTS = {
    "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
    "intermediate_size": 29568, "vocab_size": 152064, "rms_norm_eps": 1e-5,
}  # fmt: skip

# Fields of `ModelConfig` and the keys of config.json that replace their defaults.
_TOKEN_IDS = {
    "vision_start": "vision_start_token_id",
    "vision_end": "vision_end_token_id",
    "image_pad": "image_token_id",
    "video_pad": "video_token_id",
}


def _model_config(raw, text, vision, source) -> ModelConfig:
    _check_values(raw, text, vision, source)
    _check_supported(text, vision, source)
    tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    token_ids = {field: raw[key] for field, key in _TOKEN_IDS.items() if key in raw}
    config = ModelConfig(_vision_config(vision), _text_config(text, tied), **token_ids)
    _check_sizes(config.text, config.vision, source)
    return config


def _check_sizes(text: TextConfig, vision: VisionConfig, source) -> None:
    """Sizes that are possible each by itself, but not together."""
    sections, head_dim = text.mrope_sections, text.head_dim
    for fit, said in (
        (2 * sum(sections) == head_dim,
         f"mrope_section {list(sections)} does not add up to half of head_dim {head_dim}"),
        (text.heads % text.kv_heads == 0,
         f"num_attention_heads {text.heads} is no multiple of num_key_value_heads {text.kv_heads}"),
        (vision.width % (4 * vision.heads) == 0,
         f"vision_config.hidden_size {vision.width} is no multiple of four times num_heads {vision.heads}"),
        (vision.window >= vision.pixels_per_token,
         f"vision_config.window_size {vision.window} is less than a token's side, {vision.pixels_per_token} pixels"),
        (vision.out_width == text.width,
         f"vision_config.out_hidden_size {vision.out_width} differs from hidden_size {text.width}"),
    ):  # fmt: skip
        if not fit:
            raise UserError(f"{source}: {said}")


# Keys whose values are above 0 where they are given: whole numbers, other numbers, and those that may be null.
_WHOLE = {
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "depth", "num_heads", "out_hidden_size", "patch_size", "temporal_patch_size"),
    *("spatial_merge_size", "window_size", "in_channels", "in_chans"),
}
_NUMBERS = {"rms_norm_eps", "rope_theta", "tokens_per_second"}
_NULLABLE = {"num_key_value_heads", "head_dim", "rope_theta"}


def _check_values(raw, text, vision, source) -> None:
    parts = (("", text), ("", _rope(text)), ("vision_config.", vision), ("vision_config.", _rope(vision)))
    for place, part in parts:
        for key in sorted(part.keys() & (_WHOLE | _NUMBERS)):
            value, kinds = part[key], (int,) if key in _WHOLE else (int, float)
            valid = key in _NULLABLE if value is None else type(value) in kinds and 0 < value < math.inf
            if not valid:
                kind = "a whole number" if key in _WHOLE else "a number"
                raise UserError(f"{source}: {place}{key} is {value!r}; it must be {kind} above 0")
    for key in _TOKEN_IDS.values():
        if type(raw.get(key, 0)) is not int:
            raise UserError(f"{source}: {key} is {raw[key]!r}; it must be a whole number")
    for key in ("tie_word_embeddings", "use_sliding_window"):
        for value in (raw.get(key), text.get(key)):
            if not isinstance(value, bool | None):
                raise UserError(f"{source}: {key} is {value!r}; it must be true or false")
    if not _whole_numbers(layers := vision["fullatt_block_indexes"]):
        raise UserError(f"{source}: vision_config.fullatt_block_indexes is {layers!r}; it must list layers, from 0 on")
    sections = _mrope_sections(text)
    if not (_whole_numbers(sections) and len(sections) == 3):
        raise UserError(f"{source}: mrope_section is {sections!r}; it must be three whole numbers")


def _whole_numbers(value) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _rope(text) -> dict:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _mrope_sections(text) -> list[int]:
    return _rope(text).get("mrope_section", [16, 24, 24])


def _check_supported(text, vision, source) -> None:
    kind = _rope(text).get("rope_type", _rope(text).get("type", "default"))
    if kind not in ("default", "mrope"):
        raise UserError(f"{source}: rope type {kind!r} is not supported; only 'mrope' (plain M-RoPE) is")
    if quantised := text.get("quantization_config"):
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, Mapping) else quantised
        raise UserError(f"{source}: a quantised checkpoint ({method}); give the one that it was made from")
    if text.get("use_sliding_window"):
        raise UserError(f"{source}: use_sliding_window is not supported; set it to false")
    for part, activation in (("text", text.get("hidden_act")), ("vision", vision.get("hidden_act"))):
        if activation not in (None, "silu"):
            raise UserError(f"{source}: {part} hidden_act {activation!r} is not supported; only 'silu' is")


def _vision_config(vision) -> VisionConfig:
    return VisionConfig(
        layers=vision["depth"],
        width=vision["hidden_size"],
        heads=vision["num_heads"],
        ff=vision["intermediate_size"],
        out_width=vision["out_hidden_size"],
        # A tower that was cut may still name layers that it had.
        full_attention_layers=tuple(i for i in vision["fullatt_block_indexes"] if i < vision["depth"]),
        patch=vision["patch_size"],
        temporal_patch=vision["temporal_patch_size"],
        merge=vision["spatial_merge_size"],
        window=vision["window_size"],
        channels=vision.get("in_channels", vision.get("in_chans", 3)),
        tokens_per_second=vision["tokens_per_second"],
        rope_theta=float(_rope(vision).get("rope_theta") or 1e4),
    )


def _text_config(text, tied: bool) -> TextConfig:
    rope, heads = _rope(text), text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    return TextConfig(
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"] or heads,
        head_dim=head_dim,
        ff=text["intermediate_size"],
        vocab=text["vocab_size"],
        mrope_sections=tuple(_mrope_sections(text)),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
        eps=text["rms_norm_eps"],
        tied=tied,
    )


# Checkpoints that come with the package, by the name that stands for their directory.
BUNDLED = {"needle": pathlib.Path(__file__).parent / "needle" / "checkpoint"}


def checkpoint_directory(name) -> pathlib.Path:
    """The directory of a checkpoint: `name` itself, unless it is a bundled model's and no checkpoint lies there.

    A `Path` is a directory and no name.

    Raises:
      UserError: an empty name, which would be the current directory.
    """
    if not str(name):
        raise UserError("model: the name is empty; give a checkpoint's directory")
    path = pathlib.Path(name)
    return path if (path / "config.json").is_file() or not isinstance(name, str) else BUNDLED.get(name, path)


def read_model_config(directory) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory, or of a bundled model.

    Raises:
      UserError: no such directory, no `config.json` in it, or not valid JSON.
    """
    path = checkpoint_directory(directory) / "config.json"
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such model directory (download a model of the hub first); bundled models: "
                        f"{', '.join(BUNDLED)}")  # fmt: skip
    if not path.is_file():
        raise UserError(f"{path.parent}: no config.json; {_where_it_may_be(path.parent)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    return model_config(raw, str(path))


def _where_it_may_be(directory: pathlib.Path) -> str:
    """What to give in place of a directory that is no checkpoint."""
    if snapshots := sorted(directory.glob("snapshots/*/config.json")):
        return f"give a directory below it, {snapshots[-1].parent}"
    if (directory / "adapter_config.json").is_file():
        return "it holds an adapter (LoRA); merge that into its base model, and give the result"
    return "give the directory of a Hugging Face or converted checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


METHODS = ("adapttoken", "lite", "flexselect", "uniform", "full")


def _choice(*values: str, help: str) -> Any:
    return dataclasses.field(default=values[0], metadata={"choices": values, "help": help})


def _number(default, *, help: str, low=None, high=None) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": help})


def _switch(default: bool, *, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def _plain(field: dataclasses.Field, value):
    """A setting as a plain Python value of its field's type: NumPy's numbers are welcome, numbers as text are not."""
    number = not isinstance(value, bool)
    try:
        if field.type is int and number:
            return operator.index(value)
        if field.type is float and number and isinstance(value, numbers.Real):
            return float(value)
        if field.type is bool and value in (True, False):
            return bool(value)
    except (TypeError, ValueError, OverflowError):
        pass
    if field.type is str:
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false"}[field.type]
    raise UserError(f"--{field.name}={value}: must be {kind}")


_INT32 = 2**31 - 1  # largest number of the compiled loops
_EXACT = 2**53  # beyond it floats leave whole numbers out


@dataclasses.dataclass(frozen=True)
class AdaptTokenConfig:
    """Every open choice of the method. A field's name is its command-line flag and its key in `result.json`.

    Raises:
      UserError: on construction, for a value of another type, outside the field's choices or bounds, or not finite.
    """

    preset: str = _choice("qwen-vl-utils", "flexselect", "hf", help="rules for sampling, size, resizer and time ids")
    fps: float = _number(4.0, low=1e-6, help="frames sampled per second of video")
    max_frames: int = _number(4096, low=1, high=_EXACT, help="most frames sampled from a video")
    max_pixels: int = _number(308 * 560, low=1, high=_EXACT, help="most pixels per resized frame")
    mrope: str = _choice("legacy", "hf5", help="where the text after the video starts in M-RoPE")
    slots_per_group: int = _number(64, low=1, high=_EXACT, help="temporal slots (frame pairs) per group")
    group_order: str = _choice("sequential", "bit_reversed", help="order in which groups are visited")
    reference_layer: int = _number(
        -1, low=-1, high=_INT32, help="0-based decoder layer that scores tokens; -1: the model's preset"
    )
    relevance_heads: str = _choice("max", "mean", help="reduction of attention over heads")
    relevance_text: str = _choice("max", "mean", help="reduction of attention over text tokens")
    relevance_queries: str = _choice("after_vision", "question", "last", help="text tokens whose attention counts")
    keep_after_reference: float = _number(
        1.0, low=1e-6, high=1.0, help="share of a group's tokens that layers after the reference layer see; 1: all"
    )
    debias: bool = _switch(False, help="divide relevance by its trend over the group and drop attention sinks")
    certainty: str = _choice(
        "neg_entropy", "option_entropy", "max_probability", "deepconf", help="certainty of one generated token"
    )
    bottom_fraction: float = _number(0.10, low=0.0, high=1.0, help="least certain share of tokens that is averaged")
    temperature: float = _number(2.0, low=1e-6, help="softmax temperature of the budget over groups")
    temperature_target: float = _number(
        0.0, low=0.0, help="groups that share the budget where one stands out; sets the temperature; 0: off"
    )
    min_tokens_per_group: int = _number(
        0, low=0, high=_EXACT, help="fewest tokens that a visited group gets, before redundant ones go"
    )
    budget: int = _number(7040, low=1, high=_EXACT, help="visual tokens in the final prompt")
    over_selection: float = _number(
        1.1, low=1.0, high=1e6, help="candidates before redundancy removal, as a multiple of budget"
    )
    coverage: float = _number(
        0.0, low=0.0, high=0.5, help="share of the budget that goes to one token per stretch of time; 0: off"
    )
    similarity: str = _choice("projector", "reference_layer", help="features whose similarity makes tokens redundant")
    proximity: str = _choice("exponential", "window", help="kernel of the spatio-temporal proximity")
    proximity_scale: float = _number(2.0, low=1e-6, help="scale of the proximity kernel in seconds")
    group_positions: str = _choice("compact", "real_time", help="time ids inside a group pass")
    final_positions: str = _choice("original", "compact", help="time ids of the surviving tokens")
    stop_rule: str = _choice("groups", "rerun", help="lite: what must be certain, groups or an answer over all so far")
    stop_groups: int = _number(
        3, low=1, high=_INT32, help="lite: certain groups needed to stop; rule rerun: groups between checks"
    )
    stop_entropy: float = _number(
        0.25, low=0.0, high=1e6, help="lite: an answer is certain at or below this entropy, nats"
    )
    stop_agreement: bool = _switch(True, help="lite: the certain groups must agree on the answer")
    stop_gain: float = _number(
        0.0, low=0.0, high=1e6, help="lite: nats that certainty must gain over the question without the video; 0: off"
    )
    give_up_groups: int = _number(
        0, low=0, high=_INT32, help="lite: stop after this many groups without a more certain one; 0: off"
    )
    max_answer_tokens: int = _number(16, low=1, high=2**20, help="most tokens of an answer")
    sampling_temperature: float = _number(0.0, low=0.0, high=1e6, help="temperature of the final answer; 0 is greedy")
    top_p: float = _number(1.0, low=1e-6, high=1.0, help="sample from the likeliest tokens that hold this probability")
    seed: int = _number(0, low=0, high=2**32 - 1, help="seed of sampling")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(field, getattr(self, field.name)))
            value, meta = getattr(self, field.name), field.metadata
            if "choices" in meta and not (isinstance(value, str) and value in meta["choices"]):
                raise UserError(f"--{field.name}={value}: choose one of {', '.join(meta['choices'])}")
            if field.type is float and not math.isfinite(value):
                raise UserError(f"--{field.name}={value}: must be a finite number")
            if meta.get("low") is not None and not value >= meta["low"]:
                raise UserError(f"--{field.name}={value}: must be at least {meta['low']}")
            if meta.get("high") is not None and not value <= meta["high"]:
                raise UserError(f"--{field.name}={value}: must be at most {meta['high']}")
        if 0 < self.temperature_target < 1:
            raise UserError(f"--temperature_target={self.temperature_target}: must be 0 (off) or at least 1")
        if 0 < self.sampling_temperature < 1e-6:  # logits that are divided by less leave the range of a float32
            raise UserError(f"--sampling_temperature={self.sampling_temperature}: must be 0 (greedy) or at least 1e-06")

    @classmethod
    def for_model(cls, model: ModelConfig, paper: bool = False, **given) -> "AdaptTokenConfig":
        """The model's preset with the given fields put over it; `reference_layer` comes out resolved and checked.

        With `paper`, the published values replace what this project found to be better for the model.

        Raises:
          UserError: an unknown field, a bad value, or a reference layer that the model does not have.
        """
        if not isinstance(model, ModelConfig):
            raise UserError("model: give a ModelConfig, such as the config of what adapttoken_jax.load returns")
        unknown = set(given) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"unknown configuration field: {', '.join(sorted(unknown))}")
        preset = model_preset(model)
        if paper:
            preset = {name: value for name, value in preset.items() if name in MODEL_FIELDS}
        return cls(**{**preset, **given}).resolve(model)

    def resolve(self, model: ModelConfig) -> "AdaptTokenConfig":
        """This configuration with `reference_layer` -1 replaced by the model's preset.

        Raises:
          UserError: a reference layer that the model does not have.
        """
        layer = self.reference_layer
        if layer >= model.text.layers:
            raise UserError(f"--reference_layer={layer}: the model has layers 0 to {model.text.layers - 1}")
        if layer >= 0:
            return self
        return dataclasses.replace(self, reference_layer=model_preset(model)["reference_layer"])


# Fields that belong to a model and its videos rather than to the method: the paper's values are for its own models.
MODEL_FIELDS = frozenset(
    {
        "preset",
        "fps",
        "max_frames",
        "max_pixels",
        "mrope",
        "slots_per_group",
        "budget",
        "reference_layer",
        "max_answer_tokens",
        "sampling_temperature",
        "top_p",
        "seed",
    }
)

# Depth of FlexSelect's reference layer in the 7B model (20 of 28); other sizes take the same relative depth until a
# needle probe of that size says otherwise.
_REFERENCE_DEPTH = 20 / 28

# (text width, layers) -> fields that differ from the defaults.
MODEL_PRESETS: dict[tuple[int, int], dict[str, Any]] = {
    (config.text.width, config.text.layers): {
        "reference_layer": round(config.text.layers * _REFERENCE_DEPTH), "budget": 7040,
    } for config in SIZES.values()
}  # fmt: skip
# The bundled needle model: sizes of its videos, and what validation videos recommend (docs/evidence.md).
MODEL_PRESETS[128, 4] = {
    "max_pixels": 56 * 56, "slots_per_group": 8, "budget": 8, "reference_layer": 0, "temperature": 0.15,
    "group_order": "bit_reversed", "final_positions": "compact",
    "stop_rule": "rerun", "stop_groups": 4, "stop_entropy": 0.05,
}  # fmt: skip


def model_preset(model: ModelConfig) -> dict[str, Any]:
    """Fields of `AdaptTokenConfig` that the model's row in `MODEL_PRESETS` sets; unlisted sizes get the depth rule."""
    fallback = {"reference_layer": min(model.text.layers - 1, round(model.text.layers * _REFERENCE_DEPTH))}
    return MODEL_PRESETS.get((model.text.width, model.text.layers), fallback)
