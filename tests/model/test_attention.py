"""Every fast path of attention against a softmax written out, and rotary angles against their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax.model import attention, rotary


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + len(shape)).normal(size=shape), jnp.float32)


def plain(q, k, v, mask):
    """One head and batch entry at a time, in float64; queries come scaled."""
    out, lse = np.zeros(q.shape), np.zeros((*q.shape[:1], q.shape[2], q.shape[1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        group = h * k.shape[2] // q.shape[2]
        scores = np.float64(q[b, :, h]) @ np.float64(k[b, :, group]).T
        scores = np.where(mask[b], scores, -np.inf)
        lse[b, h] = np.log(np.exp(scores).sum(-1))
        out[b, :, h] = np.exp(scores - lse[b, h][:, None]) @ np.float64(v[b, :, group])
    return out, lse


@pytest.mark.parametrize("implementation", list(attention.CAUSAL))
@pytest.mark.parametrize("T", [7, 512, 700])
def test_causal_attention(implementation, T):
    q, k, v = random(2, T, 6, 8) / 8**0.5, random(2, T, 2, 8, seed=1), random(2, T, 2, 8, seed=2)
    valid = np.random.default_rng(0).random((2, T)) < 0.8
    valid[:, 0] = True  # every row sees something
    ours = jax.jit(lambda *a: attention.causal_attention(*a, implementation))(q, k, v, valid)
    theirs, _ = plain(q, k, v, np.tril(np.ones((T, T), bool)) & valid[:, None])
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def in_half_precision(*arrays):
    """bfloat16 arrays, and what they hold in float64."""
    half = [array.astype(jnp.bfloat16) for array in arrays]
    return half, [np.asarray(array, np.float64) for array in half]


def test_scores_of_half_precision_are_float32():
    (q, k), wide = in_half_precision(random(1, 5, 4, 64), random(1, 7, 2, 64, seed=1))
    got = attention.scores(q, k)
    assert got.dtype == jnp.float32
    expected = np.einsum("BTKGH,BSKH->BKGTS", wide[0].reshape(1, 5, 2, 2, 64), wide[1]).reshape(1, 4, 5, 7)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", [*attention.CAUSAL, "windows", "context"])
def test_softmax_of_half_precision_is_float32(name):
    """Scores of some tens: rounded to bfloat16, a score of 32 is off by 0.1, and so is what is attended to."""
    (q, k, v), wide = in_half_precision(
        1.5 * random(1, 40, 2, 16), random(1, 40, 2, 16, seed=1), random(1, 40, 2, 16, seed=2)
    )
    mask = np.ones((1, 40, 40), bool)
    if name == "windows":
        heads_first = [jnp.swapaxes(x, 1, 2)[:, :, None] for x in (4 * q, k, v)]  # which it divides by 4
        ours = jnp.swapaxes(attention.window_attention(*heads_first)[:, :, 0], 1, 2)
    elif name == "context":
        ours, _ = attention.context_attention(q, k, v, mask[:, 0])
    else:
        ours, mask = attention.causal_attention(q, k, v, mask[:, 0], name), np.tril(mask)
    theirs, lse = plain(*wide, mask)
    assert ours.dtype == jnp.bfloat16 and lse.max() > 16
    np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=0.02)  # weights and values of 8 bits, up to 3


@pytest.mark.parametrize("implementation", list(attention.CAUSAL))
def test_scores_whose_exponentials_no_float32_holds(implementation):
    q, k, v = 20 * random(1, 70, 2, 8), random(1, 70, 1, 8, seed=1), random(1, 70, 1, 8, seed=2)
    ours = attention.causal_attention(q, k, v, jnp.ones((1, 70), bool), implementation)
    theirs, lse = plain(q, k, v, np.tril(np.ones((1, 70, 70), bool)))
    assert lse.max() > 100
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # a score of 200 is known to 2e-5


@pytest.mark.parametrize("implementation", list(attention.CAUSAL))
def test_sums_that_float16_does_not_hold(implementation):
    """All keys alike, so that a row is the mean of 1700 equal weights: 68 000 before it is divided, 65 504 is most."""
    zeros, v = jnp.zeros((1, 1700, 1, 2), jnp.float16), jnp.full((1, 1700, 1, 2), 40, jnp.float16)
    last = attention.causal_attention(zeros, zeros, v, jnp.ones((1, 1700), bool), implementation)[:, -1]
    np.testing.assert_allclose(np.float32(last), 40, rtol=1e-3)


def test_large_contexts_take_the_bounded_path(monkeypatch):
    taken = []
    for name, function in list(attention.CAUSAL.items()):
        monkeypatch.setitem(attention.CAUSAL, name, lambda *a, n=name, f=function: taken.append(n) or f(*a))
    for T in (8, 1100):
        attention.causal_attention(*(random(1, T, 1, 2) for _ in range(3)), jnp.ones((1, T), bool))
    assert taken == ["reference", "blocked"]


@pytest.mark.parametrize("T", [4, 150])
def test_two_parts_are_one_softmax(T, monkeypatch):
    """150 rows of three questions attend in blocks: 100 of all of them over the context, 64 of each over the tail."""
    monkeypatch.setattr(attention, "_MOST_ROWS", 100)
    B, Q, N, S, R, K, H = 2, 3, 6, 9, 5, 2, 8
    q, ck, cv = random(B, Q, T, N, H) / H**0.5, random(B, S, K, H), random(B, S, K, H, seed=3)
    tk, tv = random(B, Q, R, K, H, seed=4), random(B, Q, R, K, H, seed=5)
    rng = np.random.default_rng(1)
    cmask, tmask = rng.random((B, S)) < 0.7, rng.random((B, Q, T, R)) < 0.5
    tmask[..., 0] = True
    ours, lse = jax.jit(attention.two_part_attention)(q, (ck, cv, cmask), (tk, tv, tmask))
    observed = attention.probabilities_from_lse(q, ck, cmask, lse)
    for j in range(Q):
        keys, values = jnp.concatenate([ck, tk[:, j]], 1), jnp.concatenate([cv, tv[:, j]], 1)
        mask = np.concatenate([np.broadcast_to(cmask[:, None], (B, T, S)), tmask[:, j]], -1)
        theirs, their_lse = plain(q[:, j], keys, values, mask)
        np.testing.assert_allclose(ours[:, j], theirs, atol=2e-6)
        np.testing.assert_allclose(lse[:, j], their_lse, atol=2e-6)
        scores = np.asarray(attention.scores(q[:, j], ck), np.float64)
        expected = np.where(cmask[:, None, None], np.exp(scores - their_lse[..., None]), 0)
        np.testing.assert_allclose(observed[:, j], expected, atol=2e-6)


@pytest.mark.parametrize("questions", [1, 3, 15, 100])
def test_rows_that_attend_at_once_are_bounded_over_all_questions(questions):
    most = max(attention._MOST_ROWS, questions * attention._BLOCK)
    for rows in range(1, 1500):
        size = attention.rows_at_once(questions, rows)
        blocks = -(-rows // size)
        assert size * questions < most + 16 * questions and blocks * size < rows + 16 * blocks
        assert size == rows or size % 16 == 0


def test_text_angles_follow_their_sections():
    ids = jnp.array([[5, 300], [7, 1], [11, 65537]])
    angles = np.asarray(rotary.text_angles(ids, 16, 1e4, (2, 3, 3)))
    for t in range(2):
        for i, axis in enumerate([0, 0, 1, 1, 1, 2, 2, 2]):
            assert angles[t, i] == pytest.approx(int(ids[axis, t]) * 1e4 ** (-2 * i / 16), rel=1e-6)


def test_rotation_keeps_what_depends_on_distance_alone():
    q, k = random(1, 1, 16), random(1, 1, 16, seed=1)
    turn = lambda p: rotary.turns(rotary.text_angles(jnp.full((3, 1), p), 16, 1e4, (2, 3, 3))[:, None])
    products = [float((rotary.rotate(q, turn(p)) * rotary.rotate(k, turn(p + 9))).sum()) for p in (0, 3, 100)]
    np.testing.assert_allclose(products, products[0], atol=1e-5)
    half = rotary.rotate(q.astype(jnp.bfloat16), turn(257))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(rotary.rotate(q, turn(7), 0.3), 0.3 * rotary.rotate(q, turn(7)), atol=1e-6)
    np.testing.assert_allclose(half.astype(jnp.float32), rotary.rotate(q, turn(257)), atol=0.02)  # bfloat16's rounding


@pytest.mark.parametrize("width", [16, 80, 128])
def test_rotation_turns_complex_numbers(width):
    """Rows before heads, as in the decoder, and heads before rows, as in the vision tower."""
    x = random(3, 7, 2, width)  # [T, P, N, H]
    angles = rotary.vision_angles(np.arange(7), np.arange(7)[::-1], width, 1e4)
    first, second = np.split(np.asarray(x, np.float64), 2, -1)
    turned = (first + 1j * second) * np.exp(1j * angles.astype(np.float64))[:, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    turn = rotary.turns(jnp.asarray(angles))
    np.testing.assert_allclose(rotary.rotate(x, [each[:, None] for each in turn]), expected, atol=2e-6)
    heads_first = rotary.rotate(jnp.swapaxes(x, 1, 2), turn)
    np.testing.assert_allclose(jnp.swapaxes(heads_first, 1, 2), expected, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [80, 128])  # channels of a head in the vision towers and in the decoders
def test_a_product_swaps_bit_for_bit(width, dtype):
    x = random(3, 7, 2, width).astype(dtype)
    np.testing.assert_array_equal(rotary._swap_by_product(x).astype(jnp.float32), rotary._swap(x).astype(jnp.float32))
