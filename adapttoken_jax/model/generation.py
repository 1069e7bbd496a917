"""Answers, token by token, in one compiled loop over a prefilled context."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.model.text import Context, Tail, TextDecoder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; `top_p` keeps the smallest set of tokens of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """logits[..., V] -> token ids int32[...]."""
        if self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        kept = keep_top_p(logits / self.temperature, self.top_p)
        return jax.random.categorical(key, kept).astype(jnp.int32)


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Sets to -inf every token outside the smallest set whose probability reaches `top_p`; the best token stays."""
    if top_p >= 1:
        return logits
    ordered = jnp.sort(logits, -1, descending=True)
    mass_before = jnp.cumsum(jax.nn.softmax(ordered), -1) - jax.nn.softmax(ordered)
    threshold = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """State of the loop, and its result. The loop ends when every answer has ended or the buffer of A tokens is full.

    Attributes:
      tails: keys and values of the questions and of the answers so far, one `Tail` per context.
      tokens: int32[B, Q, A].
      counted: bool[B, Q, A], True for tokens of the answer: those before the end token, or that one if it comes first.
      measured: float32[B, Q, A, m], what the caller measures of each token's logits.
      ended: bool[B, Q].
      step: int32, tokens written so far.
      key: random key of sampling.
    """

    tails: tuple[Tail, ...]
    tokens: jax.Array
    counted: jax.Array
    measured: jax.Array
    ended: jax.Array
    step: jax.Array
    key: jax.Array


def generate(
    text: TextDecoder,
    logits: jax.Array,
    first_position: jax.Array,
    pasts: Sequence[tuple[Context, Tail]],
    start: int,
    *,
    tokens: int,
    limit: jax.Array,
    end_ids: tuple[int, ...],
    measure: Callable[[jax.Array], jax.Array],
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    kernel: Kernel = XLA,
) -> Generation:
    """Generates an answer to every question.

    Args:
      text: the decoder.
      logits: float32[B, Q, V] after the last prompt token.
      first_position: int32[B, Q], M-RoPE id of the first generated token; later ones count up from it.
      pasts: what the prompt left behind, one pair per range of layers, from the lowest to the highest; the answer is
        written into the tails from index `start` on. Not looked at where `tokens` is 1.
      tokens: length A of the answer's buffer.
      limit: int32[Q], most tokens of each question's answer, at most A.
      end_ids: tokens that end an answer.
      measure: logits[B, Q, V] -> float32[B, Q, m].
      sampling, key: how tokens are chosen; greedy needs no key.
      kernel: what computes attention over the contexts.

    Returns:
      The loop's last state.
    """
    record = _Record(sampling, end_ids, limit, measure)
    tails = tuple(tail for _, tail in pasts) if tokens > 1 else ()
    width = jax.eval_shape(measure, logits).shape[-1]
    first = record(_blank(tails, (*logits.shape[:2], tokens, width), key), logits)
    if tokens == 1:
        return first

    text = text.as_it_lies(kernel)

    def advance(state: Generation) -> Generation:
        last = state.step - 1
        token = jax.lax.dynamic_index_in_dim(state.tokens, last, 2)  # [B, Q, 1]
        position = jnp.broadcast_to((first_position + last)[..., None, None], (*token.shape[:2], 3, 1))
        hidden, tails = text.embed(token), []
        for (context, _), tail in zip(pasts, state.tails, strict=True):
            valid = jnp.ones_like(token, bool)
            hidden, tail, _ = text.extend(hidden, position, valid, context, tail, start + last, kernel=kernel)
            tails.append(tail)
        return record(dataclasses.replace(state, tails=tuple(tails)), text.logits(hidden[:, :, -1]))

    going = lambda state: (state.step < tokens) & ~jnp.all(state.ended)
    return jax.lax.while_loop(going, advance, first)


def _blank(tails: tuple[Tail, ...], shape: tuple[int, int, int, int], key: jax.Array | None) -> Generation:
    """The state before any token; `shape` is (B, Q, A, m)."""
    return Generation(
        tails=tails,
        tokens=jnp.zeros(shape[:3], jnp.int32),
        counted=jnp.zeros(shape[:3], bool),
        measured=jnp.zeros(shape, jnp.float32),
        ended=jnp.zeros(shape[:2], bool),
        step=jnp.int32(0),
        key=jax.random.key(0) if key is None else key,
    )


class _Record(NamedTuple):
    """Chooses a token and writes it down; the fields are the arguments of `generate`."""

    sampling: Sampling
    end_ids: tuple[int, ...]
    limit: jax.Array
    measure: Callable[[jax.Array], jax.Array]

    def __call__(self, state: Generation, logits) -> Generation:
        """The state with one more token, chosen from logits[B, Q, V]."""
        key, now = jax.random.split(state.key)
        token = self.sampling(logits, now)
        is_end = jnp.isin(token, jnp.asarray(self.end_ids, jnp.int32))
        put = lambda buffer, value: buffer.at[:, :, state.step].set(value)
        return dataclasses.replace(
            state,
            tokens=put(state.tokens, token),
            counted=put(state.counted, ~state.ended & (~is_end | (state.step == 0))),
            measured=put(state.measured, self.measure(logits)),
            ended=state.ended | is_end | (state.step + 1 >= self.limit),
            step=state.step + 1,
            key=key,
        )
