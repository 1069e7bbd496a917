"""The text decoder, in two movements that share their layers.

`prefill` runs a context (prompt prefix and visual tokens) once and keeps its keys and values. `extend` runs further
tokens (a question, then its answer token by token) against that context; many questions can share one context, each
with a tail of keys and values of its own. The answer is the same as of one long sequence.

Either may run a range of the layers: what a lower range saw of a context can decide which rows of it the upper one
gets. Layers are taken out of their stack one by one, so a range copies no weights.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from adapttoken_jax.model.attention import probabilities_from_lse, two_part_attention
from adapttoken_jax.model.block import Block, product, rms_norm
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.model.rotary import rotate, text_angles, turns
from adapttoken_jax.sharding import gathered, shared_rows, split_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Keys and values of a prefilled context, per layer.

    Attributes:
      k, v: [L, B, S, K, H], of the layers that were run.
      valid: bool[B, S], False at padding.
      first: the lowest of the layers; static.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    first: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def layers(self) -> range:
        """Indices of the layers that it holds keys and values of."""
        return range(self.first, self.first + len(self.k))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
    """Keys and values of what follows the context, in a buffer of fixed length R.

    Attributes:
      k, v: [L, B, Q, R, K, H], L the layers of the context.
      valid: bool[B, Q, R], True where a token was written that later ones may look at.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array


class Probe(NamedTuple):
    """Asks `extend` for the attention of one layer.

    Attributes:
      layer: 0-based decoder layer.
      observe: maps that layer's attention to the context, float32[B, Q, N, T, S], to what is kept of it.
    """

    layer: int
    observe: Callable[[jax.Array], jax.Array]


class TextLayer(Block):
    """One pre-norm decoder layer with grouped-query attention (biases on q, k, v) and a gated feed-forward block."""

    def queries(self, x, turn):
        """Rotated queries [..., T, N, H] of the normalised x[..., T, D]."""
        return rotate(product("...TD,DNH->...TNH", x, self.q_kernel[...]) + self.q_bias[...], turn)

    def keys_and_values(self, x, turn):
        """Rotated keys and values, [..., T, K, H] each, of the normalised x[..., T, D]."""
        k = product("...TD,DKH->...TKH", x, self.k_kernel[...]) + self.k_bias[...]
        return rotate(k, turn), product("...TD,DKH->...TKH", x, self.v_kernel[...]) + self.v_bias[...]

    def finish(self, x, mixed):
        """Adds the attention's output and the feed-forward block to the residual stream."""
        x = x + product("...TNH,NHD->...TD", mixed, self.o_kernel[...])
        h = rms_norm(x, self.norm2, self.config.eps)
        gate = product("...D,DF->...F", h, self.gate_kernel[...])
        up = product("...D,DF->...F", h, self.up_kernel[...])
        return x + product("...F,FD->...D", jax.nn.silu(gate) * up, self.down_kernel[...])

    def prefill(self, x, turn, valid, kernel, needed):
        """One layer of `TextDecoder.prefill`: its output where it is `needed`, else x; and its keys and values."""
        h = rms_norm(x, self.norm1, self.config.eps)
        k, v = self.keys_and_values(h, turn)
        output = lambda: self.finish(x, kernel.causal(self.queries(h, turn), k, v, valid))
        return jax.lax.cond(needed, output, lambda: x), k, v

    def extend(self, x, turn, context, tail, mask, start, kernel):
        """One layer of `TextDecoder.extend`; also returns its queries and their log-sum-exp."""
        h = rms_norm(x, self.norm1, self.config.eps)
        q, new = split_rows((self.queries(h, turn), self.keys_and_values(h, turn)), kernel.mesh)
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, own, start, 2) for old, own in zip(tail, new, strict=True))
        mixed, lse = two_part_attention(q, context, (k, v, mask), kernel.over_context)
        return self.finish(x, shared_rows(mixed, kernel.mesh)), (k, v), q, lse


