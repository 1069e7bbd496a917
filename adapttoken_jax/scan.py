"""The scan: visits the groups of a video, wave by wave, and keeps what each one says.

A wave holds as many groups as the mesh's first axis is long. Every question runs against a group's visual prefix as
one batch. What a group says does not depend on the wave it ran in: early stopping is decided group by group, in
visiting order, and groups of the wave beyond the stop count as not visited.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

from adapttoken_jax import sharding
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import OnProgress, VisualTokens
from adapttoken_jax.errors import UserError
from adapttoken_jax.geometry import bucket, round_up, text_start
from adapttoken_jax.loading import Model
from adapttoken_jax.passes import PassSpec, PromptBatch, run_prompts
from adapttoken_jax.prompt import Prompt, parse_option
from adapttoken_jax.selection import StopRule, group_certainty, group_slots, least_certain_mean, visiting_order

# Padded sizes are multiples of these, so that questions of similar length, and contexts, share a program.
OPTION_STEP = 8
_SUFFIX_STEP = 16
_CONTEXT_STEP = 64

DEADLINE = "deadline reached"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said to one question in one pass.

    Attributes:
      first_logits: float32[V], before the first answer token; None of a group whose logits were not to be kept.
      option_logits: float32[O], those of the options' letters, then padding.
      answer_ids: int32[A'], the answer's own tokens.
      entropy: response entropy, nats: mean over the least certain tokens.
      certainty: the same summary of the chosen form of certainty.
    """

    first_logits: np.ndarray | None
    option_logits: np.ndarray
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
class Stopping:
    """How Lite ends a scan.

    Attributes:
      rule: the rule in numbers.
      blind: per question, the entropy of the answer without the video, nats; None where the rule does not ask for it.
      reason: why question q, after these visits, needs no more of them; "" to go on.
    """

    rule: StopRule
    blind: list[float | None]
    reason: Callable[[int, list[Visit]], str]


@dataclasses.dataclass(frozen=True)
class ScanLog:
    """What every question has visited so far, and why it stopped; both loops over groups keep one.

    Attributes:
      groups: slots of each group of the video.
      stop: None visits all groups.
      visits, reasons: per question.
    """

    groups: list[np.ndarray]
    stop: Stopping | None
    visits: list[list[Visit]]
    reasons: list[str]

    @classmethod
    def start(cls, video: VisualTokens, prompts: list[Prompt], config: AdaptTokenConfig, stop: Stopping | None):
        """The log of a scan that has seen nothing yet."""
        groups = group_slots(video.clip.grid[0], config.slots_per_group)
        return cls(groups, stop, [[] for _ in prompts], [""] * len(prompts))

    @property
    def done(self) -> bool:
        """Whether no question needs another group."""
        return all(self.reasons)

    def add(self, asked: list[Visit]) -> None:
        """Adds a group as each row saw it; questions that have stopped do not count it, later rows have none."""
        for q, visit in enumerate(asked[: len(self.visits)]):
            if not self.reasons[q]:
                self.visits[q].append(visit)
                self.reasons[q] = self.stop.reason(q, self.visits[q]) if self.stop else ""

    def after_wave(self, time_is_up: Callable[[], bool] | None, on_progress: OnProgress | None) -> None:
        """Reports progress, and stops every question if the time is up."""
        if on_progress:
            on_progress("groups", max(len(v) for v in self.visits), len(self.groups))
        if time_is_up and time_is_up():
            self.reasons[:] = [reason or DEADLINE for reason in self.reasons]

    def scans(self) -> list[Scan]:
        """One `Scan` per question."""
        whole = len(self.groups)
        return [Scan(v, why if len(v) < whole else "") for v, why in zip(self.visits, self.reasons, strict=True)]


@dataclasses.dataclass(frozen=True)
class ContextTokens:
    """Visual tokens of one context: features [n, D] and M-RoPE ids int32[3, n].

    Features that lie on the device already have the padded size.
    """

    features: np.ndarray
    position_ids: np.ndarray


