"""Which kernel computes attention: splash attention on a TPU, cuDNN's flash attention on a GPU, XLA elsewhere.

The vision tower's, whose windows are small, has a kernel of its own on a TPU (`windows.py`).

`resolve` chooses for a model; `Kernel` leaves to XLA the calls that a kernel is bad at. Every kernel has the signature
of the reference, takes grouped queries as they are and agrees with `attention.py`, which is its reference twin. Letters
as there.

- A float32 model takes XLA everywhere: the kernels round the factors of their products.
- XLA cannot split a kernel over a mesh by itself, so each device is handed its own heads and batch entries.
- Of a context in pieces (`pieces.py`) each device has its own rows, all keys, and its own part of the causal mask.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adapttoken_jax.geometry import LANES, round_up
from adapttoken_jax.model import attention, windows
from adapttoken_jax.model.pieces import WHOLE, Pieces
from adapttoken_jax.model.spread import EVERYWHERE, TILE_ROWS, Spread
from adapttoken_jax.sharding import batch_axes

_BLOCKS = (384, 512)  # of whole contexts; of pieces, whose runs are the blocks, up to _LONGEST_BLOCK
_LONGEST_BLOCK = 1024
_MOST_PADDING = 2  # times the rows of a context; what needs more is too short for so many pieces
_FEW_ROWS = 8
_STEP = 8  # what a GPU's library of products wants to divide the rows
_SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of vector memory
_HALF = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel on a mesh; hashable, so that it can be a static argument.

    Attributes:
      name: `xla`, `splash`, `cudnn`, or in the vision tower alone `windows`.
      mesh: the mesh that the program runs on; None for one device.
      largest: rows of the largest window that `windows` has memory for.
    """

    name: str = "xla"
    mesh: Mesh | None = None
    largest: int = 1024

    def pieces(self, contexts: int, length: int) -> Pieces:
        """How so many contexts of so many rows lie on the mesh."""
        found = self._pieces(contexts)
        padded = found.runs * self.run(-(-length // found.runs))
        return found if padded <= _MOST_PADDING * length else WHOLE

    def sharers(self, contexts: int) -> tuple[str, ...]:
        """Axes of the mesh whose places share the products of answers about so many contexts (`sharding.parted`)."""
        return self._pieces(contexts).own

    def _pieces(self, contexts: int) -> Pieces:
        found = Pieces.of(self.mesh, contexts)
        # cuDNN has no kernel for a piece; whether a lone context gains without, or an answer's token, which then waits
        # for four sums per layer, was not measured on GPUs.
        return WHOLE if self.name == "cudnn" and "context" not in found.own else found

    def run(self, rows: int) -> int:
        """The length of the runs, of at least so many rows, that suits `causal` of pieces: whole blocks of splash."""
        if self.name != "splash":
            return rows
        blocks = -(-rows // _LONGEST_BLOCK)
        return blocks * round_up(-(-rows // blocks), LANES)

    def suffix_run(self, rows: int, questions: int) -> int:
        """The length of the runs of suffixes: with those of so many questions a piece's rows can be `spread`."""
        if self.name != "splash":
            return rows
        tiles = TILE_ROWS * self.mesh.shape["model"]
        return round_up(rows, tiles // math.gcd(tiles, 2 * questions))

    def rows(self, contexts: int, length: int) -> int:
        """The rows, at least so many of each context, that suit products and `causal`: for splash whole blocks.

        XLA would otherwise copy operands and results to pad them, in every layer. (Of pieces `run` tells that.)
        """
        splash = self.name == "splash" and self.pieces(contexts, length).count == 1
        return round_up(length, _block(length) if splash else _STEP)

    def spread(self, rows, pieces: Pieces, config) -> Spread:
        """How rows [P, R, D] of the decoder lie on `model` between products. On GPUs and CPUs it was not measured."""
        if self.mesh is None or self.name != "splash":
            return EVERYWHERE
        axes = pieces.axes if pieces.count > 1 else batch_axes(self.mesh, len(rows))
        if "fsdp" in self.mesh.shape and not axes:  # a lone context's weights stay in parts
            return EVERYWHERE
        return Spread.of(self.mesh, axes, rows.shape[1], config.heads, config.ff)

    def causal(self, q, k, v, valid, rest=None, pieces: Pieces = WHOLE) -> jax.Array:
        """Causal attention of a sequence over itself: scaled q[B, T, N, H], k and v[B, T, K, H] -> [B, T, N, H].

        `valid[B, T]` is False at padding, which stands at the end and which nothing looks at. Rows of padding come out
        as any finite numbers; the last of them as `rest`[B, R, N, H], where that is given.

        With `pieces`, `q` is a piece of the sequence and then the rest's rows; keys are the sequence's alone, in the
        order of the pieces.
        """
        if rest is not None and (pieces.count > 1 or self.name == "xla"):
            own = slice(q.shape[1] - rest.shape[1])
            if pieces.count == 1:
                k, v, valid = (x[:, own] for x in (k, v, valid))
            return jnp.concatenate([self.causal(q[:, own], k, v, valid, pieces=pieces), rest], 1)
        if pieces.count > 1:
            return self._causal_piece(q, k, v, valid, pieces)
        if self.name == "xla":
            return attention.causal_attention(q, k, v, valid)
        kernel = {"splash": _splash_causal, "cudnn": _cudnn_causal}[self.name]
        mixed = self._per_device(kernel, 1)(q, k, v, valid)
        # A kernel pads to whole blocks as it is: computing a few rows more costs less than copies cut to size.
        return mixed if rest is None else mixed.at[:, -rest.shape[1] :].set(rest)

    def _causal_piece(self, q, k, v, valid, pieces: Pieces):
        order = pieces.order(k.shape[1])
        if self.name != "splash":
            places = jnp.tile(order.reshape(pieces.count, -1), (len(q) // pieces.count, 1))
            return attention.causal_attention(q, k, v, valid, places=places, key_places=order)
        run = len(order) // pieces.runs
        block = run // -(-run // _LONGEST_BLOCK)
        mask = _splash_mask_of(order)
        kernels = _splash_kernels(mask, q.shape[2] // self.mesh.shape["model"], (block, block), shards=pieces.count)
        split = NamedSharding(self.mesh, PartitionSpec(None, pieces.own))
        specs = {platform: kernel.manual_sharding_spec(split) for platform, kernel in kernels.items()}
        return self._per_device(_splash, 1, pieces, (kernels, specs))(q, k, v, valid)

    def over_context(self, q, k, v, valid, unused: int = 0, pieces: Pieces = WHOLE) -> tuple[jax.Array, jax.Array]:
        """Attention of later rows over a context: scaled q[B, T, N, H], k and v[B, S, K, H], valid[B, S].

        Padding may stand anywhere.

        The last `unused` keys are nothing but padding. B may be `pieces` of contexts.

        Returns:
          values[B, T, N, H], and the log-sum-exp of every row's scores, float32[B, N, T].
        """
        # cuDNN's log-sum-exp reaches JAX rounded to the queries' type, too coarse for relevance; few rows come here.
        if self.name != "splash":
            used = slice(-unused or None)
            return attention.context_attention(q, *(x[:, used] for x in (k, v, valid)))
        # Splash wants blocks of keys; for an answer's token, copying them into blocks costs more than attention does.
        kernel = attention.context_attention if q.shape[1] <= _FEW_ROWS else _splash_over_context
        return self._per_device(kernel, 2, pieces)(q, k, v, valid)

    @property
    def pads_windows(self) -> bool:
        """Whether `within` wants windows of one size; on a mesh, whose devices have slots of their own, XLA does it."""
        return self.name != "cudnn" or self.mesh is not None

    def within(self, q, k, v, valid=None) -> jax.Array:
        """Attention of the vision tower within windows: q, k, v[T, N, W, U, H] -> the same shape.

        Letters as of `attention.window_attention`; `valid` is None unless `pads_windows`.
        """
        return attention.window_attention(q, k, v, valid) if self.pads_windows else _cudnn_within(q, k, v)

    def takes_rows(self, sizes: tuple[tuple[int, int], ...], heads: int, head_dim: int) -> bool:
        """Whether `within_rows` is there for windows of these sizes (W, U)."""
        return self.name == "windows" and windows.suits(sizes, heads, head_dim, self.largest)

    def within_rows(self, qkv, turn, valid, W: int, heads: int) -> jax.Array:
        """`windows.attend` with `rotary.turns`, on each device's own slots; `valid` is None where nothing is padded."""
        cos, sin = turn
        valid = np.ones(len(cos), bool) if valid is None else valid
        attend = lambda qkv, cos, sin: windows.attend(qkv, cos, sin, valid, W=W, heads=heads)
        if self.mesh is None:
            return attend(qkv, cos, sin)
        slots, everywhere = PartitionSpec(self.mesh.axis_names), PartitionSpec()
        split = jax.shard_map(
            attend, mesh=self.mesh, in_specs=(slots, everywhere, everywhere), out_specs=slots, check_vma=False
        )
        return split(qkv, cos, sin)

    def _per_device(self, function, outputs: int, pieces: Pieces = WHOLE, shared=()):
        """`function` on every device's own batch entries (`pieces`, or whole if axes divide them) and heads.

        `shared`: a further argument, and how the mesh splits it.
        """
        if self.mesh is None:
            return function

        def split(q, k, v, valid):
            batch, over = self._places(*q.shape[::2], pieces)
            # Fewer key heads than devices: each is repeated until every device has one.
            repeats = math.lcm(k.shape[2], math.prod(self.mesh.shape[name] for name in over)) // k.shape[2]
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
            heads, rows = PartitionSpec(batch, None, over), PartitionSpec(batch, over)
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=(heads, heads, heads, PartitionSpec(batch), *shared[1:]),
                out_specs=heads if outputs == 1 else (heads, rows), check_vma=False,
            )(q, k, v, valid, *shared[:1])  # fmt: skip

        return split

    def _places(self, batch: int, heads: int, pieces: Pieces) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Axes of the mesh that split so many batch entries, and so many heads."""
        over = pieces.axes if pieces.count > 1 else batch_axes(self.mesh, batch)
        weights_are_split = not over and "fsdp" in self.mesh.shape and heads % self.mesh.size == 0
        return over, ("model", *self.mesh.axis_names[:-1]) if weights_are_split else ("model",)


XLA = Kernel()


def resolve(dtype, head_dim: int, mesh: Mesh | None = None, platform: str | None = None) -> Kernel:
    """The best kernel for a model whose decoder has this element type and head size.

    `platform` is "tpu", "gpu" or "cpu"; None is where the program runs now.
    """
    platform = platform or jax.default_backend()
    if platform == "tpu" and dtype == jnp.bfloat16 and head_dim % LANES == 0:
        return Kernel("splash", mesh)
    if platform == "gpu" and dtype in _HALF and head_dim <= 128 and head_dim % 8 == 0:
        return Kernel("cudnn", mesh)
    return Kernel("xla", mesh)


def resolve_vision(dtype, head_dim: int, mesh: Mesh | None = None, platform: str | None = None) -> Kernel:
    """The best kernel for the vision tower of such a model; arguments as of `resolve`."""
    if (platform or jax.default_backend()) == "tpu" and dtype == jnp.bfloat16:
        kind = (jax.devices() if mesh is None else mesh.devices.flat)[0].device_kind
        return Kernel("windows", mesh, largest=256 if kind in _SMALL_CHIPS else 1024)
    return resolve(dtype, head_dim, mesh, platform)


def _cudnn_causal(q, k, v, valid, implementation="cudnn"):
    del valid  # padding stands at the end, where no row before it looks; told of it, cuDNN is slower
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=1.0, implementation=implementation)


def _cudnn_within(q, k, v, implementation="cudnn"):
    T, N, W, U, H = q.shape
    rows = (jnp.transpose(x, (0, 2, 3, 1, 4)).reshape(T * W, U, N, H) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(*rows, implementation=implementation)
    return jnp.transpose(mixed.reshape(T, W, U, N, H), (0, 3, 1, 2, 4))


def _splash_causal(q, k, v, valid):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas loads slowly, and few need it

    shape, blocks = _whole_blocks(q, k)
    return _splash(q, k, v, valid, _splash_kernels(splash.CausalMask(shape), q.shape[2], blocks))


def _splash_over_context(q, k, v, valid):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, blocks = _whole_blocks(q, k)
    return _splash(q, k, v, valid, _splash_kernels(splash.FullMask(shape), q.shape[2], blocks, with_lse=True))


def _whole_blocks(q, k) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and keys padded to whole blocks, and these blocks."""
    lengths = q.shape[1], k.shape[1]
    blocks = tuple(map(_block, lengths))
    return tuple(map(round_up, lengths, blocks)), blocks


def _block(length: int) -> int:
    """The block of rows or keys that pads so many least; of two that pad alike the longer."""
    least = round_up(length, LANES)
    return min((block for block in _BLOCKS if block <= least), key=lambda b: (round_up(length, b), -b), default=least)


def _splash_mask_of(order: np.ndarray):
    """The causal mask of a sequence over itself, both in such an order. Made in parts: the whole may not fit."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class Mask(splash.Mask):
        shape = (len(order), len(order))

        def __getitem__(self, index):
            rows, keys = index
            return order[rows][:, None] >= order[keys]

    return Mask()


def _splash_kernels(mask, heads: int, blocks: tuple[int, int], with_lse: bool = False, shards: int = 1) -> dict:
    """Splash with a mask, of which each device has one of `shards`, by platform: others than a TPU interpret it."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    make = lambda interpret: splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=shards, save_residuals=with_lse,
        block_sizes=splash.BlockSizes(block_q=blocks[0], block_kv=blocks[1], block_kv_compute=blocks[1]),
        interpret=interpret,
    )  # fmt: skip
    return {"tpu": make(False), "default": make(True)}


def _splash(q, k, v, valid, kernels: dict):
    """Pads rows and keys to whole blocks; a row looks at the keys of its segment, and padding is another one."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, S = q.shape[1], k.shape[1]
    blocks = kernels["tpu"].kwargs["block_sizes"]
    rows, keys = round_up(T, blocks.block_q), round_up(S, blocks.block_kv)
    heads_first = lambda x, size: jnp.moveaxis(jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))), 2, 1)
    hidden = jnp.pad(~valid, ((0, 0), (0, keys - S)), constant_values=True).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.zeros((q.shape[0], rows), jnp.int32), kv=hidden)
    out = jax.lax.platform_dependent(
        heads_first(q, rows), heads_first(k, keys), heads_first(v, keys), segments,
        **{platform: jax.vmap(kernel) for platform, kernel in kernels.items()},
    )  # fmt: skip
    if not kernels["tpu"].kwargs["save_residuals"]:
        return jnp.moveaxis(out, 1, 2)[:, :T]
    return jnp.moveaxis(out[0], 1, 2)[:, :T], out[1][0][..., :T]
