"""The model's two compiled programs: encode some slots, and run a batch of prompts.

A group pass and the final pass are the same program: a context of prompt prefix and visual tokens, then every question
against it. Shapes are static: visual tokens, questions' suffixes and answers are padded, and padding changes nothing.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.compilation import compiled
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.geometry import window_layout
from adapttoken_jax.model import Probe
from adapttoken_jax.model.generation import Sampling, generate
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.model.text import Rows, TextDecoder
from adapttoken_jax.model.vision import VisionTower
from adapttoken_jax.selection import reduce_relevance, token_certainty, token_entropy
from adapttoken_jax.video import normalised

# Of a TPU core's vector memory, at most this much per operation: left to itself the compiler gives so little that the
# tiles of large products are small, and a decoder layer runs at two thirds of the speed that its own estimate has with
# more. By that estimate for v5e, v5p and v6e the decoder is fastest with 64 MiB (32 to 96 were tried), and the vision
# tower within 2 % of what it has with any. The compiler may also compute one product inside another, tile by tile, to
# keep what lies between them out of memory: where arithmetic limits, that is slower. Where chips share a product it may
# pass the parts on in rounds, which for an answer's token costs more than it hides: not below 1 MiB (7B on v5e:2x4,
# fsdp=8: the final pass takes 0.48 s in place of 0.53). Sparse cores, where a chip has them, gather and add up over the
# links while the others compute.
TPU_OPTIONS = {
    "xla_tpu_scoped_vmem_limit_kib": str(2**16),
    "xla_tpu_dot_dot_fusion": "false",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
}

# Products are cuBLAS'. XLA's autotuner would take kernels of its own for some: a chunk of a 7B model's frames then took
# 60 ms on an H200 in place of 46; and it copies the weights out of their stack for them, which cuBLAS reads in place.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """B contexts, and Q questions asked of each.

    Attributes:
      prefix_ids: int32[P], prompt tokens before the visual tokens.
      visual: [B, M, D], visual tokens; B contexts of M tokens each.
      visual_valid: bool[B, M].
      context_positions: int32[B, 3, P + M], M-RoPE ids.
      suffix_ids: int32[Q, T], prompt tokens after the visual tokens, padded on the right.
      suffix_length: int32[Q].
      query_rows: bool[Q, T], rows whose attention counts as relevance.
      suffix_start: int32[B], M-RoPE id of the first suffix token.
      answer_start: int32[B, Q], M-RoPE id of the first generated token.
      limit: int32[Q], most tokens of each answer.
      option_ids: int32[Q, O], first tokens of the options' letters, padded with -1.
      key: random key of sampling.
    """

    prefix_ids: jax.Array
    visual: jax.Array
    visual_valid: jax.Array
    context_positions: jax.Array
    suffix_ids: jax.Array
    suffix_length: jax.Array
    query_rows: jax.Array
    suffix_start: jax.Array
    answer_start: jax.Array
    limit: jax.Array
    option_ids: jax.Array
    key: jax.Array

    @property
    def per_context(self) -> dict[str, jax.Array]:
        """The fields with a leading axis B; the others are shared by all contexts."""
        names = ("visual", "visual_valid", "context_positions", "suffix_start", "answer_start")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """What is compiled into a pass.

    Attributes:
      relevance: (layer, heads, text): reference layer and reductions; None for a pass that only answers.
      certainty: form of a token's certainty, as in `AdaptTokenConfig`.
      keep_layer: return the visual tokens' hidden states after this layer; None for no.
      answer_tokens: length A of the answers' buffer.
      end_ids: tokens that end an answer.
      sampling: how tokens are chosen.
      keep_share: share of a context's own visual tokens that the layers after the reference layer see: those most
        relevant to any of the questions; 1 for all.
      kernel: what computes attention.
    """

    relevance: tuple[int, str, str] | None
    certainty: str
    keep_layer: int | None
    answer_tokens: int
    end_ids: tuple[int, ...]
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    keep_share: float = 1.0
    kernel: Kernel = XLA

    @classmethod
    def answering(cls, config: AdaptTokenConfig, answer_tokens: int, end_ids: tuple[int, ...], kernel: Kernel):
        """A pass that only answers, greedily."""
        return cls(None, config.certainty, None, answer_tokens, end_ids, kernel=kernel)

    def of_groups(self, config: AdaptTokenConfig) -> "PassSpec":
        """The same with what a group pass gives beside its answer."""
        return dataclasses.replace(
            self,
            relevance=(config.reference_layer, config.relevance_heads, config.relevance_text),
            keep_layer=config.reference_layer if config.similarity == "reference_layer" else None,
            keep_share=config.keep_after_reference,
        )

    def final(self, config: AdaptTokenConfig) -> "PassSpec":
        """The same with the final answer's sampling."""
        return dataclasses.replace(self, sampling=Sampling(config.sampling_temperature, config.top_p))


