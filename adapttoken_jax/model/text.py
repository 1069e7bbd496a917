"""The text decoder, in two movements that share their layers.

`prefill` runs a context (prompt prefix and visual tokens) once and keeps its keys and values. `extend` runs further
tokens (a question, then its answer token by token) against that context; many questions can share one context, each
with a tail of keys and values of its own. The answer is the same as of one long sequence. `read` is both in one
loop over the layers: what a layer keeps of the context serves its own questions, and is dropped if no answer goes on.

Each may run a range of the layers: what a lower range saw of a context can decide which rows of it the upper one
gets. Layers are taken out of their stack one by one, so a range copies no weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from adapttoken_jax import parameters
from adapttoken_jax.model.attention import blocks, probabilities_from_lse, rows_at_once, two_part_attention
from adapttoken_jax.model.block import Block, held, merge_axes, pad_end, product, rms_norm, wide_product
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.model.pieces import WHOLE, Pieces
from adapttoken_jax.model.rotary import rotate, text_angles, turns
from adapttoken_jax.model.spread import EVERYWHERE
from adapttoken_jax.sharding import gathered, lies_turned, parted, shared_rows, split_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Keys and values of a prefilled context, per layer.

    Attributes:
      k, v: [L, B, S, K, H], of the layers that were run.
      valid: bool[B, S], False at padding.
      first: the lowest of the layers; static.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array
    first: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def layers(self) -> range:
        """Indices of the layers that it holds keys and values of."""
        return range(self.first, self.first + len(self.k))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
    """Keys and values of what follows the context, in a buffer of fixed length R.

    Attributes:
      k, v: [L, B, Q, R, K, H], L the layers of the context.
      valid: bool[B, Q, R], True where a token was written that later ones may look at.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array


class Rows(NamedTuple):
    """Rows on their way through the layers.

    Attributes:
      x: embeddings, or what the layers below made of them: [B, S, D] of contexts, [B, Q, T, D] of what follows them.
      position_ids: int32[B, 3, S] or [B, Q, 3, T].
      valid: bool[B, S] or [B, Q, T]; padding stands at the end, nothing looks at it.
    """

    x: jax.Array
    position_ids: jax.Array
    valid: jax.Array

    def padded(self, count: int) -> "Rows":
        """With so many rows of padding after them."""
        # Joined with zeros, not padded: rows that were joined before are then written once, with what follows them.
        zeros = lambda x, axis: jnp.zeros_like(x, shape=(*x.shape[:axis], count, *x.shape[axis % x.ndim + 1 :]))
        ends = zip(self, (-2, -1, -1), strict=True)
        return Rows(*(jnp.concatenate([x, zeros(x, axis)], axis) for x, axis in ends)) if count else self


class Probe(NamedTuple):
    """Asks `extend` or `read` for the attention of one layer.

    Attributes:
      layer: 0-based decoder layer.
      observe: maps that layer's attention to the context, float32[B, Q, N, T, S], and `rows` of its T tokens to what
        is kept of it.
      rows: bool[Q, T], the tokens that count.
      join: what is kept of many tokens, from what is kept of blocks of them, [blocks, ...].
    """

    layer: int
    observe: Callable[..., jax.Array]
    rows: jax.Array
    join: Callable[[jax.Array], jax.Array]


_TURNED = ("gate_kernel", "up_kernel")


