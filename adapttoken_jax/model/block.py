"""What every part of the model shares: parameters by name, and RMS normalisation."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """A node of the parameter tree: one `nnx.Param` per leaf, one Block of the class in `parts` per inner node.

    Names and shapes come from the parameter table. A stack of layers is one Block whose leaves have a leading axis L;
    `jax.lax.scan` over it hands out the layers.
    """

    parts: ClassVar[dict[str, type["Block"]]] = {}

    def __init__(self, config, values: dict):
        self.config = config
        for name, value in values.items():
            setattr(self, name, self.parts[name](config, value) if isinstance(value, dict) else nnx.Param(value))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)
    return scale[...] * normal.astype(x.dtype)