def exact(function):
    """Runs a function of a part of a float32 model in true float32: accelerators would round factors of products."""

    @functools.wraps(function)
    def traced(part, *args, **kwargs):
        wide = jax.tree.leaves(part)[0].dtype == jnp.float32
        with jax.default_matmul_precision("highest" if wide else "default"):
            return function(part, *args, **kwargs)

    return traced


@compiled(static=("height", "width", "kernel"), tpu_options=TPU_OPTIONS, gpu_options=GPU_OPTIONS)
@exact
def encode_slots(tower: VisionTower, patches: jax.Array, height: int, width: int, kernel: Kernel = XLA) -> jax.Array:
    """Patches of T slots -> visual tokens [T, M, D].

    Args:
      tower: the model's vision tower.
      patches: uint8 [T, height x width, 1176], pixels.
      height, width: in patches.
      kernel: what computes attention.
    """
    with jax.named_scope("vision"):
        layout = window_layout(tower.config, height, width, kernel.pads_windows)
        return tower(normalised(patches), layout, kernel=kernel)["features"]


@exact
def prompts_pass(text: TextDecoder, batch: PromptBatch, spec: PassSpec) -> dict[str, jax.Array]:
    """Prefills every context once, runs every question against it and generates the answers (steps 4 to 6 and 11).

    With `spec.keep_share` below 1 the layers after the reference layer see only the most relevant visual tokens.
    Questions share a context: a token then counts as relevant as it is to the question that it is most relevant to.

    Returns:
      "first_logits" float32[B, Q, V] and of them "option_logits" float32[B, Q, O]; "tokens" int32[B, Q, A], "counted"
      bool[B, Q, A] (the answer's own tokens), "entropy" and "certainty" float32[B, Q, A] per token; with
      `spec.relevance` "relevance" float32[B, Q, M]; with `spec.keep_layer` "kept"[B, M, D].
    """
    visual = _visual_rows(batch)
    hidden, pasts, found = _run_layers(text, batch, spec)
    with jax.named_scope("question"):
        last = jnp.take_along_axis(hidden, (batch.suffix_length - 1)[None, :, None, None], 2)[:, :, 0]
        logits = text.logits(last)
    with jax.named_scope("answer"):
        generation = generate(
            text, logits, batch.answer_start, pasts, batch.suffix_ids.shape[1], tokens=spec.answer_tokens,
            limit=batch.limit, end_ids=spec.end_ids, measure=functools.partial(_measure, batch=batch, spec=spec),
            sampling=spec.sampling, key=batch.key, kernel=spec.kernel,
        )  # fmt: skip
    of_options = jnp.take_along_axis(logits, jnp.maximum(batch.option_ids, 0)[None], -1)
    out = {"first_logits": logits, "option_logits": of_options}
    out |= {"tokens": generation.tokens, "counted": generation.counted}
    out |= {"entropy": generation.measured[..., 0], "certainty": generation.measured[..., 1]}
    if spec.relevance is not None:
        out["relevance"] = found["observed"][..., visual]
    if spec.keep_layer is not None:
        out["kept"] = found["kept"][:, visual]
    return out


run_prompts = compiled(static=("spec",), tpu_options=TPU_OPTIONS, gpu_options=GPU_OPTIONS)(prompts_pass)


def _run_layers(text, batch, spec):
    """Contexts and questions through all layers.

    Returns:
      The suffixes' hidden states [B, Q, T, D], the pasts of `generate` if an answer may go on, and what was kept and
      observed on the way.
    """
    layers = range(text.config.layers)
    reference = layers[-1] if spec.keep_share == 1 else spec.relevance[0]
    lower, upper = layers[: reference + 1], layers[reference + 1 :]
    context, suffixes = _context_rows(text, batch, spec.kernel), _suffix_rows(text, batch)
    read = functools.partial(text.read, room=spec.answer_tokens - 1, kernel=spec.kernel)
    keep_layer = reference if upper else spec.keep_layer
    hidden, *pasts, found = read(
        context, suffixes, layers=lower, keep_layer=keep_layer, probe=_relevance_probe(batch, spec)
    )
    if upper:
        context = _most_relevant(context._replace(x=found["kept"]), found["observed"], batch, spec)
        hidden, past, _ = read(context, suffixes._replace(x=hidden), layers=upper)
        pasts.append(past)
    return hidden, pasts, found