class TextLayer(Block):
    """One pre-norm decoder layer with grouped-query attention (biases on q, k, v) and a gated feed-forward block."""

    turned = False  # whether the gate and up kernels are [F, D]

    def axes(self, name: str) -> tuple[str, ...]:
        """Letters of the axes of a parameter of one layer."""
        axes = parameters.axes("text", "layers", name)[1:]  # without L
        return axes[::-1] if self.turned and name in _TURNED else axes

    def queries(self, x):
        """Queries [..., T, N, H] of the normalised x[..., T, D], still to be `rotated`."""
        return product("...TD,DNH->...TNH", x, self.q_kernel[...]) + self.q_bias[...]

    def rotated(self, queries, turn):
        """Queries as attention takes them: rotated, and scaled before they are rounded to their type.

        Whatever forms scores of them, for values or for relevance, then forms the same ones.
        """
        return rotate(queries, turn, self.config.head_dim**-0.5)

    def keys_and_values(self, x, turn, at_once=False):
        """Rotated keys and values, [..., T, K, H] each, of the normalised x[..., T, D].

        `at_once` reads x once for both, for a copy of their weights.
        """
        kernels = self.k_kernel[...], self.v_kernel[...]
        if at_once:
            both = product("...TD,DCKH->...TCKH", x, jnp.stack(kernels, 1))
            k, v = both[..., 0, :, :], both[..., 1, :, :]
        else:
            k, v = (product("...TD,DKH->...TKH", x, kernel) for kernel in kernels)
        return rotate(k + self.k_bias[...], turn), v + self.v_bias[...]

    def finish(self, x, mixed, spread=EVERYWHERE):
        """Adds the attention's output and the feed-forward block to the residual stream, whose rows are `spread`."""
        x = x + spread.sums("...TNH,NHD->...TD", mixed, self.o_kernel[...])
        h = spread.whole(rms_norm(x, self.norm2, self.config.eps))
        widen = functools.partial(product, "...D,FD->...F" if self.turned else "...D,DF->...F", h)
        gate, up = widen(self.gate_kernel[...]), widen(self.up_kernel[...])
        return x + spread.sums("...F,FD->...D", jax.nn.silu(gate) * up, self.down_kernel[...])

    def prefill(self, x, turn, valid, kernel, needed):
        """One layer of `TextDecoder.prefill`: its output where it is `needed`, else x; and its keys and values."""
        h = rms_norm(x, self.norm1, self.config.eps)
        k, v = self.keys_and_values(h, turn)
        output = lambda: self.finish(x, kernel.causal(self.rotated(self.queries(h), turn), k, v, valid))
        return jax.lax.cond(needed, output, lambda: x), k, v

    def extend(self, x, turn, context, tail, mask, start, kernel):
        """One layer of `TextDecoder.extend`; also returns its queries and their log-sum-exp."""
        h = rms_norm(x, self.norm1, self.config.eps)
        q, new = split_rows((self.rotated(self.queries(h), turn), self.keys_and_values(h, turn)), kernel.mesh)
        k, v = (jax.lax.dynamic_update_slice_in_dim(old, own, start, 2) for old, own in zip(tail, new, strict=True))
        mixed, lse = two_part_attention(q, context, (k, v, mask), kernel.over_context)
        return self.finish(x, shared_rows(mixed, kernel.mesh)), (k, v), q, lse

    def read(self, rows, turn, masks, kernel, first, pieces=WHOLE, spread=EVERYWHERE):
        """One layer of `TextDecoder.read`: its output for the rows from `first` on.

        Args:
          rows: [P, s + Q x t, D] of contexts and suffixes, or of `pieces` of them, in parts of `spread`.
          masks: `valid` of the contexts, bool[P, S or more], and `mask` of the suffixes, bool[P, Q, t, T].

        Returns:
          Those rows, in parts; k and v, each a pair of the contexts' [P, S or more, K, H] and the suffixes'
          [P, Q, T, K, H]; the suffixes' queries [P, Q, t, N, H] and the log-sum-exp of their scores [P, Q, N, t].
        """
        h = [spread.whole(rms_norm(part, self.norm1, self.config.eps)) for part in rows]
        keys_and_values = functools.partial(self.keys_and_values, at_once=len(h) > 1)
        new = spread.join(map(keys_and_values, h, spread.split(turn)))
        k, v = (_of_context_and_suffixes(x, *masks[1].shape[1:3], pieces) for x in new)
        past, tail = zip(k, v, masks, strict=True)
        with jax.named_scope("rows"):
            rows, q, lse = self.attend(rows, h, turn, past, tail, kernel, first, pieces, spread)
        return rows, (k, v), q, lse

    def attend(self, rows, h, turn, past, tail, kernel, first, pieces, spread):
        """The output half of `read`, from h, the normalised rows, on every place.

        `past` is (k, v, valid) of the contexts, `tail` (k, v, mask) of the suffixes. What the past holds beyond the
        contexts is not valid.
        """
        if first:
            rows, h, spread = [spread.together(rows, first)], [spread.together(h, first)], EVERYWHERE
        q, turn = spread.join(map(self.queries, h)), jax.tree.map(lambda x: x[:, first:], turn)
        with jax.named_scope("question"):
            Q, t, T = tail[2].shape[1:]
            # The few suffixes' are rotated by themselves: of all rows nothing then needs the queries but `causal`, and
            # a TPU's compiler scales them for it as it rotates them.
            asked = _by_suffix(self.rotated(*jax.tree.map(lambda x: x[:, -Q * t :], (q, turn))), Q, t)
            unused = 0 if pieces.count > 1 else Q * T
            over_context = functools.partial(kernel.over_context, unused=unused, pieces=pieces)
            mixed, lse = two_part_attention(asked, past, tail, over_context)
            mixed = mixed.reshape(len(q), Q * t, *q.shape[2:])
        if first == 0:
            with jax.named_scope("context"):
                mixed = kernel.causal(self.rotated(q, turn), *past, rest=mixed, pieces=pieces)
        finish = functools.partial(self.finish, spread=spread)
        return list(map(finish, rows, spread.split(mixed))), asked, lse


