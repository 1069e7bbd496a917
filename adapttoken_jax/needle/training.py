"""One training step of the needle model: pictures drawn on the device, beliefs as labels, AdamW.

The model is the package's own `Qwen25VL`; this adds nothing to it. Letters as in `needle.clips`; D model, P patches.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adapttoken_jax import geometry, parameters
from adapttoken_jax.config import ModelConfig, TextConfig, VisionConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.model.qwen import Qwen25VL
from adapttoken_jax.needle.clips import Batch, Labels, QuestionBlock
from adapttoken_jax.needle.render import FrameTable, render_planes
from adapttoken_jax.video import PIXEL_MEAN, PIXEL_STD

_HEAD = 32
_HINT_LAYER, _MATCH_LAYER = 1, 2  # 0-based: each is there for the layers after it to build on


def needle_config(tokenizer, width: int = 128, layers: int = 4, ff: int = 384, vision_width: int = 96) -> ModelConfig:
    """Sizes of the needle model. Windows are one visual token wide, so that window attention is part of the picture.

    Heads are 32 wide and fill `width` exactly: transformers derives their size and ignores `head_dim` in config.json.

    Raises:
      UserError: `width` is no multiple of 32.
    """
    heads = width // _HEAD
    if width < _HEAD or width % _HEAD:
        raise UserError(f"--width={width}: must be a multiple of {_HEAD}, the width of a head")
    vision = VisionConfig(
        layers=3, width=vision_width, heads=4, ff=256, out_width=width, full_attention_layers=(1,), window=28
    )
    text = TextConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=_HEAD,
        ff=ff,
        vocab=tokenizer.tokenizer.get_vocab_size(),
        mrope_sections=(4, 6, 6),
        rope_theta=1e4,
    )
    return ModelConfig(
        vision,
        text,
        vision_start=tokenizer.vision_start,
        vision_end=tokenizer.vision_end,
        image_pad=tokenizer.tokenizer.token_to_id("<|image_pad|>"),
        video_pad=tokenizer.video_pad,
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up to `peak` over `warmup` steps, then a cosine to `floor` x peak at `steps`."""

    peak: float
    steps: int
    warmup: int = 100
    floor: float = 0.02

    def __call__(self, step):
        return optax.warmup_cosine_decay_schedule(0.0, self.peak, self.warmup, self.steps, self.peak * self.floor)(step)


