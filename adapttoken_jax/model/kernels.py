"""Which kernel computes attention: splash attention on a TPU, cuDNN's flash attention on a GPU, XLA elsewhere.

`resolve` chooses for a model; `Kernel` leaves to XLA the calls that a kernel is bad at. Every kernel has the signature
of the reference, takes grouped queries as they are and agrees with `attention.py`, which is its reference twin. Letters
as there.

- A float32 model takes XLA everywhere: the kernels round the factors of their products.
- XLA cannot split a kernel over a mesh by itself, so each device is handed its own heads and batch entries.
- Splash is not for the vision tower: its windows are small, and dense products fill a TPU's matrix units best.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from adapttoken_jax.geometry import round_up
from adapttoken_jax.model import attention

NAMES = ("xla", "splash", "cudnn")

_LANES = 128  # splash works on blocks of multiples of this, and on heads of them
_BLOCK = 512
_FEW_ROWS = 8
_HALF = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel on a mesh; hashable, so that it can be a static argument.

    Attributes:
      name: one of `NAMES`.
      mesh: the mesh that the program runs on; None for one device.
    """

    name: str = "xla"
    mesh: Mesh | None = None

    def causal(self, q, k, v, valid, rest=None) -> jax.Array:
        """Causal attention of a sequence over itself: q[B, T, N, H], k and v[B, T, K, H] -> [B, T, N, H].

        `valid[B, T]` is False at padding, which stands at the end and which nothing looks at. Rows of padding come out
        as any finite numbers; the last of them as `rest`[B, R, N, H], where that is given.
        """
        if self.name == "xla":
            own = slice(None if rest is None else -rest.shape[1])
            mixed = attention.causal_attention(*(x[:, own] for x in (q, k, v, valid)))
            return mixed if rest is None else jnp.concatenate([mixed, rest], 1)
        kernel = {"splash": _splash_causal, "cudnn": _cudnn_causal}[self.name]
        mixed = self._per_device(kernel, 1)(q, k, v, valid)
        # A kernel pads to whole blocks as it is: computing a few rows more costs less than copies cut to size.
        return mixed if rest is None else mixed.at[:, -rest.shape[1] :].set(rest)

    def over_context(self, q, k, v, valid, unused: int = 0) -> tuple[jax.Array, jax.Array]:
        """Attention of later rows over a context: q[B, T, N, H], k and v[B, S, K, H], valid[B, S], padding anywhere.

        The last `unused` keys are nothing but padding.

        Returns:
          values[B, T, N, H], and the log-sum-exp of every row's scores, float32[B, N, T].
        """
        # cuDNN's log-sum-exp reaches JAX rounded to the queries' type, too coarse for relevance; few rows come here.
        if self.name != "splash":
            used = slice(-unused or None)
            return attention.context_attention(q, *(x[:, used] for x in (k, v, valid)))
        # Splash wants blocks of keys; for an answer's token, copying them into blocks costs more than attention does.
        kernel = attention.context_attention if q.shape[1] <= _FEW_ROWS else _splash_over_context
        return self._per_device(kernel, 2)(q, k, v, valid)

    @property
    def pads_windows(self) -> bool:
        """Whether `within` wants windows of one size; on a mesh, whose devices have slots of their own, XLA does it."""
        return self.name != "cudnn" or self.mesh is not None

    def within(self, q, k, v, valid=None) -> jax.Array:
        """Attention of the vision tower within windows: q, k, v[T, N, W, U, H] -> the same shape.

        Letters as of `attention.window_attention`; `valid` is None unless `pads_windows`.
        """
        return attention.window_attention(q, k, v, valid) if self.pads_windows else _cudnn_within(q, k, v)

    def _per_device(self, function, outputs: int):
        """`function` on every device's own batch entries (if the first axis of the mesh divides them) and heads."""
        if self.mesh is None:
            return function

        def split(q, k, v, valid):
            batch, over = self._places(*q.shape[::2])
            # Fewer key heads than devices: each is repeated until every device has one.
            repeats = math.lcm(k.shape[2], math.prod(self.mesh.shape[name] for name in over)) // k.shape[2]
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
            heads, rows = PartitionSpec(batch, None, over), PartitionSpec(batch, over)
            return jax.shard_map(
                function, mesh=self.mesh, in_specs=(heads, heads, heads, PartitionSpec(batch)),
                out_specs=heads if outputs == 1 else (heads, rows), check_vma=False,
            )(q, k, v, valid)  # fmt: skip

        return split

    def _places(self, batch: int, heads: int) -> tuple[str | None, tuple[str, ...]]:
        """Axes of the mesh that split so many batch entries, and so many heads."""
        first, model = self.mesh.axis_names
        if batch % self.mesh.shape[first] == 0:
            return first, (model,)
        weights_are_split = first == "fsdp" and heads % self.mesh.size == 0
        return None, (model, first) if weights_are_split else (model,)


