"""The scan: visits the groups of a video, wave by wave, and keeps what each one says.

A wave holds as many groups as the mesh's `data` axis is long. Every question runs against a group's visual prefix as
one batch. What a group says does not depend on the wave it ran in: early stopping is decided group by group, in
visiting order, and groups of the wave beyond the stop count as not visited.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np

from adapttoken_jax import sharding
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import Progress, VisualTokens
from adapttoken_jax.geometry import round_up, text_start
from adapttoken_jax.loading import Model
from adapttoken_jax.model.generation import Sampling
from adapttoken_jax.passes import PassSpec, PromptBatch, run_prompts
from adapttoken_jax.prompt import Prompt, parse_option
from adapttoken_jax.selection import group_certainty, group_slots, least_certain_mean, visiting_order

_SUFFIX_STEP = 32  # suffixes are padded to a multiple of this, so that questions of similar length share a program
_CONTEXT_STEP = 64  # the same for contexts

DEADLINE = "deadline reached"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said to one question in one pass.

    Attributes:
      first_logits: float32[V], before the first answer token.
      answer_ids: int32[A'], the answer's own tokens.
      entropy: response entropy, nats: mean over the least certain tokens.
      certainty: the same summary of the chosen form of certainty.
    """

    first_logits: np.ndarray
    answer_ids: np.ndarray
    entropy: float
    certainty: float


@dataclasses.dataclass(frozen=True)
class Visit:
    """One group as seen by one question.

    Attributes:
      index: the group.
      slots: int64[k], its slots.
      reply: the answer from this group alone.
      relevance: float32[k M] of its tokens.
      hidden: [k M, D] at the reference layer, if similarity needs it.
    """

    index: int
    slots: np.ndarray
    reply: Reply
    relevance: np.ndarray
    hidden: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Scan:
    """The groups that one question visited, in visiting order, and the named reason for stopping early ("" if not)."""

    visits: list[Visit]
    reason: str


@dataclasses.dataclass(frozen=True)
class ContextTokens:
    """Visual tokens of one context: features [n, D] and M-RoPE ids int32[3, n]."""

    features: np.ndarray
    position_ids: np.ndarray


def visit_groups(
    model: Model,
    video: VisualTokens,
    prompts: list[Prompt],
    config: AdaptTokenConfig,
    stop: Callable[[int, list[Visit]], str] | None = None,
    time_is_up: Callable[[], bool] = lambda: False,
    on_progress: Progress | None = None,
) -> list[Scan]:
    """Steps 3 to 7: every question on every group, until all have stopped or the time is up.

    Args:
      stop: why question q, after these visits, needs no more of them; "" to go on. None: never.
      time_is_up: asked after each wave, so that at least one is run.

    Returns:
      One `Scan` per question.
    """
    groups = group_slots(video.clip.grid[0], config.slots_per_group)
    visits: list[list[Visit]] = [[] for _ in prompts]
    reasons = [""] * len(prompts)
    order = iter(visiting_order(len(groups), config.group_order))
    while wave := list(itertools.islice(order, model.wave)):
        asked = _ask_wave(model, video, [groups[g] for g in wave], prompts, config)
        for g, per_question in zip(wave, asked, strict=True):
            for q, visit in enumerate(per_question):
                if not reasons[q]:
                    visits[q].append(dataclasses.replace(visit, index=int(g)))
                    reasons[q] = stop(q, visits[q]) if stop else ""
        if on_progress:
            on_progress("groups", max(len(v) for v in visits), len(groups))
        if time_is_up():
            reasons = [reason or DEADLINE for reason in reasons]
        if all(reasons):
            break
    return [Scan(v, reason if len(v) < len(groups) else "") for v, reason in zip(visits, reasons, strict=True)]


def read_answer(model: Model, prompt: Prompt, reply: Reply) -> tuple[str, str | None]:
    """The answer's text, and its option: read from the text, else the letter that was likeliest as the first token."""
    text = model.tokenizer.decode(reply.answer_ids).strip()
    if not prompt.letters:
        return text, None
    option = parse_option(text, prompt.letters, prompt.options)
    return text, option or prompt.letters[int(np.argmax(reply.first_logits[list(prompt.letter_ids)]))]


