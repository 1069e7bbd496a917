"""Step 6 of the method: how certain the model is of the answer that it gives from one group.

Axis letters: T generated tokens, V vocabulary. Entropies are in nats. Everything works on NumPy and JAX arrays, also
inside `jax.jit` (with `form` and `bottom_fraction` static), in float32 or the input's wider type.
"""

import jax
import numpy as np

from adapttoken_jax.errors import UserError
from adapttoken_jax.selection.arrays import array_and_namespace, widened

CERTAINTIES = ("neg_entropy", "option_entropy", "max_probability", "deepconf")

# DeepConf (arXiv 2508.15260) averages over the 20 most likely tokens.
_DEEPCONF_TOKENS = 20


def _log_softmax(logits, xp):
    logits = widened(logits, xp)
    with np.errstate(invalid="ignore"):  # a row without a finite logit is NaN
        shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))


def token_entropy(logits):
    """H = -sum p ln p of softmax(logits) over the last axis, nats: [..., V] -> [...]; 0 to ln V.

    A logit of -inf is a token without mass. NaN if a row holds NaN, +inf, or nothing but -inf.
    """
    logits, xp = array_and_namespace(logits)
    log_p = _log_softmax(logits, xp)
    p = xp.exp(log_p)
    # The inner `where` keeps 0 * -inf out of the sum, and no entropy is -0.
    return (p * xp.where((p == 0) | (log_p == 0), 0, -log_p)).sum(axis=-1)


def token_certainty(logits, form: str, option_ids=None):
    """Certainty of a generated token from its logits, [..., V] -> [...]; higher is more certain in every form.

    Args:
      logits: [..., V], float.
      form:
        `neg_entropy`: -H over the whole vocabulary, nats.
        `option_entropy`: -H of the softmax restricted to `option_ids`, nats; `neg_entropy` if there are none.
        `max_probability`: probability of the most likely token.
        `deepconf`: minus the mean ln p of the 20 most likely tokens (of all, if V is smaller), nats.
      option_ids: int[options], token ids of the option letters; negative ids are padding. None, empty or all padding
        for an open question.

    Raises:
      UserError: another form.
    """
    if form not in CERTAINTIES:
        raise UserError(f"--certainty={form}: choose one of {', '.join(CERTAINTIES)}")
    logits, xp = array_and_namespace(logits)
    if form == "max_probability":
        return xp.exp(_log_softmax(logits, xp).max(axis=-1))
    if form == "deepconf":
        return _deepconf(_log_softmax(logits, xp), xp)
    if form == "neg_entropy" or option_ids is None or not len(option_ids):
        return -token_entropy(logits)
    ids = xp.asarray(option_ids)
    among_options = xp.where(ids >= 0, logits[..., ids], -np.inf)
    return -xp.where((ids >= 0).any(), token_entropy(among_options), token_entropy(logits))


def _deepconf(log_p, xp):
    tokens = min(_DEEPCONF_TOKENS, log_p.shape[-1])
    # A token without mass counts as the least float32 probability: an infinite certainty could not be averaged.
    log_p = xp.maximum(log_p, np.log(np.finfo(np.float32).tiny))
    if xp is np:
        likeliest = np.partition(log_p, log_p.shape[-1] - tokens, axis=-1)[..., -tokens:]
    else:
        likeliest = jax.lax.top_k(log_p, tokens)[0]
    return -likeliest.mean(axis=-1)


def least_certain_mean(certainties, mask, bottom_fraction: float):
    """Certainty of an answer: the mean over its n least certain tokens, n = max(1, floor(bottom_fraction * tokens)).

    Args:
      certainties: [..., T] of any form of `token_certainty`.
      mask: bool[..., T], the tokens that count (not those after the end of the answer); None: all.
      bottom_fraction: in [0, 1].

    Returns:
      [...]; NaN if no token counts or if one that counts is NaN.
    """
    certainties, xp = array_and_namespace(certainties)
    certainties = widened(certainties, xp)
    mask = xp.ones(certainties.shape, bool) if mask is None else xp.asarray(mask, bool)
    length = certainties.shape[-1]
    # Looked up, not computed from the traced count: float32 would floor products such as 0.29 * 100 wrongly.
    taken = np.asarray([max(1, int(bottom_fraction * count + 1e-9)) for count in range(length + 1)], np.int32)
    count = mask.sum(axis=-1)
    n = xp.asarray(taken)[count]
    ascending = xp.sort(xp.where(mask, certainties, np.inf), axis=-1)
    total = xp.where(np.arange(length) < n[..., None], ascending, 0).sum(axis=-1)
    sound = (count > 0) & ~(xp.isnan(certainties) & mask).any(axis=-1)
    return xp.where(sound, total / n.astype(total.dtype), np.nan)


def group_certainty(entropies, mask, bottom_fraction: float):
    """Certainty C_g of a group from its token entropies: MINUS the mean of the highest ones, nats; at most 0.

    The `neg_entropy` case of `least_certain_mean`, which see; the entropy reported for a group is minus this.

    Args:
      entropies: [..., T] from `token_entropy`.
      mask: bool[..., T], the tokens that count; None: all.
      bottom_fraction: in [0, 1]; share of the tokens that is averaged, at least one token.
    """
    entropies, xp = array_and_namespace(entropies)
    return least_certain_mean(-widened(entropies, xp), mask, bottom_fraction)