def _visual_rows(batch) -> slice:
    """Where a context's visual tokens are."""
    prefix = batch.prefix_ids.shape[0]
    return slice(prefix, prefix + batch.visual.shape[1])


def _context_rows(text, batch, kernel) -> Rows:
    with jax.named_scope("context"):
        prefix = text.embed(batch.prefix_ids)
        prefix = jnp.broadcast_to(prefix, (batch.visual.shape[0], *prefix.shape))
        valid = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), batch.visual_valid], 1)
        x = jnp.concatenate([prefix, batch.visual.astype(prefix.dtype)], 1)
        return _padded(Rows(x, batch.context_positions, valid), batch.suffix_ids.size, kernel)


def _padded(rows: Rows, others: int, kernel) -> Rows:
    """Padding after the rows, so that they and `others`, which go through a product together, suit the kernel."""
    together = rows.x.shape[1] + others
    return rows.padded(kernel.rows(len(rows.x), together) - together)


def _most_relevant(rows: Rows, relevance, batch, spec) -> Rows:
    """The prefix, and of each context's own visual tokens the share most relevant to any question: relevance[B, Q, S].

    There are rows for the share of a context without padding; those that a shorter one leaves over are padding.
    """
    with jax.named_scope("context"):
        prefix, tokens = batch.prefix_ids.shape[0], batch.visual.shape[1]
        shares = np.asarray([math.ceil(spec.keep_share * n) for n in range(tokens + 1)])
        scores = jnp.where(batch.visual_valid, relevance[..., _visual_rows(batch)].max(1), -1.0)
        ranked = jnp.argsort(-scores, stable=True)[:, : shares[-1]]  # among equals the lower index
        kept = jnp.arange(shares[-1]) < jnp.asarray(shares)[batch.visual_valid.sum(1)][:, None]
        visual = jnp.sort(jnp.where(kept, ranked, tokens))  # as they came; `tokens`, which stands last, is none of them
        text = jnp.broadcast_to(jnp.arange(prefix), (len(visual), prefix))
        index = jnp.concatenate([text, prefix + jnp.minimum(visual, tokens - 1)], 1)
        chosen = Rows(
            jnp.take_along_axis(rows.x, index[..., None], 1),
            jnp.take_along_axis(rows.position_ids, index[:, None], 2),
            jnp.concatenate([jnp.ones(text.shape, bool), visual < tokens], 1),
        )
        return _padded(chosen, batch.suffix_ids.size, spec.kernel)


def _suffix_rows(text, batch) -> Rows:
    with jax.named_scope("question"):
        B, (Q, T) = batch.visual.shape[0], batch.suffix_ids.shape
        x = text.embed(batch.suffix_ids)
        valid = jnp.arange(T) < batch.suffix_length[:, None]
        positions = batch.suffix_start[:, None, None, None] + jnp.arange(T)
        spread = lambda array, *own: jnp.broadcast_to(array, (B, Q, *own))
        return Rows(spread(x, *x.shape[1:]), spread(positions, 3, T), spread(valid, T))


def _relevance_probe(batch, spec):
    if spec.relevance is None:
        return None
    layer, heads, text = spec.relevance
    counted = jnp.maximum(batch.query_rows.sum(-1, keepdims=True), 1)

    def observe(probabilities, rows):
        relevance = reduce_relevance(probabilities, heads, text, rows)
        # A mean of some rows has their share in the mean of all.
        return relevance if text == "max" else relevance * (rows.sum(-1, keepdims=True) / counted)

    return Probe(layer, observe, batch.query_rows, lambda parts: parts.max(0) if text == "max" else parts.sum(0))


def _measure(logits, batch, spec):
    """Entropy and certainty of each next token: logits[B, Q, V] -> [B, Q, 2]."""
    certainty = jax.vmap(lambda x, options: token_certainty(x, spec.certainty, options), (1, 0), 1)
    return jnp.stack([token_entropy(logits), certainty(logits, batch.option_ids)], -1)