def agreed_answer(model: Model, prompt: Prompt, reply: Reply) -> str | None:
    """What two replies must share to agree: the option, or the text but for capitals; None where there is neither."""
    text, option = read_answer(model, prompt, reply)
    return option or text.casefold() or None


def _ask_wave(model, video, groups, prompts, config) -> list[list[Visit]]:
    """One compiled pass over a wave of groups: a list of visits per group, one per question."""
    contexts = [
        ContextTokens(video.gather(video.coordinates(slots)), group_position_ids(video, slots, prompts[0], config))
        for slots in groups
    ]
    # A short wave repeats its last group, so that every wave has the same shape.
    contexts += [contexts[-1]] * (model.wave - len(contexts))
    size = config.slots_per_group * video.per_slot
    batch = prompt_batch(model, video, contexts, prompts, config, size)
    spec = group_spec(model, prompts, config)
    out = jax.device_get(run_prompts(model.module, batch, spec))
    return [
        [_visit(out, b, q, slots, len(contexts[b].features), config) for q in range(len(prompts))]
        for b, slots in enumerate(groups)
    ]


def group_spec(model: Model, prompts: list[Prompt], config: AdaptTokenConfig) -> PassSpec:
    """What is compiled into a group pass."""
    return PassSpec(
        relevance=(config.reference_layer, config.relevance_heads, config.relevance_text),
        certainty=config.certainty,
        keep_layer=config.reference_layer if config.similarity == "reference_layer" else None,
        answer_tokens=max(_group_limit(p, config) for p in prompts),
        end_ids=model.tokenizer.eos,
    )


def _group_limit(prompt: Prompt, config: AdaptTokenConfig) -> int:
    """Answer tokens of a group pass: the letter alone where there are options."""
    return 1 if prompt.letters else config.max_answer_tokens


def _visit(out, b, q, slots, n, config) -> Visit:
    return Visit(
        index=-1,
        slots=slots,
        reply=reply(out, b, q, config),
        relevance=out["relevance"][b, q, :n],
        hidden=out["kept"][b, :n] if "kept" in out else None,
    )


def reply(out: dict[str, np.ndarray], b: int, q: int, config: AdaptTokenConfig) -> Reply:
    """Reads question q of context b out of what `run_prompts` returned."""
    counted = out["counted"][b, q]
    return Reply(
        first_logits=out["first_logits"][b, q],
        answer_ids=out["tokens"][b, q][counted],
        entropy=float(-group_certainty(out["entropy"][b, q], counted, config.bottom_fraction)),
        certainty=float(least_certain_mean(out["certainty"][b, q], counted, config.bottom_fraction)),
    )


def group_position_ids(video: VisualTokens, slots, prompt: Prompt, config: AdaptTokenConfig) -> np.ndarray:
    """M-RoPE ids int32[3, k M] of a group's visual tokens, as if it were a short video or at its true times."""
    renumber = config.group_positions == "compact"
    return video.position_ids(video.coordinates(slots), len(prompt.prefix_ids), renumber)


def suffix_start(visual_ids: np.ndarray, prompt: Prompt, config: AdaptTokenConfig, video: VisualTokens) -> int:
    """M-RoPE id of the first token after the visual tokens, by the rule `config.mrope`; without any, of text alone."""
    if visual_ids.shape[1] == 0:
        return len(prompt.prefix_ids)
    _, height, width = video.clip.grid
    return text_start(config.mrope, len(prompt.prefix_ids), visual_ids, height, width, video.merge)


def full_position_ids(visual_ids, prompt, config, video) -> np.ndarray:
    """M-RoPE ids int32[3, P + n + T] of a whole unpadded prompt."""
    prefix = np.arange(len(prompt.prefix_ids), dtype=np.int32)
    suffix = suffix_start(visual_ids, prompt, config, video) + np.arange(len(prompt.suffix_ids), dtype=np.int32)
    text = lambda ids: np.broadcast_to(ids, (3, len(ids)))
    return np.concatenate([text(prefix), visual_ids, text(suffix)], 1)