def visit_groups(
    model: Model,
    video: VisualTokens,
    prompts: list[Prompt],
    config: AdaptTokenConfig,
    stop: Stopping | None = None,
    time_is_up: Callable[[], bool] | None = None,
    on_progress: OnProgress | None = None,
    keep_logits: bool = False,
) -> list[Scan]:
    """Steps 3 to 7: every question on every group, until all have stopped or the time is up.

    The reference twin of `device_scan.visit_groups`: one compiled pass per wave, everything else on the host.

    Args:
      stop: None visits all groups.
      time_is_up: asked after each wave, so that at least one is run.
      keep_logits: keep every visit's `first_logits`: 0.6 MB for the vocabulary of Qwen2.5-VL.

    Returns:
      One `Scan` per question.
    """
    log = ScanLog.start(video, prompts, config, stop)
    order = iter(visiting_order(len(log.groups), config.group_order))
    while not log.done and (wave := list(itertools.islice(order, model.wave))):
        contexts = [group_context(video, log.groups[g], prompts[0], config) for g in wave]
        # A short wave repeats its last group, so that every wave has the same shape.
        contexts += [contexts[-1]] * (model.wave - len(contexts))
        batch = prompt_batch(model, video, contexts, prompts, config, config.slots_per_group * video.per_slot)
        out = run_and_read(model, batch, group_spec(model, prompts, config), keep_logits)
        for b, g in enumerate(wave):
            log.add(read_visits(out, b, int(g), log.groups[g], len(contexts[b].features), config))
        log.after_wave(time_is_up, on_progress)
    return log.scans()


def read_answer(model: Model, prompt: Prompt, reply: Reply) -> tuple[str, str | None]:
    """The answer's text, and its option: read from the text, else the letter that was likeliest as the first token."""
    text = model.tokenizer.decode(reply.answer_ids).strip()
    if not prompt.letters:
        return text, None
    option = parse_option(text, prompt.letters, prompt.options)
    return text, option or prompt.letters[int(np.argmax(reply.option_logits[: len(prompt.letters)]))]


def agreed_answer(model: Model, prompt: Prompt, reply: Reply) -> str | None:
    """What two replies must share to agree: the option, or the text but for capitals; None where there is neither."""
    text, option = read_answer(model, prompt, reply)
    return option or text.casefold() or None


def group_context(video: VisualTokens, slots, prompt: Prompt, config: AdaptTokenConfig) -> ContextTokens:
    """The visual tokens of one group, as if it were a short video."""
    ids = group_position_ids(video, slots, prompt, config)
    return ContextTokens(video.gather(video.coordinates(slots)), ids)


def group_spec(model: Model, prompts: list[Prompt], config: AdaptTokenConfig) -> PassSpec:
    """What is compiled into a group pass."""
    return answer_spec(model, max(group_limit(p, config) for p in prompts), config).of_groups(config)


def answer_spec(model: Model, answer_tokens: int, config: AdaptTokenConfig) -> PassSpec:
    """What is compiled into a pass that only answers, greedily."""
    return PassSpec.answering(config, answer_tokens, model.tokenizer.eos, model.kernel)


def group_limit(prompt: Prompt, config: AdaptTokenConfig) -> int:
    """Answer tokens of a group pass: the letter alone where there are options."""
    return 1 if prompt.letters else config.max_answer_tokens


def read_visits(out: dict[str, np.ndarray], b: int, index: int, slots, n: int, config) -> list[Visit]:
    """Reads the group `index` of `n` tokens, context b of what `run_prompts` returned: one visit per question.

    Visits hold copies: a view would keep all that was returned, padding included, for as long as the scan goes on.
    """
    hidden = out["kept"][b, :n].copy() if "kept" in out else None
    return [
        Visit(index, slots, reply(out, b, q, config), relevance[:n].copy(), hidden)
        for q, relevance in enumerate(out["relevance"][b])
    ]


def reply(out: dict[str, np.ndarray], b: int, q: int, config: AdaptTokenConfig) -> Reply:
    """Reads question q of context b out of what `run_prompts` returned.

    Raises:
      UserError: what the model computed is not finite.
    """
    counted = out["counted"][b, q]
    said = Reply(
        first_logits=out["first_logits"][b, q].copy() if "first_logits" in out else None,
        option_logits=out["option_logits"][b, q].copy(),
        answer_ids=out["tokens"][b, q][counted],
        entropy=0.0 - float(group_certainty(out["entropy"][b, q], counted, config.bottom_fraction)),  # 0, not -0
        certainty=float(least_certain_mean(out["certainty"][b, q], counted, config.bottom_fraction)),
    )
    if not math.isfinite(said.entropy + said.certainty):
        raise UserError(
            "--dtype: the model's logits are not finite: its numbers exceed the element type, or its weights are "
            "damaged; take --dtype=float32, or another copy of the weights"
        )
    return said


