"""AdaptToken in one read: sample → encode → scan groups → allocate the budget → select tokens → answer.

Steps are numbered as in the paper's algorithm. The comparison arms differ in one place each: `flexselect` gives every
group the same budget and keeps all it selects, `uniform` samples only as many frames as the budget holds, `full` keeps
everything. Options beyond the paper are off by default; with them off nothing of them is computed.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from adapttoken_jax import costs, result
from adapttoken_jax.config import METHODS, AdaptTokenConfig, ModelConfig, read_model_config
from adapttoken_jax.encoding import Progress, VisualTokens, encode_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import Model
from adapttoken_jax.prompt import Prompt, build_prompt, check_question
from adapttoken_jax.scan import (
    ContextTokens,
    Reply,
    Scan,
    Visit,
    agreed_answer,
    blind_replies,
    final_reply,
    full_position_ids,
    group_position_ids,
    read_answer,
    visit_groups,
)
from adapttoken_jax.selection import (
    StopRule,
    adaptive_temperature,
    allocate_budget,
    candidate_count,
    coverage_count,
    coverage_tokens,
    debias_relevance,
    equal_budget,
    group_slots,
    group_weights,
    option_consensus,
    remove_redundant,
    top_tokens,
)
from adapttoken_jax.video import Clip, plan_clip, probe


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do, known before any work: the sampled clip and the groups (none: answer directly)."""

    clip: Clip
    tokens_per_slot: int
    groups: list[np.ndarray]

    @property
    def tokens(self) -> int:
        """Visual tokens of the whole clip."""
        return self.clip.grid[0] * self.tokens_per_slot


@dataclasses.dataclass(frozen=True)
class Selected:
    """Steps 8 to 10 for one question.

    Attributes:
      weights: float64[v], softmax weight per visited group, in visiting order.
      budgets: int[v], tokens allotted to it, those of the coverage floor included.
      candidates: int64[n, 3], (slot, row, column) before redundancy removal, in video order.
      tokens: int64[B, 3], the survivors, in video order.
    """

    weights: np.ndarray
    budgets: np.ndarray
    candidates: np.ndarray
    tokens: np.ndarray


