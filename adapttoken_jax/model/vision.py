"""The vision tower. A slot (two frames) is a batch entry: no layer looks across slots, so chunks of any size agree.

Patches are laid out window by window once and stay so through all layers: window layers attend within each run of equal
windows, full layers within the slot, a run of one. Where products are dense, windows are padded to one run: cutting
arrays into runs costs a TPU more than the padding. The kind of a layer is static, and to XLA heads are given before
patches: a choice made while running, or heads beside their channels, make a TPU's compiler rearrange whole arrays, at
several times the cost of the products. The kernel of `windows.py` leaves them where they are.

Letters: T slots, N heads, P patch places of a slot, W windows of a run, U places of a window, H head dim.
"""

import itertools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapttoken_jax.geometry import LANES, WindowLayout
from adapttoken_jax.model.block import Block, pad_end, product, rms_norm
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.model.rotary import rotate, turns, vision_angles

_CHANNELS = {"gate_kernel": -1, "gate_bias": -1, "up_kernel": -1, "up_bias": -1, "down_kernel": -2}  # the axis of each


class Places(NamedTuple):
    """What a layer needs to know of the patch places: which are real, and the windows that attention stays within.

    Attributes:
      windows: (W, U) of each run of equal windows.
      valid: bool[P]; None where nothing is padded.
    """

    windows: tuple[tuple[int, int], ...]
    valid: np.ndarray | None


class VisionLayer(Block):
    """One pre-norm layer: attention within windows or within the slot, then a gated feed-forward block with biases.

    Queries, keys and values of all heads are one axis. Channels of zeros, which add nothing, widen the feed-forward
    block until `LANES` divides it. The published width of 3420 it does not divide, and a head has 80: a TPU would
    rearrange the weights in every call, and multiply at half the speed.
    """

    def __init__(self, config, values: dict):
        wide = {name: _whole_lanes(values[name], axis) for name, axis in _CHANNELS.items()}
        super().__init__(config, values | wide)

    def __call__(self, x, turn, places, kernel):
        """x[T, P, D] -> the same."""
        c = self.config
        x = x + self.mix(rms_norm(x, self.norm1, c.eps), turn, places, kernel) + self.o_bias[...]
        return x + self.feed_forward(rms_norm(x, self.norm2, c.eps))

    def mix(self, x, turn, places, kernel):
        """Attention's part of the normalised x[T, P, D], without its last bias."""
        qkv, o_kernel = product("TPD,DF->TPF", x, self.qkv_kernel[...]) + self.qkv_bias[...], self.o_kernel[...]
        if kernel.takes_rows(places.windows, *o_kernel.shape[:2]):
            mixed = kernel.within_rows(qkv, turn, places.valid, places.windows[0][0], o_kernel.shape[0])
            return product("TPF,FD->TPD", mixed, o_kernel.reshape(mixed.shape[-1], -1))
        mixed = self.attend(*self.heads(qkv, turn), places, kernel)
        return product("TNPH,NHD->TPD", mixed, o_kernel)

    def heads(self, qkv, turn):
        """Rotated queries and keys, and values, [T, N, P, H] each, of qkv[T, P, 3 N H]."""
        qkv = qkv.reshape(*qkv.shape[:2], 3, *self.o_kernel.shape[:2])
        q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
        return rotate(q, turn), rotate(k, turn), v

    @staticmethod
    def attend(q, k, v, places, kernel):
        """Attention of [T, N, P, H] within windows."""
        mixed, start = [], 0
        for W, U in places.windows:
            run = slice(start, start + W * U)
            rows = (x[:, :, run].reshape(*x.shape[:2], W, U, x.shape[3]) for x in (q, k, v))
            valid = None if places.valid is None else places.valid[run].reshape(W, U)
            mixed.append(kernel.within(*rows, valid).reshape(*q.shape[:2], W * U, q.shape[3]))
            start = run.stop
        return jnp.concatenate(mixed, 2)

    def feed_forward(self, x):
        """Gated linear unit with SiLU: x[T, P, D] -> the same shape."""
        gate = jax.nn.silu(product("TPD,DF->TPF", x, self.gate_kernel[...]) + self.gate_bias[...])
        up = product("TPD,DF->TPF", x, self.up_kernel[...]) + self.up_bias[...]
        return product("TPF,FD->TPD", gate * up, self.down_kernel[...]) + self.down_bias[...]