def optimizer(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW with gradient clipping; weight decay on kernels and embeddings only."""
    decayed = lambda values: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key.endswith(("kernel", "embedding", "head")), values
    )
    adamw = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


class TrainState(NamedTuple):
    """values: the parameter table's nested dictionary; moments: the optimizer's state; step: int32, steps done."""

    values: Any
    moments: Any
    step: Any


def initial_state(config: ModelConfig, seed: int, schedule: Schedule) -> TrainState:
    """Random parameters of a seed."""
    # "rbg" keys compile in a second where the default ones take ten.
    values = parameters.initialise(config, jax.random.key(seed, impl="rbg"))
    return TrainState(values, optimizer(schedule).init(values), jnp.int32(0))


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="size")
def draw(table: FrameTable, size: tuple[int, int]) -> jax.Array:
    """Renders clips: [B, F] table -> uint8 [B, F, 3, Y, X].

    A compilation of its own: fused with the cutting into patches, XLA would draw pixel by pixel in the patches' order.
    """
    return render_planes(table, *size, xp=jnp)


def cut_patches(planes: jax.Array) -> jax.Array:
    """Normalises and cuts frames as the preprocessor does: uint8 [B, F, 3, Y, X] -> float32 [B F / 2, P, 1176]."""
    height, width = planes.shape[-2:]
    x = (planes - PIXEL_MEAN[:, None, None]) / PIXEL_STD[:, None, None]
    x = x.reshape(-1, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    x = x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)  # slot, merged row, merged column, row, column, C, T, 14, 14
    return x.reshape(x.shape[0], height * width // 196, 1176)


def context_of(model: Qwen25VL, planes: jax.Array, batch: Batch, prefix_ids: tuple[int, ...]):
    """Encodes the clips and prefills prefix and visual tokens: the `Context` that a batch's questions share."""
    clips, tokens = batch.order.shape
    layout = geometry.window_layout(model.config.vision, *(side // 14 for side in planes.shape[-2:]))
    features = model.vision(cut_patches(planes), layout)["features"].reshape(clips, tokens, -1)
    features = jnp.take_along_axis(features, batch.order[..., None], 1)
    prefix = model.text.embed(jnp.asarray(prefix_ids))
    prefix = jnp.broadcast_to(prefix, (clips, *prefix.shape))
    embeddings = jnp.concatenate([prefix, features], 1)
    return model.text.prefill(embeddings, batch.position_ids, batch.valid)[0]


def read_logits(model: Qwen25VL, context, block: QuestionBlock) -> tuple[jax.Array, jax.Array]:
    """Logits at the positions that a block reads: of answers [B, Q, A, V], of hints [B, Q, I, V] after layer 1, and of
    matches [B, Q, J, V] after layer 2."""
    _, count, length = block.ids.shape
    tail = model.text.empty_tail(context, count, length)
    hidden, _, found = model.text.extend(
        model.text.embed(block.ids), block.position_ids, block.valid, context, tail, 0, return_layers=True
    )
    early = [found["layers"][min(layer, model.config.text.layers - 1)] for layer in (_HINT_LAYER, _MATCH_LAYER)]
    at = lambda x, labels: model.text.logits(jnp.take_along_axis(x, labels.read[..., None], 2))
    return at(hidden, block.answer), at(early[0], block.hints), at(early[1], block.matches)


def losses(config: ModelConfig, prefix_ids: tuple[int, ...], values, planes: jax.Array, batch: Batch):
    """The loss, that is the mean over blocks of nats above the beliefs' own entropy, and the metrics of each block."""
    model = Qwen25VL(config, values)
    context = context_of(model, planes, batch, prefix_ids)
    found = {}
    for name, block in batch.blocks.items():
        answer, *early = read_logits(model, context, block)
        means = [_mean(excess(x, labels), labels.weight) for x, labels in zip(early, block[-2:], strict=True)]
        found[name] = block_metrics(answer, block) | dict(zip(("hints", "matches"), means, strict=True))
    total = sum(
        metrics["excess"] + jnp.max(batch.blocks[name].hints.weight) * (metrics["hints"] + metrics["matches"])
        for name, metrics in found.items()
    )
    metrics = {f"{name}_{key}": value for name, metrics in found.items() for key, value in metrics.items()}
    return total / len(found), metrics


def excess(logits: jax.Array, labels: Labels) -> jax.Array:
    """Cross-entropy with the beliefs less their own entropy, nats >= 0, [B, Q, A]."""
    at_targets = jnp.take_along_axis(jax.nn.log_softmax(logits), labels.targets, -1)
    return -jnp.sum(labels.beliefs * at_targets, -1) - _own_entropy(labels)


def _own_entropy(labels: Labels) -> jax.Array:
    return -jnp.sum(jax.scipy.special.xlogy(labels.beliefs, labels.beliefs), -1)


def _mean(x, weight):
    return jnp.sum(x * weight) / jnp.maximum(jnp.sum(weight), 1e-9)


def block_metrics(logits: jax.Array, block: QuestionBlock) -> dict[str, jax.Array]:
    """Excess nats over all answer tokens; accuracy, entropy and belief's entropy of the tokens that need the picture.

    "accuracy": of those with one right token; "entropy_known", "entropy_open": mean entropy over the whole vocabulary
    where one token is right, and where several are equally likely; "gap": mean distance of the latter to the belief's.
    """
    labels, own = block.answer, _own_entropy(block.answer)
    log_p = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    known = block.value & (own < 1e-6) & (labels.weight > 0)
    open_ = block.value & (own > 1e-6) & (labels.weight > 0)
    best = jnp.take_along_axis(labels.targets, jnp.argmax(labels.beliefs, -1)[..., None], -1)[..., 0]
    return {
        "excess": _mean(excess(logits, labels), labels.weight),
        "accuracy": _mean(jnp.argmax(logits, -1) == best, known),
        "entropy_known": _mean(entropy, known),
        "entropy_open": _mean(entropy, open_),
        "gap": _mean(jnp.abs(entropy - own), open_),
    }


@functools.partial(jax.jit, static_argnames=("config", "prefix_ids", "schedule"), donate_argnames="state")
def train_step(state: TrainState, planes: jax.Array, batch: Batch, *, config, prefix_ids, schedule):
    """One step. Returns the new state and the metrics of the batch before it."""
    objective = functools.partial(losses, config, prefix_ids)
    (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(state.values, planes, batch)
    updates, moments = optimizer(schedule).update(gradient, state.moments, state.values)
    norm = optax.tree.norm(gradient)
    new = TrainState(optax.apply_updates(state.values, updates), moments, state.step + 1)
    return new, metrics | {"loss": loss, "gradient_norm": norm, "learning_rate": schedule(state.step)}


@functools.partial(jax.jit, static_argnames=("config", "prefix_ids"))
def evaluate_batch(values, planes: jax.Array, batch: Batch, *, config, prefix_ids):
    """Metrics of a batch without learning from it."""
    loss, metrics = losses(config, prefix_ids, values, planes, batch)
    return metrics | {"loss": loss}
