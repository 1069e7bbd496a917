"""Lets one body of code serve NumPy and JAX arrays, inside and outside of `jax.jit`."""

from typing import Any

import numpy as np


def array_and_namespace(values) -> tuple[Any, Any]:
    """`values` as an array, and the module whose functions work on it: `jax.numpy` for JAX arrays, else NumPy.

    Lists and numbers become NumPy arrays. JAX itself is not imported here: its arrays and tracers name their module.
    """
    if not hasattr(values, "__array_namespace__"):
        values = np.asarray(values)
    return values, values.__array_namespace__()


def widened(array, xp):
    """In float32, or the array's wider type: sums of narrower numbers overflow, and unsigned ones have no minus."""
    return array.astype(xp.result_type(array.dtype, np.float32))