class TextDecoder(Block):
    """Embedding, scanned layers, final norm and head (tied to the embedding where the checkpoint says so)."""

    parts: ClassVar = {"layers": TextLayer}

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids [...] -> embeddings [..., D]."""
        return held(self.embedding[...], until=ids)[ids]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] after the last layer -> float32 logits [..., V]; applies the final norm."""
        x = rms_norm(hidden, self.norm, self.config.eps)
        head = held(self.embedding[...], until=x).T if self.config.tied else self.head[...]
        return wide_product(x, head)

    def as_it_lies(self, kernel: Kernel) -> "TextDecoder":
        """The decoder with gate and up kernels `turned`, if the TPU that runs `kernel` keeps them that way.

        For a loop within a loop: its compiler would lay copies of the whole stacks aside, in the order of their shape.
        """
        if self.layers.turned or kernel.name != "splash" or not lies_turned(self.layers.gate_kernel.shape, kernel.mesh):
            return self
        turned = jax.tree.map(lambda leaf: leaf, self)
        for name in _TURNED:
            setattr(turned.layers, name, nnx.Param(jnp.swapaxes(getattr(self.layers, name)[...], 1, 2)))
        turned.layers.turned = True
        return turned

    def turns(self, position_ids):
        """The rotary `turns` of M-RoPE ids [..., 3, T] for [..., T, N, H]."""
        c = self.config
        return turns(text_angles(position_ids, c.head_dim, c.rope_theta, c.mrope_sections)[..., None, :])

    def prefill(self, embeddings, position_ids, valid, *, layers: range | None = None, keep_layer=None,
                return_layers=False, kernel: Kernel = XLA):  # fmt: skip
        """Runs a context from its beginning.

        What follows a context looks at its keys and values alone, so the last layer ends there, unless its output is
        asked for.

        Args:
          embeddings: [B, S, D], or what the layers below `layers` made of them.
          position_ids: int32[B, 3, S].
          valid: bool[B, S]; padding stands at the end, nothing looks at it.
          layers: those to run; None is all.
          keep_layer: a 0-based layer whose output is returned as "kept"[B, S, D].
          return_layers: return every layer's output as "layers"[L, B, S, D].
          kernel: what computes attention, and on which mesh.

        Returns:
          The `Context` and a dictionary of the intermediates asked for.
        """
        turn = self.turns(position_ids)
        layers = range(self.config.layers) if layers is None else layers
        last = self.config.layers - 1
        read = return_layers or keep_layer == last

        def step(carry, index):
            x, kept = carry
            x, k, v = self.layer(index).prefill(x, turn, valid, kernel, needed=read or index < last)
            if keep_layer is not None:
                kept = jnp.where(index == keep_layer, x, kept)
            return (x, kept), (k, v, x if return_layers else None)

        kept = None if keep_layer is None else embeddings
        (_, kept), (k, v, outputs) = jax.lax.scan(step, (embeddings, kept), jnp.asarray(layers))
        found = {"kept": kept, "layers": outputs}
        return Context(k, v, valid, layers.start), {name: value for name, value in found.items() if value is not None}

    def empty_tail(self, context: Context, questions: int, length: int) -> Tail:
        """A `Tail` of a context with room for `length` tokens per question."""
        layers, batch, _, *heads = context.k.shape
        buffer = jnp.zeros((layers, batch, questions, length, *heads), context.k.dtype)
        return Tail(buffer, buffer, jnp.zeros((batch, questions, length), bool))

    def extend(self, embeddings, position_ids, valid, context: Context, tail: Tail, start, *, probe=None,
               return_layers=False, kernel: Kernel = XLA):  # fmt: skip
        """Runs tokens that follow a context and what the tail already holds through the context's layers.

        Args:
          embeddings: [B, Q, T, D], or what the layers below made of them.
          position_ids: int32[B, Q, 3, T].
          valid: bool[B, Q, T]; padding is never looked at.
          context: the shared past.
          tail: each question's own past; tokens are written at `start`, a (traced) integer.
          probe: the attention to observe, a `Probe`.
          return_layers: return every layer's output as "layers"[L, B, Q, T, D].
          kernel: what computes attention over the context, and on which mesh.

        Returns:
          Hidden states [B, Q, T, D], the grown `Tail`, and a dictionary of the intermediates asked for ("observed" for
          the probe).
        """
        turn = self.turns(position_ids)
        sharers = kernel.sharers(len(embeddings))
        written = jax.lax.dynamic_update_slice_in_dim(tail.valid, valid, start, 2)
        mask = _looks_at(written, start, embeddings.shape[2])

        def step(carry, indexed):
            x, observed = carry
            index, (ck, cv, tk, tv) = indexed
            layer = parted(self.layer(index), kernel.mesh, sharers)
            x, (tk, tv), q, lse = layer.extend(x, turn, (ck, cv, context.valid), (tk, tv), mask, start, kernel)
            observed = _observe(probe, index, observed, lambda: (q, ck, context.valid, lse))
            return (x, observed), (tk, tv, x if return_layers else None)

        observed = self.unobserved(probe, (*embeddings.shape[:3], context.valid.shape[1]))
        layers_in = (jnp.asarray(context.layers), (context.k, context.v, tail.k, tail.v))
        start_from = (shared_rows(embeddings, kernel.mesh), observed)
        (x, observed), (k, v, layers) = jax.lax.scan(step, start_from, layers_in)
        found = {"observed": observed, "layers": layers}
        return x, Tail(k, v, written), {name: value for name, value in found.items() if value is not None}

    def read(self, context: Rows, suffixes: Rows, *, layers: range | None = None, room=0, keep_layer=None, probe=None,
             kernel: Kernel = XLA):  # fmt: skip
        """`prefill` of contexts and `extend` by suffixes, layer by layer: the same numbers.

        The rows of both go through a layer's products together; attention alone tells them apart. Nothing looks at what
        the last layer makes of a context: it gives that of the suffixes alone, unless `keep_layer` asks for both.

        Args:
          context: B of them.
          suffixes: Q of each.
          layers: those to run; None is all.
          room: of the tail, for an answer's tokens that see the past. 0: there are none, and no past is kept.
          keep_layer, probe, kernel: as of `prefill` and `extend`.

        Returns:
          Hidden states [B, Q, T, D]; the past, a `Context` and a `Tail`, or None; and a dictionary of the intermediates
          asked for, "kept" and "observed".
        """
        layers = range(self.config.layers) if layers is None else layers
        last = self.config.layers - 1
        ends = layers[-1] == last != keep_layer
        (B, S), (Q, T) = context.valid.shape, suffixes.valid.shape[1:]
        context, suffixes, pieces = _in_pieces(context, suffixes, kernel)
        s, t = (rows.valid.shape[-1] // pieces.count for rows in (context, suffixes))
        rows, position_ids = _side_by_side(context, suffixes, pieces)
        turn = self.turns(position_ids)
        valid, mask = _masks(context.valid, suffixes.valid, pieces)
        spread = kernel.spread(rows, pieces, self.config)

        def run(carry, index, first=0):
            rows, kept, observed = carry
            rows = [spread.own(split_rows(part, kernel.mesh)) for part in rows]
            layer = gathered(self.layer(index), kernel.mesh, B)
            rows, past, q, lse = layer.read(rows, turn, (valid, mask), kernel, first, pieces, spread)
            if kept is not None:
                kept = [jnp.where(index == keep_layer, *pair) for pair in zip(rows, kept, strict=True)]
            observed = _observe(probe, index, observed, lambda: _looks(q, past[0][0], valid, lse, pieces, S, T))
            return (rows, kept, observed), jax.tree.map(pieces.merge, past) if room else None

        # Cut before they are spread: places would pass on to each other what is another's by the cuts.
        parts = list(map(spread.whole, spread.split(spread.whole(rows))))
        start_from = (parts, None if keep_layer is None else parts, self.unobserved(probe, (len(rows), Q, T, S)))
        in_loop = jnp.arange(layers.start, layers.stop - ends)
        (rows, kept, observed), past = jax.lax.scan(run, start_from, in_loop)
        if ends:
            (rows, _, observed), own = run((rows, None, observed), last, first=s)
            past = jax.tree.map(lambda stack, more: jnp.concatenate([stack, more[None]]), past, own)
        found = {}
        if keep_layer is not None:
            found["kept"] = pieces.join(spread.together(kept)[:, :s], 1)[:, :S]
        if probe is not None:
            found["observed"] = jax.tree.map(pieces.merge, observed)
        if room:
            past = _left_behind(*past, pieces.merge(valid[:, : s * pieces.count]), suffixes.valid, pieces, room, layers)
        rows = rows[0] if ends else spread.together(rows, s)
        return pieces.join(_by_suffix(rows, Q, t), 2)[:, :, :T], past, found

    def unobserved(self, probe, shape: tuple[int, int, int, int]):
        """Zeros of the shape that the probe's observation will have, of (B, Q, T, S); None of no probe."""
        if probe is None:
            return None
        B, Q, T, S = shape
        rows = jax.ShapeDtypeStruct((B, Q, self.config.heads, T, S), jnp.float32)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(probe.observe, rows, probe.rows))


