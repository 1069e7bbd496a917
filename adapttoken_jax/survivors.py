"""Steps 8 to 10 for one question: which visual tokens of the scanned video its final prompt holds."""

import numpy as np

from adapttoken_jax.run import Run, Selected
from adapttoken_jax.scan import Visit
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
    top_tokens,
)


def select(run: Run) -> Selected:
    """Steps 8 to 10: budget per group, most relevant tokens of each, redundant ones dropped, video order restored."""
    # In the order of the video's groups, to which ties in the budget refer; budgets go back to visiting order.
    order = np.argsort([v.index for v in run.scan.visits])
    visits = [run.scan.visits[i] for i in order]
    relevance = [relevance_of(run, v) for v in visits]
    weights, budgets, covering = _budgets(run, visits, relevance)
    chosen = [
        top_tokens(np.where(own, np.nan, r)[None], [b])[0]
        for r, b, own in zip(relevance, budgets, covering, strict=True)
    ]
    budgets = budgets + [own.sum() for own in covering]
    back = np.argsort(order)
    scanned = run.video.coordinates(np.concatenate([v.slots for v in visits]))
    floor, candidates = (scanned[np.concatenate(marks)] for marks in (covering, chosen))
    by_place = np.lexsort(candidates.T[::-1])
    candidates = candidates[by_place]
    kept = np.ones(len(candidates), bool)
    if run.method != "flexselect":
        score = np.concatenate([w * r[c] for w, r, c in zip(weights, relevance, chosen, strict=True)])[by_place]
        kept = _without_redundancy(run, visits, chosen, by_place, candidates, score, run.config.budget - len(floor))
    return Selected(
        weights[back], budgets[back], _in_video_order(candidates, floor), _in_video_order(candidates[kept], floor)
    )


def relevance_of(run: Run, visit: Visit) -> np.ndarray:
    """The relevance by which a group's tokens are selected, float32[k M]."""
    if not run.config.debias or run.method == "flexselect":
        return visit.relevance
    return debias_relevance(visit.relevance.reshape(-1, run.video.per_slot)).reshape(-1)


def _budgets(run: Run, visits, relevance) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Step 8: weights [v], tokens to select per group [v], and which tokens of each are set aside for coverage."""
    config = run.config
    capacity = np.array([len(r) for r in relevance])
    if run.method == "flexselect":
        equal, nothing = np.full(len(visits), 1 / len(visits)), [np.zeros(n, bool) for n in capacity]
        return equal, equal_budget(capacity, config.budget), nothing
    certainty = np.array([v.reply.certainty for v in visits])
    temperature = budget_temperature(certainty, config.temperature, config.temperature_target)
    weights = group_weights(certainty, temperature)
    covering = _cover(run, visits, relevance, weights)
    reserved = np.array([own.sum() for own in covering])
    total = candidate_count(config.budget - reserved.sum(), config.over_selection, (capacity - reserved).sum())
    budgets = allocate_budget(certainty, capacity - reserved, total, temperature, config.min_tokens_per_group)
    return weights, budgets, covering


def _cover(run: Run, visits, relevance, weights) -> list[np.ndarray]:
    """The coverage floor: per group, which tokens are the best of their stretch of time."""
    slots = np.concatenate([np.repeat(v.slots, run.video.per_slot) for v in visits])
    score = np.concatenate([w * r for w, r in zip(weights, relevance, strict=True)])
    count = coverage_count(run.config.coverage, run.config.budget)
    marked = coverage_tokens(slots, score, run.plan.clip.grid[0], count)
    return np.split(marked, np.cumsum([len(r) for r in relevance])[:-1])


def _in_video_order(tokens: np.ndarray, more: np.ndarray) -> np.ndarray:
    together = np.concatenate([tokens, more])
    return together[np.lexsort(together.T[::-1])]


def _without_redundancy(run: Run, visits, chosen, by_place, candidates, score, keep: int) -> np.ndarray:
    """Step 10: which candidates stay, bool[n]."""
    config = run.config
    if len(candidates) <= keep:
        return np.ones(len(candidates), bool)
    if config.similarity == "projector":
        features = run.video.gather(candidates)
    else:
        features = np.concatenate([v.hidden[c] for v, c in zip(visits, chosen, strict=True)])[by_place]
    positions = run.plan.clip.positions(candidates)
    return remove_redundant(
        features.astype(np.float32), positions, score, keep, kernel=config.proximity, scale=config.proximity_scale
    )
