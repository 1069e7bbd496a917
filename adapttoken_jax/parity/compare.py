"""`adapttoken compare`: PyTorch beside this library on one video and question, stage by stage.

Each stage gets the same input on both sides (the PyTorch one's output of the stage before), so that a difference shows
where it arises. The last rows run the whole method on both sides.
"""

import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from adapttoken_jax import pipeline
from adapttoken_jax.config import AdaptTokenConfig, checkpoint_directory, read_model_config
from adapttoken_jax.errors import UserError
from adapttoken_jax.geometry import window_layout
from adapttoken_jax.loading import load
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.parity import pytorch_method as oracle
from adapttoken_jax.prompt import build_prompt
from adapttoken_jax.video import PRESETS, Clip, FrameReader
from checkpoints_convert.load import checkpoint_format

# One rounding step of a resized 8-bit channel after normalisation; the two resizers' sums may round apart by one.
_LEVEL = 1 / 255 / 0.26130258


def compare(directory, video, question: str, options, overrides: dict, tolerance: float) -> tuple[list[dict], bool]:
    """Runs both sides in float32.

    Args:
      directory: checkpoint directory.
      video, question, options: as `pipeline.answer`.
      overrides: fields of `AdaptTokenConfig`.
      tolerance: largest difference that passes, relative to the stage's largest value.

    Returns:
      Rows {"stage", "max_abs", "max_rel", "ok"} and whether all are within the tolerance. "patches" may differ by one
      8-bit level, selected tokens and answer ids not at all.

    Raises:
      UserError: as `pipeline.answer`.
    """
    if checkpoint_format(checkpoint_directory(directory)) != "huggingface":
        raise UserError(f"--model={directory}: transformers cannot read it; adapttoken convert --to huggingface first")
    config = AdaptTokenConfig.for_model(read_model_config(directory), **overrides)
    oracle.check(config, "adapttoken")
    model = load(directory, dtype="float32")
    result = pipeline.answer(model, video, question, options, config, trace=True)
    plan = pipeline.plan_run(model.config, video, config, "adapttoken")
    if not sys.stderr.isatty():  # a bar in a log is noise
        transformers.utils.logging.disable_progress_bar()
    torch_model = oracle.load_model(model.path)
    inputs = method_inputs(model, plan.clip, result.trace, question, options)
    rows = [_row("patches", result.trace["patches"], torch_patches(plan.clip), 1.01 * _LEVEL, relative=False)]
    rows += [
        _row(stage, ours, theirs, tolerance) for stage, ours, theirs in _stages(model, torch_model, inputs, config)
    ]
    rows += _method_rows(result, oracle.run(torch_model, inputs, config, "adapttoken"), tolerance)
    return rows, all(row["ok"] for row in rows)


def method_inputs(model, clip: Clip, trace: dict, question: str, options) -> oracle.MethodInputs:
    """What the PyTorch version of the method starts from: this library's prompt, and what its trace holds."""
    prompt = build_prompt(model.tokenizer, question, options)
    return oracle.MethodInputs(
        patches=trace["patches"], grid=clip.grid, frame_times=trace["frame_times"],
        seconds_per_slot=clip.seconds_per_slot, frame_indices=clip.frame_indices,
        prefix_ids=prompt.prefix_ids, suffix_ids=prompt.suffix_ids, question_span=prompt.question_span,
        letter_ids=list(prompt.letter_ids) or None, eos_ids=model.tokenizer.eos,
    )  # fmt: skip


def torch_patches(clip: Clip) -> np.ndarray:
    """Patches float32[T h w, 1176] of a clip, resized, normalised and cut by PyTorch."""
    wanted = clip.slot_frames.reshape(-1)
    with FrameReader(clip.info, np.unique(wanted)) as reader:
        frames = {i: _torch_resized(image, clip) for i, image in reader.read(np.unique(wanted))}
    video = torch.stack([frames[i] for i in wanted])  # [2 T, 3, H, W]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    v, (slots, rows, cols) = clip.vision, clip.grid
    cut = ((video / 255 - mean) / std).reshape(
        slots, v.temporal_patch, v.channels, rows // v.merge, v.merge, v.patch, cols // v.merge, v.merge, v.patch
    )
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(slots * rows * cols, v.patch_features).numpy()


def _torch_resized(image: np.ndarray, clip: Clip) -> torch.Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    if PRESETS[clip.preset].resizer == "float32":
        pixels = pixels.float()
    size = (clip.height, clip.width)
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].float().clamp(0, 255).round()


