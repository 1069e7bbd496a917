"""The steps of AdaptToken as pure functions, one file per step; nothing here knows the model or the video.

grouping (step 3), relevance (5, 9), certainty (6), stopping (7), budget (8), redundancy (10). Relevance and certainty
work on NumPy and JAX arrays, also inside `jax.jit`; the other steps decide shapes or control flow and run on the host,
in NumPy, accepting JAX arrays. Beyond the paper and off by default: stop_rule (7), temperature (8), debias and
coverage (9); consensus is a second answer. compiled_stopping (7) and compiled (8 to 10) are twins that run on the
device.
"""

from adapttoken_jax.selection.budget import allocate_budget, candidate_count, equal_budget, group_weights
from adapttoken_jax.selection.certainty import (
    group_certainty,
    least_certain_mean,
    token_certainty,
    token_entropy,
)
from adapttoken_jax.selection.consensus import option_consensus, pooled_evidence
from adapttoken_jax.selection.coverage import coverage_count, coverage_tokens
from adapttoken_jax.selection.debias import debias_relevance, position_trend
from adapttoken_jax.selection.grouping import group_slots, visiting_order
from adapttoken_jax.selection.redundancy import KERNELS, remove_redundant, remove_redundant_reference
from adapttoken_jax.selection.relevance import reduce_relevance, top_tokens
from adapttoken_jax.selection.stop_rule import CERTAIN_OVER_ALL, GAVE_UP, StopRule, blind_gain, gave_up
from adapttoken_jax.selection.stopping import CERTAIN_GROUPS_AGREE, ENOUGH_CERTAIN_GROUPS, GO_ON, should_stop
from adapttoken_jax.selection.temperature import (
    budget_temperature,
    effective_groups,
    solve_temperature,
    target_groups,
)

__all__ = [
    "CERTAIN_GROUPS_AGREE",
    "CERTAIN_OVER_ALL",
    "ENOUGH_CERTAIN_GROUPS",
    "GAVE_UP",
    "GO_ON",
    "KERNELS",
    "StopRule",
    "allocate_budget",
    "blind_gain",
    "budget_temperature",
    "candidate_count",
    "coverage_count",
    "coverage_tokens",
    "debias_relevance",
    "effective_groups",
    "equal_budget",
    "gave_up",
    "group_certainty",
    "group_slots",
    "group_weights",
    "least_certain_mean",
    "option_consensus",
    "pooled_evidence",
    "position_trend",
    "reduce_relevance",
    "remove_redundant",
    "remove_redundant_reference",
    "should_stop",
    "solve_temperature",
    "target_groups",
    "token_certainty",
    "token_entropy",
    "top_tokens",
    "visiting_order",
]
