"""The steps of AdaptToken as pure functions, one file per step; nothing here knows the model or the video.

grouping (step 3), relevance (5, 9), certainty (6), stopping (7), budget (8), redundancy (10). Relevance and certainty
work on NumPy and JAX arrays, also inside `jax.jit`; the other steps decide shapes or control flow and run on the host,
in NumPy, accepting JAX arrays.
"""

from adapttoken_jax.selection.budget import allocate_budget, candidate_count, equal_budget, group_weights
from adapttoken_jax.selection.certainty import (
    CERTAINTIES,
    group_certainty,
    least_certain_mean,
    token_certainty,
    token_entropy,
)
from adapttoken_jax.selection.grouping import group_slots, visiting_order
from adapttoken_jax.selection.redundancy import KERNELS, remove_redundant, remove_redundant_reference
from adapttoken_jax.selection.relevance import reduce_relevance, top_tokens
from adapttoken_jax.selection.stopping import CERTAIN_GROUPS_AGREE, ENOUGH_CERTAIN_GROUPS, GO_ON, should_stop

__all__ = [
    "CERTAINTIES",
    "CERTAIN_GROUPS_AGREE",
    "ENOUGH_CERTAIN_GROUPS",
    "GO_ON",
    "KERNELS",
    "allocate_budget",
    "candidate_count",
    "equal_budget",
    "group_certainty",
    "group_slots",
    "group_weights",
    "least_certain_mean",
    "reduce_relevance",
    "remove_redundant",
    "remove_redundant_reference",
    "should_stop",
    "token_certainty",
    "token_entropy",
    "top_tokens",
    "visiting_order",
]
