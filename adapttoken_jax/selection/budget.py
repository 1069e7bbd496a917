"""Step 8 of the method: how many tokens each visited group may keep. NumPy, float64, sums exact.

Axis letter: g groups. JAX arrays are accepted and come back as NumPy arrays: budgets decide shapes, so they live on
the host.
"""

import bisect

import numpy as np

from adapttoken_jax.errors import UserError

# Remainders are compared in whole units of this, so that the last bit of a platform's `exp` decides nothing: exact ties
# go to the lower index everywhere.
_UNIT = 1e-9


def candidate_count(budget: int, over_selection: float, available: int) -> int:
    """Tokens to take before redundancy removal: round(over_selection * budget), at most `available`."""
    return min(round(over_selection * budget), int(available))


def group_weights(certainty, temperature: float) -> np.ndarray:
    """softmax(certainty / temperature) over the groups, float64[g].

    Raises:
      UserError: a temperature that is not positive.
      ValueError: a certainty that is not finite.
    """
    weights = np.exp(_log_weights(certainty, temperature))
    return weights / weights.sum()


def _log_weights(certainty, temperature: float) -> np.ndarray:
    """Logarithms of the weights up to a common constant; the largest is 0."""
    certainty = np.asarray(certainty, np.float64)
    if not temperature > 0:
        raise UserError(f"--temperature={temperature}: must be above 0")
    if not np.isfinite(certainty).all():
        raise ValueError(f"certainty must be finite in every group: {certainty.tolist()}")
    # Spread first: dividing the certainties themselves by a tiny temperature would cancel catastrophically.
    spread = certainty - certainty.max(initial=-np.inf)
    # Below this, logarithms are so large that counts added to them are lost; the weights are those of one group anyway.
    least = -1e-11 * spread.min(initial=0.0)
    return spread / max(temperature, least)


def allocate_budget(certainty, capacity, budget: int, temperature: float, minimum: int = 0) -> np.ndarray:
    """Splits `budget` over groups in proportion to softmax(certainty / temperature), within each group's bounds.

    The real shares are clip(lambda * weight, minimum, capacity) with the one lambda that makes them sum to the budget:
    what a full group cannot take goes to the others by weight. Largest remainders make them integers (ties: the lower
    index), so each budget is less than one token away from its share and never above the capacity.

    Args:
      certainty: [g] of the visited groups, higher is more certain.
      capacity: int[g], tokens that each group has.
      budget: tokens to hand out.
      temperature: of the softmax; high is equal budgets, low is all to the most certain group.
      minimum: fewest tokens per group; a group with fewer keeps all it has.

    Returns:
      int64[g] with sum min(budget, sum(capacity)) exactly.

    Raises:
      UserError: the minima alone exceed the budget, or a temperature that is not positive.
      ValueError: shapes that differ, a negative count, or a certainty that is not finite.
    """
    log_weights = _log_weights(certainty, temperature)
    high = np.asarray(capacity, np.int64)
    if high.ndim != 1 or high.shape != log_weights.shape or (high < 0).any():
        raise ValueError(f"capacity must be one non-negative count per group ({log_weights.size}): {high.tolist()}")
    if budget < 0 or minimum < 0:
        raise ValueError(f"budget ({budget}) and minimum ({minimum}) must not be negative")
    low = np.minimum(minimum, high)
    total = min(int(budget), int(high.sum()))
    if low.sum() > total:
        raise UserError(
            f"--budget: {total} tokens cannot give {high.size} groups --min_tokens_per_group={minimum} each; "
            f"raise --budget or lower --min_tokens_per_group"
        )
    if total == high.sum():
        return high.copy()
    return _largest_remainder(_clipped_shares(log_weights, low, high, total), total)


def equal_budget(capacity, budget: int) -> np.ndarray:
    """FlexSelect's budgets: the same for every group, int64[g]; caps, rounding and errors as in `allocate_budget`."""
    return allocate_budget(np.zeros(np.shape(capacity)), capacity, budget, temperature=1.0)


def _clipped_shares(log_weights, low, high, total: int) -> np.ndarray:
    """clip(exp(mu + log_weights), low, high) for the mu at which it sums to `total`; sum(low) <= total < sum(high).

    The sum is increasing in mu and smooth between the points where some group leaves its minimum or meets its capacity,
    so the right piece is found by evaluating those points, and on it the free groups share what is left by weight.
    Logarithms, because at a low temperature weights underflow that still rank the groups once the best one is full.
    """
    with np.errstate(divide="ignore", over="ignore"):
        leaves_low, meets_high = np.log(low) - log_weights, np.log(high) - log_weights
        points = np.unique(np.concatenate([leaves_low, meets_high]))
        place = bisect.bisect_left(points, total, key=lambda mu: np.clip(np.exp(mu + log_weights), low, high).sum())
    # At the smallest temperatures the exponentials are rough, and no sum may reach the total.
    end = points[min(place, points.size - 1)]
    free = (leaves_low < end) & (meets_high >= end)
    shares = np.where(meets_high < end, high, low).astype(np.float64)
    if free.any():
        weights = np.exp(log_weights[free] - log_weights[free].max())
        shares[free] = (total - shares[~free].sum()) * weights / weights.sum()
    return np.clip(shares, low, high)


def _largest_remainder(shares, total: int) -> np.ndarray:
    budgets = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(-np.round((shares - budgets) / _UNIT), stable=True)
    budgets[by_remainder[: total - budgets.sum()]] += 1
    return budgets
