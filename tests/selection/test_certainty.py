import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection import group_certainty, least_certain_mean, token_certainty, token_entropy

BOTH = pytest.mark.parametrize("xp", [np, jnp])


@BOTH
def test_entropy_closed_forms(xp):
    inf = float("inf")
    logits = xp.asarray([[7.0] * 4, [0.0, -inf, -inf, -inf], [3.0, 3.0, -inf, -inf], [0.0, -1e4, 1e4, 0.0]])
    got = token_entropy(logits)
    assert got.__array_namespace__() is xp
    np.testing.assert_allclose(got, [math.log(4), 0, math.log(2), 0], rtol=1e-6, atol=1e-7)
    assert not np.signbit(np.append(got, token_entropy(xp.asarray([3.0])))).any()


@BOTH
def test_entropy_of_a_large_vocabulary(xp):
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, (3, 152064)).astype(np.float32) + np.float32([[0], [300], [-300]])
    exact = logits.astype(np.float64)
    expected = stats.entropy(np.exp(exact - exact.max(axis=-1, keepdims=True)), axis=-1)
    np.testing.assert_allclose(token_entropy(xp.asarray(logits)), expected, rtol=2e-6)


@pytest.mark.parametrize("seed", range(10))
def test_entropy_ignores_a_shift_and_is_bounded(seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 10 ** random.uniform(-2, 3), (5, 50))
    entropy = token_entropy(logits)
    assert (entropy >= 0).all() and (entropy <= math.log(50) + 1e-12).all()
    np.testing.assert_allclose(token_entropy(logits + 11), entropy, rtol=1e-9, atol=1e-12)


def test_one_letter_of_four_is_at_most_ln_4():
    logits = np.full((100, 1000), -np.inf, np.float32)
    logits[:, 10:14] = np.random.default_rng(0).normal(0, 3, (100, 4))
    assert token_entropy(logits).max() <= 1.3863


@BOTH
def test_half_precision_is_computed_in_float32(xp):
    logits = np.random.default_rng(0).normal(0, 5, (4, 3000)).astype(np.float32)
    narrow = jnp.asarray(logits).astype(jnp.bfloat16)
    got = token_entropy(xp.asarray(narrow))
    assert got.dtype == np.float32
    exact = np.exp(np.asarray(narrow, np.float64))
    np.testing.assert_allclose(got, stats.entropy(exact, axis=-1), rtol=1e-5)


def test_entropy_of_no_mass_is_nan():
    assert np.isnan(token_entropy(np.full(3, -np.inf)))


@BOTH
def test_the_four_forms_literally(xp):
    logits = xp.log(xp.asarray([[0.5, 0.25, 0.125, 0.125], [0.1, 0.1, 0.7, 0.1]]))
    entropy = [1.75 * math.log(2), -0.7 * math.log(0.7) - 0.3 * math.log(0.1)]
    close = {"rtol": 1e-5}
    np.testing.assert_allclose(token_certainty(logits, "neg_entropy"), [-h for h in entropy], **close)
    np.testing.assert_allclose(token_certainty(logits, "max_probability"), [0.5, 0.7], **close)
    # Options 0 and 2: 4/5 and 1/5; 1/8 and 7/8.
    expected = [-stats.entropy([0.8, 0.2]), -stats.entropy([0.125, 0.875])]
    np.testing.assert_allclose(token_certainty(logits, "option_entropy", [0, 2]), expected, **close)
    np.testing.assert_allclose(token_certainty(logits, "option_entropy", [0, 2, -1, -1]), expected, **close)
    np.testing.assert_allclose(token_certainty(logits, "option_entropy", [-1, -1]), [-h for h in entropy], **close)
    np.testing.assert_allclose(token_certainty(logits, "option_entropy"), [-h for h in entropy], **close)
    np.testing.assert_allclose(token_certainty(logits, "option_entropy", []), [-h for h in entropy], **close)
    expected = [(1 + 2 + 3 + 3) * math.log(2) / 4, -(math.log(0.7) + 3 * math.log(0.1)) / 4]
    np.testing.assert_allclose(token_certainty(logits, "deepconf"), expected, **close)


@BOTH
def test_deepconf_takes_the_twenty_most_likely(xp):
    logits = np.random.default_rng(0).normal(0, 3, (6, 500))
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = [-sum(sorted(row)[-20:]) / 20 for row in log_p]
    np.testing.assert_allclose(token_certainty(xp.asarray(logits, np.float32), "deepconf"), expected, rtol=1e-5)


