"""The method in PyTorch, written to be fast: what this library's speed is compared with.

transformers' Qwen2.5-VL with scaled dot-product attention, under `inference_mode`. The reference beside it
(`pytorch_method`) is written to be plain; here
  * vision features are encoded once per slot, and windows of equal size attend as one batch (transformers' tower calls
    its attention window by window, which is several times slower);
  * relevance costs one softmax over the text rows of the reference layer, whose queries and keys are taken on the way;
  * only the last position reaches the head, and answers decode with a key-value cache;
  * redundant tokens are found from one similarity matrix on the device and a best partner per token.

Steps that are whole numbers on the host (groups, position ids, budgets) are the reference's own. The paper's settings
alone: what a field of the configuration would change beyond them is refused. Letters as in `pytorch_method`.
"""

import contextlib
import dataclasses
import re
import types
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from adapttoken_jax.config import AdaptTokenConfig, ModelConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.parity import pytorch_method as plain
from adapttoken_jax.video import PIXEL_MEAN, PIXEL_STD

Model = transformers.Qwen2_5_VLForConditionalGeneration

_ATTENTION = "observed_sdpa"
_REDUCE = {"max": torch.amax, "mean": torch.mean}


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def _observed_sdpa(module, query, key, value, attention_mask, **kwargs):
    """transformers' SDPA; a layer that has been given `observe` shows it its queries and keys first."""
    if observe := getattr(module, "observe", None):
        observe(query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


transformers.AttentionInterface.register(_ATTENTION, _observed_sdpa)
transformers.AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def hf_config(config: ModelConfig) -> transformers.Qwen2_5_VLConfig:
    """Sizes as transformers names them."""
    text, vision = config.text, config.vision
    rope = {"rope_type": "default", "rope_theta": text.rope_theta, "mrope_section": list(text.mrope_sections)}
    return transformers.Qwen2_5_VLConfig(
        tie_word_embeddings=text.tied,
        text_config={
            "hidden_size": text.width, "intermediate_size": text.ff, "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "num_key_value_heads": text.kv_heads, "vocab_size": text.vocab,
            "rms_norm_eps": text.eps, "rope_parameters": rope, "tie_word_embeddings": text.tied,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
        vision_config={
            "depth": vision.layers, "hidden_size": vision.width, "num_heads": vision.heads,
            "intermediate_size": vision.ff, "out_hidden_size": vision.out_width,
            "fullatt_block_indexes": list(vision.full_attention_layers), "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch, "spatial_merge_size": vision.merge,
            "window_size": vision.window, "in_channels": vision.channels,
            "tokens_per_second": vision.tokens_per_second,
        },
    )  # fmt: skip


def build_model(config: ModelConfig, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, device) -> Model:
    """transformers' model with the given weights, under the published checkpoints' keys, in evaluation mode.

    Raises:
      RuntimeError: weights that are missing, unknown or misshapen; the message names them.
    """
    with torch.device(device):
        model = Model._from_config(hf_config(config), dtype=dtype, attn_implementation=_ATTENTION)
    named = {_name(key): tensor for key, tensor in weights.items()}
    if config.text.tied:
        named["lm_head.weight"] = named["model.language_model.embed_tokens.weight"]
    model.load_state_dict(named)
    _batch_windows(model)
    return model.eval()


def _batch_windows(model: Model) -> None:
    for block in model.model.visual.blocks:
        block.attn.forward = types.MethodType(_attend_in_batches, block.attn)


@contextlib.contextmanager
def unchanged_tower(model: Model) -> Iterator[None]:
    """The model with transformers' own vision attention, one call per window."""
    for block in model.model.visual.blocks:
        del block.attn.forward  # what hides the class's
    try:
        yield
    finally:
        _batch_windows(model)


def _name(key: str) -> str:
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", key))


def _attend_in_batches(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
    """`Qwen2_5_VLVisionAttention.forward` with one call per size of window in place of one per window."""
    count = hidden_states.shape[0]
    q, k, v = self.qkv(hidden_states).reshape(count, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    starts, sizes = cu_seqlens[:-1], cu_seqlens.diff()
    mixed = torch.empty_like(q)
    for size in sizes.unique().tolist():
        rows = starts[sizes == size, None] + torch.arange(size, device=starts.device)  # [windows, size]
        if rows.numel() == count:
            mixed = _attend(*(x.unflatten(0, (-1, size)) for x in (q, k, v))).flatten(0, 1)
        else:
            mixed[rows] = _attend(q[rows], k[rows], v[rows])
    return self.proj(mixed.reshape(count, -1))


def _attend(q, k, v):
    """[windows, size, N, H] each."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 4 to 6
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def encode(model: Model, patches: np.ndarray, grid, chunk: int) -> torch.Tensor:
    """Vision features [T, M, D] of patches [T h w, 1176], `chunk` slots per call of the tower.

    Pixels, uint8, are normalised on the device; float32 patches are already.
    """
    slots, rows, columns = grid
    per_slot, parts = rows * columns, []
    spread = [torch.from_numpy(np.repeat(each, patches.shape[-1] // 3)) for each in (PIXEL_MEAN, PIXEL_STD)]
    mean, deviation = (each.to(model.device) for each in spread)
    for start in range(0, slots, chunk):
        count = min(chunk, slots - start)
        part = torch.from_numpy(patches[start * per_slot : (start + count) * per_slot])
        thw = torch.tensor([[count, rows, columns]], device=model.device)
        part = part.to(model.device)
        part = (part.float() - mean) / deviation if part.dtype == torch.uint8 else part
        features = model.model.visual(part.to(model.dtype), grid_thw=thw).pooler_output
        parts.append(features.reshape(count, -1, features.shape[-1]))
    return torch.cat(parts)


@dataclasses.dataclass(frozen=True)
class GroupPass:
    """What one group tells: `tokens` int [n, 3], `relevance` float32 [n] on the host, the answer and its entropy."""

    tokens: np.ndarray
    relevance: np.ndarray
    entropy: float
    answer_ids: tuple[int, ...]


@torch.inference_mode()
def pass_group(model: Model, inputs: plain.MethodInputs, features: torch.Tensor, slots, config) -> GroupPass:
    """Steps 4 to 6 for one group; `features` [T, M, D] are the whole video's."""
    tokens = _tokens_of(model, inputs, slots)
    first, suffix = len(inputs.prefix_ids), len(inputs.suffix_ids)
    embeddings = prompt_embeddings(model, inputs, features[torch.as_tensor(slots)].flatten(0, 1))
    rows = plain.query_rows(config.relevance_queries, len(embeddings), suffix, inputs.question_span)
    ids = plain.group_position_ids(model, inputs, slots, config)
    limit = 1 if inputs.letter_ids is not None else config.max_answer_tokens
    with _observed(model, config.reference_layer, rows) as found:
        answer, entropies = answer_greedily(model, embeddings, ids, limit, inputs.eos_ids)
    visual = found[0][..., first : first + len(tokens)]
    by_row = _REDUCE[config.relevance_heads](visual, 0)
    return GroupPass(
        tokens=tokens,
        relevance=_REDUCE[config.relevance_text](by_row, 0).cpu().numpy(),
        entropy=-plain.mean_of_least(-entropies.cpu().numpy(), config.bottom_fraction),
        answer_ids=answer,
    )


def _tokens_of(model, inputs, slots) -> np.ndarray:
    merge = model.config.vision_config.spatial_merge_size
    return plain.tokens_of(slots, *(side // merge for side in inputs.grid[1:]))


@torch.inference_mode()
def prompt_embeddings(model: Model, inputs: plain.MethodInputs, visual: torch.Tensor) -> torch.Tensor:
    """[prefix, visual tokens [n, D], suffix] as embeddings [S, D]."""
    embed = lambda ids: model.get_input_embeddings()(torch.as_tensor(ids, device=model.device))
    return torch.cat([embed(inputs.prefix_ids), visual, embed(inputs.suffix_ids)])


@contextlib.contextmanager
def _observed(model, layer: int, rows: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """Collects the attention float32 [N, rows, S] of a layer's `rows` to the whole prompt while the block prefills."""
    attention, found = model.model.language_model.layers[layer].self_attn, []

    def observe(query, key):
        if found:  # a token that is being generated
            return
        (_, heads, _, width), kv_heads = query.shape, key.shape[1]
        rows_of = query[0, :, rows].reshape(kv_heads, -1, width).float()
        products = (rows_of @ key[0].float().mT).reshape(heads, len(rows), -1) * attention.scaling
        after = torch.arange(key.shape[2], device=key.device) > torch.tensor(rows, device=key.device)[:, None]
        found.append(products.masked_fill_(after, -torch.inf).softmax(-1))

    attention.observe = observe
    try:
        yield found
    finally:
        del attention.observe


@torch.inference_mode()
def prefill(model: Model, embeddings: torch.Tensor, position_ids: np.ndarray, cache=None) -> torch.Tensor:
    """Runs a prompt [S, D] with ids int [3, S]: logits float32 [V] after its last token. `cache` is filled if given."""
    ids = torch.as_tensor(position_ids, device=model.device)[:, None]
    decoder = model.model.language_model
    hidden = decoder(
        inputs_embeds=embeddings[None], position_ids=ids, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return model.lm_head(hidden[0, -1]).float()


@torch.inference_mode()
def answer_greedily(model, embeddings, position_ids, limit: int, eos_ids) -> tuple[tuple[int, ...], torch.Tensor]:
    """The counted tokens of a greedy answer of at most `limit`, and their entropies float32 [tokens], nats."""
    cache = transformers.DynamicCache(config=model.config) if limit > 1 else None
    logits, ids, entropies = prefill(model, embeddings, position_ids, cache), [], []
    last = int(position_ids[0, -1])
    while True:
        log_p = torch.log_softmax(logits, -1)
        entropies.append(-(log_p.exp() * log_p).sum())
        ids.append(int(logits.argmax()))
        if len(ids) == limit or ids[-1] in eos_ids:
            break
        token = model.get_input_embeddings()(torch.tensor(ids[-1:], device=model.device))
        logits = prefill(model, token, np.full((3, 1), last + len(ids)), cache)
    counted = max(1, len(ids) - (ids[-1] in eos_ids))
    return tuple(ids[:counted]), torch.stack(entropies[:counted])


# ---------------------------------------------------------------------------------------------------------------------
# Steps 8 to 11
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Selection:
    """`budget` int [groups], and the survivors `selected` int [n, 3] in video order."""

    budget: np.ndarray
    selected: np.ndarray


@torch.inference_mode()
def select(model: Model, inputs: plain.MethodInputs, features: torch.Tensor, passes: list[GroupPass], config):
    """Steps 8 to 10 over all groups, in their order: a `Selection`."""
    weights = plain.group_weights([-visit.entropy for visit in passes], config.temperature)
    total = round(config.over_selection * config.budget)
    budget = plain.allocate(weights, [len(v.tokens) for v in passes], total, config.min_tokens_per_group)
    chosen = [plain.most_relevant(visit.relevance, count) for visit, count in zip(passes, budget, strict=True)]
    candidates = np.concatenate([visit.tokens[index] for visit, index in zip(passes, chosen, strict=True)])
    scores = np.concatenate([w * v.relevance[i] for w, v, i in zip(weights, passes, chosen, strict=True)])
    order = np.lexsort(candidates.T[::-1])
    candidates, scores = candidates[order], scores[order]
    times = np.asarray(inputs.frame_times, np.float64)[2 * candidates[:, 0]]
    positions = torch.as_tensor(np.column_stack([times, candidates[:, 1:]]), device=model.device)
    pairs = redundancy(_gather(model, inputs, features, candidates), positions, config.proximity_scale)
    return Selection(budget, candidates[remove_redundant(pairs.cpu().numpy(), scores, config.budget)])


def _gather(model, inputs, features: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    columns = inputs.grid[2] // model.config.vision_config.spatial_merge_size
    slots, rows, cols = torch.as_tensor(tokens, device=features.device).T
    return features[slots, rows * columns + cols]


def redundancy(features: torch.Tensor, positions: torch.Tensor, scale: float) -> torch.Tensor:
    """`pytorch_method.redundancy` with the exponential kernel, float64 [n, n] on the features' device."""
    unit = torch.nn.functional.normalize(features.double(), dim=1, eps=1e-12)
    seconds, rows, cols = ((axis[:, None] - axis).abs() for axis in positions.T)
    proximity = torch.exp(-seconds / scale - torch.hypot(rows, cols))
    return (unit @ unit.T).clamp_(min=0).round_(decimals=12).mul_(proximity)


def remove_redundant(pairs: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """`pytorch_method.remove_redundant`, keeping the best partner of every token instead of searching all pairs."""
    left = np.where(np.triu(np.ones(pairs.shape, bool), 1), pairs, -np.inf)
    best, partner = left.max(1), left.argmax(1)
    kept = np.ones(len(scores), bool)
    for _ in range(len(scores) - keep):
        i = best.argmax()
        j = partner[i]
        drop = i if scores[i] < scores[j] else j
        kept[drop], best[drop], left[:, drop] = False, -np.inf, -np.inf
        stale = np.flatnonzero(kept & (partner == drop))
        best[stale], partner[stale] = left[stale].max(1), left[stale].argmax(1)
    return kept


@torch.inference_mode()
def final_answer(model: Model, inputs: plain.MethodInputs, features: torch.Tensor, selected: np.ndarray, config):
    """Step 11: the counted tokens of the answer from the `selected` tokens, and their entropies."""
    ids = plain.final_position_ids(model, inputs, selected, config.final_positions, config)
    embeddings = prompt_embeddings(model, inputs, _gather(model, inputs, features, selected))
    return answer_greedily(model, embeddings, ids, config.max_answer_tokens, inputs.eos_ids)


# ---------------------------------------------------------------------------------------------------------------------
# The whole method
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answered:
    """A whole run: the groups' `passes` in their order, the `selection`, and the answer's tokens."""

    passes: list[GroupPass]
    selection: Selection
    answer_ids: tuple[int, ...]


def run(model: Model, inputs: plain.MethodInputs, config: AdaptTokenConfig, chunk: int) -> Answered:
    """The method on a video of several groups; `chunk` slots are encoded at a time.

    Raises:
      UserError: a setting that this version does not have.
    """
    check(config)
    features = encode(model, inputs.patches, inputs.grid, chunk)
    groups = plain.interleaved_groups(inputs.grid[0], config.slots_per_group)
    passes = [pass_group(model, inputs, features, slots, config) for slots in groups]
    selection = select(model, inputs, features, passes, config)
    return Answered(passes, selection, final_answer(model, inputs, features, selection.selected, config)[0])


def check(config: AdaptTokenConfig) -> None:
    """Raises `UserError` for a setting that this version does not have."""
    fixed = {"certainty": "neg_entropy", "similarity": "projector", "proximity": "exponential",
             "sampling_temperature": 0.0, "debias": False, "coverage": 0.0, "temperature_target": 0.0}  # fmt: skip
    for field, value in fixed.items():
        if getattr(config, field) != value:
            raise UserError(f"--{field}={getattr(config, field)}: the fast PyTorch version has {value} alone")
