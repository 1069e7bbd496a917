"""What every part of the model shares: parameters by name, products, and RMS normalisation."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

_TILE_ROWS = 8  # of a TPU's vector registers


class Block(nnx.Module):
    """A node of the parameter tree: one `nnx.Param` per leaf, one Block of the class in `parts` per inner node.

    Names and shapes come from the parameter table. A stack of layers is one Block whose leaves have a leading axis L.
    """

    parts: ClassVar[dict[str, type["Block"]]] = {}

    def __init__(self, config, values: dict):
        self.config = config
        for name, value in values.items():
            setattr(self, name, self.parts[name](config, value) if isinstance(value, dict) else nnx.Param(value))

    def layer(self, index) -> "Block":
        """One layer of the stack `layers`; with a traced `index` a loop takes one after the other, copying no stack."""
        return jax.tree.map(lambda stack: held(stack, until=index)[index], self.layers)


def held(array: jax.Array, until: jax.Array | int) -> jax.Array:
    """`array`, with which nothing is done before `until` is known, say the index of a round of a loop.

    XLA for CPUs takes whatever is done to bfloat16 in float32. Free to, it would widen all weights once, ahead of the
    loops that use them, and hold them in memory three times over.
    """
    if array.dtype != jnp.bfloat16:
        return array
    wait = lambda array, until: jax.lax.optimization_barrier((array, until))[0]
    return jax.lax.platform_dependent(array, until, cpu=wait, default=lambda array, until: array)


def product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one type, in that type.

    On a CPU a half-precision product is asked for in float32 and rounded afterwards: only then does XLA use the
    processor's own instructions, twice as fast as what it does otherwise, which is to widen both factors first. On a
    TPU a lone row goes beside zeros.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(spec, x, y)
    plain = functools.partial(jnp.einsum, spec)
    wide = lambda x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)
    tpu = functools.partial(beside_zeros, plain, axis=_lone_row(spec, x.shape))
    return jax.lax.platform_dependent(x, y, cpu=wide, tpu=tpu, default=plain)


def wide_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x[..., D] times y[D, V] in float32, of factors of any type.

    A lone row goes beside zeros: cuBLAS has this product for two rows of half precision and more, not for one, and XLA
    would widen all of `y` first.
    """
    spec = "...D,DV->...V"
    plain = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32:
        return plain(x, y)
    beside = functools.partial(beside_zeros, plain, axis=_lone_row(spec, x.shape))
    return jax.lax.platform_dependent(x, y, cpu=plain, default=beside)


def _lone_row(spec: str, shape: tuple[int, ...]) -> int | None:
    """The axis of rows of x[..., row, contracted axes], if it holds one row; None where `spec` has no such axis."""
    rows, weights = spec.split("->")[0].split(",")
    axis = len(shape) - 1 - len(set(rows) & set(weights))
    return axis if rows.startswith("...") and axis >= 0 and shape[axis] == 1 else None


def beside_zeros(multiply, x: jax.Array, y: jax.Array, axis: int | None) -> jax.Array:
    """`multiply(x, y)` with the one row on `axis` as the first of eight.

    A TPU's compiler multiplies a lone row without the matrix units: a token of an answer then takes almost three times
    as long as reading the weights does.
    """
    if axis is None:
        return multiply(x, y)
    return jax.lax.slice_in_dim(multiply(pad_end(x, axis, _TILE_ROWS - 1), y), 0, 1, axis=axis)


def row_by_row(x: jax.Array) -> jax.Array:
    """`x` as it lies in memory by default, row by row.

    A TPU's compiler turns a whole residual stream around, one channel after the other, where 128 divides its rows; its
    products are then slower.
    """
    pin = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return jax.lax.platform_dependent(x, tpu=pin, default=lambda x: x)


def pad_end(x: jax.Array, axis: int, count: int) -> jax.Array:
    """`x` with `count` zeros after the end of an axis."""
    widths = np.zeros((x.ndim, 2), int)
    widths[axis, 1] = count
    return jnp.pad(x, widths)


def merge_axes(x: jax.Array, axis: int) -> jax.Array:
    """`x` with an axis and the next one as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return scale[...] * normal.astype(x.dtype)
