"""A context's rows in pieces: what each place gets, and that nothing is lost on the way."""

import jax
import numpy as np
import pytest

from adapttoken_jax import sharding
from adapttoken_jax.model.pieces import WHOLE, Pieces


def on(mesh: str, contexts: int) -> Pieces:
    return Pieces.of(sharding.make_mesh(sharding.MeshShape.parse(mesh)), contexts)


def test_a_piece_is_a_run_from_the_beginning_and_one_from_the_end():
    pieces = on("data=1,context=2", 1)
    assert pieces.order(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert WHOLE.order(4).tolist() == [0, 1, 2, 3] and WHOLE.runs == 1


@pytest.mark.parametrize("C", [2, 4, 8])
def test_pieces_look_at_equally_many_rows(C):
    places = on(f"context={C}", 1).order(16 * C).reshape(C, -1)
    assert len({int(sum(own + 1)) for own in places}) == 1


@pytest.mark.parametrize(
    ("mesh", "contexts", "axes", "count"),
    [
        ("data=4,model=2", 4, ("data",), 1),
        ("data=4,model=2", 1, ("data",), 4),
        ("data=4,model=2", 8, (), 1),
        ("data=2,context=2,model=2", 2, ("data", "context"), 2),
        ("data=2,context=4,model=1", 1, ("context",), 4),
        ("fsdp=2,context=4,model=1", 2, ("fsdp", "context"), 4),
        ("fsdp=8,model=1", 1, (), 1),
    ],
)
def test_where_contexts_lie(mesh, contexts, axes, count):
    pieces = on(mesh, contexts)
    assert (pieces.axes, pieces.count) == (axes, count)
    x = np.random.default_rng(0).random((contexts, 3, 16, 4), np.float32)
    cut = jax.jit(lambda x: pieces.cut(x, 2))(x)
    assert cut.shape == (contexts * count, 3, 16 // count, 4)
    own = pieces.order(16).reshape(count, -1)
    for place, piece in enumerate(np.asarray(cut)):
        np.testing.assert_array_equal(piece, x[place // count][:, own[place % count]])
    np.testing.assert_array_equal(jax.jit(lambda x: pieces.join(x, 2))(cut), x)
    gathered = jax.jit(lambda x: pieces.gather(x, 2))(cut)
    for place, whole in enumerate(np.asarray(gathered)):
        np.testing.assert_array_equal(whole, x[place // count][:, pieces.order(16)])
    np.testing.assert_array_equal(jax.jit(lambda x: pieces.in_order(x, 2))(x), x[:, :, pieces.order(16)])
    np.testing.assert_array_equal(jax.jit(lambda x: pieces.merge(pieces.spread(x)))(x), x)


def test_a_piece_lies_on_its_place_alone():
    pieces = on("data=2,context=2,model=2", 2)
    cut = jax.jit(lambda x: pieces.cut(x, 1))(np.zeros((2, 8, 4), np.float32))
    assert cut.sharding.shard_shape(cut.shape) == (1, 4, 4)
