"""Steps 8 to 10 as compiled programs of static shape; `budget`, `relevance`, `coverage` and `redundancy` are the twins.

Tokens are padded to G groups of S, candidates to C, places in the video's order to P. Call under `precise()`: the twins
compute in float64, and so do these wherever the platform has it. Tokens are sorted once, and nothing is scattered: a
TPU's compiler spends up to half a minute on a sort of so many, and sorts to scatter.

Axis letters: G groups, S tokens of a group, C candidates, P places, D features.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adapttoken_jax.selection.redundancy import KERNELS

_ROWS = 128  # rows of the redundancy matrix that are formed together


def precise():
    """A context in which these programs compute as their twins do: float64, but for a TPU, which has none."""
    return contextlib.nullcontext() if jax.default_backend() == "tpu" else jax.enable_x64(True)


class Scanned(NamedTuple):
    """What a question's scan leaves behind, padded.

    Attributes:
      relevance: float[G, S]; NaN where there is no token or the group was not visited.
      certainty: float[G].
      visited: bool[G].
      token: int32[P], which token has each place in the video's order, counted group by group; G S: none of these.
      stretch: int32[G, S], the stretch of time whose best token is set aside for coverage.
    """

    relevance: jax.Array
    certainty: jax.Array
    visited: jax.Array
    token: jax.Array
    stretch: jax.Array


class Numbers(NamedTuple):
    """Settings that are traced, so that other values compile nothing.

    Attributes:
      budget: int32[], tokens of the final prompt.
      over_selection: float[], candidates as a multiple of it.
      temperature: float[], of the softmax over groups.
      minimum: int32[], fewest tokens per group.
      scale: float[], of the proximity, seconds.
    """

    budget: jax.Array
    over_selection: jax.Array
    temperature: jax.Array
    minimum: jax.Array
    scale: jax.Array


class Candidates(NamedTuple):
    """Tokens chosen by steps 8 and 9, in the video's order, and the budgets that they fill.

    Attributes:
      weights: float[G], of the groups; 0 where not visited.
      budgets: int32[G], tokens of each group, those for coverage included.
      place: int32[C]; P is padding.
      score: float[C], weighted relevance.
      free: bool[C], tokens that redundancy removal may drop.
      covering: bool[C], those set aside for coverage, which it may not. Padding is neither.
      keep: int32[], free tokens that the final prompt has room for.
    """

    weights: jax.Array
    budgets: jax.Array
    place: jax.Array
    score: jax.Array
    free: jax.Array
    covering: jax.Array
    keep: jax.Array


@functools.partial(jax.jit, static_argnames=("most", "stretches"))
def choose_candidates(scanned: Scanned, numbers: Numbers, *, most: int, stretches: int) -> Candidates:
    """Steps 8 and 9: budgets by certainty, the most relevant tokens of each group, and those set aside for coverage.

    Args:
      most: C, at least the candidates and the stretches together.
      stretches: tokens set aside, one per stretch of time; 0 for none.
    """
    weights = _group_weights(scanned, numbers.temperature)
    score = weights[:, None] * scanned.relevance
    real = scanned.visited[:, None] & ~jnp.isnan(scanned.relevance)
    covering = _best_of_stretches(scanned, score, real, stretches)
    reserved, capacity = covering.sum(1), (real & ~covering).sum(1)
    keep = numbers.budget - reserved.sum()
    total = jnp.minimum(jnp.round(numbers.over_selection * keep).astype(capacity.dtype), capacity.sum())
    budgets = allocate_budget(scanned.certainty, scanned.visited, capacity, total, numbers)
    top = _top_tokens(jnp.where(real & ~covering, scanned.relevance, -jnp.inf), budgets)
    in_order = lambda values: values.reshape(-1).at[scanned.token].get(mode="fill", fill_value=0)
    # Where the running count of chosen tokens reaches 1, 2, 3, …; P, beyond the last place, where there are fewer.
    place = jnp.searchsorted(jnp.cumsum(in_order(top | covering)), jnp.arange(1, most + 1))
    read = lambda values: in_order(values).at[place].get(mode="fill", fill_value=0)
    return Candidates(
        weights, budgets + reserved, place.astype(jnp.int32), read(score), read(top), read(covering), keep
    )


def _top_tokens(relevance, budgets):
    """The twin of `relevance.top_tokens` over [G, S] with -inf where there is no token: bool[G, S]."""
    falling = jnp.sort(relevance, axis=1, descending=True, stable=False)
    least = jnp.take_along_axis(falling, jnp.maximum(budgets - 1, 0)[:, None], axis=1)
    above, level = relevance > least, (relevance == least) & (relevance > -jnp.inf)
    left = budgets - above.sum(1)  # for those at the level of the last one, from the lowest index on
    return above | (level & (jnp.cumsum(level, axis=1) <= left[:, None]))


def _group_weights(scanned: Scanned, temperature):
    return jax.nn.softmax(scanned.certainty / temperature, where=scanned.visited)


def _best_of_stretches(scanned: Scanned, score, real, stretches: int):
    """The twin of `coverage_tokens`: bool[G, S]."""
    if stretches == 0:
        return jnp.zeros(real.shape, bool)
    stretch = scanned.stretch.reshape(-1)
    score = jnp.where(real, score, -jnp.inf).reshape(-1)
    best = jax.ops.segment_max(score, stretch, stretches)
    # Among equals the first in the order of groups, as in the twin, whose tokens come group by group.
    index = jnp.arange(score.size)
    first = jax.ops.segment_min(jnp.where(score == best[stretch], index, score.size), stretch, stretches)
    return (first[stretch] == index).reshape(real.shape) & real


def allocate_budget(certainty, visited, capacity, total, numbers: Numbers):
    """The twin of `budget.allocate_budget` over padded groups: int[G], 0 for groups that were not visited."""
    high = jnp.where(visited, capacity, 0)
    low = jnp.minimum(numbers.minimum, high)
    log_weights = (certainty - jnp.max(certainty, where=visited, initial=-jnp.inf)) / numbers.temperature
    shares = _clipped_shares(log_weights, low, high, total)
    return jnp.where(total == high.sum(), high, _largest_remainder(shares, total))


def _clipped_shares(log_weights, low, high, total):
    """clip(exp(mu + log_weights), low, high) for the mu at which it sums to `total`; see the twin."""
    leaves_low, meets_high = (jnp.log(bound.astype(log_weights.dtype)) - log_weights for bound in (low, high))
    points = jnp.sort(jnp.concatenate([leaves_low, meets_high]))
    sums = jnp.clip(jnp.exp(points[:, None] + log_weights), low, high).sum(1)
    end = points[jnp.minimum(jnp.searchsorted(sums, total.astype(sums.dtype)), points.size - 1)]
    free = (leaves_low < end) & (meets_high >= end)
    fixed = jnp.where(meets_high < end, high, low)
    weights = jax.nn.softmax(log_weights, where=free)
    return jnp.clip(jnp.where(free, (total - jnp.where(free, 0, fixed).sum()) * weights, fixed), low, high)


def _largest_remainder(shares, total):
    unit = 1e-9 if shares.dtype == jnp.float64 else 1e-3
    budgets = jnp.floor(shares).astype(total.dtype)
    by_remainder = jnp.argsort(-jnp.round((shares - budgets) / unit), stable=True)
    rank = jnp.argsort(by_remainder, stable=True)
    return budgets + (rank < total - budgets.sum())


@functools.partial(jax.jit, static_argnames="kernel")
def remove_redundant(features, positions, candidates: Candidates, scale, *, kernel: str):
    """Step 10: marks the candidates that stay, bool[C]; the twin of `redundancy.remove_redundant`.

    The redundancy of all pairs is formed once. Each token keeps its most redundant partner; dropping tokens only lowers
    what is left, so a partner that is gone is replaced when its token comes up, not before.

    Args:
      features: [C, D].
      positions: float[C, 3], time in seconds, row and column.
      scale: of the proximity, seconds.
      kernel: one of `redundancy.KERNELS`.
    """
    redundancy = _redundancy(features, positions, candidates.free, scale, KERNELS[kernel])
    score, keep = candidates.score, candidates.keep

    def going(state):
        kept, *_ = state
        return kept.sum() > keep

    def advance(state):
        kept, best, partner = state
        i = best.argmax()
        j = partner[i]
        row = jnp.where(kept, redundancy[i], -1)
        dropped = jnp.where(score[i] < score[j], i, j)
        drop = (kept.at[dropped].set(False), best.at[dropped].set(-1), partner)
        look_again = (kept, best.at[i].set(row.max()), partner.at[i].set(row.argmax()))
        return jax.tree.map(functools.partial(jnp.where, kept[j]), drop, look_again)

    state = (candidates.free, redundancy.max(1), redundancy.argmax(1))
    kept, *_ = jax.lax.while_loop(going, advance, state)
    return kept | candidates.covering


def _redundancy(features, positions, free, scale, kernel):
    """Redundancy [C, C] of each token with the later ones; -1 elsewhere."""
    wide = positions.dtype
    norms = jnp.sqrt((features.astype(wide) ** 2).sum(1, keepdims=True))
    unit = jnp.where(norms > 0, features.astype(wide) / norms, 0)
    index = jnp.arange(len(free))

    def row_of(i):
        cosine = jnp.matmul(unit, unit[i], precision="highest")  # a TPU would round float32 factors to bfloat16
        cosine = jnp.round(jnp.maximum(cosine, 0), 12 if wide == jnp.float64 else 6)
        proximity = kernel(*(positions[i] - positions).T, scale)
        return jnp.where((index > i) & free & free[i], cosine * proximity, -1)

    return jax.lax.map(row_of, index, batch_size=_ROWS)


@functools.partial(jax.jit, static_argnames=("size", "places"))
def gather_survivors(features, candidates: Candidates, kept, *, size: int, places: int):
    """The final prompt's tokens: their features [size, D], zeros behind the last, and their places int32[size]."""
    [index] = jnp.nonzero(kept, size=size, fill_value=len(kept))
    take = lambda values, fill: values.at[index].get(mode="fill", fill_value=fill)
    return take(features, 0), take(candidates.place, places)
