"""The twelve steps in plain PyTorch and NumPy on top of transformers: what this library's answers are compared with.

Written from the method's specification alone; it shares no code with the library but the configuration. Nothing is fast
here: one group at a time, no padding, no key-value cache (a generated token re-runs its whole sequence), attention
matrices in full. Hidden states and attention come from forward hooks on transformers' own layers; position ids are
always given explicitly, so that transformers' rule for them does not matter. Selection runs in float64 on the
model's float32 outputs.

Decisions where the steps leave room:
  * "Hidden state at the reference layer" is that decoder layer's output, before any further normalisation.
  * Group answers and the final answer count the tokens before the end-of-sequence token; if it comes first, it counts.
  * When the video is answered directly (step 12, `full`, `uniform`), there are no groups (G is 0 in every array), every
    token is a candidate and is selected, and the ids are the original ones.
  * Generated tokens go on from the last prompt token's id, as in transformers' `generate` (5.23.0). Under `legacy` that
    is the largest id of the prompt, which is what `rope_deltas` means; under `hf5` it can be smaller.
  * Pairs of equal redundancy are ordered by the candidates' video order (slot, row, column).

Axis letters: S positions of one prompt, N heads, D model width, V vocabulary, M merged tokens per slot, n tokens,
T slots, K slots per group, G groups (here, not query heads).
"""

import contextlib
import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
import transformers
from transformers.vision_utils import get_vision_window_index

from adapttoken_jax.config import METHODS, AdaptTokenConfig
from adapttoken_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class MethodInputs:
    """A sampled video and a tokenised prompt. For method `uniform` the frames are already the uniformly sampled ones.

    Attributes:
      patches: float32 [T*h*w, 1176], normalised, in the order in which transformers' processors give them;
        `pytorch_fast` also takes them as pixels, uint8.
      grid: (T, h, w): slots, then rows and columns of 14-pixel patches.
      frame_times: float [N] seconds; to select the same where pairs tie, in float32's precision as a trace.
      seconds_per_slot: time between slots as M-RoPE counts it.
      prefix_ids: prompt before the visual tokens; ends with `<|vision_start|>`.
      suffix_ids: prompt after them; starts with `<|vision_end|>`.
      question_span: (start, stop) of the question within `suffix_ids`.
      letter_ids: token id of each option's letter, or None for an open question.
      eos_ids: token ids that end an answer.
      frame_indices: int [N] in the source video; None when the frames are all there is.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]
    frame_times: np.ndarray
    seconds_per_slot: float
    prefix_ids: Sequence[int]
    suffix_ids: Sequence[int]
    question_span: tuple[int, int]
    letter_ids: Sequence[int] | None
    eos_ids: Sequence[int]
    frame_indices: np.ndarray | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The model, stage by stage
# ---------------------------------------------------------------------------------------------------------------------


def load_model(directory) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A checkpoint directory in transformers: float32, eager attention, evaluation mode, on the CPU."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


@contextlib.contextmanager
def _recorded(modules) -> Iterator[list]:
    """Collects what the modules return while the block runs, in the order of their calls."""
    outputs: list = []
    handles = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def vision_stages(model, patches: np.ndarray, grid) -> dict[str, np.ndarray]:
    """Every stage of the vision tower, float32, patches in the order of the input.

    Returns:
      `layers` [layers, T*h*w, C] (output of each block), `features` [T, M, D].
    """
    tower, merge = model.model.visual, model.config.vision_config.spatial_merge_size
    (slots, rows, columns), unit = grid, merge**2
    thw = torch.tensor([[slots, rows, columns]])
    with torch.no_grad(), _recorded(tower.blocks) as blocks:
        features = tower(torch.as_tensor(patches, dtype=torch.float32), grid_thw=thw).pooler_output
    order, _ = get_vision_window_index(thw, merge, tower.window_size, tower.patch_size)
    restore = torch.argsort(order)
    layers = [block.reshape(len(order), unit, -1)[restore].reshape(len(order) * unit, -1) for block in blocks]
    return {
        "layers": torch.stack(layers).numpy(),
        "features": features.reshape(slots, rows * columns // unit, -1).numpy(),
    }


def vision_features(model, patches: np.ndarray, grid) -> np.ndarray:
    """Merged visual tokens, float32 [T, M, D], each slot row by row (step 4's encoder)."""
    return vision_stages(model, patches, grid)["features"]


def embed(model, token_ids: Sequence[int]) -> torch.Tensor:
    """Token embeddings, float32 [len(token_ids), D]."""
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(list(token_ids), dtype=torch.long))


