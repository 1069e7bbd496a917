import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection import group_slots, visiting_order


def test_groups_interleave():
    assert [group.tolist() for group in group_slots(7, 3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_1024_slots_in_groups_of_64_are_16_groups():
    groups = group_slots(1024, 64)
    assert len(groups) == 16
    assert all(group.tolist() == list(range(g, 1024, 16)) for g, group in enumerate(groups))


@pytest.mark.parametrize("slots", [0, 1, 2, 63, 64, 65, 127, 128, 129, 2048])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_groups_partition_the_slots_evenly(slots, size):
    groups = group_slots(slots, size)
    assert len(groups) == int(np.ceil(slots / size))
    assert sorted(slot for group in groups for slot in group) == list(range(slots))
    sizes = [len(group) for group in groups]
    assert max(sizes, default=0) <= size
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_no_group_without_slots_per_group():
    with pytest.raises(UserError, match="--slots_per_group=0"):
        group_slots(10, 0)


@pytest.mark.parametrize(
    "groups, order",
    [
        (1, [0]),
        (2, [0, 1]),
        (4, [0, 2, 1, 3]),
        (5, [0, 4, 2, 1, 3]),
        (6, [0, 4, 2, 1, 5, 3]),
        (8, [0, 4, 2, 6, 1, 5, 3, 7]),
    ],
)
def test_bit_reversed_literals(groups, order):
    assert visiting_order(groups, "bit_reversed").tolist() == order


def test_bit_reversed_against_reversed_binary_strings():
    for groups in range(70):
        bits = max(groups - 1, 0).bit_length()
        counts = [int(f"{count:0{bits}b}"[::-1], 2) for count in range(2**bits)]
        assert visiting_order(groups, "bit_reversed").tolist() == [count for count in counts if count < groups]


def test_sequential_counts_up():
    assert visiting_order(5, "sequential").tolist() == [0, 1, 2, 3, 4]


def test_unknown_order_names_the_flag():
    with pytest.raises(UserError, match="--group_order=random"):
        visiting_order(5, "random")
