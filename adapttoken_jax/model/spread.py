"""The rows of contexts between the products of a layer, on the places of `model`.

`model` splits a layer's products, so that each place has a part of every row's sum. Were all sums then sent to all
places, each would normalise and add up all rows. Each gets the sums of rows of its own instead, and they are gathered
again before the next product: as many bytes travel, and what lies between products is shared.

Nothing but attention ties rows to each other. They go through the rest of a layer in parts, so that one part travels
while another is multiplied.

Letters: P contexts or pieces of them, R rows of each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapttoken_jax.model.block import product, row_by_row

TILE_ROWS = 16  # of bfloat16: every place gets whole tiles
PART_ROWS = 2048  # at most; fewer take longer to multiply by the same weights, more wait longer for the first


@dataclasses.dataclass(frozen=True)
class Spread:
    """How rows [P, R, D] lie between products; hashable.

    Attributes:
      mesh: the mesh; None for one device, and where the compiler may lay them as it likes.
      axes: its axes that split P.
      over: its axes that split R; none where every place of `model` has all rows.
      cuts: the rows at which a new part begins.
    """

    mesh: Mesh | None = None
    axes: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    cuts: tuple[int, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh, axes: tuple[str, ...], rows: int, *split: int) -> "Spread":
        """Of so many rows; `split` are the sizes of the axes that products sum over, which `model` must divide."""
        places = mesh.shape["model"]
        tile = places * TILE_ROWS
        if places == 1 or rows % tile or any(size % places for size in split):
            return cls(mesh, axes)
        parts = -(-rows // PART_ROWS)
        return cls(mesh, axes, ("model",), tuple(rows // tile * part // parts * tile for part in range(1, parts)))

    def split(self, tree) -> list:
        """A tree of arrays [P, R, ...] -> one for each part of the rows."""
        leaves, form = jax.tree.flatten(tree)
        return [form.unflatten(part) for part in zip(*(jnp.split(x, self.cuts, 1) for x in leaves), strict=True)]

    def join(self, parts):
        """The inverse of `split`."""
        return jax.tree.map(lambda *part: jnp.concatenate(part, 1), *parts)

    def together(self, parts: list[jax.Array], first: int = 0) -> jax.Array:
        """The rows from `first` on, all on every place, of parts [P, R, D] that lie in either way."""
        begins = (0, *self.cuts)
        needed = sum(cut <= first for cut in self.cuts)
        return self.join(map(self.whole, parts[needed:]))[:, first - begins[needed] :]

    def own(self, x: jax.Array) -> jax.Array:
        """Rows [P, R, D] with each on one place, if they are spread, and row by row in memory."""
        if self.mesh is None:
            return row_by_row(x)
        # By hand: a TPU's compiler may take an array whose layout is asked for to all places of the mesh.
        lie = PartitionSpec(self.axes or None, self.over or None)
        return jax.shard_map(row_by_row, mesh=self.mesh, in_specs=lie, out_specs=lie, check_vma=False)(x)

    def whole(self, x: jax.Array) -> jax.Array:
        """Rows [P, R, D] with all on every place."""
        if not self.over:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.axes or None, None)))

    def sums(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`product` of x[P, R, split, ...] and y[split, ..., D], whose axis `split` lies on `model`: its `own` rows.

        By hand: left to itself the compiler sums all rows on all places first, in rounds of their own number of rows.
        """
        if not self.over:
            return product(spec, x, y)
        places = self.mesh.shape["model"]

        def own_sums(x, y):
            summands = product(spec, row_by_row(x), y)
            summands = summands.reshape(summands.shape[0], places, -1, summands.shape[-1])
            return jax.lax.psum_scatter(summands, "model", scatter_dimension=1)

        axes = self.axes or None
        return jax.shard_map(
            own_sums, mesh=self.mesh, in_specs=(PartitionSpec(axes, None, "model"), PartitionSpec("model")),
            out_specs=PartitionSpec(axes, "model"), check_vma=False,
        )(x, y)  # fmt: skip


EVERYWHERE = Spread()
