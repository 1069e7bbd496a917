import math

import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection import allocate_budget, candidate_count, equal_budget, group_weights


def shares_by_bisection(certainty, low, high, total, temperature):
    """The real-valued shares from scratch: bisection on ln lambda, in float64."""
    logs = (certainty - certainty.max()) / temperature

    def shares(mu):
        return np.clip(np.exp(np.minimum(mu + logs, 700)), low, high)

    below, above = -50.0, 50.0 - logs.min()
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if shares(middle).sum() < total else (below, middle)
    return shares(above)


def random_case(seed):
    random = np.random.default_rng(seed)
    groups = int(random.integers(1, 40))
    certainty = -random.uniform(0, 1.4, groups) * 10 ** random.uniform(-1, 1)
    capacity = random.integers(0, 200, groups)
    minimum = int(random.integers(0, 5)) if seed % 3 == 0 else 0
    low = np.minimum(minimum, capacity)
    budget = int(random.integers(low.sum(), capacity.sum() + 2))
    return certainty, capacity, budget, float(10 ** random.uniform(-2, 2)), minimum


def test_figure_5_weights():
    np.testing.assert_allclose(group_weights([-0.14, -1.22], 2.0), [0.632, 0.368], atol=5e-4)


def test_weights_sum_to_one_at_any_temperature():
    for temperature in (1e-6, 0.05, 1.0, 1e6):
        assert group_weights([-1.0, -0.2, -30.0], temperature).sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    "certainty, capacity, budget, minimum, expected",
    [
        ([-0.14, -1.22], [10000, 10000], 7744, 0, [4893, 2851]),  # 4892.76 and 2851.24
        ([0, 0, 0], [9, 9, 9], 10, 0, [4, 3, 3]),
        ([0, 0, 0], [9, 2, 9], 10, 0, [4, 2, 4]),
        ([0, 0], [3, 4], 100, 0, [3, 4]),
        ([0, 0], [3, 4], 0, 0, [0, 0]),
        ([2 * math.log(3), 0], [100, 100], 10, 0, [8, 2]),  # 7.5 and 2.5: the tie goes to the lower index
        ([0, 2 * math.log(3)], [100, 100], 10, 0, [3, 7]),
        ([0, 2 * math.log(3)], [100, 100], 14, 0, [4, 10]),  # 3.5 and 10.5, whichever way their last bits fall
        ([2 * math.log(share) for share in (2.3, 0.3, 1.2, 6.2)], [100] * 4, 10, 0, [3, 0, 1, 6]),  # 0.3 ties with 2.3
        ([2 * math.log(5), 0], [100, 100], 3, 0, [3, 0]),
        ([2 * math.log(7), 0], [100, 100], 4, 0, [4, 0]),
        ([2 * math.log(3), 0, 0], [5, 100, 100], 25, 0, [5, 10, 10]),
        ([0, -100, -100], [100, 100, 100], 50, 3, [44, 3, 3]),
        ([0, -100, -100], [100, 100, 2], 50, 3, [45, 3, 2]),
        ([0, 0, 0], [5, 0, 5], 4, 0, [2, 0, 2]),
        ([0], [7], 4, 0, [4]),
        ([], [], 4, 0, []),
    ],
)
def test_allocation_literally(certainty, capacity, budget, minimum, expected):
    got = allocate_budget(certainty, capacity, budget, 2.0, minimum)
    assert got.tolist() == expected
    assert got.dtype == np.int64


@pytest.mark.parametrize("first", range(0, 300, 30))
def test_allocation_is_the_rounded_clipped_softmax(first):
    for seed in range(first, first + 30):
        check_allocation(seed)


def check_allocation(seed):
    certainty, capacity, budget, temperature, minimum = random_case(seed)
    low = np.minimum(minimum, capacity)
    total = min(budget, capacity.sum())
    got = allocate_budget(certainty, capacity, budget, temperature, minimum)
    assert got.sum() == total
    assert (got >= low).all() and (got <= capacity).all()
    shares = shares_by_bisection(certainty, low, capacity, total, temperature)
    assert shares.sum() == pytest.approx(total, abs=1e-6)
    assert (np.abs(got - shares) < 1 + 1e-6).all()
    # Largest remainders: no group rounded down has a larger remainder than one rounded up.
    remainder = shares - np.floor(shares + 1e-7)
    up = got > np.floor(shares + 1e-7)
    assert remainder[up].min(initial=1) >= remainder[~up].max(initial=0) - 1e-6


