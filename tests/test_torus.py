"""Which chip takes which place: rings of neighbours, on every slice that can be planned for."""

import itertools
import math
import types

import numpy as np
import pytest

from adapttoken_jax import sharding, torus
from adapttoken_jax.planning.chips import CHIPS

SLICES = sorted({shape for chip in CHIPS.values() for shape in chip.slices})


def coords(box) -> np.ndarray:
    """As devices come, the first axis fastest; two-dimensional slices have a third coordinate 0."""
    box = (*box, 1)[:3]
    return np.array([place[::-1] for place in itertools.product(*map(range, box[::-1]))])


def steps(path: np.ndarray) -> np.ndarray:
    """Links between every place of a ring and the next one; no chip is behind a wrap-around link here."""
    return np.abs(path - np.roll(path, -1, 0)).sum(1)


@pytest.mark.parametrize("block", [(2, 4), (4, 2), (2, 2, 2), (4, 2, 1), (1, 2, 2), (3, 4), (2, 3, 3), (16, 16)])
def test_a_closed_path_goes_through_all_places_and_back(block):
    path = torus.closed_path(block)
    assert len({*map(tuple, path.tolist())}) == len(path) == math.prod(block)
    assert (steps(path) == 1).all()


@pytest.mark.parametrize("block", [(1, 1), (8,), (1, 8), (3, 3), (3, 1, 5)])
def test_what_cannot_be_closed_is_still_a_path(block):
    path = torus.closed_path(block)
    assert len({*map(tuple, path.tolist())}) == len(path) == math.prod(block)
    assert (steps(path)[:-1] == 1).all()


@pytest.mark.parametrize("shape", SLICES)
def test_every_mesh_of_every_slice_has_rings_of_neighbours(shape):
    at = coords(map(int, shape.split("x")))
    powers = [2**power for power in range(9) if len(at) % 2**power == 0]
    for model, context in itertools.product(powers, powers):
        if len(at) % (model * context):
            continue
        chips = torus.places((len(at) // model // context, context, model), at)
        assert sorted(chips.ravel()) == list(range(len(at))), "every chip has one place"
        for ring in at[chips.reshape(-1, model)]:
            assert (steps(ring) == 1).all() or model == 1
        if model == 1:
            for ring in at[chips.reshape(-1, context)]:
                assert (steps(ring) == 1).all() or context == 1
        # An axis between two others goes round in blocks of the inner one, in a straight line from each to the next.
        for ring in np.moveaxis(at[chips], 1, 2).reshape(-1, context, 3):
            assert all(np.count_nonzero(a - b) <= 1 for a, b in zip(ring, np.roll(ring, -1, 0), strict=True))


def test_a_literal_case():
    assert coords((2, 2)).tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert torus.places((4,), coords((2, 2))).tolist() == [0, 1, 3, 2]
    assert torus.places((2, 4), coords((2, 4))).tolist() == [[0, 1, 3, 2], [4, 5, 7, 6]]
    assert torus.places((4, 2), coords((2, 4))).tolist() == [[0, 2], [1, 3], [5, 7], [4, 6]]


def test_a_host_has_its_chips_anywhere_in_the_slice():
    at = coords((2, 4))
    assert (torus.places((2, 4), at + np.array([4, 8, 0])) == torus.places((2, 4), at)).all()


def test_what_is_no_box_has_no_places():
    at = coords((2, 4))
    assert torus.places((8,), np.concatenate([at[:7], [[0, 4, 0]]])) is None, "a chip outside"
    assert torus.places((8,), np.repeat(at[:4], 2, 0)) is None, "two cores per chip"
    assert torus.places((4,), at) is None, "more chips than places"


def test_a_mesh_takes_tpu_chips_in_this_order():
    chips = [types.SimpleNamespace(platform="tpu", coords=place, id=each) for each, place in enumerate(coords((2, 2)))]
    placed = sharding._placed((1, 4), chips)
    assert [chip.id for chip in placed.ravel()] == [0, 1, 3, 2]