def prompt_batch(model, video, contexts, prompts, config, size=None, limit=None) -> PromptBatch:
    """Pads contexts and questions to static shapes and places them on the mesh.

    `size` is the padded number of visual tokens (None: the next multiple that holds them), `limit` the number of answer
    tokens (None: as in group passes).
    """
    prefix = np.asarray(prompts[0].prefix_ids, np.int32)
    size = size or round_up(max(len(c.features) for c in contexts), _CONTEXT_STEP)
    T = round_up(max(len(p.suffix_ids) for p in prompts), _SUFFIX_STEP)
    starts = [suffix_start(c.position_ids, prompts[0], config, video) for c in contexts]
    answers = [[start + len(p.suffix_ids) for p in prompts] for start in starts]
    split = {
        "visual": np.stack([_padded(c.features, size, 0) for c in contexts]),
        "visual_valid": np.stack([np.arange(size) < len(c.features) for c in contexts]),
        "context_positions": np.stack([_context_positions(len(prefix), c, size) for c in contexts]),
        "suffix_start": np.asarray(starts, np.int32),
        "answer_start": np.asarray(answers, np.int32),
    }
    shared = {
        "prefix_ids": prefix,
        "suffix_ids": np.stack([_padded(np.asarray(p.suffix_ids, np.int32), T, 0) for p in prompts]),
        "suffix_length": np.asarray([len(p.suffix_ids) for p in prompts], np.int32),
        "query_rows": np.stack([_query_rows(p, T, config.relevance_queries) for p in prompts]),
        "limit": np.asarray([limit or _group_limit(p, config) for p in prompts], np.int32),
        "option_ids": _option_ids(prompts),
        "key": jax.random.key(config.seed),
    }
    if model.mesh is not None:
        over_data = sharding.batch_sharding(model.mesh) if len(contexts) == model.wave else None
        everywhere = sharding.replicated(model.mesh)
        split = jax.device_put(split, over_data or everywhere)
        shared = jax.device_put(shared, everywhere)
    return PromptBatch(**split, **shared)


def _padded(array: np.ndarray, size: int, axis: int, fill=0) -> np.ndarray:
    widths = [(0, size - array.shape[axis] if a == axis else 0) for a in range(array.ndim)]
    return np.pad(array, widths, constant_values=fill)


def _context_positions(prefix: int, context: ContextTokens, size: int) -> np.ndarray:
    text = np.broadcast_to(np.arange(prefix, dtype=np.int32), (3, prefix))
    return np.concatenate([text, _padded(context.position_ids, size, 1)], 1)


def _query_rows(prompt: Prompt, T: int, queries: str) -> np.ndarray:
    """Rows of the padded suffix whose attention counts as relevance: bool[T]."""
    length = len(prompt.suffix_ids)
    first, last = {"after_vision": (0, length), "question": prompt.question_span, "last": (length - 1, length)}[queries]
    rows = np.arange(T)
    return (first <= rows) & (rows < last)


def _option_ids(prompts: list[Prompt]) -> np.ndarray:
    widest = max(1, max(len(p.letter_ids) for p in prompts))
    return np.stack([_padded(np.asarray(p.letter_ids, np.int32), widest, 0, -1) for p in prompts])


def blind_replies(model, video, prompts, config) -> list[Reply]:
    """What the model answers to each question, as in a group pass, from a prompt without visual tokens."""
    nothing = ContextTokens(np.zeros((0, video.features.shape[-1]), video.features.dtype), np.zeros((3, 0), np.int32))
    batch = prompt_batch(model, video, [nothing], prompts, config)
    spec = PassSpec(
        relevance=None,
        certainty=config.certainty,
        keep_layer=None,
        answer_tokens=max(_group_limit(p, config) for p in prompts),
        end_ids=model.tokenizer.eos,
    )
    out = jax.device_get(run_prompts(model.module, batch, spec))
    return [reply(out, 0, q, config) for q in range(len(prompts))]


def final_reply(model, video, context, prompt, config) -> Reply:
    """Step 11: answers one question from one context of chosen tokens."""
    batch = prompt_batch(model, video, [context], [prompt], config, limit=config.max_answer_tokens)
    spec = PassSpec(
        relevance=None,
        certainty=config.certainty,
        keep_layer=None,
        answer_tokens=config.max_answer_tokens,
        end_ids=model.tokenizer.eos,
        sampling=Sampling(config.sampling_temperature, config.top_p),
    )
    return reply(jax.device_get(run_prompts(model.module, batch, spec)), 0, 0, config)
