"""Rotary embeddings in float32: 2-D for the vision tower, M-RoPE (time, height, width) for the text decoder."""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Inverse frequencies float32[head_dim / 2]."""
    return (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))).astype(np.float32)


def vision_angles(rows: np.ndarray, cols: np.ndarray, head_dim: int, theta: float) -> np.ndarray:
    """Angles float32[P, head_dim / 2] of patches: half of the frequencies turn by row, the other half by column."""
    inverse = frequencies(head_dim // 2, theta)
    return np.concatenate([np.outer(rows, inverse), np.outer(cols, inverse)], axis=1).astype(np.float32)


def text_angles(position_ids: jax.Array, head_dim: int, theta: float, sections: tuple[int, ...]) -> jax.Array:
    """M-RoPE angles float32[..., T, head_dim / 2] from ids [..., 3, T]: each section of frequencies follows one id.

    Ids stay integers until this product; bfloat16 could not tell 256 from 257.
    """
    section = np.repeat(np.arange(3), sections)  # which id drives each frequency
    ids = jnp.moveaxis(position_ids.astype(jnp.float32), -2, -1)[..., section]
    return ids * frequencies(head_dim, theta)


def turns(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32, of angles[..., H / 2]: once for all heads and layers."""
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array], scale: float = 1.0) -> jax.Array:
    """Rotates x[..., H] in float32 by the angles that have these `turns`, and scales; pairs element i with i + H / 2.

    `turn` broadcasts to x, whose heads may stand before its rows or after them.

    A TPU swaps the halves by a product with a signed permutation, which is exact in any type at the highest precision:
    to shift channels among the lanes costs it several times as much.
    """
    cos, sin = (jnp.concatenate([each, each], -1) for each in turn)
    swapped = jax.lax.platform_dependent(x, tpu=_swap_by_product, default=_swap)
    return ((x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin) * scale).astype(x.dtype)


def _swap(x):
    """The other half of every pair, signed as a rotation wants it: (a, b) -> (-b, a)."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], -1)


def _swap_by_product(x):
    half = np.eye(x.shape[-1] // 2, dtype=np.float32)
    swap = np.block([[np.zeros_like(half), half], [-half, np.zeros_like(half)]])
    return jnp.matmul(x, jnp.asarray(swap, x.dtype), precision="highest")
