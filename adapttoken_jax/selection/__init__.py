"""The method's steps as pure functions: NumPy or JAX arrays in, arrays out. One file per step; none knows the model."""

from adapttoken_jax.selection.budget import allocate_budget, candidate_count, equal_budget, group_weights
from adapttoken_jax.selection.certainty import group_certainty, least_certain_mean, token_certainty, token_entropy
from adapttoken_jax.selection.grouping import group_slots, visiting_order
from adapttoken_jax.selection.redundancy import remove_redundant
from adapttoken_jax.selection.relevance import reduce_relevance, top_tokens
from adapttoken_jax.selection.stopping import should_stop

__all__ = [
    "allocate_budget",
    "candidate_count",
    "equal_budget",
    "group_certainty",
    "group_slots",
    "group_weights",
    "least_certain_mean",
    "reduce_relevance",
    "remove_redundant",
    "should_stop",
    "token_certainty",
    "token_entropy",
    "top_tokens",
    "visiting_order",
]
