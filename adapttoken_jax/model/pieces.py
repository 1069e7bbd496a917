"""The rows of one context on several places of a mesh.

Every place takes its piece of a context's rows and of its questions' through a layer; only keys and values, a fraction
of a row, are gathered from the other pieces, for attention. A row looks at the rows before it, so later ones have more
to do: a sequence is cut into twice as many runs as there are pieces, and a piece is the c-th run from the beginning and
the c-th from the end, which is as much work for each.

Letters: B contexts, C pieces of each, P = B x C. An array [P, ...] lies with one piece on each place.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from adapttoken_jax.model.block import merge_axes


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How contexts lie on a mesh; hashable.

    Attributes:
      mesh: the mesh; None for one device.
      contexts: its axes that hold different contexts.
      own: its axes that hold the pieces of one context.
    """

    mesh: Mesh | None = None
    contexts: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh | None, contexts: int) -> "Pieces":
        """How so many contexts lie on a mesh (see `sharding.py`).

        With one context per place of the first axis, `context` holds their pieces. A lone context is cut for the last
        axis that holds contexts, unless `fsdp` splits the weights: then these stay where they are, and rows are whole.
        """
        if mesh is None:
            return WHOLE
        first, *cut = mesh.axis_names[:-1]
        if contexts == mesh.shape[first]:
            return cls(mesh, (first,), tuple(cut))
        return cls(mesh, (), tuple(cut or [first])) if contexts == 1 and first != "fsdp" else WHOLE

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh that split an array [P, ...]."""
        return self.contexts + self.own

    @property
    def count(self) -> int:
        """Pieces of each context, C."""
        return math.prod(self.mesh.shape[axis] for axis in self.own)

    @property
    def runs(self) -> int:
        """Runs that a sequence is cut into: its length must be a multiple."""
        return 1 if self.count == 1 else 2 * self.count

    def order(self, length: int) -> np.ndarray:
        """Where the rows of all pieces, one piece after the other, stand in a sequence of so many rows."""
        runs = np.arange(length).reshape(self.runs, -1)
        return runs.ravel() if self.count == 1 else np.stack([runs, runs[::-1]], 1)[: self.count].ravel()

    def in_order(self, x, axis: int):
        """Rows as they stand in a sequence -> in the `order` of the pieces."""
        if self.count == 1:
            return x
        early, late = jnp.split(_unmerged(x, axis, self.runs), 2, axis)
        return merge_axes(merge_axes(jnp.stack([early, jnp.flip(late, axis)], axis + 1), axis), axis)

    def in_sequence(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `in_order`. (A gather by index would do either, slowly on a TPU.)"""
        if self.count == 1:
            return x
        runs = _unmerged(_unmerged(x, axis, self.runs), axis, self.count)
        early, late = (jax.lax.index_in_dim(runs, each, axis + 1, keepdims=False) for each in (0, 1))
        return merge_axes(jnp.concatenate([early, jnp.flip(late, axis)], axis), axis)

    def cut(self, x: jax.Array, axis: int) -> jax.Array:
        """[B, ..., S, ...] with rows on `axis` -> [P, ..., S / C, ...]."""

        def piece(x):
            c = jax.lax.axis_index(self.own)
            runs = _unmerged(x, axis, self.runs)
            own = (jax.lax.dynamic_slice_in_dim(runs, place, 1, axis) for place in (c, self.runs - 1 - c))
            return merge_axes(jnp.concatenate(list(own), axis), axis)

        return self._each(piece, x, self.contexts, self.axes)

    def gather(self, x: jax.Array, axis: int) -> jax.Array:
        """[P, ..., S / C, ...] with rows on `axis` -> [P, ..., S, ...]: all rows of a context on each of its places.

        They stand in the `order` of the pieces: attention need not have them in another, and copying takes its time.
        """
        whole = lambda x: jax.lax.all_gather(x, self.own, axis=axis, tiled=True)
        return self._each(whole, x, self.axes, self.axes)

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """[P, ..., S / C, ...] with rows on `axis` -> [B, ..., S, ...], the inverse of `cut`."""
        return self.merge(self.in_sequence(self.gather(x, axis), axis))

    def spread(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [P, ...]: the same for every piece of a context."""
        return self._each(lambda x: x, x, self.contexts, self.axes)

    def merge(self, x: jax.Array) -> jax.Array:
        """[P, ...], the same for every piece of a context -> [B, ...]. Nothing travels."""
        return self._each(lambda x: x, x, self.axes, self.contexts)

    def _each(self, function, x, came: tuple[str, ...], goes: tuple[str, ...]):
        """`function` on every place's own part of `x`, whose first axis came and goes over these axes of the mesh."""
        if self.count == 1:
            return x
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=PartitionSpec(came or None), out_specs=PartitionSpec(goes or None),
            axis_names={*self.axes}, check_vma=False,
        )(x)  # fmt: skip


WHOLE = Pieces()


def _unmerged(x, axis: int, parts: int):
    """`x` with an axis as two, the first of so many parts."""
    return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
