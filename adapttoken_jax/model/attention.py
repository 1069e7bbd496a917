"""Attention in XLA: one clear reference and a memory-bounded version of it; the twins of every kernel in `kernels.py`.

All functions compute softmax in float32 and treat grouped queries without repeating keys. Queries of the decoder come
scaled by H**-0.5 (`TextLayer.rotated`), those of windows do not. Masks are boolean, True where a query may look.
Letters: B batch, T query, S key, N heads, K kv-heads, G query heads per kv-head, H head dim.
"""

import functools

import jax
import jax.numpy as jnp

from adapttoken_jax.geometry import round_up
from adapttoken_jax.model.block import merge_axes, pad_end, product

MASKED = -1e30  # finite, so that a row with nothing to look at gives numbers, not NaN
_BLOCK = 64  # queries per block of the memory-bounded version: a block's scores stay in a CPU's cache
_SEGMENTS = 16  # parts of a sequence whose blocks look no further than the part's end: half of the work is never done
_REFERENCE_UP_TO = 128  # keys up to which the score matrix is formed whole
_MOST_ROWS = 512  # of questions that attend at once; a prompt with an hour of subtitles has ten thousand
_ROW_STEP = 16  # of what a question then has at once, so that kernels have whole tiles


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Dot products in float32: q[B, T, N, H], k[B, S, K, H] -> [B, N, T, S]."""
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    products = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    return products.reshape(B, N, T, k.shape[1])


def weighted_values(probabilities: jax.Array, v: jax.Array) -> jax.Array:
    """probabilities[B, N, T, S], v[B, S, K, H] -> [B, T, N, H] in the dtype of `v`."""
    B, N, T, S = probabilities.shape
    K = v.shape[2]
    grouped = probabilities.reshape(B, K, N // K, T, S).astype(v.dtype)
    return product("BKGTS,BSKH->BTKGH", grouped, v).reshape(B, T, N, v.shape[3])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention: q[B, T, N, H], k and v[B, S, K, H], mask[B or 1, T or 1, S] -> [B, T, N, H]."""
    return weighted_values(jax.nn.softmax(jnp.where(mask[:, None], scores(q, k), MASKED)), v)


def _causal_reference(q, k, v, valid, places, key_places):
    return attention(q, k, v, (places[..., None] >= key_places) & valid[:, None])