@BOTH
def test_certainties_of_masked_logits_are_finite(xp):
    logits = xp.asarray([0.0, 1.0] + [-float("inf")] * 98)
    for form in ("neg_entropy", "option_entropy", "max_probability", "deepconf"):
        assert np.isfinite(token_certainty(logits, form, [0, 1]))


@pytest.mark.parametrize("form", ["neg_entropy", "option_entropy", "max_probability", "deepconf"])
def test_every_form_ranks_a_peaked_token_above_a_flat_one(form):
    flat, peaked = np.zeros(100), np.zeros(100)
    peaked[3] = 8
    assert token_certainty(peaked, form, [1, 2, 3]) > token_certainty(flat, form, [1, 2, 3])


def test_forms_trace():
    logits = np.random.default_rng(0).normal(0, 3, (2, 60)).astype(np.float32)
    for form in ("neg_entropy", "option_entropy", "max_probability", "deepconf"):
        traced = jax.jit(lambda x, form=form: token_certainty(x, form, (4, 5, 6)))(logits)
        np.testing.assert_allclose(traced, token_certainty(logits, form, (4, 5, 6)), rtol=1e-5)


def test_unknown_form_names_the_flag():
    with pytest.raises(UserError, match="--certainty=entropy: choose one of neg_entropy"):
        token_certainty(np.zeros(3), "entropy")


@BOTH
def test_group_certainty_literally(xp):
    entropies = xp.asarray([0.5, 9.0, 0.1, 0.9, 0.2])
    mask = np.array([True, False, True, True, True])
    for fraction, expected in [(0.1, -0.9), (0.5, -0.7), (0.75, -1.6 / 3), (1.0, -1.7 / 4), (0.0, -0.9)]:
        np.testing.assert_allclose(group_certainty(entropies, mask, fraction), expected, rtol=1e-6)
    np.testing.assert_allclose(group_certainty(entropies, None, 0.1), -9, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8"])
def test_group_certainty_of_narrow_numbers_is_computed_in_float32(xp, dtype):
    entropies = xp.asarray(jnp.full(8192, 11, dtype))  # their sum is beyond float16
    got = group_certainty(entropies, None, 1.0)
    assert got.dtype == np.float32 and got == -11


def test_one_token_is_minus_its_entropy():
    assert group_certainty(np.array([0.14]), np.array([True]), 0.1) == -0.14


@pytest.mark.parametrize("seed", range(20))
def test_least_certain_mean_against_sorting(seed):
    random = np.random.default_rng(seed)
    certainties = random.normal(size=(8, 25)).astype(np.float32)
    mask = random.random((8, 25)) < random.uniform(0.2, 1)
    mask[:, 0] = True
    fraction = float(random.uniform(0, 1))
    expected = []
    for row, counted in zip(certainties, mask, strict=True):
        ascending = sorted(float(value) for value in row[counted])
        taken = max(1, int(fraction * len(ascending)))
        expected.append(sum(ascending[:taken]) / taken)
    np.testing.assert_allclose(least_certain_mean(certainties, mask, fraction), expected, rtol=1e-5, atol=1e-6)
    traced = jax.jit(lambda c, m: least_certain_mean(c, m, fraction))(certainties, mask)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6)


@BOTH
def test_share_of_tokens_is_floored_in_exact_arithmetic(xp):
    # In float32, and for 0.29 in float64 too, these products lie just below the integer.
    values = xp.arange(100.0)
    for fraction, taken in [(0.29, 29), (0.57, 57), (0.1, 10), (0.07, 7)]:
        np.testing.assert_allclose(least_certain_mean(values, None, fraction), (taken - 1) / 2, rtol=1e-6)


@BOTH
def test_no_token_and_nan_tokens_give_nan(xp):
    values, nan = xp.asarray([1.0, float("nan"), 2.0]), float("nan")
    np.testing.assert_equal(float(least_certain_mean(values, np.zeros(3, bool), 0.1)), nan)
    np.testing.assert_equal(float(least_certain_mean(values, None, 0.1)), nan)
    assert float(least_certain_mean(values, np.array([True, False, True]), 0.1)) == 1
    np.testing.assert_equal(float(group_certainty(xp.asarray([]), xp.asarray([]), 0.1)), nan)