def group_position_ids(video: VisualTokens, slots, prompt: Prompt, config: AdaptTokenConfig) -> np.ndarray:
    """M-RoPE ids int32[3, k M] of a group's visual tokens, as if it were a short video or at its true times."""
    renumber = config.group_positions == "compact"
    return video.position_ids(video.coordinates(slots), len(prompt.prefix_ids), renumber)


def suffix_start(visual_ids: np.ndarray, prompt: Prompt, config: AdaptTokenConfig, video: VisualTokens) -> int:
    """M-RoPE id of the first token after the visual tokens, by the rule `config.mrope`; without any, of text alone."""
    if visual_ids.shape[1] == 0:
        return len(prompt.prefix_ids)
    _, height, width = video.clip.grid
    return text_start(config.mrope, len(prompt.prefix_ids), visual_ids, height, width, video.clip.vision.merge)


def full_position_ids(visual_ids, prompt, config, video) -> np.ndarray:
    """M-RoPE ids int32[3, P + n + T] of a whole unpadded prompt."""
    start = suffix_start(visual_ids, prompt, config, video)
    before, after = _text_ids(0, len(prompt.prefix_ids)), _text_ids(start, len(prompt.suffix_ids))
    return np.concatenate([before, visual_ids, after], 1)


def _text_ids(start: int, count: int) -> np.ndarray:
    """M-RoPE ids int32[3, count] of text, the same in every dimension."""
    return np.broadcast_to(start + np.arange(count, dtype=np.int32), (3, count))


def prompt_batch(
    model, video, contexts, prompts, config, size=None, limit=None, waves=None, visual=None
) -> PromptBatch:
    """Pads contexts and questions to static shapes and places them on the mesh.

    `size` is the padded number of visual tokens (None: the next bucket that holds them), `limit` the number of answer
    tokens (None: as in group passes). With `waves` the contexts are those of so many waves, and the fields
    `per_context` get a leading axis for them. `visual`: the contexts' features [B, size, D], padded already.
    """
    prefix = np.asarray(prompts[0].prefix_ids, np.int32)
    lengths = [c.position_ids.shape[1] for c in contexts]
    size = size or context_size(max(lengths))
    T = suffix_size(max(len(p.suffix_ids) for p in prompts))
    starts = [suffix_start(c.position_ids, prompts[0], config, video) for c in contexts]
    answers = [[start + len(p.suffix_ids) for p in prompts] for start in starts]
    split = {
        "visual": _visual(contexts, size) if visual is None else visual,
        "visual_valid": np.arange(size) < np.asarray(lengths)[:, None],
        "context_positions": np.stack([_context_positions(len(prefix), c, size) for c in contexts]),
        "suffix_start": np.asarray(starts, np.int32),
        "answer_start": np.asarray(answers, np.int32),
    }
    shared = {
        "prefix_ids": prefix,
        "suffix_ids": np.stack([_padded(np.asarray(p.suffix_ids, np.int32), T, 0) for p in prompts]),
        "suffix_length": np.asarray([len(p.suffix_ids) for p in prompts], np.int32),
        "query_rows": np.stack([_query_rows(p, T, config.relevance_queries) for p in prompts]),
        "limit": np.asarray([limit or group_limit(p, config) for p in prompts], np.int32),
        "option_ids": _option_ids(prompts),
        "key": jax.random.key(config.seed),
    }
    if waves is not None:
        split = {name: value.reshape(waves, -1, *value.shape[1:]) for name, value in split.items()}
    if model.mesh is not None:
        split, shared = _placed(model, split, shared, 0 if waves is None else 1)
    return PromptBatch(**split, **shared)


