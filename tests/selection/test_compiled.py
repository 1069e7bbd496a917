"""The compiled steps 8 to 10 against their NumPy twins: the same integers and the same tokens, ties included."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax import selection
from adapttoken_jax.selection import compiled

G, GROUPS = 6, 4  # padded, visited


@jax.jit
def budgets_of(certainty, visited, capacity, total, numbers):
    return compiled.allocate_budget(certainty, visited, capacity, total, numbers)


def numbers(budget, over_selection=1.0, temperature=2.0, minimum=0, scale=2.0):
    floats = np.asarray([over_selection, temperature, scale])
    return compiled.Numbers(np.int32(budget), floats[0], floats[1], np.int32(minimum), floats[2])


@pytest.mark.parametrize("seed", range(60))
def test_budgets_are_the_twins(seed):
    rng = np.random.default_rng(seed)
    visited = np.zeros(G, bool)
    visited[rng.choice(G, GROUPS, replace=False)] = True
    # Few levels, so that shares tie; a group may have nothing left.
    certainty = rng.choice([0.0, -0.1, -0.1, -1.3], GROUPS) if seed % 2 else -rng.random(GROUPS)
    capacity = rng.integers(0 if seed % 3 else 5, 40, GROUPS)
    temperature, minimum = float(rng.choice([2.0, 0.3, 1e-3])), int(seed % 4)
    budget = int(rng.integers(minimum * GROUPS, 120))
    ours = np.zeros((2, G))
    ours[0, ~visited], ours[1, ~visited] = 5.0, 7  # what a group that was not visited holds counts for nothing
    ours[0, visited], ours[1, visited] = certainty, capacity
    with compiled.precise():
        total = np.int32(min(budget, capacity.sum()))
        got = budgets_of(ours[0], visited, ours[1].astype(np.int32), total, numbers(0, 1.0, temperature, minimum))
    expected = selection.allocate_budget(certainty, capacity, budget, temperature, minimum)
    np.testing.assert_array_equal(np.asarray(got)[visited], expected)
    assert not np.asarray(got)[~visited].any()


@pytest.mark.parametrize(
    "shares, expected",
    [
        ([2.5, 7.5], [3, 7]),
        ([7.5, 2.5], [8, 2]),
        ([3.5, 31.5], [4, 31]),
        ([2.5, 247.5], [3, 247]),
        ([2.3, 0.3, 1.2, 6.2], [3, 0, 1, 6]),
        ([0.3, 2.3, 1.2, 6.2], [1, 2, 1, 6]),
        ([2.4999, 7.5001], [2, 8]),  # no tie
    ],
)
def test_exact_ties_go_to_the_lower_group_whatever_their_last_bits(shares, expected):
    certainty, visited = 2 * np.log(np.resize(shares, G)), np.arange(G) < len(shares)
    with compiled.precise():
        got = budgets_of(certainty, visited, np.full(G, 999, np.int32), np.int32(round(sum(shares))), numbers(0))
    assert np.asarray(got)[visited].tolist() == expected


def random_tokens(rng, n, C, ties):
    """Features, positions and scores of n tokens in video order, padded to C; with `ties` a static scene's."""
    features, positions, score = np.zeros((C, 8), np.float32), np.zeros((C, 3)), np.zeros(C)
    features[:n] = rng.normal(size=(5, 8))[rng.integers(0, 5, n)] if ties else rng.normal(size=(n, 8))
    features[:n][rng.random(n) < 0.1] = 0
    positions[:n] = np.column_stack([np.sort(rng.integers(0, 5, n)) / 2, rng.integers(0, 3, (n, 2))])
    score[:n] = rng.integers(0, 3, n) / 4 if ties else rng.random(n)
    return features, positions, score


