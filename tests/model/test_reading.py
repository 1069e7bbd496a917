"""`TextDecoder.read` against `prefill` and `extend`, which transformers is the oracle of."""

import jax
import numpy as np
import pytest

from adapttoken_jax import parameters
from adapttoken_jax.config import model_config
from adapttoken_jax.model import Probe, Qwen25VL
from adapttoken_jax.model.text import Rows
from tests import tiny

B, S, Q, T = 2, 150, 3, 7  # a context of more rows than attention takes in one piece


@pytest.fixture(scope="module")
def text():
    config = model_config(tiny._flat_config(tiny.SHAPES["seven_per_kv"], "float32"))
    return Qwen25VL(config, parameters.initialise(config, jax.random.key(3))).text


def rows(text):
    """Two contexts, the second of them padded, and three suffixes of each, of other lengths."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=(*shape, text.config.width)).astype(np.float32)
    context = Rows(draw(B, S), random.integers(0, 99, (B, 3, S)), np.arange(S) < np.array([[S], [S - 20]]))
    valid = np.broadcast_to(np.arange(T) < np.array([[T], [3], [5]]), (B, Q, T))
    return context, Rows(draw(B, Q, T), random.integers(99, 120, (B, Q, 3, T)), valid)


@pytest.mark.parametrize("layers", [None, range(0, 2), range(1, 3)], ids=str)
@pytest.mark.parametrize("room", [0, 4])
def test_one_loop_gives_the_numbers_of_two(text, layers, room):
    context, suffixes = rows(text)
    probe = Probe(1, lambda p, _: p.max((2, 3)), np.ones((Q, T), bool), lambda parts: parts.max(0))
    keep = (layers or range(text.config.layers))[-1]

    @jax.jit
    def together(text):
        return text.read(context, suffixes, layers=layers, room=room, keep_layer=keep, probe=probe)

    @jax.jit
    def apart(text):
        past, kept = text.prefill(*context, layers=layers, keep_layer=keep)
        hidden, tail, found = text.extend(*suffixes, past, text.empty_tail(past, Q, T + room), 0, probe=probe)
        return hidden, (past, tail), kept | found

    (hidden, past, found), (same_hidden, same_past, same_found) = together(text), apart(text)
    assert found.keys() == same_found.keys() == {"kept", "observed"}
    # Both round every sum anew, relative to its terms, which are no larger than the largest number of the array.
    close = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))
    close(hidden[suffixes.valid], same_hidden[suffixes.valid])
    close(found["kept"][context.valid], same_found["kept"][context.valid])
    close(found["observed"], same_found["observed"])
    assert np.asarray(found["observed"]).max() > 0.01
    if not room:
        assert past is None, "nothing is kept that no token will look at"
        return
    (ours, tail), (theirs, same_tail) = past, same_past
    assert ours.layers == theirs.layers and (tail.valid == same_tail.valid).all()
    for name in ("k", "v"):
        close(getattr(ours, name)[:, context.valid], getattr(theirs, name)[:, context.valid])
        mine, other = (np.asarray(getattr(each, name))[:, np.asarray(tail.valid)] for each in (tail, same_tail))
        assert mine.shape == other.shape
        close(mine, other)


def test_the_last_layers_context_ends_at_its_keys_unless_it_is_kept(text):
    context, suffixes = rows(text)
    *_, found = text.read(context, suffixes, keep_layer=text.config.layers - 1)
    _, kept = text.prefill(*context, return_layers=True)
    np.testing.assert_allclose(
        found["kept"][context.valid], kept["layers"][-1][context.valid], atol=1e-5 * np.abs(found["kept"]).max()
    )
