"""Steps 3 and 7 of the method: which slots form a group, and in which order the groups are visited."""

import numpy as np

from adapttoken_jax.errors import UserError


def group_slots(num_slots: int, slots_per_group: int) -> list[np.ndarray]:
    """Interleaved groups: group g holds the slots g, g + G, g + 2G, ... with G = ceil(num_slots / slots_per_group).

    Every group spans the whole video at a lower rate; sizes differ by at most one slot.

    Returns:
      G arrays int64[k], k <= slots_per_group, each ascending; together every slot once. No slots, no groups.

    Raises:
      UserError: `slots_per_group` below 1.
    """
    if slots_per_group < 1:
        raise UserError(f"--slots_per_group={slots_per_group}: must be at least 1")
    groups = -(-num_slots // slots_per_group)
    return [np.arange(first, num_slots, groups) for first in range(groups)]


def visiting_order(num_groups: int, order: str) -> np.ndarray:
    """The groups in the order of their visit, int64[g], a permutation of 0 .. num_groups - 1.

    `sequential` counts up. `bit_reversed` visits 0, G/2, G/4, 3G/4, ...: neighbouring groups hold neighbouring frames,
    so distant ones first cover the video sooner. For a number of groups that is no power of two, the bits are reversed
    over the next power of two and groups that do not exist are left out.

    Raises:
      UserError: another `order`.
    """
    if order == "sequential":
        return np.arange(num_groups)
    if order != "bit_reversed":
        raise UserError(f"--group_order={order}: choose one of sequential, bit_reversed")
    reversed_counts = np.zeros(1, np.int64)
    while reversed_counts.size < num_groups:
        # Bit reversals of twice as many numbers: even ones (a low 0) keep the high half free, odd ones set the low bit.
        reversed_counts = np.concatenate([2 * reversed_counts, 2 * reversed_counts + 1])
    return reversed_counts[reversed_counts < num_groups]