def test_more_certain_groups_of_one_size_get_no_less():
    for seed in range(300):
        random = np.random.default_rng(seed)
        groups = int(random.integers(2, 20))
        certainty = -random.uniform(0, 1.4, groups)
        capacity = np.full(groups, random.integers(1, 60))
        budget = int(random.integers(0, capacity.sum() + 1))
        got = allocate_budget(certainty, capacity, budget, 10 ** random.uniform(-2, 1))
        assert (np.diff(got[np.argsort(certainty, stable=True)]) >= 0).all(), seed


def test_no_group_gets_more_than_2_02_times_another_at_the_default_temperature():
    for seed in range(50):
        certainty = -np.random.default_rng(seed).uniform(0, 1.4, 16)
        certainty[:2] = 0, -1.4
        got = allocate_budget(certainty, np.full(16, 64 * 220), 7744, 2.0)
        assert got.max() <= 2.02 * got.min() + 1, seed
        assert got.max() / got.min() == pytest.approx(math.exp(0.7), rel=0.01), seed


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 0.01])
def test_cold_allocation_fills_the_most_certain_groups_first(temperature):
    got = allocate_budget([-20, -0.1, -30, -9], [10, 10, 10, 10], 24, temperature)
    assert got.tolist() == [4, 10, 0, 10]


def test_jax_arrays_are_accepted():
    got = allocate_budget(jnp.asarray([-0.14, -1.22]), jnp.asarray([10000, 10000]), 1000, 2.0)
    assert got.tolist() == [632, 368]


def test_budgets_are_no_part_of_what_was_given():
    capacity = np.array([3, 3])
    allocate_budget([0, 0], capacity, 99, 2.0)[0] = 0
    assert capacity.tolist() == [3, 3]


def test_equal_budgets_differ_by_one_where_not_full():
    for seed in range(50):
        random = np.random.default_rng(seed)
        capacity = random.integers(0, 50, 12)
        budget = int(random.integers(0, capacity.sum() + 10))
        got = equal_budget(capacity, budget)
        assert got.sum() == min(budget, capacity.sum()), seed
        free = got[got < capacity]
        # Whoever is not full has at most one token less than anybody, and the odd tokens go to the lower indices.
        assert got.max(initial=0) - free.min(initial=10**6) <= 1 and (np.diff(free) <= 0).all(), seed


def test_equal_budget_literally():
    assert equal_budget([64, 64, 64], 100).tolist() == [34, 33, 33]


def test_candidates_are_ten_percent_more_where_there_are_enough():
    assert candidate_count(7040, 1.1, 10**6) == 7744
    assert candidate_count(7040, 1.1, 7100) == 7100
    assert candidate_count(32, 1.0, 100) == 32
    assert candidate_count(7, 1.1, 100) == 8  # 7.7 to the nearest


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"minimum": 4}, "--budget: 10 tokens cannot give 3 groups --min_tokens_per_group=4 each; raise --budget"),
        ({"temperature": 0.0}, "--temperature=0.0: must be above 0"),
    ],
)
def test_user_mistakes_name_the_flag(kwargs, message):
    with pytest.raises(UserError, match=message):
        allocate_budget([0, 0, 0], [9, 9, 9], 10, **{"temperature": 2.0, **kwargs})


@pytest.mark.parametrize(
    "certainty, capacity", [([0, float("nan")], [1, 1]), ([0, 0], [1]), ([0, 0], [1, -1]), ([[0, 0]], [[1, 1]])]
)
def test_bad_arrays_raise(certainty, capacity):
    with pytest.raises(ValueError, match=r"certainty must be finite|one non-negative count per group"):
        allocate_budget(certainty, capacity, 1, 2.0)


@pytest.mark.parametrize("kwargs", [{"budget": -3}, {"minimum": -5}])
def test_negative_counts_raise(kwargs):
    with pytest.raises(ValueError, match="must not be negative"):
        allocate_budget([0, -10], [50, 50], **{"budget": 20, "temperature": 2.0, **kwargs})


@pytest.mark.parametrize("temperature", [1e-300, 1e-17, 1e-12, 1e-6])
def test_the_smallest_temperatures_hand_out_the_whole_budget(temperature):
    random = np.random.default_rng(0)
    for _ in range(200):
        capacity = random.integers(1, 20000, 20)
        budgets = allocate_budget(-random.uniform(0, 12, 20), capacity, capacity.sum() - 1, temperature)
        assert budgets.sum() == capacity.sum() - 1 and (budgets <= capacity).all()
    assert allocate_budget([-0.9, -0.3, -1.3], [4, 2, 2], 5, temperature).tolist() == [3, 2, 0]
