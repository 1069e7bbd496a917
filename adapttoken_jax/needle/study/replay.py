"""From the log of a scan to the tokens of the final prompt: steps 8 to 10 once more, for any setting and any arm.

`survivors.select` does the same for one run of the method, group by group; here all groups are arrays, because a study
selects hundreds of thousands of times. `cells.check_replay` and the tests hold the two together.

Letters as in `scans`; B tokens selected.
"""

import dataclasses

import numpy as np

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens
from adapttoken_jax.needle.study.scans import Log
from adapttoken_jax.prompt import Prompt
from adapttoken_jax.selection import (
    allocate_budget,
    budget_temperature,
    candidate_count,
    coverage_count,
    coverage_tokens,
    debias_relevance,
    equal_budget,
    group_weights,
    remove_redundant,
    token_certainty,
    top_tokens,
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a replay selected. weights: float64[G]; tokens: int64[B, 3] (slot, row, column) in video order."""

    weights: np.ndarray
    tokens: np.ndarray


def certainties(log: Log, prompt: Prompt, form: str) -> np.ndarray:
    """Certainty of each group's answer of one token, float64[G]."""
    if form == "neg_entropy":
        return -log.entropy
    return np.asarray(token_certainty(log.logits, form, np.asarray(prompt.letter_ids)), np.float64)


def select(video: VisualTokens, log: Log, prompt: Prompt, config: AdaptTokenConfig, method: str) -> Choice:
    """Steps 8 to 10.

    Args:
      method: `adapttoken` or `lite` (the method), `flexselect` (equal budgets, nothing dropped), or `attention` (one
        pool over all groups, by relevance alone, nothing dropped).
    """
    places = coordinates(video, log.slots)
    relevance = _relevance(video, log, config, method)
    capacity = (~np.isnan(relevance)).sum(1)
    if method in ("attention", "flexselect"):
        pool = relevance.reshape(1, -1) if method == "attention" else relevance
        budgets = [config.budget] if method == "attention" else equal_budget(capacity, config.budget)
        taken = top_tokens(pool, budgets).reshape(relevance.shape)
        return Choice(np.full(len(capacity), 1 / len(capacity)), in_video_order(places[taken]))
    certainty = certainties(log, prompt, config.certainty)
    temperature = budget_temperature(certainty, config.temperature, config.temperature_target)
    weights = group_weights(certainty, temperature)
    covering = _covering(video, log, relevance, weights, config)
    reserved = covering.sum(1)
    total = candidate_count(config.budget - reserved.sum(), config.over_selection, (capacity - reserved).sum())
    budgets = allocate_budget(certainty, capacity - reserved, total, temperature, config.min_tokens_per_group)
    taken = top_tokens(np.where(covering, np.nan, relevance), budgets)
    kept = _without_redundancy(video, log, taken, places, weights[:, None] * relevance, config, int(reserved.sum()))
    return Choice(weights, in_video_order(np.concatenate([kept, places[covering]])))


def coordinates(video: VisualTokens, slots: np.ndarray) -> np.ndarray:
    """(slot, row, column) of every token: int64[G, n, 3]; the slot is -1 at padding."""
    return video.coordinates(slots.reshape(-1)).reshape(len(slots), -1, 3)


def in_video_order(tokens: np.ndarray) -> np.ndarray:
    """Sorts (slot, row, column) rows."""
    return tokens[np.lexsort(tokens.T[::-1])]


def _relevance(video, log, config, method) -> np.ndarray:
    if not config.debias or method not in ("adapttoken", "lite"):
        return log.relevance
    out = log.relevance.copy()
    for row in out:
        own = ~np.isnan(row)
        row[own] = debias_relevance(row[own].reshape(-1, video.per_slot)).reshape(-1)
    return out


def _covering(video, log, relevance, weights, config) -> np.ndarray:
    """Tokens of the coverage floor: bool[G, n]."""
    marked = np.zeros(relevance.shape, bool)
    count = coverage_count(config.coverage, config.budget)
    if count:
        own = ~np.isnan(relevance)
        slots = np.repeat(log.slots, video.per_slot, axis=1)
        scores = (weights[:, None] * relevance)[own]
        marked[own] = coverage_tokens(slots[own], scores, video.clip.grid[0], count)
    return marked


def _without_redundancy(video, log, taken, places, scores, config, reserved) -> np.ndarray:
    """(slot, row, column) of the candidates that survive step 10, int64[kept, 3]."""
    tokens = places[taken]
    keep = min(config.budget - reserved, len(tokens))
    if keep == len(tokens):
        return tokens
    order = np.lexsort(tokens.T[::-1])
    tokens, scores = tokens[order], scores[taken][order]
    features = video.gather(tokens) if config.similarity == "projector" else log.hidden[taken][order]
    positions = video.clip.positions(tokens)
    kept = remove_redundant(
        features.astype(np.float32), positions, scores, keep, kernel=config.proximity, scale=config.proximity_scale
    )
    return tokens[kept]