def _by_suffix(x, questions: int, length: int) -> jax.Array:
    """The suffixes' rows, which are the last: [B, ... + Q x T, ...] -> [B, Q, T, ...]."""
    return x[:, -questions * length :].reshape(len(x), questions, length, *x.shape[2:])


def _in_pieces(context: Rows, suffixes: Rows, kernel: Kernel) -> tuple[Rows, Rows, Pieces]:
    """Both with padding after them, so that the pieces of `kernel` can cut them into runs of a length that suits."""
    pieces = kernel.pieces(*context.valid.shape)
    if pieces.count == 1:
        return context, suffixes, pieces
    in_runs = lambda length, run: pieces.runs * run(-(-length // pieces.runs)) - length
    S, (Q, T) = context.valid.shape[1], suffixes.valid.shape[1:]
    more = in_runs(S, kernel.run), in_runs(T, functools.partial(kernel.suffix_run, questions=Q))
    return context.padded(more[0]), suffixes.padded(more[1]), pieces


def _side_by_side(context: Rows, suffixes: Rows, pieces: Pieces) -> tuple[jax.Array, jax.Array]:
    """Rows [P, s + Q x t, D] of contexts and then their suffixes, and position ids [P, 3, s + Q x t]."""
    rows = [pieces.cut(context.x, 1), merge_axes(pieces.cut(suffixes.x, 2), 1)]
    later = pieces.cut(jnp.swapaxes(suffixes.position_ids, 1, 2), 3)
    return jnp.concatenate(rows, 1), jnp.concatenate([pieces.cut(context.position_ids, 2), merge_axes(later, 2)], 2)


def _masks(context_valid, suffix_valid, pieces: Pieces) -> tuple[jax.Array, jax.Array]:
    """`valid` and `mask` of `TextLayer.read`, from bool[B, S] and bool[B, Q, T]."""
    mask = _looks_at(suffix_valid, 0, suffix_valid.shape[2])
    if pieces.count == 1:
        return pad_end(context_valid, 1, suffix_valid[0].size), mask
    return pieces.spread(pieces.in_order(context_valid, 1)), pieces.cut(pieces.in_order(mask, 3), 2)


def _of_context_and_suffixes(x, questions: int, length: int, pieces: Pieces) -> tuple[jax.Array, jax.Array]:
    """Keys or values [P, s + Q x t, K, H] -> of the contexts, [P, S, K, H], and of the suffixes, [P, Q, T, K, H].

    Of pieces: of all of a context and its suffixes, in the order of the pieces. Else the former have the others' after
    them, which saves a copy.
    """
    if pieces.count == 1:
        return x, _by_suffix(x, questions, length)
    x = jnp.moveaxis(x, 2, 1)  # heads before rows, as kernels want them
    context, suffixes = x[:, :, : -questions * length], x[:, :, -questions * length :]
    suffixes = suffixes.reshape(*x.shape[:2], questions, length, -1)
    return jnp.moveaxis(pieces.gather(context, 2), 1, 2), jnp.moveaxis(pieces.gather(suffixes, 3), 1, 3)


def _looks(q, k, valid, lse, pieces: Pieces, context: int, suffix: int):
    """The arguments of `probabilities_from_lse` of all rows of the suffixes over their contexts, both in sequence."""
    k, valid = (pieces.in_sequence(x, 1)[:, :context] for x in (k, valid))
    q, lse = (pieces.in_sequence(pieces.gather(x, axis), axis) for x, axis in ((q, 2), (lse, 3)))
    return q[:, :, :suffix], k, valid, lse[..., :suffix]


def _left_behind(k, v, valid, suffix_valid, pieces: Pieces, room: int, layers: range) -> tuple[Context, Tail]:
    """What layers keep for answers: k and v are pairs of what `_of_context_and_suffixes` gives, with an axis L."""
    (ck, tk), (cv, tv) = k, v
    tail = (pad_end(pieces.in_sequence(x, 3), 3, room) for x in (tk, tv))
    context = (x[:, :, : valid.shape[1]] for x in (ck, cv))
    return Context(*context, valid, layers.start), Tail(*tail, pad_end(suffix_valid, 2, room))


def _looks_at(written, start, length: int) -> jax.Array:
    """What tokens at `start` and after may look at of the tail: bool[B, Q, T, R] from written[B, Q, R]."""
    causal = start + jnp.arange(length)[:, None] >= jnp.arange(written.shape[2])
    return causal & written[:, :, None]


def _observe(probe, index, observed, rows):
    """The probe's observation of `rows`, of arguments of `probabilities_from_lse`, if layer `index` is its own."""
    if probe is None:
        return None
    with jax.named_scope("probe"):
        return jax.lax.cond(index == probe.layer, lambda: _looked(probe, *rows()), lambda: observed)


def _looked(probe, q, k, valid, lse):
    """What the probe keeps of `probabilities_from_lse` of these arguments, of all rows at once or block by block."""
    look = lambda q, lse, rows: probe.observe(probabilities_from_lse(q, k, valid, lse), rows)
    size = rows_at_once(*q.shape[1:3])
    if q.shape[2] <= size:
        return look(q, lse, probe.rows)
    parts = blocks(q, 2, size), blocks(lse, 3, size), blocks(probe.rows, 1, size)
    return probe.join(jax.lax.map(lambda part: look(*part), parts))