def prompt_embeddings(model, prefix_ids, features: np.ndarray, suffix_ids) -> torch.Tensor:
    """[prefix, visual tokens [n, D], suffix] as embeddings, float32 [S, D]."""
    return torch.cat([embed(model, prefix_ids), torch.as_tensor(features), embed(model, suffix_ids)])


def hidden_states(model, embeddings: torch.Tensor, position_ids: np.ndarray, attention_layers=None) -> dict:
    """Every stage of the text model for one unpadded sequence, float32.

    Args:
      model: with eager attention, because the attention matrices are returned.
      embeddings: [S, D].
      position_ids: int [3, S].
      attention_layers: 0-based layers whose attention is kept; None for all. It is by far the largest part.

    Returns:
      `layers` [layers, S, D] (output of each layer), `attentions` [attention layers, N, S, S],
      `norm` [S, D], `logits` [S, V].

    Raises:
      ValueError: the model's attention is not eager.
    """
    decoder = model.model.language_model
    if decoder.config._attn_implementation != "eager":
        raise ValueError("the model must be loaded with attn_implementation='eager'")
    kept = range(len(decoder.layers)) if attention_layers is None else attention_layers
    attentions = [decoder.layers[layer].self_attn for layer in kept]
    with torch.no_grad(), _recorded(decoder.layers) as layers, _recorded(attentions) as weights:
        ids = torch.as_tensor(np.asarray(position_ids), dtype=torch.long)[:, None]
        norm = decoder(inputs_embeds=embeddings[None], position_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(norm)
    return {
        "layers": torch.cat(layers).numpy(),
        "attentions": np.array([weight[0].numpy() for _, weight in weights]),
        "norm": norm[0].numpy(),
        "logits": logits[0].float().numpy(),
    }


@dataclasses.dataclass(frozen=True)
class Answer:
    """A greedy answer: `ids` are the counted tokens, `logits` float32 [len(ids), V] what each was chosen from."""

    ids: tuple[int, ...]
    logits: np.ndarray
    prompt: dict[str, np.ndarray]  # `hidden_states` of the prompt alone


def answer_greedily(
    model, embeddings: torch.Tensor, position_ids: np.ndarray, max_tokens: int, eos_ids, attention_layers=()
) -> Answer:
    """Greedy decoding; ids of new tokens count up from the last prompt token, as in transformers' `generate`.

    A tie goes to the lowest token id. Tokens from the end-of-sequence token on do not count, unless it is the first.
    The attention of `attention_layers` is kept in the answer's `prompt`.
    """
    ids, logits, prompt, first_new = [], [], None, int(position_ids[0, -1]) + 1
    while len(ids) < max_tokens and not (ids and ids[-1] in eos_ids):
        states = hidden_states(model, embeddings, position_ids, () if prompt else attention_layers)
        prompt = prompt or states
        logits.append(states["logits"][-1])
        ids.append(int(np.argmax(logits[-1])))
        embeddings = torch.cat([embeddings, embed(model, ids[-1:])])
        position_ids = np.concatenate([position_ids, np.full((3, 1), first_new + len(ids) - 1)], axis=1)
    counted = max(1, len(ids) - (ids[-1] in eos_ids))
    return Answer(tuple(ids[:counted]), np.stack(logits[:counted]), prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 2 and 3: groups
# ---------------------------------------------------------------------------------------------------------------------


def interleaved_groups(num_slots: int, slots_per_group: int) -> list[list[int]]:
    """Group g holds slots g, g+G, g+2G, ... with G = ceil(num_slots / slots_per_group)."""
    count = math.ceil(num_slots / slots_per_group)
    return [list(range(group, num_slots, count)) for group in range(count)]


def visiting_order(num_groups: int, order: str) -> list[int]:
    """0, 1, 2, ... or, for `bit_reversed`, the bit-reversed numbers of the next power of two that are groups."""
    if order == "sequential":
        return list(range(num_groups))
    bits = (num_groups - 1).bit_length()
    reversed_numbers = [sum((i >> bit & 1) << (bits - 1 - bit) for bit in range(bits)) for i in range(2**bits)]
    return [number for number in reversed_numbers if number < num_groups]


def tokens_of(slots: Sequence[int], rows: int, columns: int) -> np.ndarray:
    """(slot, row, column) of every merged token of the slots, int [n, 3], slot by slot and row by row."""
    return np.array([(s, r, c) for s in slots for r in range(rows) for c in range(columns)], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 4 and 11: M-RoPE position ids
# ---------------------------------------------------------------------------------------------------------------------


def time_ids(slots: np.ndarray, seconds: float, tokens_per_second: float) -> np.ndarray:
    """floor(slot * seconds * tokens_per_second) in float32, multiplied in this order, int [n]."""
    times = np.asarray(slots, np.float32) * np.float32(seconds) * np.float32(tokens_per_second)
    return np.floor(times).astype(np.int64)


def position_ids(num_prefix: int, times, rows, columns, num_suffix: int, grid, mrope: str, merge: int = 2):
    """Ids of [prefix, visual tokens, suffix], int [3, S]: time, row, column.

    Args:
      num_prefix: text tokens before the video; the video starts at that id.
      times: int [n] time ids counted from the video's start; `rows` and `columns` likewise, on the merged grid.
      rows: int [n].
      columns: int [n].
      num_suffix: text tokens after the video.
      grid: (slots, rows, columns) in patches.
      mrope: `legacy`: the suffix follows the largest visual id; `hf5`: it starts max(h, w) / merge after the video's
        start, as in transformers 5.3 and later (`Qwen2_5_VLModel.get_rope_index`).
      merge: patches per side of a merged token.
    """
    prefix = np.tile(np.arange(num_prefix), (3, 1))
    vision = num_prefix + np.stack([times, rows, columns]).astype(np.int64)
    after = {"legacy": int(vision.max()) + 1, "hf5": num_prefix + max(grid[1:]) // merge}[mrope]
    return np.concatenate([prefix, vision, np.tile(after + np.arange(num_suffix), (3, 1))], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Step 5: relevance
# ---------------------------------------------------------------------------------------------------------------------


def query_rows(queries: str, length: int, num_suffix: int, question_span) -> list[int]:
    """Positions of the prompt whose attention counts: all after the video, the question's, or the last."""
    start = length - num_suffix
    return {
        "after_vision": list(range(start, length)),
        "question": list(range(start + question_span[0], start + question_span[1])),
        "last": [length - 1],
    }[queries]


def relevance(attention: np.ndarray, rows: Sequence[int], visual: slice, heads: str, text: str) -> np.ndarray:
    """Attention [N, S, S] of the `rows` to the `visual` columns, reduced over heads first and then over rows, [n]."""
    reduce = {"max": np.max, "mean": np.mean}
    return reduce[text](reduce[heads](attention[:, rows, visual], axis=0), axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Step 6: certainty
# ---------------------------------------------------------------------------------------------------------------------


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis in float64."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def entropy(logits: np.ndarray) -> np.ndarray:
    """-sum p ln p over the last axis, nats."""
    log_p = log_probabilities(logits)
    return -np.sum(np.exp(log_p) * log_p, axis=-1)


def mean_of_least(certainties: np.ndarray, fraction: float) -> float:
    """Mean of the least certain `fraction` of the tokens, at least one of them."""
    count = max(1, int(fraction * len(certainties) + 1e-9))
    return float(np.mean(np.sort(certainties)[:count]))


def answer_entropy(logits: np.ndarray, fraction: float) -> float:
    """Mean entropy of the least certain tokens of an answer whose logits are [tokens, V], nats."""
    return -mean_of_least(-entropy(logits), fraction)


def certainty(logits: np.ndarray, form: str, letter_ids, fraction: float) -> float:
    """Certainty of an answer with logits [tokens, V]; larger is more certain.

    `option_entropy` looks at the first token and only at the letters; without letters it is `neg_entropy`.
    """
    if form == "option_entropy" and letter_ids is not None:
        return -float(entropy(logits[0, list(letter_ids)]))
    log_p = log_probabilities(logits)
    if form == "max_probability":
        return mean_of_least(np.exp(log_p.max(axis=-1)), fraction)
    if form == "deepconf":
        return mean_of_least(-np.mean(np.sort(log_p, axis=-1)[:, -20:], axis=-1), fraction)
    return mean_of_least(-entropy(logits), fraction)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 4 to 7: the scan over groups
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupPass:
    """What one group tells: `tokens` int [n, 3], `relevance` float32 [n], `hidden` float32 [n, D], first logits [V]."""

    tokens: np.ndarray
    relevance: np.ndarray
    hidden: np.ndarray
    first_logits: np.ndarray
    entropy: float
    certainty: float
    answer_ids: tuple[int, ...]
    answer: Hashable


def _merge(model) -> int:
    return model.config.vision_config.spatial_merge_size


def group_position_ids(model, inputs: MethodInputs, slots: Sequence[int], config: AdaptTokenConfig) -> np.ndarray:
    """Ids of one group's prompt, int [3, S]: slots renumbered at 1 s each, or at their times in the video."""
    rows, columns = (side // _merge(model) for side in inputs.grid[1:])
    if config.group_positions == "compact":
        tokens, seconds = tokens_of(range(len(slots)), rows, columns), 1.0
    else:
        tokens, seconds = tokens_of(slots, rows, columns), inputs.seconds_per_slot
    return _prompt_position_ids(model, inputs, tokens, seconds, config)


def _prompt_position_ids(model, inputs, tokens, seconds, config) -> np.ndarray:
    times = time_ids(tokens[:, 0], seconds, model.config.vision_config.tokens_per_second)
    counts = len(inputs.prefix_ids), len(inputs.suffix_ids)
    return position_ids(
        counts[0], times, tokens[:, 1], tokens[:, 2], counts[1], inputs.grid, config.mrope, _merge(model)
    )


def pass_group(model, inputs: MethodInputs, features: np.ndarray, slots, config: AdaptTokenConfig) -> GroupPass:
    """Steps 4 to 6 for one group; `features` [T, M, D] are the whole video's."""
    tokens = tokens_of(slots, *(side // _merge(model) for side in inputs.grid[1:]))
    visual = features[slots].reshape(len(tokens), -1)
    embeddings = prompt_embeddings(model, inputs.prefix_ids, visual, inputs.suffix_ids)
    ids = group_position_ids(model, inputs, slots, config)
    steps = 1 if inputs.letter_ids is not None else config.max_answer_tokens
    answer = answer_greedily(model, embeddings, ids, steps, inputs.eos_ids, [config.reference_layer])
    columns = slice(len(inputs.prefix_ids), len(inputs.prefix_ids) + len(tokens))
    rows = query_rows(config.relevance_queries, len(embeddings), len(inputs.suffix_ids), inputs.question_span)
    return GroupPass(
        tokens=tokens,
        relevance=relevance(
            answer.prompt["attentions"][0], rows, columns, config.relevance_heads, config.relevance_text
        ),
        hidden=answer.prompt["layers"][config.reference_layer, columns],
        first_logits=answer.logits[0],
        entropy=answer_entropy(answer.logits, config.bottom_fraction),
        certainty=certainty(answer.logits, config.certainty, inputs.letter_ids, config.bottom_fraction),
        answer_ids=answer.ids,
        answer=_answer_of(inputs, answer),
    )


def _answer_of(inputs: MethodInputs, answer: Answer) -> Hashable:
    """What two groups must share to agree: the option's index, or the ids themselves for an open question."""
    return answer.ids if inputs.letter_ids is None else chosen_option(answer, inputs.letter_ids)


def chosen_option(answer: Answer, letter_ids: Sequence[int]) -> int:
    """Index of the option: the first answer token if it is a letter, else the letter that was most probable there."""
    letters = list(letter_ids)
    if answer.ids[0] in letters:
        return letters.index(answer.ids[0])
    return int(np.argmax(answer.logits[0, letters]))


def stop_reason(entropies: Sequence[float], answers: Sequence[Hashable], config: AdaptTokenConfig) -> str | None:
    """Step 7's rule over the groups visited so far: `agreement`, `certain`, or None to go on."""
    certain = [answer for value, answer in zip(entropies, answers, strict=True) if value <= config.stop_entropy]
    if not config.stop_agreement:
        return "certain" if len(certain) >= config.stop_groups else None
    agreeing = max((certain.count(answer) for answer in certain), default=0)
    return "agreement" if agreeing >= config.stop_groups else None


def scan_groups(model, inputs, features, groups, config, lite: bool) -> tuple[dict[int, GroupPass], str]:
    """Visits groups in order, all of them unless `lite` stops; returns {group: pass} in that order and the reason."""
    visits: dict[int, GroupPass] = {}
    for group in visiting_order(len(groups), config.group_order):
        visits[group] = pass_group(model, inputs, features, groups[group], config)
        seen = visits.values()
        reason = stop_reason([v.entropy for v in seen], [v.answer for v in seen], config) if lite else None
        if reason and len(visits) < len(groups):
            return visits, reason
    return visits, "all_groups"


# ---------------------------------------------------------------------------------------------------------------------
# Steps 8 to 10: budgets, candidates, redundancy
# ---------------------------------------------------------------------------------------------------------------------


def group_weights(certainties: Sequence[float], temperature: float) -> np.ndarray:
    """softmax(C / temperature), float64 [groups]."""
    return np.exp(log_probabilities(np.asarray(certainties, np.float64) / temperature))


def allocate(weights, capacity, total: int, minimum: int = 0) -> np.ndarray:
    """Splits `total` tokens over groups, int [groups].

    Shares are clip(level * weight, minimum, capacity) at the level where they add up to `total`; the fractions are
    rounded by largest remainder, ties to the lower index. If `total` exceeds what there is, everything is taken.

    Raises:
      UserError: the minimum alone exceeds `total`.
    """
    weights, capacity = np.asarray(weights, np.float64), np.asarray(capacity, np.int64)
    low = np.minimum(minimum, capacity)
    if low.sum() > total:
        raise UserError(f"--budget: {total} tokens are fewer than --min_tokens_per_group={minimum} for {len(weights)}")
    shares = _shares(np.maximum(weights, np.finfo(np.float64).tiny), low, capacity, min(total, capacity.sum()))
    budget = np.floor(shares).astype(np.int64)
    missing = min(total, capacity.sum()) - budget.sum()
    budget[np.argsort(-(shares - budget), kind="stable")[:missing]] += 1
    return budget


def _shares(weights, low, high, total) -> np.ndarray:
    """clip(level * weights, low, high) with the level at which the sum, piecewise linear in it, is `total`."""

    def filled(level):
        return np.clip(level * weights, low, high)

    knots = np.unique(np.concatenate([[0.0], low / weights, high / weights]))
    start = max(knot for knot in knots if filled(knot).sum() <= total)
    slope = weights[(low / weights <= start) & (start < high / weights)].sum()
    return filled(start + (total - filled(start).sum()) / slope) if slope else filled(start)


def most_relevant(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest scores in ascending order of index; ties go to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def redundancy(features: np.ndarray, positions: np.ndarray, kernel: str, scale: float) -> np.ndarray:
    """Cosine similarity (at least 0) x proximity of every pair, float64 [n, n].

    `positions` [n, 3] are (seconds, row, column). `exponential`: exp(-|dt| / scale - d) with d the distance in merged
    cells; `window`: 1 within `scale` seconds and one row and one column, else 0.
    """
    unit = np.asarray(features, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    apart = np.abs(positions[:, None] - positions[None]).astype(np.float64)
    if kernel == "exponential":
        proximity = np.exp(-apart[..., 0] / scale - np.hypot(apart[..., 1], apart[..., 2]))
    else:
        proximity = (apart <= [scale, 1, 1]).all(axis=-1)
    # Rounded, so that equal features tie whatever the order of their sums.
    return np.round(np.maximum(unit @ unit.T, 0), 12) * proximity


def remove_redundant(pairs: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """Drops one token of the most redundant pair until `keep` are left, bool [n].

    `pairs` [n, n] is the redundancy. Of pairs i < j that tie, the smallest i and then j is taken; of its tokens the one
    with the lower score goes, j if they tie.
    """
    left = np.where(np.triu(np.ones_like(pairs, bool), 1), pairs, -np.inf)
    kept = np.ones(len(scores), bool)
    while kept.sum() > keep:
        i, j = np.unravel_index(np.argmax(left), left.shape)
        drop = i if scores[i] < scores[j] else j
        kept[drop], left[drop], left[:, drop] = False, -np.inf, -np.inf
    return kept


@dataclasses.dataclass(frozen=True)
class Selection:
    """`weights` float64 [visited], `budget` int [visited], `candidates` and `selected` int [n, 3] in video order."""

    weights: np.ndarray
    budget: np.ndarray
    candidates: np.ndarray
    selected: np.ndarray


def select(model, inputs, features, visits: dict[int, GroupPass], config, method: str) -> Selection:
    """Steps 8 to 10 over the visited groups; `flexselect` has equal weights and stops after step 9."""
    passes = list(visits.values())
    capacity = [len(visit.tokens) for visit in passes]
    equal = method == "flexselect"
    weights = group_weights([0.0 if equal else visit.certainty for visit in passes], config.temperature)
    total = config.budget if equal else round(config.over_selection * config.budget)
    # Largest remainders go to the lower group index, so the groups are put in that order first.
    order = np.argsort(list(visits))
    budget = np.empty(len(passes), np.int64)
    least = 0 if equal else config.min_tokens_per_group
    budget[order] = allocate(weights[order], np.take(capacity, order), total, least)
    chosen = [most_relevant(visit.relevance, count) for visit, count in zip(passes, budget, strict=True)]
    candidates = np.concatenate([visit.tokens[index] for visit, index in zip(passes, chosen, strict=True)])
    in_video_order = np.lexsort(candidates.T[::-1])
    if equal:
        return Selection(weights, budget, candidates[in_video_order], candidates[in_video_order])
    scores = np.concatenate([w * v.relevance[i] for w, v, i in zip(weights, passes, chosen, strict=True)])
    hidden = np.concatenate([visit.hidden[index] for visit, index in zip(passes, chosen, strict=True)])
    candidates, scores, hidden = (values[in_video_order] for values in (candidates, scores, hidden))
    compared = _features_of(model, inputs, features, candidates) if config.similarity == "projector" else hidden
    pairs = redundancy(compared, _seconds_rows_columns(inputs, candidates), config.proximity, config.proximity_scale)
    kept = remove_redundant(pairs, scores, min(config.budget, len(candidates)))
    return Selection(weights, budget, candidates, candidates[kept])


def _features_of(model, inputs, features, tokens) -> np.ndarray:
    slots, rows, columns = tokens.T
    return features[slots, rows * (inputs.grid[2] // _merge(model)) + columns]


def _seconds_rows_columns(inputs, tokens) -> np.ndarray:
    """A slot's time is that of its first frame, float64 [n, 3]."""
    times = np.asarray(inputs.frame_times, np.float64)[2 * tokens[:, 0]]
    return np.stack([times, tokens[:, 1], tokens[:, 2]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 11 and 12, and the whole method
# ---------------------------------------------------------------------------------------------------------------------


def final_position_ids(model, inputs: MethodInputs, selected: np.ndarray, positions: str, config) -> np.ndarray:
    """Ids of the final prompt, int [3, S]: the survivors' own, or their slots renumbered at 1 s each (`compact`)."""
    if positions == "compact":
        slots = np.unique(selected[:, 0], return_inverse=True)[1].reshape(-1)
        tokens = np.column_stack([slots, selected[:, 1:]])
        return _prompt_position_ids(model, inputs, tokens, 1.0, config)
    return _prompt_position_ids(model, inputs, selected, inputs.seconds_per_slot, config)


def run(model, inputs: MethodInputs, config: AdaptTokenConfig, method: str = "adapttoken") -> dict:
    """Answers the question with one of `METHODS` and tells everything on the way.

    Args:
      model: from `load_model`.
      inputs: the sampled video and the prompt.
      config: with `reference_layer` resolved (not -1).
      method: `adapttoken`, `lite`, `flexselect`, `uniform` or `full`; the last two answer directly.

    Returns:
      The keys, shapes and conventions of a trace file: `frame_indices`, `frame_times`, `grid`, `patches`,
      `visual_features`, `groups` (K is `config.slots_per_group`; G is 0 in a direct answer), `prefix_ids`,
      `suffix_ids`, `group_position_ids` (each visited group's unpadded ids, then -1), `group_first_logits`,
      `group_entropy`, `group_certainty`, `group_relevance` (float values of groups not visited are NaN), `budget` (0 if
      not visited), `candidates`, `selected`, `final_position_ids`, `final_first_logits`, `answer_ids`. Beside them
      `weights` float32 [G] (NaN if not visited), `visited` int [groups visited] in visiting order, `stop_reason`
      (`direct`, `all_groups`, `agreement`, `certain`), `stop_early`, `direct`, `group_answer_ids` {group: ids},
      `group_answers` {group: answer}, `final_entropy` nats, `option` (index or None) and `option_probabilities`
      float32 [options] or None.

    Raises:
      UserError: an unknown method, sampling asked for, or a budget below the groups' minimum.
      ValueError: `reference_layer` is not resolved.
    """
    check(config, method)
    features = vision_features(model, inputs.patches, inputs.grid)
    groups = interleaved_groups(inputs.grid[0], config.slots_per_group)
    everything = tokens_of(range(inputs.grid[0]), *(side // _merge(model) for side in inputs.grid[1:]))
    direct = method in ("uniform", "full") or len(groups) == 1 or len(everything) <= config.budget
    if direct:
        groups, visits, reason, positions = [], {}, "direct", "original"
        selection = Selection(np.empty(0), np.empty(0, np.int64), everything, everything)
    else:
        visits, reason = scan_groups(model, inputs, features, groups, config, lite=method == "lite")
        selection, positions = select(model, inputs, features, visits, config, method), config.final_positions
    final_ids = final_position_ids(model, inputs, selection.selected, positions, config)
    visual = _features_of(model, inputs, features, selection.selected)
    embeddings = prompt_embeddings(model, inputs.prefix_ids, visual, inputs.suffix_ids)
    answer = answer_greedily(model, embeddings, final_ids, config.max_answer_tokens, inputs.eos_ids)
    return {
        **_video_part(inputs, features),
        **_group_part(model, inputs, config, groups, visits, selection),
        **_final_part(inputs, config, selection, final_ids, answer),
        "direct": direct,
        "stop_reason": reason,
        "stop_early": bool(visits) and len(visits) < len(groups),
    }


def check(config: AdaptTokenConfig, method: str) -> None:
    """Raises `UserError` for a method, or a setting, that this version does not have."""
    if method not in METHODS:
        raise UserError(f"--method={method}: choose one of {', '.join(METHODS)}")
    if config.sampling_temperature > 0:
        raise UserError("--sampling_temperature: the PyTorch reference only decodes greedily; set it to 0")
    stopping = ("stop_gain", "give_up_groups") if method == "lite" else ()
    for option in ("debias", "coverage", "temperature_target", "keep_after_reference", *stopping):
        if getattr(config, option) != getattr(AdaptTokenConfig, option):
            raise UserError(f"--{option}: the PyTorch reference has the paper's steps alone; leave it out")
    if method == "lite" and config.stop_rule != "groups":
        raise UserError(f"--stop_rule={config.stop_rule}: the PyTorch reference knows only groups; leave it out")
    if config.reference_layer < 0:
        raise ValueError("config.reference_layer is -1; resolve the configuration for the model first")


def _video_part(inputs: MethodInputs, features: np.ndarray) -> dict:
    count = len(inputs.frame_times)
    return {
        "frame_indices": np.arange(count) if inputs.frame_indices is None else np.asarray(inputs.frame_indices),
        "frame_times": np.asarray(inputs.frame_times, np.float32),
        "grid": np.asarray(inputs.grid, np.int64),
        "patches": np.asarray(inputs.patches, np.float32),
        "visual_features": features,
        "prefix_ids": np.asarray(inputs.prefix_ids, np.int64),
        "suffix_ids": np.asarray(inputs.suffix_ids, np.int64),
    }


def _group_part(model, inputs, config, groups, visits: dict[int, GroupPass], selection: Selection) -> dict:
    tokens = inputs.grid[1] * inputs.grid[2] // _merge(model) ** 2
    length = len(inputs.prefix_ids) + config.slots_per_group * tokens + len(inputs.suffix_ids)
    ids = np.full((len(groups), 3, length), -1, np.int64)
    for group in visits:
        own = group_position_ids(model, inputs, groups[group], config)
        ids[group, :, : own.shape[1]] = own

    def by_group(values, width=(), fill=np.nan, dtype=np.float32):
        table = np.full((len(groups), *width), fill, dtype)
        for group, value in values.items():
            table[(group, slice(len(value))) if width else group] = value
        return table

    def of_visits(name, width=()):
        return by_group({group: getattr(visit, name) for group, visit in visits.items()}, width)

    slots_per_group = config.slots_per_group
    return {
        "groups": by_group(dict(enumerate(groups)), (slots_per_group,), -1, np.int64),
        "group_position_ids": ids,
        "group_first_logits": of_visits("first_logits", (model.config.text_config.vocab_size,)),
        "group_entropy": of_visits("entropy"),
        "group_certainty": of_visits("certainty"),
        "group_relevance": of_visits("relevance", (slots_per_group * tokens,)),
        "group_answer_ids": {group: visit.answer_ids for group, visit in visits.items()},
        "group_answers": {group: visit.answer for group, visit in visits.items()},
        "visited": np.array(list(visits), np.int64),
        "weights": by_group(dict(zip(visits, selection.weights, strict=True))),
        "budget": by_group(dict(zip(visits, selection.budget, strict=True)), fill=0, dtype=np.int64),
    }


def _final_part(inputs, config, selection: Selection, final_ids: np.ndarray, answer: Answer) -> dict:
    letters = inputs.letter_ids
    return {
        "candidates": selection.candidates,
        "selected": selection.selected,
        "final_position_ids": final_ids,
        "final_first_logits": answer.logits[0],
        "final_entropy": answer_entropy(answer.logits, config.bottom_fraction),
        "answer_ids": np.array(answer.ids, np.int64),
        "option": None if letters is None else chosen_option(answer, letters),
        "option_probabilities": None
        if letters is None
        else np.exp(log_probabilities(answer.logits[0, list(letters)])).astype(np.float32),
    }
