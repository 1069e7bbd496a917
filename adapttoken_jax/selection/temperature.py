"""A temperature for step 8 that follows the evidence: how many groups share the budget, instead of a fixed number.

With a fixed temperature the most certain of 16 groups may get most of the budget while the same one among 128 gets
little. Here the effective number of groups, exp(H(w)) for weights w, is prescribed, and the temperature solves for it.

Axis letter: g groups. NumPy, float64.
"""

import numpy as np

from adapttoken_jax.selection.budget import group_weights

# Temperatures tried, as multiples of the certainties' range: from one group alone to equal weights within 1e-6.
_LOWEST, _HIGHEST = 1e-4, 1e6
_HALVINGS = 60


def effective_groups(weights) -> float:
    """exp of the entropy of the weights: 1 where one group has all the weight, g where all have the same."""
    weights = np.asarray(weights, np.float64)
    positive = weights[weights > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def target_groups(certainty, fewest: float) -> float:
    """The effective number of groups to aim at: g where all are equally certain, near `fewest` where one stands out.

    The spread is how far the most certain group is above the mean, s nats; the target goes from g to `fewest` on
    a logarithmic scale with the share 1 - exp(-s) of the way. `fewest` is at least 1 and is cut to g.
    """
    certainty = np.asarray(certainty, np.float64)
    g = certainty.size
    fewest = min(fewest, g)
    share = -np.expm1(certainty.mean() - certainty.max())
    return float(g * (fewest / g) ** share)


def solve_temperature(certainty, target: float) -> float:
    """The temperature at which softmax(certainty / temperature) has `target` effective groups.

    Found by bisection: the effective number rises with the temperature, from the number of groups that tie for the
    first place to g. A target outside of that range gives the end of the range; certainties that are all the same give
    1, since every temperature does the same to them.

    Args:
      certainty: [g], finite.
      target: effective number of groups.
    """
    certainty = np.asarray(certainty, np.float64)
    spread = float(np.ptp(certainty))
    if spread == 0:
        return 1.0
    low, high = np.log(_LOWEST * spread), np.log(_HIGHEST * spread)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_few = effective_groups(group_weights(certainty, float(np.exp(middle)))) < target
        low, high = (middle, high) if too_few else (low, middle)
    return float(np.exp((low + high) / 2))


def budget_temperature(certainty, fixed: float, fewest: float) -> float:
    """The temperature of step 8: `fixed`, or with `fewest` > 0 `solve_temperature` for `target_groups`."""
    return solve_temperature(certainty, target_groups(certainty, fewest)) if fewest else fixed