class TextDecoder(Block):
    """Embedding, scanned layers, final norm and head (tied to the embedding where the checkpoint says so)."""

    parts: ClassVar = {"layers": TextLayer}

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] -> embeddings [..., D]."""
        return self.embedding[...][ids]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] after the last layer -> float32 logits [..., V]; applies the final norm."""
        x = rms_norm(hidden, self.norm, self.config.eps)
        head = self.embedding[...].T if self.config.tied else self.head[...]
        return jnp.einsum("...D,DV->...V", x, head, preferred_element_type=jnp.float32)

    def turns(self, position_ids):
        """The rotary `turns` of M-RoPE ids [..., 3, T]."""
        c = self.config
        return turns(text_angles(position_ids, c.head_dim, c.rope_theta, c.mrope_sections))

    def prefill(self, embeddings, position_ids, valid, *, layers: range | None = None, keep_layer=None,
                return_layers=False, kernel: Kernel = XLA):  # fmt: skip
        """Runs a context from its beginning.

        What follows a context looks at its keys and values alone, so the last layer ends there, unless its output is
        asked for.

        Args:
          embeddings: [B, S, D], or what the layers below `layers` made of them.
          position_ids: int32[B, 3, S].
          valid: bool[B, S]; padding stands at the end, nothing looks at it.
          layers: those to run; None is all.
          keep_layer: a 0-based layer whose output is returned as "kept"[B, S, D].
          return_layers: return every layer's output as "layers"[L, B, S, D].
          kernel: what computes attention, and on which mesh.

        Returns:
          The `Context` and a dictionary of the intermediates asked for.
        """
        turn = self.turns(position_ids)
        layers = range(self.config.layers) if layers is None else layers
        last = self.config.layers - 1
        read = return_layers or keep_layer == last or last not in layers

        def step(carry, index):
            x, kept = carry
            layer = gathered(self.layer(index), kernel.mesh, len(x))
            x, k, v = layer.prefill(split_rows(x, kernel.mesh), turn, valid, kernel, needed=read or index < last)
            if keep_layer is not None:
                kept = jnp.where(index == keep_layer, x, kept)
            return (x, kept), (k, v, x if return_layers else None)

        kept = None if keep_layer is None else embeddings
        (_, kept), (k, v, outputs) = jax.lax.scan(step, (embeddings, kept), jnp.asarray(layers))
        found = {"kept": kept, "layers": outputs}
        return Context(k, v, valid, layers.start), {name: value for name, value in found.items() if value is not None}

    def empty_tail(self, context: Context, questions: int, length: int) -> Tail:
        """A `Tail` of a context with room for `length` tokens per question."""
        layers, batch, _, *heads = context.k.shape
        buffer = jnp.zeros((layers, batch, questions, length, *heads), context.k.dtype)
        return Tail(buffer, buffer, jnp.zeros((batch, questions, length), bool))

    def extend(self, embeddings, position_ids, valid, context: Context, tail: Tail, start, *, probe=None,
               return_layers=False, kernel: Kernel = XLA):  # fmt: skip
        """Runs tokens that follow a context and what the tail already holds through the context's layers.

        Args:
          embeddings: [B, Q, T, D], or what the layers below made of them.
          position_ids: int32[B, Q, 3, T].
          valid: bool[B, Q, T]; padding is never looked at.
          context: the shared past.
          tail: each question's own past; tokens are written at `start`, a (traced) integer.
          probe: the attention to observe, a `Probe`.
          return_layers: return every layer's output as "layers"[L, B, Q, T, D].
          kernel: what computes attention over the context, and on which mesh.

        Returns:
          Hidden states [B, Q, T, D], the grown `Tail`, and a dictionary of the intermediates asked for ("observed" for
          the probe).
        """
        turn = self.turns(position_ids)
        written = jax.lax.dynamic_update_slice_in_dim(tail.valid, valid, start, 2)
        T, R = embeddings.shape[2], written.shape[2]
        causal = start + jnp.arange(T)[:, None] >= jnp.arange(R)
        mask = causal & written[:, :, None]  # [B, Q, T, R]

        def step(carry, indexed):
            x, observed = carry
            index, (ck, cv, tk, tv) = indexed
            x, (tk, tv), q, lse = self.layer(index).extend(
                x, turn, (ck, cv, context.valid), (tk, tv), mask, start, kernel
            )
            if probe is not None:
                look = lambda: probe.observe(probabilities_from_lse(q, ck, context.valid, lse))
                observed = jax.lax.cond(index == probe.layer, look, lambda: observed)
            return (x, observed), (tk, tv, x if return_layers else None)

        observed = None if probe is None else self.unobserved(probe, embeddings, context)
        layers_in = (jnp.asarray(context.layers), (context.k, context.v, tail.k, tail.v))
        start_from = (shared_rows(embeddings, kernel.mesh), observed)
        (x, observed), (k, v, layers) = jax.lax.scan(step, start_from, layers_in)
        found = {"observed": observed, "layers": layers}
        return x, Tail(k, v, written), {name: value for name, value in found.items() if value is not None}

    def unobserved(self, probe, embeddings, context):
        """Zeros of the shape that the probe's observation will have."""
        B, Q, T, _ = embeddings.shape
        rows = jax.ShapeDtypeStruct((B, Q, self.config.heads, T, context.valid.shape[1]), jnp.float32)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(probe.observe, rows))