@pytest.mark.parametrize("kernel", list(selection.KERNELS))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_survivors_are_the_twins(kernel, ties, seed):
    rng = np.random.default_rng(seed)
    n, C, keep = int(rng.integers(20, 40)), 40, int(rng.integers(1, 25))
    features, positions, score = random_tokens(rng, n, C, ties)
    covering = rng.random(C) < 0.2
    covering[n:] = False
    free = ~covering & (np.arange(C) < n)
    with compiled.precise():
        found = compiled.Candidates(None, None, np.arange(C, dtype=np.int32), score, free, covering, np.int32(keep))
        kept = np.asarray(compiled.remove_redundant(features, positions, found, np.float64(1.3), kernel=kernel))
    expected = covering.copy()
    expected[free] = selection.remove_redundant(
        features[free], positions[free], score[free], keep, kernel=kernel, scale=1.3
    )
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("stretches", [0, 3, 7])
@pytest.mark.parametrize("seed", range(8))
def test_candidates_are_the_twins(stretches, seed):
    """Interleaved groups of up to 3 slots of 4 tokens, some of them not visited, in a video of 11 slots."""
    rng, K, M, slots = np.random.default_rng(seed), 3, 4, 11
    groups = selection.group_slots(slots, K)
    seen = np.sort(rng.choice(len(groups), 3, replace=False))
    relevance, place = np.full((G, K * M), np.nan, np.float32), np.zeros((G, K * M), np.int32)
    token = np.full(slots * M, G * K * M, np.int32)
    certainty, visited = np.zeros(G), np.zeros(G, bool)
    for g in seen:
        n = len(groups[g]) * M
        relevance[g, :n] = rng.integers(0, 5, n) / 8 if seed % 2 else rng.random(n)
        place[g, :n] = (groups[g][:, None] * M + np.arange(M)).reshape(-1)
        token[place[g, :n]] = g * K * M + np.arange(n)
        certainty[g], visited[g] = -rng.random(), True
    budget, over = 14, 1.4
    stretch = np.minimum(place.astype(np.int64) // M * stretches // slots, stretches).astype(np.int32)
    with compiled.precise():
        found = compiled.choose_candidates(
            compiled.Scanned(relevance, certainty, visited, token, stretch), numbers(budget, over, 0.5, 1),
            most=24, stretches=stretches,
        )  # fmt: skip
    rows = [relevance[g, : len(groups[g]) * M] for g in seen]
    weights = selection.group_weights(certainty[seen], 0.5)
    score = np.concatenate([w * row for w, row in zip(weights, rows, strict=True)])
    at = np.concatenate([place[g, : len(row)] for g, row in zip(seen, rows, strict=True)])
    covering = selection.coverage_tokens(at // M, score, slots, stretches)
    parts = np.split(covering, np.cumsum([len(row) for row in rows])[:-1])
    left = np.asarray([(~part).sum() for part in parts])
    total = selection.candidate_count(budget - covering.sum(), over, left.sum())
    budgets = selection.allocate_budget(certainty[seen], left, total, 0.5, 1)
    top = [
        selection.top_tokens(np.where(part, np.nan, row)[None], [b])[0]
        for part, row, b in zip(parts, rows, budgets, strict=True)
    ]
    chosen = np.concatenate(top) | covering
    n, order = chosen.sum(), np.argsort(at[chosen])
    np.testing.assert_array_equal(found.place[:n], np.sort(at[chosen]))
    assert (np.asarray(found.place[n:]) == slots * M).all() and not np.asarray(found.free | found.covering)[n:].any()
    np.testing.assert_array_equal(found.free[:n], np.concatenate(top)[chosen][order])
    np.testing.assert_array_equal(found.covering[:n], covering[chosen][order])
    np.testing.assert_allclose(found.score[:n], score[chosen][order], rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(found.budgets)[seen], budgets + [part.sum() for part in parts])
    assert int(found.keep) == budget - covering.sum()


def test_a_tpu_compares_features_as_they_are():
    """Left to itself it would round the factors of a float32 product to eight bits, and drop other tokens."""
    flags, scores, count = jnp.ones(6, bool), jnp.ones(6, jnp.float32), jnp.int32(3)
    found = compiled.Candidates(None, None, jnp.arange(6, dtype=jnp.int32), scores, flags, flags, count)
    traced = compiled.remove_redundant.trace(
        jnp.ones((6, 8), jnp.bfloat16), jnp.ones((6, 3), jnp.float32), found, jnp.float32(1), kernel="exponential"
    )
    products = re.findall(r"stablehlo\.dot_general.*", traced.lower(lowering_platforms=("tpu",)).as_text())
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products), products


def test_survivors_keep_their_order_and_padding_is_zero():
    features = np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    kept = np.asarray([False, True, True, False, True, False])
    found = compiled.Candidates(None, None, np.arange(6, dtype=np.int32) * 3, None, kept, ~kept, np.int32(3))
    got, places = compiled.gather_survivors(features, found, kept, size=5, places=99)
    np.testing.assert_array_equal(got, [[3, 4], [5, 6], [9, 10], [0, 0], [0, 0]])
    np.testing.assert_array_equal(places, [3, 6, 12, 99, 99])
