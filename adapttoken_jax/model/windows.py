"""The vision tower's attention on a TPU: one kernel from the product of queries, keys and values to the mix of heads.

Heads of 80 channels do not fill a TPU's 128 lanes. Taken apart they are padded, and XLA copies whole arrays from layout
to layout around products that are small. Here heads stay side by side, as the product before writes them and the
product after reads them:

- A block holds as many heads as fill whole tiles of lanes, C = lcm(H, 128) channels: eight heads of 80.
- A rotation pairs channel i of a head with i + H / 2: the lanes turned either way, and a choice between the two.
- A head's scores are its queries, beside zeros, times the tiles of keys that it lies in, at most 256 channels, which
  newer matrix units take at once. Its mix is its weights times the same tiles of values, of which its lanes are kept.
- Steps that depend on each other stand far apart, those of several heads together: the compiler keeps their order.

Its reference twin is the path without it in `vision.py`. Letters as there; R rows that are computed together.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.geometry import LANES, round_up
from adapttoken_jax.model.attention import MASKED
from adapttoken_jax.model.block import pad_end

_ROWS = 16  # of a tile of half precision
_MOST_ROWS = 256  # that are computed together; by the compiler's schedules more gain little (320: 6 %)
_LARGE_MEMORY = 2**25  # bytes of vector memory that a window of more than `_MOST_ROWS` may take


def suits(windows: tuple[tuple[int, int], ...], heads: int, head_dim: int, most: int) -> bool:
    """Whether the kernel takes these runs (W, U): windows of one size, whole tiles and at most `most` rows each.

    Of windows that are computed in parts it takes one alone, the whole slot.
    """
    ((W, U), *others) = windows
    in_tiles = U % _ROWS == 0 and heads * head_dim % math.lcm(head_dim, LANES) == 0
    return in_tiles and most >= U and not others and (W == 1 or U <= _MOST_ROWS)


def attend(qkv: jax.Array, cos: jax.Array, sin: jax.Array, valid: np.ndarray, *, W: int, heads: int) -> jax.Array:
    """Rotates queries and keys, and attends within windows.

    Args:
      qkv: [T, P, 3 N H], queries, keys and values of all heads.
      cos, sin: float32[P, H / 2], of the rotation.
      valid: bool[P], False at padding, which nothing looks at.
      W: windows of a slot; `suits` says of which sizes.
      heads: N.

    Returns:
      [T, P, N H].
    """
    H, C = 2 * cos.shape[-1], math.lcm(2 * cos.shape[-1], LANES)
    signs = jnp.repeat(jnp.asarray([-1.0, 1.0], jnp.float32), H // 2)
    tables = (jnp.tile(jnp.tile(x, 2) * sign, C // H) for x, sign in ((cos, 1), (sin, signs)))
    hidden = jnp.where(valid, 0.0, MASKED).astype(jnp.float32)
    call = functools.partial(_call, qkv.shape, qkv.dtype, W, heads)
    return jax.lax.platform_dependent(qkv, *tables, hidden, tpu=call(interpret=False), default=call(interpret=True))


def _call(shape, dtype, W, heads, interpret):
    """The kernel as a function of qkv, cosines and signed sines[P, C], and what is added to scores[P].

    A step of its grid has B rows of C channels. They look at S rows: at the windows that they fill, several where those
    are small, or at the whole slot, of which they are a part; its last part may have less rows. All parts of a slot
    come one after the other, and slots before windows, so that tables and keys are fetched once.
    """
    from jax.experimental import pallas as pl  # loads slowly, and few need it
    from jax.experimental.pallas import tpu as pltpu

    T, P, D = shape[0], shape[1], shape[2] // 3
    H, U = D // heads, P // W
    parts = -(-U // _MOST_ROWS)
    C, R = math.lcm(H, LANES), round_up(-(-U // parts), _ROWS)
    S = U * _largest_divisor(W, _MOST_ROWS // U)
    B, columns = S if parts == 1 else R, D // C
    block = lambda size, index: pl.BlockSpec((1, size, C), index)
    rows = block(B, lambda c, s, t, b: (t, s * parts + b, c))
    keys, values = (block(S, lambda c, s, t, b, part=part: (t, s, part * columns + c)) for part in (1, 2))
    table = pl.BlockSpec((parts * B, C), lambda c, s, t, b: (s, 0))
    kernel = pl.pallas_call(
        functools.partial(_attend_block, H=H, U=U, R=R),
        out_shape=jax.ShapeDtypeStruct((T, P, D), dtype),
        grid=(columns, P // S, T, parts),
        in_specs=[rows, keys, values, table, table, pl.BlockSpec((1, 1, S), lambda c, s, t, b: (s, 0, 0))],
        out_specs=rows,
        scratch_shapes=[pltpu.VMEM((S, C), dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_LARGE_MEMORY if U > _MOST_ROWS else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * T * P * U * D,
            transcendentals=T * P * U * heads,
            bytes_accessed=4 * T * P * D * dtype.itemsize,
        ),
        interpret=interpret,
        name="windows",
    )
    whole = lambda table: pad_end(table, 0, parts * B - S)  # as the last part of a slot reads them
    return lambda qkv, cos, sin, hidden: kernel(qkv, qkv, qkv, whole(cos), whole(sin), hidden.reshape(P // S, 1, S))


def _largest_divisor(number: int, most: int) -> int:
    return max(each for each in range(1, max(1, most) + 1) if number % each == 0)


def _attend_block(q_ref, k_ref, v_ref, cos_ref, sin_ref, hidden_ref, out_ref, rotated_ref, *, H, U, R):
    """q_ref[1, B, C] over k_ref and v_ref[1, S, C], R rows at a time; rotated_ref keeps the rotated keys."""
    from jax.experimental import pallas as pl

    block, (_, B, C), S = pl.program_id(3), q_ref.shape, k_ref.shape[1]

    @pl.when(block == 0)
    def _():
        rotated_ref[...] = _rotated(k_ref[0], cos_ref[:S], sin_ref[:S], H).astype(rotated_ref.dtype)

    own = pl.ds(pl.multiple_of(block * B, _ROWS), B)
    q = (_rotated(q_ref[0], cos_ref[own], sin_ref[own], H) * H**-0.5).astype(q_ref.dtype)
    heads = [_tiles(n, H) for n in range(C // H)]
    for start in range(0, B, R):
        rows, window = slice(start, start + R), slice(start, start + U) if R == U else slice(0, U)
        scores = [_scores(q[rows, tiles], rotated_ref[window, tiles], lanes) for tiles, lanes in heads]
        weights = [_softmax(x + hidden_ref[0, :, window], q.dtype) for x in scores]
        mixes = [_mix(w, total, v_ref[0, window, tiles]) for (w, total), (tiles, _) in zip(weights, heads, strict=True)]
        for tile in range(C // LANES):
            lanes = slice(tile * LANES, (tile + 1) * LANES)
            out_ref[0, rows, lanes] = _joined(mixes, heads, lanes).astype(out_ref.dtype)


def _rotated(x, cos, sin, H):
    """x[rows, C] in float32, each head's channels turned: `rotary.rotate`."""
    from jax.experimental.pallas import tpu as pltpu

    wide, C = x.astype(jnp.float32), x.shape[-1]
    is_first = jax.lax.rem(_lane(C), np.int32(H)) < H // 2
    partner = jnp.where(is_first, pltpu.roll(wide, C - H // 2, 1), pltpu.roll(wide, H // 2, 1))
    return wide * cos + partner * sin


def _tiles(head: int, H: int) -> tuple[slice, slice]:
    """The tiles of lanes that a head lies in, and of these lanes its own."""
    start, stop = head * H, (head + 1) * H
    first = start // LANES * LANES
    return slice(first, -(-stop // LANES) * LANES), slice(start - first, stop - first)


def _lane(count: int):
    return jax.lax.broadcasted_iota(jnp.int32, (1, count), 1)


def _scores(q, k, lanes: slice):
    lane = _lane(q.shape[-1])
    alone = jnp.where((lane >= lanes.start) & (lane < lanes.stop), q, jnp.zeros((), q.dtype))
    return jax.lax.dot_general(alone, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _softmax(scores, dtype):
    """Weights that are still to be divided by their sum, and the sum."""
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights.astype(dtype), weights.sum(-1, keepdims=True)


def _mix(weights, total, v):
    return jnp.dot(weights, v, preferred_element_type=jnp.float32) / total


def _joined(mixes, heads, lanes: slice):
    """One tile of lanes, each lane from the head that it belongs to."""
    joined = None
    for mix, (tiles, own) in zip(mixes, heads, strict=True):
        if tiles.start <= lanes.start < tiles.stop:
            part = mix[:, lanes.start - tiles.start : lanes.stop - tiles.start]
            begins = tiles.start + own.start - lanes.start
            joined = part if joined is None else jnp.where(_lane(LANES) >= begins, part, joined)
    return joined
