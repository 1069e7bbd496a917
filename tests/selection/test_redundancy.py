import itertools
import math
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection import redundancy, remove_redundant, remove_redundant_reference

BOTH = pytest.mark.parametrize("remove", [remove_redundant, remove_redundant_reference])


def random_case(seed):
    """Tokens with ties and duplicates on purpose: few features, repeated rows, few scores, a small grid."""
    random = np.random.default_rng(seed)
    n, width = int(random.integers(1, 45)), int(random.integers(1, 6))
    features = random.normal(size=(n, width)).astype(np.float32)
    if seed % 2:
        features = features[random.integers(0, max(1, n // 3), n)]  # exact duplicates
    if seed % 5 == 0:
        features = np.round(features)  # zero vectors, right angles
    positions = random.integers(0, [6, 3, 4], (n, 3)) * [0.5, 1, 1]
    if seed % 3:
        positions = positions[np.lexsort(positions.T[::-1])]  # video order
    score = random.integers(0, 5, n) / 4 if seed % 4 else random.random(n)
    kernel = ("exponential", "window")[seed // 2 % 2]
    keep, scale = int(random.integers(1, n + 2)), float(random.choice([0.5, 2.0, 10.0]))
    return (features, positions, score, keep), {"kernel": kernel, "scale": scale}


@pytest.mark.parametrize("first", range(0, 600, 60))
def test_fast_twin_equals_reference(first):
    for seed in range(first, first + 60):
        args, kwargs = random_case(seed)
        got = remove_redundant(*args, **kwargs)
        assert got.sum() == min(args[3], len(args[2])), seed
        np.testing.assert_array_equal(got, remove_redundant_reference(*args, **kwargs), err_msg=f"seed {seed}")


@pytest.mark.parametrize("seed", range(20))
def test_blocks_do_not_matter(seed, monkeypatch):
    args, kwargs = random_case(seed)
    expected = remove_redundant(*args, **kwargs)
    for rows, columns, nearest, best in ((1, 1, 1, 1), (3, 2, 2, 4), (7, 5, 1, 2)):
        monkeypatch.setattr(redundancy, "_ROWS", rows)
        monkeypatch.setattr(redundancy, "_COLUMNS", columns)
        monkeypatch.setattr(redundancy, "_NEAREST", nearest)
        monkeypatch.setattr(redundancy, "_BEST", best)
        np.testing.assert_array_equal(remove_redundant(*args, **kwargs), expected)


def redundancy_matrix(features, positions, kernel, scale):
    """All pairs at once in float64, -1 on and below the diagonal."""
    features = np.asarray(features, np.float64)
    norms = np.linalg.norm(features, axis=1)
    cosine = np.clip(features @ features.T / np.outer(norms, norms), 0, 1)
    time, row, col = np.abs(positions[:, None] - positions[None]).transpose(2, 0, 1)
    near = (time <= scale) & (row <= 1) & (col <= 1)
    proximity = np.exp(-time / scale - np.sqrt(row**2 + col**2)) if kernel == "exponential" else near
    return np.triu(cosine * proximity + 1, 1) - 1


@pytest.mark.parametrize("kernel", ["exponential", "window"])
@pytest.mark.parametrize("seed", range(5))
def test_large_case_against_the_full_matrix(kernel, seed):
    random = np.random.default_rng(seed)
    n = 400
    features = random.normal(size=(n, 16)) + 1
    positions = random.random((n, 3)) * [20, 6, 9]
    score = random.random(n)
    matrix = redundancy_matrix(features.astype(np.float32), positions, kernel, 2.0)
    kept = np.ones(n, bool)
    for _ in range(150):
        i, j = np.unravel_index(matrix.argmax(), matrix.shape)
        dropped = i if score[i] < score[j] else j
        kept[dropped] = False
        matrix[dropped], matrix[:, dropped] = -1, -1
    np.testing.assert_array_equal(remove_redundant(features, positions, score, 250, kernel=kernel), kept)


@BOTH
def test_the_lower_score_of_the_closest_pair_goes(remove):
    features = np.ones((3, 2))
    positions = [[0, 0, 0], [0, 0, 1], [0, 0, 5]]
    assert remove(features, positions, [0.1, 0.2, 0.0], 2).tolist() == [False, True, True]
    assert remove(features, positions, [0.2, 0.1, 0.0], 2).tolist() == [True, False, True]
    assert remove(features, positions, [0.1, 0.1, 0.0], 2).tolist() == [True, False, True]  # tie: the higher index
    assert remove(features, positions, [0.1, 0.2, 0.0], 1).tolist() == [False, True, False]


@BOTH
def test_similarity_counts_as_much_as_proximity(remove):
    # Pair (0, 1) is near but at 60 degrees: e^-1 / 2; pair (1, 2) is equal, sqrt(2) cells off: e^-1.414.
    features = [[1, 0], [0.5, math.sqrt(0.75)], [0.5, math.sqrt(0.75)]]
    positions = [[0, 0, 0], [0, 0, 1], [0, 1, 2]]
    assert remove(features, positions, [0, 1, 0.5], 2).tolist() == [True, True, False]


@BOTH
def test_opposite_and_zero_features_are_not_redundant(remove):
    features = [[1, 0], [-1, 0], [0, 0], [0.1, 1]]
    positions = [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 3]]
    # Only (0, 3) has any similarity, small and far as it is.
    assert remove(features, positions, [2, 1, 1, 3], 3).tolist() == [False, True, True, True]


@BOTH
def test_without_any_redundancy_pairs_go_in_index_order(remove):
    positions = [[0, 0, 0], [100, 0, 0], [200, 0, 0], [300, 0, 0]]
    got = remove(np.ones((4, 1)), positions, [1, 2, 4, 3], 2, kernel="window")
    assert got.tolist() == [False, False, True, True]  # (0, 1) drops 0, then (1, 2) drops 1


@BOTH
def test_ties_go_to_the_smallest_i_then_the_smallest_j(remove):
    # Four equal tokens in a row: pairs (0, 1), (1, 2), (2, 3) tie; then (0, 2) and (2, 3) do not.
    positions = [[0, 0, col] for col in range(4)]
    assert remove(np.ones((4, 1)), positions, [1, 1, 1, 1], 3).tolist() == [True, False, True, True]
    assert remove(np.ones((4, 1)), positions, [1, 1, 1, 1], 2).tolist() == [True, False, True, False]


@BOTH
def test_seconds_trade_against_cells_by_the_scale(remove):
    # One cell is e^-1; three seconds are e^-1.5 at a scale of 2 s and e^-0.3 at 10 s.
    positions, features, score = [[0, 0, 0], [0, 0, 1], [3, 0, 0]], np.ones((3, 1)), [3, 2, 1]
    assert remove(features, positions, score, 2, scale=2.0).tolist() == [True, False, True]
    assert remove(features, positions, score, 2, scale=10.0).tolist() == [True, True, False]


@BOTH
def test_window_ends_after_one_cell_and_the_scale(remove):
    neighbours = {(2.0, 1, 1): True, (2.1, 0, 0): False, (0, 2, 0): False, (0, 0, -2): False, (-2.0, -1, -1): True}
    for offset, inside in neighbours.items():
        # Tokens 0 and 1 have no redundancy; 2 lies at the offset from 1. Outside the window the first pair loses.
        positions = np.array([[50, 0, 0], [10, 5, 5], np.add([10, 5, 5], offset)])
        got = remove(np.ones((3, 1)), positions, [1, 3, 2], 2, kernel="window")
        assert got.tolist() == ([True, True, False] if inside else [False, True, True])


@BOTH
def test_a_static_scene_thins_out_by_score(remove):
    # The same 2 x 2 picture in 6 slots, half a second apart: what goes never outscores what replaces it.
    random = np.random.default_rng(0)
    positions = np.array([(slot / 2, row, col) for slot, row, col in itertools.product(range(6), range(2), range(2))])
    features = np.tile(random.normal(size=(4, 8)), (6, 1))
    score = np.tile(np.arange(6.0)[:, None], (1, 4)).ravel()
    kept = remove(features, positions, score, 4)
    assert kept.tolist() == [False] * 20 + [True] * 4


def test_permuted_tokens_without_ties_leave_the_same_set():
    random = np.random.default_rng(1)
    features, positions, score = random.normal(size=(60, 4)) + 0.5, random.random((60, 3)) * 5, random.random(60)
    order = random.permutation(60)
    kept = remove_redundant(features, positions, score, 30)
    np.testing.assert_array_equal(remove_redundant(features[order], positions[order], score[order], 30), kept[order])


@BOTH
def test_half_precision_jax_arrays_are_accepted(remove):
    features = jnp.ones((3, 4), jnp.bfloat16)
    got = remove(features, jnp.asarray([[0, 0, 0], [0, 0, 1], [9, 0, 0]]), jnp.asarray([1.0, 2.0, 0.5]), 2)
    assert isinstance(got, np.ndarray) and got.tolist() == [False, True, True]


def test_enough_room_keeps_everything():
    assert remove_redundant(np.ones((2, 1)), np.zeros((2, 3)), [1, 1], 5).tolist() == [True, True]
    assert remove_redundant(np.ones((0, 1)), np.zeros((0, 3)), [], 5).tolist() == []


def test_thousands_of_tokens_stay_within_memory():
    random = np.random.default_rng(0)
    cells = np.sort(random.choice(40 * 220, 6000, replace=False))
    positions = np.stack([cells // 220 * 0.5, cells % 220 // 20, cells % 20], axis=1)
    features = random.normal(size=(220, 32))[cells % 220] + random.normal(size=(6000, 32))
    tracemalloc.start()
    kept = remove_redundant(features.astype(np.float32), positions, random.random(6000), 5500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.sum() == 5500
    assert peak < 6000**2 * 2  # bytes: one float32 per pair would not fit


@pytest.mark.parametrize(
    "kwargs, message",
    [({"kernel": "gauss"}, "--proximity=gauss: choose one of"), ({"scale": 0.0}, "--proximity_scale=0.0")],
)
def test_user_mistakes_name_the_flag(kwargs, message):
    with pytest.raises(UserError, match=message):
        remove_redundant(np.ones((2, 1)), np.zeros((2, 3)), [1, 1], 1, **kwargs)


@pytest.mark.parametrize(
    "features, positions, score, keep",
    [
        (np.ones((2, 1)), np.zeros((2, 3)), [1, 1], 0),
        (np.ones((3, 1)), np.zeros((2, 3)), [1, 1], 1),
        (np.ones((2, 1)), np.zeros((2, 2)), [1, 1], 1),
        (np.ones((2, 1)), np.zeros((2, 3)), [1, np.nan], 1),
        (np.full((2, 1), np.inf), np.zeros((2, 3)), [1, 1], 1),
    ],
)
def test_bad_arguments_raise(features, positions, score, keep):
    with pytest.raises(ValueError, match=r"keep must be|do not fit|must be finite"):
        remove_redundant(features, positions, score, keep)
