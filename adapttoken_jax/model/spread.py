"""The rows of contexts between the products of a layer, on the places of `model`.

`model` splits a layer's products, so that each place has a part of every row's sum. Were all sums then sent to all
places, each would normalise and add up all rows. Each gets the sums of rows of its own instead, and they are gathered
again before the next product: as many bytes travel, and what lies between products is shared.

Letters: P contexts or pieces of them, R rows of each.
"""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapttoken_jax.model.block import product

TILE_ROWS = 16  # of bfloat16: every place gets whole tiles


@dataclasses.dataclass(frozen=True)
class Spread:
    """How rows [P, R, D] lie between products; hashable.

    Attributes:
      mesh: the mesh; None where every place of `model` has all rows.
      axes: its axes that split P.
    """

    mesh: Mesh | None = None
    axes: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh, axes: tuple[str, ...], rows: int, *split: int) -> "Spread":
        """Of so many rows; `split` are the sizes of the axes that products sum over, which `model` must divide."""
        places = mesh.shape["model"]
        shared = places > 1 and rows % (places * TILE_ROWS) == 0 and all(size % places == 0 for size in split)
        return cls(mesh, axes) if shared else EVERYWHERE

    def own(self, x: jax.Array) -> jax.Array:
        """Rows [P, R, D] with each on one place."""
        return self._lay(x, "model")

    def whole(self, x: jax.Array) -> jax.Array:
        """Rows [P, R, D] with all on every place."""
        return self._lay(x, None)

    def _lay(self, x, rows):
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.axes or None, rows)))

    def sums(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """`product` of x[P, R, split, ...] and y[split, ..., D], whose axis `split` lies on `model`: its `own` rows.

        By hand: left to itself the compiler sums all rows on all places first, in rounds of their own number of rows.
        """
        if self.mesh is None:
            return product(spec, x, y)
        places = self.mesh.shape["model"]

        def own_sums(x, y):
            parts = product(spec, x, y)
            parts = parts.reshape(parts.shape[0], places, -1, parts.shape[-1])
            return jax.lax.psum_scatter(parts, "model", scatter_dimension=1)

        over = self.axes or None
        return jax.shard_map(
            own_sums, mesh=self.mesh, in_specs=(PartitionSpec(over, None, "model"), PartitionSpec("model")),
            out_specs=PartitionSpec(over, "model"), check_vma=False,
        )(x, y)  # fmt: skip


EVERYWHERE = Spread()
