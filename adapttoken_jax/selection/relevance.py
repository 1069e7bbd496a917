"""Steps 5 and 9 of the method: the relevance of visual tokens to the text, and the most relevant tokens of each group.

Axis letters: N heads, T text tokens (queries), S visual tokens (keys), g groups. Everything works on NumPy and JAX
arrays, also inside `jax.jit`, has static shapes, and computes in float32 or the input's wider type.
"""

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection.arrays import array_and_namespace, widened


def reduce_relevance(probabilities, heads: str, text: str, rows=None):
    """Relevance of each visual token: its attention reduced over heads first, then over text tokens.

    The reference for every kernel that produces relevance without storing the probabilities.

    Args:
      probabilities: [..., N, T, S] attention at the reference layer, softmax already taken over the WHOLE key sequence
        (not only over the S visual keys that are passed here).
      heads: `max` or `mean` over N.
      text: `max` or `mean` over T.
      rows: bool[..., T], the text tokens that count; None: all.

    Returns:
      [..., S], in [0, 1]; zeros where no row counts.

    Raises:
      UserError: another reduction.
    """
    probabilities, xp = array_and_namespace(probabilities)
    over_heads = _reduction(xp, heads, "relevance_heads")(widened(probabilities, xp), axis=-3)  # [..., T, S]
    reduce_text = _reduction(xp, text, "relevance_text")
    if rows is None:
        return reduce_text(over_heads, axis=-2)
    rows = xp.asarray(rows)[..., None]  # [..., T, 1]
    # A row that does not count becomes zero: the smallest probability for a maximum, no summand for a mean.
    counted = xp.where(rows, over_heads, 0)
    if text == "max":
        return counted.max(axis=-2)
    return counted.sum(axis=-2) / xp.maximum(rows.sum(axis=-2), 1).astype(counted.dtype)


def _reduction(xp, name: str, flag: str):
    if name not in ("max", "mean"):
        raise UserError(f"--{flag}={name}: choose one of max, mean")
    return getattr(xp, name)


def top_tokens(relevance, budgets):
    """Marks the `budgets[g]` most relevant tokens of each group; among equals the lower index.

    Args:
      relevance: [g, n]; NaN where there is no token (padding, or a group that was not visited).
      budgets: int[g], tokens to take. More than the group has takes all that it has.

    Returns:
      bool[g, n].
    """
    relevance, xp = array_and_namespace(relevance)
    relevance = widened(relevance, xp)
    by_relevance = xp.argsort(-relevance, axis=-1, stable=True)  # NaN sorts last
    rank = xp.argsort(by_relevance, axis=-1, stable=True)
    return (rank < xp.asarray(budgets)[..., None]) & ~xp.isnan(relevance)
