"""The vision tower. A slot (two frames) is a batch entry: no layer looks across slots, so chunks of any size agree.

Patches are laid out in windows once, padded to a common window size, and stay so through all layers: window layers
attend within [W, U'] and full layers within [1, W U'] of every slot and head, with the same mask of padding. U' counts
patches per window. The kind of a layer is static, and heads come before patches: a choice made while running, or heads
beside their channels, make a TPU's compiler rearrange whole arrays, at several times the cost of the products.
"""

import itertools
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.geometry import WindowLayout
from adapttoken_jax.model.attention import MASKED
from adapttoken_jax.model.block import Block, product, rms_norm
from adapttoken_jax.model.rotary import rotate_heads_first, turns, vision_angles


class VisionLayer(Block):
    """One pre-norm layer: attention within windows or within the slot, then a gated feed-forward block with biases."""

    def __call__(self, x, turn, mask, full: bool):
        """x[T, W U', D] -> the same; `full` widens attention from the window to the slot."""
        c = self.config
        q, k, v = self.qkv(rms_norm(x, self.norm1, c.eps), turn)
        mixed = self.attend(q, k, v, mask.reshape(1, -1) if full else mask)
        x = x + product("TNPH,NHD->TPD", mixed, self.o_kernel[...]) + self.o_bias[...]
        return x + self.feed_forward(rms_norm(x, self.norm2, c.eps))

    def qkv(self, x, turn):
        """Rotated queries and keys, and values, [T, N, W U', H] each, of the normalised x[T, W U', D]."""
        q, k, v = product("TPD,DcNH->cTNPH", x, self.qkv_kernel[...]) + self.qkv_bias[...][:, None, :, None]
        return rotate_heads_first(q, turn), rotate_heads_first(k, turn), v

    @staticmethod
    def attend(q, k, v, mask):
        """Attention of [T, N, W U', H] within the stretches that `mask`[W, U'] cuts the rows into, of real patches."""
        q, k, v = (x.reshape(*x.shape[:2], *mask.shape, x.shape[3]) for x in (q, k, v))
        scores = jnp.einsum("TNWUH,TNWSH->TNWUS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED)).astype(v.dtype)
        return product("TNWUS,TNWSH->TNWUH", weights, v).reshape(*q.shape[:2], -1, q.shape[-1])

    def feed_forward(self, x):
        """Gated linear unit with SiLU: x[T, W U', D] -> the same shape."""
        gate = jax.nn.silu(product("TPD,DF->TPF", x, self.gate_kernel[...]) + self.gate_bias[...])
        up = product("TPD,DF->TPF", x, self.up_kernel[...]) + self.up_bias[...]
        return product("TPF,FD->TPD", gate * up, self.down_kernel[...]) + self.down_bias[...]


def _runs(kinds: list[bool]) -> Iterator[tuple[np.ndarray, bool]]:
    """Neighbours of the same kind: [False, False, True] -> ([0, 1], False), ([2], True)."""
    for full, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        yield np.asarray([*run]), full


class VisionTower(Block):
    """Patches of whole slots -> merged visual tokens."""

    parts: ClassVar = {"layers": VisionLayer}

    def __call__(self, patches: jax.Array, layout: WindowLayout, return_layers: bool = False) -> dict[str, jax.Array]:
        """Encodes slots.

        Args:
          patches: [T, P, channels x temporal patch x patch^2], rows in merge order (four per merged token).
          layout: `geometry.window_layout` of the slot's size; static.
          return_layers: also return every layer's output.

        Returns:
          "features"[T, M, D_text] in raster order; with `return_layers` also "layers"[L, T, P, D] in patch order.
        """
        x, mask, turn = self.embed(patches, layout), *self.places(layout)
        kinds = [bool(full) for full in np.isin(np.arange(self.config.layers), self.config.full_attention_layers)]
        layers = []
        for indices, full in _runs(kinds):
            x, outputs = self.run(indices, x, turn, mask, full, return_layers)
            layers.append(outputs)
        out = {"features": self.merge(x, layout)}
        if return_layers:
            unwindow = lambda y: self.unwindow(y, layout).reshape(*patches.shape[:2], -1)
            out["layers"] = jax.vmap(unwindow)(jnp.concatenate(layers))
        return out

    def run(self, indices, x, turn, mask, full, return_layers):
        """Layers of one kind, one after another: their output, and with `return_layers` that of each."""

        def step(x, index):
            x = self.layer(index)(x, turn, mask, full)
            return x, x if return_layers else None

        return jax.lax.scan(step, x, indices)

    def embed(self, patches, layout):
        """Linear patch embedding, then patches to their window places: [T, W U', D]."""
        x = product("TPF,FD->TPD", patches.astype(self.patch_kernel.dtype), self.patch_kernel[...])
        units = x.reshape(x.shape[0], -1, self.config.merge**2, x.shape[-1])  # [T, M, merge^2, D]
        return units[:, layout.token.reshape(-1)].reshape(x.shape[0], -1, x.shape[-1])

    def places(self, layout):
        """Mask [W, U'] of real patches, and the rotary `turns` of all places [W U']."""
        c = self.config
        mask = np.repeat(layout.valid, c.merge**2, axis=1)
        angles = vision_angles(layout.rows, layout.cols, c.head_dim, c.rope_theta)
        return jnp.asarray(mask), turns(jnp.asarray(angles))

    def unwindow(self, x, layout):
        """[T, W U', D] -> [T, M, merge^2, D], merged tokens in raster order."""
        units = x.reshape(x.shape[0], -1, self.config.merge**2, x.shape[-1])
        return units[:, layout.place]

    def merge(self, x, layout):
        """Norm, concatenation of each token's patches, two linear layers with exact (erf) GELU between."""
        units = rms_norm(self.unwindow(x, layout), self.merger_norm, self.config.eps)
        units = units.reshape(*units.shape[:2], -1)
        hidden = product("TMD,DF->TMF", units, self.merger_in_kernel[...]) + self.merger_in_bias[...]
        hidden = jax.nn.gelu(hidden, approximate=False)
        return product("TMF,FD->TMD", hidden, self.merger_out_kernel[...]) + self.merger_out_bias[...]