def decoder_stages(module: Qwen25VL, embeddings: np.ndarray, position_ids: np.ndarray, context: int) -> dict:
    """Every decoder layer's output "layers"[L, S, D] and "logits"[S - context, V] of one unpadded prompt.

    Runs as the method does: `context` positions are prefilled, the rest extends them.
    """

    @jax.jit
    def run(text, x, ids):
        T = x.shape[0] - context
        past, first = text.prefill(
            x[None, :context], ids[None, :, :context], jnp.ones((1, context), bool), return_layers=True
        )
        hidden, _, rest = text.extend(
            x[None, None, context:], ids[None, None, :, context:], jnp.ones((1, 1, T), bool), past,
            text.empty_tail(past, 1, T), 0, return_layers=True,
        )  # fmt: skip
        layers = jnp.concatenate([first["layers"][:, 0], rest["layers"][:, 0, 0]], 1)
        return {"layers": layers, "logits": text.logits(hidden[0, 0])}

    return run(module.text, jnp.asarray(embeddings), jnp.asarray(position_ids))


def _stages(model, torch_model, inputs, config) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    slots, height, width = inputs.grid
    layout = window_layout(model.config.vision, height, width)
    vision = oracle.vision_stages(torch_model, inputs.patches, inputs.grid)
    patches = inputs.patches.reshape(slots, height * width, -1)
    ours = jax.jit(lambda module, p: module.vision(p, layout, return_layers=True))(model.module, patches)
    for i, theirs in enumerate(vision["layers"]):
        yield f"vision layer {i}", ours["layers"][i], theirs
    yield "vision features", ours["features"], vision["features"]

    group = np.asarray(oracle.interleaved_groups(slots, config.slots_per_group)[0])
    features = vision["features"][group].reshape(-1, model.config.text.width)
    rows, cols = height // model.config.vision.merge, width // model.config.vision.merge
    tokens = oracle.tokens_of(np.arange(len(group)), rows, cols)
    times = oracle.time_ids(tokens[:, 0], 1.0, model.config.vision.tokens_per_second)
    ids = oracle.position_ids(len(inputs.prefix_ids), times, tokens[:, 1], tokens[:, 2], len(inputs.suffix_ids),
                              inputs.grid, config.mrope)  # fmt: skip
    embeddings = oracle.prompt_embeddings(torch_model, inputs.prefix_ids, features, inputs.suffix_ids)
    text = oracle.hidden_states(torch_model, embeddings, ids)
    context = ids.shape[1] - len(inputs.suffix_ids)
    ours = decoder_stages(model.module, embeddings.numpy(), ids, context)
    for i, theirs in enumerate(text["layers"]):
        yield f"decoder layer {i}", ours["layers"][i], theirs
    yield "logits", ours["logits"], text["logits"][context:]


def _method_rows(result, theirs: dict, tolerance: float) -> list[dict]:
    ours = result.trace
    rows = []
    if not theirs["direct"]:
        rows = [
            _row(f"method: {key}", ours[key], theirs[key], tolerance) for key in ("group_relevance", "group_entropy")
        ]
        rows.append(_row("method: budget", ours["budget"], theirs["budget"], 0))
    rows.append(_row("method: final logits", ours["final_first_logits"], theirs["final_first_logits"], tolerance))
    return rows + [_row(f"method: {key}", ours[key], theirs[key], 0) for key in ("selected", "answer_ids")]


def _row(stage: str, ours: Sequence, theirs: Sequence, tolerance: float, relative: bool = True) -> dict:
    """One line of the table; differing lengths count as an infinite difference, NaN on both sides as none."""
    ours, theirs = (np.asarray(x, np.float64).reshape(-1) for x in (ours, theirs))
    if ours.shape != theirs.shape:
        return {"stage": stage, "max_abs": np.inf, "max_rel": np.inf, "ok": False}
    same = np.isnan(ours) & np.isnan(theirs)
    absolute = float(np.max(np.where(same, 0, np.abs(ours - theirs)), initial=0.0))
    scale = float(np.nanmax(np.abs(theirs), initial=0.0)) or 1.0
    return {
        "stage": stage,
        "max_abs": absolute,
        "max_rel": absolute / scale,
        "ok": bool((absolute / scale if relative else absolute) <= tolerance),
    }
