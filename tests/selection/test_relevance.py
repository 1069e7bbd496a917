import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection import reduce_relevance, top_tokens

# [N=2, T=3, S=2]; each text row of each head as it would stand among other keys.
PROBABILITIES = np.array(
    [
        [[0.1, 0.6], [0.3, 0.0], [0.9, 0.9]],
        [[0.5, 0.2], [0.1, 0.4], [0.8, 0.7]],
    ],
    np.float32,
)
FIRST_TWO = np.array([True, True, False])


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize(
    "heads, text, rows, expected",
    [
        ("max", "max", None, [0.9, 0.9]),
        ("max", "max", FIRST_TWO, [0.5, 0.6]),
        # Heads first: per row the larger head, then the mean (text first would give 0.3, 0.3).
        ("max", "mean", FIRST_TWO, [0.4, 0.5]),
        ("mean", "max", FIRST_TWO, [0.3, 0.4]),
        ("mean", "mean", FIRST_TWO, [0.25, 0.3]),
        ("mean", "mean", None, [0.45, 2.8 / 6]),
        ("max", "mean", ~FIRST_TWO & False, [0, 0]),
    ],
)
def test_reductions_literally(xp, heads, text, rows, expected):
    got = reduce_relevance(xp.asarray(PROBABILITIES), heads, text, rows)
    assert got.__array_namespace__() is xp
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("heads", ["max", "mean"])
@pytest.mark.parametrize("text", ["max", "mean"])
def test_masked_rows_equal_left_out_rows(heads, text):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(11), size=(3, 4, 6))[..., :9]  # batch of 3
    rows = random.random((3, 6)) < 0.5
    rows[:, 0] = True
    got = reduce_relevance(probabilities, heads, text, rows)
    for one, mask, relevance in zip(probabilities, rows, got, strict=True):
        np.testing.assert_allclose(relevance, reduce_relevance(one[:, mask], heads, text), rtol=1e-12)


def test_reduction_traces_with_a_traced_mask():
    reduce = jax.jit(lambda p, rows: reduce_relevance(p, "max", "mean", rows))
    np.testing.assert_allclose(reduce(PROBABILITIES, FIRST_TWO), [0.4, 0.5], rtol=1e-6)


@pytest.mark.parametrize("flag, kwargs", [("relevance_heads", {"heads": "sum"}), ("relevance_text", {"text": "sum"})])
def test_unknown_reduction_names_the_flag(flag, kwargs):
    with pytest.raises(UserError, match=f"--{flag}=sum"):
        reduce_relevance(PROBABILITIES, **{"heads": "max", "text": "max", **kwargs})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("xp", [np, jnp])
def test_narrow_probabilities_are_averaged_in_float32(xp, dtype):
    ones = xp.asarray(jnp.ones((2, 70000, 1), dtype))
    assert reduce_relevance(ones, "mean", "mean").tolist() == [1.0]


@pytest.mark.parametrize("xp", [np, jnp])
def test_relevance_of_any_number_type_is_ranked(xp):
    assert top_tokens(xp.asarray([[0, 3, 2]], np.uint8), [1]).tolist() == [[False, True, False]]
    assert top_tokens(xp.asarray([[False, True]]), [1]).tolist() == [[False, True]]


@pytest.mark.parametrize("xp", [np, jnp])
def test_top_tokens_literally(xp):
    nan = float("nan")
    relevance = xp.asarray([[0.1, 0.9, 0.5, 0.5, 0.5], [0.2, nan, 0.3, nan, 0.1], [nan] * 5, [0.0, -0.0, 0.0, 0, 0]])
    got = top_tokens(relevance, xp.asarray([3, 5, 2, 2]))
    assert got.__array_namespace__() is xp
    assert got.astype(int).tolist() == [[0, 1, 1, 1, 0], [1, 0, 1, 0, 1], [0] * 5, [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_top_tokens_against_sorted_pairs(seed):
    random = np.random.default_rng(seed)
    relevance = random.integers(0, 6, (7, 30)).astype(np.float32)  # many ties
    relevance[random.random(relevance.shape) < 0.2] = np.nan
    budgets = random.integers(0, 31, 7)
    got = top_tokens(relevance, budgets)
    for row, budget, marked in zip(relevance, budgets, got, strict=True):
        ranked = sorted((-value, index) for index, value in enumerate(row) if not np.isnan(value))
        assert np.flatnonzero(marked).tolist() == sorted(index for _, index in ranked[:budget])
    np.testing.assert_array_equal(jax.jit(top_tokens)(relevance, budgets), got)