XLA = Kernel()


def resolve(dtype, head_dim: int, mesh: Mesh | None = None, platform: str | None = None) -> Kernel:
    """The best kernel for a model whose decoder has this element type and head size.

    `platform` is "tpu", "gpu" or "cpu"; None is where the program runs now.
    """
    platform = platform or jax.default_backend()
    if platform == "tpu" and dtype == jnp.bfloat16 and head_dim % _LANES == 0:
        return Kernel("splash", mesh)
    if platform == "gpu" and dtype in _HALF and head_dim <= 128 and head_dim % 8 == 0:
        return Kernel("cudnn", mesh)
    return Kernel("xla", mesh)


def _cudnn_causal(q, k, v, valid, implementation="cudnn"):
    lengths = valid.sum(-1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )


def _cudnn_within(q, k, v, implementation="cudnn"):
    T, N, W, U, H = q.shape
    rows = (jnp.transpose(x, (0, 2, 3, 1, 4)).reshape(T * W, U, N, H) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(*rows, implementation=implementation)
    return jnp.transpose(mixed.reshape(T, W, U, N, H), (0, 3, 1, 2, 4))


def _splash_causal(q, k, v, valid):
    return _splash(q, k, v, valid, "CausalMask", with_lse=False)


def _splash_over_context(q, k, v, valid):
    return _splash(q, k, v, valid, "FullMask", with_lse=True)


def _splash(q, k, v, valid, mask_name: str, with_lse: bool):
    """Pads rows and keys to whole blocks; a row looks at the keys of its segment, and padding is another one."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # Pallas loads slowly, and few need it

    (T, N, H), S = q.shape[1:], k.shape[1]
    block_q, block_kv = (min(_BLOCK, round_up(length, _LANES)) for length in (T, S))
    rows, keys = round_up(T, block_q), round_up(S, block_kv)
    mask = splash.MultiHeadMask([getattr(splash, mask_name)((rows, keys))] * N)
    blocks = splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv)
    heads_first = lambda x, size: jnp.moveaxis(jnp.pad(x, ((0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))), 2, 1)
    hidden = jnp.pad(~valid, ((0, 0), (0, keys - S)), constant_values=True).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.zeros((q.shape[0], rows), jnp.int32), kv=hidden)

    def run(q, k, v, segments, interpret):
        kernel = splash.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=blocks, save_residuals=with_lse, interpret=interpret
        )
        return jax.vmap(kernel)(q, k, v, segments)

    out = jax.lax.platform_dependent(
        heads_first(q * H**-0.5, rows), heads_first(k, keys), heads_first(v, keys), segments,
        tpu=functools.partial(run, interpret=False), default=functools.partial(run, interpret=True),
    )  # fmt: skip
    values = jnp.moveaxis(out[0] if with_lse else out, 1, 2)[:, :T]
    return (values, out[1][0][..., :T]) if with_lse else values