def plan_run(model: ModelConfig, video, config: AdaptTokenConfig, method: str) -> Plan:
    """Steps 1 to 3 and 12: which frames, how large, which groups.

    Raises:
      UserError: a video that cannot be read, an unknown method, or a budget that cannot hold what it must.
    """
    if method not in METHODS:
        raise UserError(f"--method={method}: choose one of {', '.join(METHODS)}")
    info, grouped = probe(video), method in ("adapttoken", "lite", "flexselect")

    def sample(max_frames, context_frames):
        return plan_clip(info, model.vision, preset=config.preset, fps=config.fps, max_frames=max_frames,
                         max_pixels=config.max_pixels, context_frames=context_frames)  # fmt: skip

    frames = model.vision.temporal_patch
    clip = sample(config.max_frames, config.slots_per_group * frames if method != "full" else config.max_frames)
    per_slot = clip.grid[1] * clip.grid[2] // model.vision.merge**2
    if method == "uniform" and clip.grid[0] * per_slot > config.budget:
        if config.budget < per_slot:
            raise UserError(
                f"--budget={config.budget}: one slot of this video has {per_slot} tokens; allow at least that"
            )
        clip = sample(config.budget // per_slot * frames, config.max_frames)
        per_slot = clip.grid[1] * clip.grid[2] // model.vision.merge**2
    groups = group_slots(clip.grid[0], config.slots_per_group)
    if not grouped or len(groups) == 1 or clip.grid[0] * per_slot <= config.budget:
        groups = []
    _check_minimum(config, len(groups))
    return Plan(clip, per_slot, groups)


def _check_minimum(config: AdaptTokenConfig, groups: int) -> None:
    shared = config.budget - coverage_count(config.coverage, config.budget)
    if groups * config.min_tokens_per_group > shared:
        beside = f" beside --coverage={config.coverage:g}" if shared < config.budget else ""
        enough = math.ceil(groups * config.min_tokens_per_group / (1 - config.coverage))
        raise UserError(
            f"--budget={config.budget}: less than --min_tokens_per_group={config.min_tokens_per_group} for each of "
            f"{groups} groups{beside}; raise the budget to {enough}"
        )


def answer(
    model: Model,
    video,
    question: str | Sequence[str],
    options: Sequence | None = None,
    config: AdaptTokenConfig | None = None,
    method: str = "adapttoken",
    *,
    system: str | None = None,
    trace: bool = False,
    abstain_above: float | None = None,
    deadline: float | None = None,
    on_progress: Progress | None = None,
) -> result.Result | list[result.Result]:
    """Answers a question about a video, or several in one scan.

    Args:
      model: from `load`.
      video: a path, or `video.Frames` in memory.
      question: one question, or a list of them; the video is then encoded and scanned once for all.
      options: the answer options of the question (None: an open question); for a list of questions, one entry each.
      config: None is the model's preset; `AdaptTokenConfig.for_model` starts from it.
      method: one of `config.METHODS`.
      system: replaces the default system message.
      trace: keep the arrays of `--trace` in `Result.trace`.
      abstain_above: nats; an answer with a higher entropy is replaced by `result.NOT_FOUND`, its option by None.
      deadline: seconds after the call at which no further group is visited, whatever the method; the answer comes from
        those visited, at least one wave. Encoding the video and the final pass are not cut short. None: no deadline.
      on_progress: called with (stage, done, total).

    Returns:
      A `Result`, or a list of them for a list of questions.

    Raises:
      UserError: something about the video, the question or the settings that the user can mend.
    """
    begin = time.perf_counter()
    questions = [question] if isinstance(question, str) else list(question)
    choices = [options] if isinstance(question, str) else list(options or [None] * len(questions))
    if not questions or len(choices) != len(questions):
        raise UserError(f"options: give one entry per question ({len(questions)}), None for an open one")
    config = AdaptTokenConfig.for_model(model.config) if config is None else config.resolve(model.config)
    prompts = [build_prompt(model.tokenizer, q, o, system) for q, o in zip(questions, choices, strict=True)]
    _check_limits(abstain_above, deadline)
    plan = plan_run(model.config, video, config, method)
    tokens = encode_video(model, plan.clip, trace, on_progress)
    time_is_up = lambda: deadline is not None and time.perf_counter() - begin >= deadline
    runs = scan_video(model, plan, tokens, prompts, config, method, time_is_up, on_progress)
    results = [_answered(run, begin, trace) for run in runs]
    if abstain_above is not None:
        results = [result.abstain(each, abstain_above) for each in results]
    return results[0] if isinstance(question, str) else results


def _check_limits(abstain_above: float | None, deadline: float | None) -> None:
    for name, value in (("abstain_above", abstain_above), ("deadline", deadline)):
        if value is not None and not value >= 0:
            raise UserError(f"--{name}={value}: must be at least 0")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Steps 8 to 11 for one question: the tokens selected, their M-RoPE ids int32[3, B], and the answer from them."""

    selected: Selected
    position_ids: np.ndarray
    reply: Reply


@dataclasses.dataclass(frozen=True)
class Run:
    """One question on its way from the scan to the result.

    Attributes:
      scan: None where the answer is direct.
      seconds: wall seconds per stage so far.
      blind: the answer to the question alone, if the stop rule asked for it.
      asked: {groups visited: outcome} of the times that the stop rule asked again over the tokens selected so far.
    """

    model: Model
    plan: Plan
    video: VisualTokens
    config: AdaptTokenConfig
    method: str
    prompt: Prompt
    scan: Scan | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    blind: Reply | None = None
    asked: dict[int, Outcome] = dataclasses.field(default_factory=dict)

    def after(self, visits: list[Visit]) -> "Run":
        """This run as if the scan had ended with these visits."""
        return dataclasses.replace(self, scan=Scan(visits, ""))


def scan_video(
    model: Model,
    plan: Plan,
    tokens: VisualTokens,
    prompts: list[Prompt],
    config: AdaptTokenConfig,
    method: str,
    time_is_up: Callable[[], bool] = lambda: False,
    on_progress: Progress | None = None,
) -> list[Run]:
    """Steps 3 to 7 for all questions of a video: one `Run` each, ready for `conclude`."""
    begin = time.perf_counter()
    runs = [Run(model, plan, tokens, config, method, prompt) for prompt in prompts]
    scans = [None] * len(prompts)
    if plan.groups:
        if method == "lite" and config.stop_gain:
            blind = blind_replies(model, tokens, prompts, config)
            runs = [dataclasses.replace(run, blind=each) for run, each in zip(runs, blind, strict=True)]
        stop = (lambda q, visits: _stop_reason(runs[q], visits)) if method == "lite" else None
        scans = visit_groups(model, tokens, prompts, config, stop, time_is_up, on_progress)
    seconds = {**tokens.seconds, "groups": time.perf_counter() - begin}
    return [dataclasses.replace(run, scan=scan, seconds=dict(seconds)) for run, scan in zip(runs, scans, strict=True)]


def _stop_reason(run: Run, visits: list[Visit]) -> str:
    """Step 7 after these visits. An answer asked for on the way is kept in `run.asked`."""

    def ask_again() -> float:
        run.asked[len(visits)] = conclude(run.after(visits))
        return run.asked[len(visits)].reply.entropy

    return StopRule.of(run.config).reason(
        [v.reply.entropy for v in visits], [agreed_answer(run.model, run.prompt, v.reply) for v in visits],
        blind=run.blind.entropy if run.blind else None, rerun=ask_again,
    )  # fmt: skip


def conclude(run: Run) -> Outcome:
    """Steps 8 to 11 for one question."""
    everything = run.video.coordinates(np.arange(run.plan.clip.grid[0]))
    empty = np.zeros(0)
    selected = select(run) if run.scan else Selected(empty, empty.astype(int), everything, everything)
    renumber = run.config.final_positions == "compact" and run.scan is not None
    ids = run.video.position_ids(selected.tokens, len(run.prompt.prefix_ids), renumber)
    context = ContextTokens(run.video.gather(selected.tokens), ids)
    return Outcome(selected, ids, final_reply(run.model, run.video, context, run.prompt, run.config))


def _answered(run: Run, begin: float, trace: bool) -> result.Result:
    """The result of a scanned run; where the stop rule has just asked over the same visits, that answer stands."""
    final_begin = time.perf_counter()
    outcome = run.asked.get(len(run.scan.visits)) if run.scan else None
    outcome = outcome or conclude(run)
    now = time.perf_counter()
    run.seconds.update(final=now - final_begin, total=now - begin)
    return _result(run, outcome, _trace(run, outcome) if trace else None)


def select(run: Run) -> Selected:
    """Steps 8 to 10: budget per group, most relevant tokens of each, redundant ones dropped, video order restored."""
    # In the order of the video's groups, to which ties in the budget refer; budgets go back to visiting order.
    order = np.argsort([v.index for v in run.scan.visits])
    visits = [run.scan.visits[i] for i in order]
    relevance = [_relevance_of(run, v) for v in visits]
    weights, budgets, covering = _budgets(run, visits, relevance)
    chosen = [
        np.flatnonzero(top_tokens(np.where(own, np.nan, r)[None], [b])[0])
        for r, b, own in zip(relevance, budgets, covering, strict=True)
    ]
    budgets = budgets + [own.sum() for own in covering]
    back = np.argsort(order)
    floor = _coordinates(run, visits, [np.flatnonzero(own) for own in covering])
    candidates = _coordinates(run, visits, chosen)
    by_place = np.lexsort(candidates.T[::-1])
    candidates = candidates[by_place]
    kept = np.ones(len(candidates), bool)
    if run.method != "flexselect":
        score = np.concatenate([w * r[c] for w, r, c in zip(weights, relevance, chosen, strict=True)])[by_place]
        kept = _without_redundancy(run, visits, chosen, by_place, candidates, score, run.config.budget - len(floor))
    return Selected(
        weights[back], budgets[back], _in_video_order(candidates, floor), _in_video_order(candidates[kept], floor)
    )


def _relevance_of(run: Run, visit: Visit) -> np.ndarray:
    if not run.config.debias or run.method == "flexselect":
        return visit.relevance
    return debias_relevance(visit.relevance.reshape(-1, run.video.per_slot)).reshape(-1)


def _budgets(run: Run, visits, relevance) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Step 8: weights [v], tokens to select per group [v], and which tokens of each are set aside for coverage."""
    config = run.config
    capacity = np.array([len(r) for r in relevance])
    if run.method == "flexselect":
        equal, nothing = np.full(len(visits), 1 / len(visits)), [np.zeros(n, bool) for n in capacity]
        return equal, equal_budget(capacity, min(config.budget, capacity.sum())), nothing
    certainty = np.array([v.reply.certainty for v in visits])
    target = config.temperature_target
    temperature = adaptive_temperature(certainty, target) if target else config.temperature
    weights = group_weights(certainty, temperature)
    covering = _cover(run, visits, relevance, weights)
    reserved = np.array([own.sum() for own in covering])
    total = candidate_count(config.budget - reserved.sum(), config.over_selection, (capacity - reserved).sum())
    budgets = allocate_budget(certainty, capacity - reserved, total, temperature, config.min_tokens_per_group)
    return weights, budgets, covering


def _cover(run: Run, visits, relevance, weights) -> list[np.ndarray]:
    """The coverage floor: per group, which tokens are the best of their stretch of time."""
    slots = np.concatenate([np.repeat(v.slots, run.video.per_slot) for v in visits])
    score = np.concatenate([w * r for w, r in zip(weights, relevance, strict=True)])
    count = coverage_count(run.config.coverage, run.config.budget)
    marked = coverage_tokens(slots, score, run.plan.clip.grid[0], count)
    return np.split(marked, np.cumsum([len(r) for r in relevance])[:-1])


def _coordinates(run: Run, visits, chosen) -> np.ndarray:
    """(slot, row, column) of the chosen tokens of each group, int64[n, 3]."""
    return np.concatenate([run.video.coordinates(v.slots)[c] for v, c in zip(visits, chosen, strict=True)])


def _in_video_order(tokens: np.ndarray, more: np.ndarray) -> np.ndarray:
    together = np.concatenate([tokens, more])
    return together[np.lexsort(together.T[::-1])]


def _without_redundancy(run: Run, visits, chosen, by_place, candidates, score, keep: int) -> np.ndarray:
    """Step 10: which candidates stay, bool[n]."""
    config = run.config
    if len(candidates) <= keep:
        return np.ones(len(candidates), bool)
    if config.similarity == "projector":
        features = run.video.gather(candidates)
    else:
        features = np.concatenate([v.hidden[c] for v, c in zip(visits, chosen, strict=True)])[by_place]
    positions = np.column_stack([run.video.slot_times[candidates[:, 0]], candidates[:, 1:]])
    return remove_redundant(
        features.astype(np.float32), positions, score, keep, kernel=config.proximity, scale=config.proximity_scale
    )


def option_probabilities(prompt: Prompt, first_logits: np.ndarray) -> dict[str, float] | None:
    """Probability of each letter as the first token, among the letters."""
    if not prompt.letters:
        return None
    logits = first_logits[list(prompt.letter_ids)].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return dict(zip(prompt.letters, (weights / weights.sum()).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What is written down
# ---------------------------------------------------------------------------------------------------------------------


def _result(run: Run, outcome: Outcome, trace) -> result.Result:
    selected, final = outcome.selected, outcome.reply
    text, option = read_answer(run.model, run.prompt, final)
    slots, rows, cols = selected.tokens.T
    return result.Result(
        answer=text,
        option=option,
        option_probabilities=option_probabilities(run.prompt, final.first_logits),
        entropy=final.entropy,
        method=run.method,
        video=_video_summary(run.plan),
        groups=_group_results(run, selected),
        selected=result.Selection(len(selected.tokens), len(selected.candidates), slots, rows, cols),
        stop=_stop(run),
        cost=_cost(run, outcome),
        config=dataclasses.asdict(run.config),
        model=_model_summary(run.model),
        versions=result.library_versions(),
        relevance=_relevance(run) if run.scan else None,
        consensus=_consensus(run, selected.weights),
        trace=trace,
    )


def _consensus(run: Run, weights: np.ndarray) -> dict[str, float] | None:
    """The second answer: the visited groups' option probabilities, mixed by the weights of the budget."""
    if not run.scan or not run.prompt.letters:
        return None
    said = [list(option_probabilities(run.prompt, v.reply.first_logits).values()) for v in run.scan.visits]
    return dict(zip(run.prompt.letters, option_consensus(said, weights).tolist(), strict=True))


def _relevance(run: Run) -> np.ndarray:
    """Relevance of every group's tokens, float32[G, K M]; NaN at padding and where not visited."""
    relevance = np.full((len(run.plan.groups), run.config.slots_per_group * run.video.per_slot), np.nan, np.float32)
    for visit in run.scan.visits if run.scan else ():
        relevance[visit.index, : len(visit.relevance)] = visit.relevance
    return relevance


def _video_summary(plan: Plan) -> result.VideoSummary:
    clip = plan.clip
    return result.VideoSummary(
        path=clip.info.path, duration_s=clip.info.duration_s, source_fps=clip.info.source_fps,
        sampled_frames=len(clip.frame_indices), slots=clip.grid[0], grid=clip.grid, tokens=plan.tokens,
    )  # fmt: skip


def _model_summary(model: Model) -> result.ModelSummary:
    mesh = None if model.mesh is None else dict(model.mesh.shape)
    return result.ModelSummary(model.path, model.config.model_type, model.dtype.name, mesh)


def _group_results(run: Run, selected: Selected) -> list[result.GroupResult]:
    visits = {} if run.scan is None else {v.index: place for place, v in enumerate(run.scan.visits)}
    group_of_slot = {int(slot): g for g, slots in enumerate(run.plan.groups) for slot in slots}
    kept = np.bincount([group_of_slot[int(s)] for s in selected.tokens[:, 0]] if group_of_slot else [],
                       minlength=len(run.plan.groups))  # fmt: skip
    return [
        result.GroupResult(index=g, slots=slots, times_s=run.video.slot_times[slots], visited=g in visits,
                           selected=int(kept[g]), **_visited(run, selected, visits.get(g)))
        for g, slots in enumerate(run.plan.groups)
    ]  # fmt: skip


def _visited(run: Run, selected: Selected, place: int | None) -> dict:
    if place is None:
        return {}
    reply = run.scan.visits[place].reply
    text, option = read_answer(run.model, run.prompt, reply)
    return {
        "entropy": reply.entropy, "certainty": reply.certainty, "answer": text, "option": option,
        "weight": float(selected.weights[place]), "budget": int(selected.budgets[place]),
    }  # fmt: skip


def _stop(run: Run) -> result.Stop:
    if run.scan is None:
        return result.Stop(False, f"answered directly from all {run.plan.tokens} tokens", 0, 0)
    reason = run.scan.reason or "all groups visited"
    return result.Stop(bool(run.scan.reason), reason, len(run.scan.visits), len(run.plan.groups))


def _cost(run: Run, outcome: Outcome) -> result.Cost:
    """Every pass that this question needed: its groups, the question alone, asking again, the final answer."""
    model, (slots, height, width) = run.model.config, run.plan.clip.grid
    prefix, suffix = len(run.prompt.prefix_ids), len(run.prompt.suffix_ids)
    passes = [(len(v.relevance), len(v.reply.answer_ids)) for v in run.scan.visits] if run.scan else []
    passes += [(0, len(run.blind.answer_ids))] if run.blind else []
    answered = [*(asked for asked in run.asked.values() if asked is not outcome), outcome]
    passes += [(len(each.selected.tokens), len(each.reply.answer_ids)) for each in answered]
    flops = sum(costs.prompt_flops(model, prefix + tokens, suffix, answer) for tokens, answer in passes)
    return result.Cost(
        seconds=result.Seconds(**run.seconds),
        visual_tokens_prefilled=sum(tokens for tokens, _ in passes),
        flops=flops + costs.vision_flops(model, slots, height, width),
    )


def _trace(run: Run, outcome: Outcome) -> dict[str, np.ndarray]:
    """The arrays of `result.TRACE_ARRAYS`; what was not visited or is padding is NaN, or -1 for integers."""
    selected, final = outcome.selected, outcome.reply
    clip, video, groups = run.plan.clip, run.video, run.plan.groups
    G, K = len(groups), run.config.slots_per_group
    P, T, V = len(run.prompt.prefix_ids), len(run.prompt.suffix_ids), run.model.config.text.vocab
    tokens = K * video.per_slot
    out = {
        "frame_indices": clip.frame_indices,
        "frame_times": clip.frame_times.astype(np.float32),
        "grid": np.array(clip.grid),
        "patches": video.patches,
        "visual_features": video.features.astype(np.float32),
        "groups": np.array([np.pad(slots, (0, K - len(slots)), constant_values=-1) for slots in groups], int)
        .reshape(G, K),
        "prefix_ids": np.array(run.prompt.prefix_ids),
        "suffix_ids": np.array(run.prompt.suffix_ids),
        "group_position_ids": np.full((G, 3, P + tokens + T), -1),
        "group_first_logits": np.full((G, V), np.nan, np.float32),
        "group_entropy": np.full(G, np.nan, np.float32),
        "group_certainty": np.full(G, np.nan, np.float32),
        "group_relevance": _relevance(run),
        "budget": np.zeros(G, int),
        "candidates": selected.candidates,
        "selected": selected.tokens,
        "final_position_ids": full_position_ids(outcome.position_ids, run.prompt, run.config, video),
        "final_first_logits": final.first_logits.astype(np.float32),
        "answer_ids": final.answer_ids,
    }  # fmt: skip
    for place, visit in enumerate(run.scan.visits if run.scan else ()):
        g = visit.index
        visual = group_position_ids(video, visit.slots, run.prompt, run.config)
        ids = full_position_ids(visual, run.prompt, run.config, video)
        out["group_position_ids"][g, :, : ids.shape[1]] = ids
        out["group_first_logits"][g] = visit.reply.first_logits
        out["group_entropy"][g] = visit.reply.entropy
        out["group_certainty"][g] = visit.reply.certainty
        out["budget"][g] = selected.budgets[place]
    return out


def dry_run(directory, video, overrides: dict, method: str, question: str | None = None, options=None) -> dict:
    """What a run would do, from the checkpoint's `config.json` and the video's header alone: no weights, no decoding.

    Returns:
      A flat dictionary of numbers and texts: frames, size, grid, tokens, groups, budget and the video's length.

    Raises:
      UserError: as `answer`.
    """
    model = read_model_config(directory)
    config = AdaptTokenConfig.for_model(model, **overrides)
    if question is not None:
        check_question(question, options)
    plan = plan_run(model, video, config, method)
    clip = plan.clip
    return {
        "duration_s": round(clip.info.duration_s, 3),
        "source_fps": round(clip.info.source_fps, 3),
        "sampled_frames": len(clip.frame_indices),
        "frame_size": f"{clip.width}x{clip.height}",
        "grid": list(clip.grid),
        "tokens_per_slot": plan.tokens_per_slot,
        "tokens": plan.tokens,
        "groups": len(plan.groups),
        "slots_per_group": config.slots_per_group if plan.groups else clip.grid[0],
        "reference_layer": config.reference_layer,
        "budget": min(config.budget, plan.tokens) if plan.groups else plan.tokens,
        "method": method,
    }