def _causal_blocked(q, k, v, valid, places, key_places):
    B, T, N, H = q.shape
    K = k.shape[2]
    whole = round_up(T, _BLOCK)
    blocks = jnp.pad(q, ((0, 0), (0, whole - T), (0, 0), (0, 0))).reshape(B, -1, _BLOCK, K, N // K, H)
    blocks = jnp.transpose(blocks, (1, 0, 3, 4, 2, 5))  # [blocks, B, K, G, block, H]
    k, v = jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)  # [B, K, H, S] and [B, K, S, H]: plain products
    places = jnp.pad(places, ((0, 0), (0, whole - T)), mode="edge").reshape(len(places), -1, _BLOCK)
    places = jnp.swapaxes(places, 0, 1)
    if len(key_places) > T:
        segments = [(slice(None), slice(None))]  # rows of a piece may look anywhere
    else:
        rows = round_up(-(-whole // _SEGMENTS), _BLOCK)
        ends = [(start, min(start + rows, whole)) for start in range(0, whole, rows)]
        segments = [(slice(start // _BLOCK, stop // _BLOCK), slice(stop)) for start, stop in ends]
    mixed = [
        _segment(places[own], blocks[own], k[..., keys], v[:, :, keys], valid[:, keys], key_places[keys])
        for own, keys in segments
    ]
    return jnp.transpose(jnp.concatenate(mixed), (1, 0, 4, 2, 3, 5)).reshape(B, whole, N, H)[:, :T]


def _segment(places, blocks, k, v, valid, key_places):
    """Blocks of rows that stand at such places, one by one, over keys."""

    def block(places_and_rows):
        places, q = places_and_rows
        mask = (places[..., None] >= key_places) & valid[:, None]
        products = jnp.einsum("BKGTH,BKHS->BKGTS", q, k, preferred_element_type=jnp.float32)
        products = jnp.where(mask[:, None, None], products, MASKED)
        weights = jnp.exp(products - products.max(-1, keepdims=True))
        # Fewer numbers to divide than the weights; until then they are sums that float16 might not hold.
        mixed = jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)

    return jax.lax.map(block, (places, blocks))


CAUSAL = {"reference": _causal_reference, "blocked": _causal_blocked}


def causal_attention(q, k, v, valid, implementation: str | None = None, places=None, key_places=None) -> jax.Array:
    """Causal attention of rows of a sequence over it: q[B, T, N, H], k and v[B, S, K, H] -> [B, T, N, H].

    Args:
      valid: bool[B, S], False at padding, which nothing looks at.
      implementation: "reference" (forms the T x S scores) or "blocked" (a block of queries at a time), which give the
        same numbers; None chooses by size.
      places, key_places: int[B or 1, T] and int[S], where rows and keys stand in the sequence; None: as they come.
    """
    places = jnp.arange(q.shape[1])[None] if places is None else places
    key_places = jnp.arange(k.shape[1]) if key_places is None else key_places
    if implementation is None:
        implementation = "reference" if q.shape[1] <= _REFERENCE_UP_TO else "blocked"
    return CAUSAL[implementation](q, k, v, valid, places, key_places)


def window_attention(q, k, v, valid=None) -> jax.Array:
    """Attention within windows, each row over those of its own that are `valid`: q, k, v[T, N, W, U, H] -> the same.

    T slots of W windows of U rows; heads come before rows. `valid[W, U]` is False at padding; None: there is none.
    """
    scores = jnp.einsum("TNWUH,TNWSH->TNWUS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if valid is not None:
        scores = jnp.where(valid[:, None], scores, MASKED)
    return product("TNWUS,TNWSH->TNWUH", jax.nn.softmax(scores).astype(v.dtype), v)


def context_attention(q, k, v, valid) -> tuple[jax.Array, jax.Array]:
    """Attention of a few rows over a context: q[B, T, N, H], k and v[B, S, K, H], valid[B, S].

    Returns:
      values[B, T, N, H], and the log-sum-exp of every row's scores, float32[B, N, T].
    """

    def attend(q):
        products = jnp.where(valid[:, None, None], scores(q, k), MASKED)
        lse = jax.nn.logsumexp(products, -1)
        return weighted_values(jnp.exp(products - lse[..., None]), v), lse

    return _by_blocks(attend, [(q, 1)], (1, 2), _MOST_ROWS)


def two_part_attention(q, context, tail, over_context=context_attention):
    """Attention over a shared context and a tail of its own, as one softmax.

    Args:
      q: [B, Q, T, N, H]; Q tails share the context of their batch entry.
      context: (k, v, mask) with k and v[B, S, K, H] and mask[B, S].
      tail: (k, v, mask) with k and v[B, Q, R, K, H] and mask[B, Q, T, R].
      over_context: `context_attention`, or a kernel that does the same.

    Returns:
      values[B, Q, T, N, H] and the log-sum-exp of every row, float32[B, Q, N, T].
    """
    (ck, cv, cmask), (tk, tv, tmask) = context, tail
    B, Q, T, N, H = q.shape
    from_context, context_lse = over_context(q.reshape(B, Q * T, N, H), ck, cv, cmask)
    rows = [(q, 2), (from_context.reshape(q.shape), 2), (context_lse.reshape(B, N, Q, T), 3), (tmask, 2)]
    return _by_blocks(functools.partial(_with_tail, k=tk, v=tv), rows, (2, 3), rows_at_once(Q, T))


def rows_at_once(questions: int, rows: int) -> int:
    """Of so many rows of each question, those that attend at once: as many as keep all questions' rows few."""
    parts = -(-rows // max(_BLOCK, _MOST_ROWS // questions))
    return rows if parts == 1 else round_up(-(-rows // parts), _ROW_STEP)


def _with_tail(q, from_context, context_lse, mask, k, v):
    """`two_part_attention` of rows that got [B, Q, T, N, H] from the context, with that log-sum-exp [B, N, Q, T]."""
    to_tail = jax.vmap(scores, 1, 2)(q, k)  # [B, N, Q, T, R]
    to_tail = jnp.where(mask[:, None], to_tail, MASKED)
    lse = jnp.logaddexp(context_lse, jax.nn.logsumexp(to_tail, -1))  # [B, N, Q, T]
    share = jnp.moveaxis(jnp.exp(context_lse - lse), 1, 3)[..., None]  # of the context in every row's mass
    from_context = (share * from_context).astype(v.dtype)
    from_tail = jax.vmap(weighted_values, (2, 1), 1)(jnp.exp(to_tail - lse[..., None]), v)
    return from_context + from_tail, jnp.swapaxes(lse, 1, 2)


def _by_blocks(function, rows, out_axes, size: int):
    """`function` of blocks of at most `size` rows, one after the other, and its results joined.

    `rows` are (array, axis of its rows), `out_axes` the axes of the results' rows.
    """
    array, axis = rows[0]
    count = array.shape[axis]
    if count <= size:
        return function(*(x for x, _ in rows))
    out = jax.lax.map(lambda own: function(*own), tuple(blocks(x, axis, size) for x, axis in rows))
    join = lambda x, axis: jax.lax.slice_in_dim(merge_axes(jnp.moveaxis(x, 0, axis), axis), 0, count, axis=axis)
    return tuple(map(join, out, out_axes))


def blocks(x, axis: int, size: int) -> jax.Array:
    """Blocks of `size` rows, which stand on `axis`, the last one padded with zeros: a new first axis of blocks."""
    x = pad_end(x, axis, -x.shape[axis] % size)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def probabilities_from_lse(q, k, mask, lse) -> jax.Array:
    """Attention probabilities of a few rows over a context, from the rows' log-sum-exp, without another softmax.

    q[B, Q, T, N, H], k[B, S, K, H], mask[B, S], lse[B, Q, N, T] -> float32[B, Q, N, T, S]. Rows need not sum to one:
    the rest of each row lies on the tail.
    """
    B, Q, T, N, H = q.shape
    products = jnp.swapaxes(scores(q.reshape(B, Q * T, N, H), k).reshape(B, N, Q, T, -1), 1, 2)
    return jnp.where(mask[:, None, None, None], jnp.exp(products - lse[..., None]), 0.0)
