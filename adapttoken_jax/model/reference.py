"""The decoder written out plainly: one sequence, every attention matrix whole. Slow; the fast paths are held to it."""

import jax
import jax.numpy as jnp

from adapttoken_jax.model.block import rms_norm
from adapttoken_jax.model.rotary import rotate, text_angles, turns
from adapttoken_jax.model.text import TextDecoder


def decode_sequence(text: TextDecoder, embeddings: jax.Array, position_ids: jax.Array) -> dict[str, jax.Array]:
    """Runs one unpadded sequence through all layers.

    Args:
      text: the decoder.
      embeddings: [S, D].
      position_ids: int32[3, S].

    Returns:
      "layers"[L, S, D] outputs, "attention"[L, N, S, S] probabilities in float32, "logits"[S, V] in float32.
    """
    c = text.config
    turn = turns(text_angles(position_ids, c.head_dim, c.rope_theta, c.mrope_sections)[:, None])
    x, layers, attentions = embeddings, [], []
    for index in range(c.layers):
        layer = text.layer(index)
        h = rms_norm(x, layer.norm1, c.eps)
        q = rotate(jnp.einsum("SD,DNH->SNH", h, layer.q_kernel[...]) + layer.q_bias[...], turn)
        k = rotate(jnp.einsum("SD,DKH->SKH", h, layer.k_kernel[...]) + layer.k_bias[...], turn)
        v = jnp.einsum("SD,DKH->SKH", h, layer.v_kernel[...]) + layer.v_bias[...]
        k, v = (jnp.repeat(each, c.heads // c.kv_heads, axis=1) for each in (k, v))
        products = jnp.einsum("TNH,SNH->NTS", q, k) / jnp.sqrt(jnp.float32(c.head_dim))
        causal = jnp.tril(jnp.ones(products.shape[1:], bool))
        attention = jax.nn.softmax(jnp.where(causal, products.astype(jnp.float32), -jnp.inf))
        mixed = jnp.einsum("NTS,SNH->TNH", attention.astype(v.dtype), v)
        x = x + jnp.einsum("TNH,NHD->TD", mixed, layer.o_kernel[...])
        h = rms_norm(x, layer.norm2, c.eps)
        x = x + (jax.nn.silu(h @ layer.gate_kernel[...]) * (h @ layer.up_kernel[...])) @ layer.down_kernel[...]
        layers.append(x)
        attentions.append(attention)
    return {"layers": jnp.stack(layers), "attention": jnp.stack(attentions), "logits": text.logits(x)}