def _placed(model, split: dict, shared: dict, axis: int) -> tuple[dict, dict]:
    """On the mesh: `split` over `data` by this axis, unless it makes no whole waves; `shared` everywhere."""
    everywhere = sharding.replicated(model.mesh)
    whole_waves = len(split["suffix_start"]) % model.wave == 0 or axis > 0
    over_data = sharding.batch_sharding(model.mesh, axis=axis) if whole_waves else everywhere
    return sharding.place(split, over_data), sharding.place(shared, everywhere)


def context_size(tokens: int) -> int:
    """The padded number of visual tokens of a context that holds `tokens`."""
    return bucket(tokens, _CONTEXT_STEP)


def suffix_size(tokens: int) -> int:
    """The padded length of questions of at most so many tokens after the video; subtitles among them make thousands."""
    return bucket(tokens, _SUFFIX_STEP, 4)


def question_rows(questions: int) -> int:
    """Rows that a scan has for so many questions: one more costs it little, a program of its own takes minutes."""
    return bucket(questions, 1, 2)


def filled_up(per_question: list) -> list:
    """What every question of a scan has, and again what the last one has for the rows that are left over."""
    return per_question + per_question[-1:] * (question_rows(len(per_question)) - len(per_question))


def _visual(contexts: list[ContextTokens], size: int):
    first = contexts[0].features
    if isinstance(first, jax.Array) or (len(contexts) == 1 and len(first) == size):
        return first[None]
    visual = np.zeros((len(contexts), size, first.shape[1]), first.dtype)
    for row, context in zip(visual, contexts, strict=True):
        row[: len(context.features)] = context.features
    return visual


def _padded(array: np.ndarray, size: int, axis: int, fill=0) -> np.ndarray:
    widths = [(0, size - array.shape[axis] if a == axis else 0) for a in range(array.ndim)]
    return np.pad(array, widths, constant_values=fill)


def _context_positions(prefix: int, context: ContextTokens, size: int) -> np.ndarray:
    return np.concatenate([_text_ids(0, prefix), _padded(context.position_ids, size, 1)], 1)


def _query_rows(prompt: Prompt, T: int, queries: str) -> np.ndarray:
    """Rows of the padded suffix whose attention counts as relevance: bool[T]."""
    length = len(prompt.suffix_ids)
    first, last = {"after_vision": (0, length), "question": prompt.question_span, "last": (length - 1, length)}[queries]
    rows = np.arange(T)
    return (first <= rows) & (rows < last)


def _option_ids(prompts: list[Prompt]) -> np.ndarray:
    widest = round_up(max(1, *(len(p.letter_ids) for p in prompts)), OPTION_STEP)
    return np.stack([_padded(np.asarray(p.letter_ids, np.int32), widest, 0, -1) for p in prompts])


def blind_replies(model, video, prompts, config) -> list[Reply]:
    """What the model answers to each question, as in a group pass, from a prompt without visual tokens."""
    nothing = ContextTokens(np.zeros((0, video.features.shape[-1]), video.features.dtype), np.zeros((3, 0), np.int32))
    batch = prompt_batch(model, video, [nothing], filled_up(prompts), config)
    spec = answer_spec(model, max(group_limit(p, config) for p in prompts), config)
    out = run_and_read(model, batch, spec)
    return [reply(out, 0, q, config) for q in range(len(prompts))]


def final_reply(model, video, context, prompt, config, room: int = 0) -> Reply:
    """Step 11: answers one question from one context of chosen tokens, padded to hold at least `room` of them."""
    size = context_size(max(room, context.position_ids.shape[1]))
    batch = prompt_batch(model, video, [context], [prompt], config, size, config.max_answer_tokens)
    spec = answer_spec(model, config.max_answer_tokens, config).final(config)
    return reply(run_and_read(model, batch, spec), 0, 0, config)


def run_and_read(model: Model, batch: PromptBatch, spec: PassSpec, keep_logits=True) -> dict[str, np.ndarray]:
    """What `run_prompts` returns, on the host."""
    out = to_read(run_prompts(model.module.text, batch, spec), keep_logits)
    return jax.device_get(sharding.everywhere(out, model.mesh))


def to_read(out: dict[str, jax.Array], keep_logits: bool) -> dict[str, jax.Array]:
    """What the host reads of the outputs of passes."""
    return {name: value for name, value in out.items() if keep_logits or name != "first_logits"}