def _whole_lanes(weights, axis: int):
    """An array, or its shape, with zeros at the end of an axis so that `LANES` divides it."""
    widen = lambda weights: pad_end(weights, axis, -weights.shape[axis] % LANES)
    if isinstance(weights, jax.ShapeDtypeStruct):
        return jax.eval_shape(widen, weights).update(sharding=weights.sharding)
    return widen(weights)


def _runs(kinds: list[bool]) -> Iterator[tuple[np.ndarray, bool]]:
    """Neighbours of the same kind: [False, False, True] -> ([0, 1], False), ([2], True)."""
    for full, run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        yield np.asarray([*run]), full


class VisionTower(Block):
    """Patches of whole slots -> merged visual tokens."""

    parts: ClassVar = {"layers": VisionLayer}

    def __call__(
        self, patches: jax.Array, layout: WindowLayout, return_layers: bool = False, kernel: Kernel = XLA
    ) -> dict[str, jax.Array]:
        """Encodes slots.

        Args:
          patches: [T, P, channels x temporal patch x patch^2], rows in merge order (four per merged token).
          layout: `geometry.window_layout` of the slot's size; static.
          return_layers: also return every layer's output.
          kernel: what computes attention.

        Returns:
          "features"[T, M, D_text] in raster order; with `return_layers` also "layers"[L, T, P, D] in patch order.
        """
        x, turn, places = self.embed(patches, layout), self.turns(layout), self.places(layout)
        whole = places._replace(windows=((1, x.shape[1]),))
        kinds = [bool(full) for full in np.isin(np.arange(self.config.layers), self.config.full_attention_layers)]
        layers = []
        for indices, full in _runs(kinds):
            x, outputs = self.run(indices, x, turn, whole if full else places, kernel, return_layers)
            layers.append(outputs)
        out = {"features": self.merge(x, layout)}
        if return_layers:
            unwindow = lambda y: self.unwindow(y, layout).reshape(*patches.shape[:2], -1)
            out["layers"] = jax.vmap(unwindow)(jnp.concatenate(layers))
        return out

    def run(self, indices, x, turn, places, kernel, return_layers):
        """Layers of one kind, one after another: their output, and with `return_layers` that of each."""

        def step(x, index):
            x = self.layer(index)(x, turn, places, kernel)
            return x, x if return_layers else None

        return jax.lax.scan(step, x, indices)

    def embed(self, patches, layout):
        """Linear patch embedding, then patches to their window places: [T, P, D]."""
        x = product("TPF,FD->TPD", patches.astype(self.patch_kernel.dtype), self.patch_kernel[...])
        units = x.reshape(x.shape[0], -1, self.config.merge**2, x.shape[-1])  # [T, M, merge^2, D]
        return units[:, layout.token].reshape(x.shape[0], -1, x.shape[-1])

    def places(self, layout):
        """The layout in patches."""
        per_token = self.config.merge**2
        windows = tuple((count, places * per_token) for count, places in layout.windows)
        return Places(windows, None if layout.valid.all() else np.repeat(layout.valid, per_token))

    def turns(self, layout):
        """The rotary `turns` of all places [P]."""
        c = self.config
        return turns(jnp.asarray(vision_angles(layout.rows, layout.cols, c.head_dim, c.rope_theta)))

    def unwindow(self, x, layout):
        """[T, P, D] -> [T, M, merge^2, D], merged tokens in raster order."""
        units = x.reshape(x.shape[0], -1, self.config.merge**2, x.shape[-1])
        return units[:, layout.place]

    def merge(self, x, layout):
        """Norm, concatenation of each token's patches, two linear layers with exact (erf) GELU between."""
        units = rms_norm(self.unwindow(x, layout), self.merger_norm, self.config.eps)
        units = units.reshape(*units.shape[:2], -1)
        hidden = product("TMD,DF->TMF", units, self.merger_in_kernel[...]) + self.merger_in_bias[...]
        hidden = jax.nn.gelu(hidden, approximate=False)
        return product("TMF,FD->TMD", hidden, self.merger_out_kernel[...]) + self.merger_out_bias[...]
