"""AdaptToken in one read: sample → encode → scan groups → allocate the budget → select tokens → answer.

Steps are numbered as in the paper's algorithm. The comparison arms differ in one place each: `flexselect` gives every
group the same budget and keeps all it selects, `uniform` samples only as many frames as the budget holds, `full` keeps
everything. Options beyond the paper are off by default; with them off nothing of them is computed.
"""

import contextlib
import dataclasses
import math
import numbers
import os
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from adapttoken_jax import device_scan, device_survivors, memory, result, scan
from adapttoken_jax.config import METHODS, AdaptTokenConfig, ModelConfig, read_model_config
from adapttoken_jax.encoding import OnProgress, VisualTokens, encode_video, stream_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.feature_cache import FeatureCache
from adapttoken_jax.geometry import round_up
from adapttoken_jax.loading import Model
from adapttoken_jax.prompt import Ask, Prompt, build_prompt, check_question
from adapttoken_jax.record import make_result, make_trace
from adapttoken_jax.run import Outcome, Plan, Run, Selected
from adapttoken_jax.scan import ContextTokens, Stopping, Visit, agreed_answer, blind_replies, final_reply
from adapttoken_jax.selection import StopRule, coverage_count, group_slots, visiting_order
from adapttoken_jax.sharding import agreed
from adapttoken_jax.streaming import Part, one_pass, reading_order
from adapttoken_jax.survivors import select
from adapttoken_jax.video import plan_clip, probe

# The loop over groups: compiled, or its reference twin with one compiled pass per wave. Same visits, same results.
LOOPS = {"device": device_scan.visit_groups, "host": scan.visit_groups}


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
    # Fewer frames may each become larger, and then even fewer fit; every round has fewer slots than the one before.
    while method == "uniform" and clip.tokens > config.budget:
        least = clip.tokens_per_slot
        if config.budget < least:
            raise UserError(f"--budget={config.budget}: one slot of this video has {least} tokens; allow at least that")
        clip = sample(config.budget // least * frames, config.max_frames)
    groups = group_slots(clip.grid[0], config.slots_per_group)
    if not grouped or len(groups) == 1 or clip.tokens <= config.budget:
        groups = []
    if method != "flexselect":
        _check_minimum(config, [len(slots) * clip.tokens_per_slot for slots in groups])
    return Plan(clip, groups)


def _check_minimum(config: AdaptTokenConfig, capacity: list[int]) -> None:
    shared = config.budget - coverage_count(config.coverage, config.budget)
    least = sum(min(config.min_tokens_per_group, tokens) for tokens in capacity)
    if least > shared:
        beside = f" beside --coverage={config.coverage:g}" if shared < config.budget else ""
        enough = math.ceil(least / (1 - config.coverage))
        raise UserError(
            f"--budget={config.budget}: less than --min_tokens_per_group={config.min_tokens_per_group} for each of "
            f"{len(capacity)} groups{beside}; raise the budget to {enough}"
        )


@memory.explained(*memory.ANSWERING)
def answer(
    model: Model,
    video,
    question: str | Ask | Sequence[str | Ask],
    options: Sequence | None = None,
    config: AdaptTokenConfig | None = None,
    method: str = "adapttoken",
    *,
    system: str | None = None,
    trace: bool = False,
    abstain_above: float | None = None,
    deadline: float | None = None,
    feature_cache: str | os.PathLike | FeatureCache | None = None,
    loop: str = "device",
    on_progress: OnProgress | None = None,
) -> result.Result | list[result.Result]:
    """Answers a question about a video, or several in one scan.

    Args:
      model: from `load`.
      video: a path, or `video.Frames` in memory.
      question: one question, or a list of them; the video is then encoded and scanned once for all. An `Ask` is put
        to the letter and brings its own options.
      options: the answer options of the question (None: an open question); for a list of questions, one entry each.
      config: None is the model's preset; `AdaptTokenConfig.for_model` starts from it.
      method: one of `config.METHODS`.
      system: replaces the default system message.
      trace: keep the arrays of `--trace` in `Result.trace`.
      abstain_above: nats; an answer with a higher entropy is replaced by `result.NOT_FOUND`, its option by None.
      deadline: seconds after the call at which no further group is visited, whatever the method; the answer comes from
        those visited, at least one wave. Encoding the video and the final pass are not cut short. None: no deadline.
      feature_cache: a directory that keeps vision features for later calls, or a `FeatureCache`, which reads the
        weights once for many calls.
      loop: `device`: the groups run inside one compiled loop; `host`: one compiled pass each, to compare with.
      on_progress: called with (stage, done, total).

    Returns:
      A `Result`, or a list of them for a list of questions.

    Raises:
      UserError: something about the video, the question or the settings that the user can mend.
    """
    begin, single = time.perf_counter(), question is None or isinstance(question, (str, Ask))
    _check_kinds(model, config)
    config = AdaptTokenConfig.for_model(model.config) if config is None else config.resolve(model.config)
    asked = [(question, options)] if single else _paired(question, options)
    prompts = [build_prompt(model.tokenizer, each, choices, system) for each, choices in asked]
    _check_limits(abstain_above, deadline)
    check_feature_cache(feature_cache, trace, model)
    if loop not in [*LOOPS]:
        raise UserError(f"loop={loop}: choose one of {', '.join(LOOPS)}")
    plan = plan_run(model.config, video, config, method)
    late = lambda: time.perf_counter() - begin >= deadline
    time_is_up = None if deadline is None else (lambda: agreed(late(), model.mesh))
    order = slot_order(model, plan, config, method, deadline)
    with _open_tokens(model, plan, order, trace, feature_cache, on_progress) as tokens:
        runs = scan_video(model, plan, tokens, prompts, config, method, time_is_up, on_progress, loop, trace)
        results = [answered(run, begin, trace) for run in runs]
    if abstain_above is not None:
        results = [result.abstain(each, abstain_above) for each in results]
    return results[0] if single else results


def _check_kinds(model, config) -> None:
    if not isinstance(model, Model):
        raise UserError("model: give what adapttoken_jax.load returns")
    if not isinstance(config, AdaptTokenConfig | None):
        raise UserError("config: give an adapttoken_jax.AdaptTokenConfig")


def _paired(questions, options) -> list[tuple]:
    """Each of a list of questions, with its options."""
    if not isinstance(questions, Sequence) or isinstance(questions, bytes) or not questions:
        raise UserError("question: give a text, an Ask, or a list of one or more of them")
    if not isinstance(options, Sequence | None):
        raise UserError("options: give a list with one entry per question")
    options = options or [None] * len(questions)
    if len(options) != len(questions):
        raise UserError(f"options: give one entry per question ({len(questions)}), None for an open one")
    return list(zip(questions, options, strict=True))


def _check_limits(abstain_above: float | None, deadline: float | None) -> None:
    for name, value in (("abstain_above", abstain_above), ("deadline", deadline)):
        if value is not None and not (isinstance(value, numbers.Real) and value >= 0):
            raise UserError(f"--{name}={value}: must be a number of at least 0")


def check_feature_cache(
    cache: str | os.PathLike | FeatureCache | None, trace: bool, model: Model | None = None
) -> None:
    """Raises `UserError` for a cache that a run, of this model, cannot use; makes the directory if it is missing."""
    if cache is not None and trace:
        raise UserError("--feature_cache: a trace needs every frame decoded; drop one of --feature_cache and --trace")
    if isinstance(cache, str | os.PathLike):
        result.made_directory("feature_cache", cache)
    elif not isinstance(cache, FeatureCache | None):
        raise UserError(f"feature_cache={cache!r}: give a directory or a FeatureCache")
    elif cache is not None and cache.model is not model:
        raise UserError("feature_cache: was made for another model; give each loaded model a FeatureCache of its own")


def slot_order(
    model: Model, plan: Plan, config: AdaptTokenConfig, method: str, deadline: float | None = None
) -> list[Part]:
    """In which order the slots of a video are best read."""
    if not plan.scanned:
        return one_pass(plan.clip)
    visits = [plan.groups[g] for g in visiting_order(len(plan.groups), config.group_order)]
    least = [config.stop_groups] if method == "lite" else []
    least += [config.give_up_groups + 1] if method == "lite" and config.give_up_groups else []
    least += [1] if deadline is not None else []
    at_least = round_up(min(least), model.wave) if least else None
    stride = StopRule.of(config).stride if method == "lite" and deadline is None else 1
    return reading_order(plan.clip, visits, at_least, config.slots_per_group * round_up(stride, model.wave))


def _open_tokens(model, plan, order, trace, cache, on_progress) -> contextlib.AbstractContextManager[VisualTokens]:
    """All tokens at once where the trace wants every array, else as they are asked for."""
    if trace:
        return contextlib.nullcontext(encode_video(model, plan.clip, trace, on_progress, scanned=plan.scanned))
    if cache is not None and not isinstance(cache, FeatureCache):
        cache = FeatureCache(cache, model)
    entry = cache.entry(plan.clip, plan.scanned) if cache else None
    return stream_video(model, plan.clip, order, on_progress, entry, plan.scanned)


def scan_video(
    model: Model,
    plan: Plan,
    tokens: VisualTokens,
    prompts: list[Prompt],
    config: AdaptTokenConfig,
    method: str,
    time_is_up: Callable[[], bool] | None = None,
    on_progress: OnProgress | None = None,
    loop: str = "device",
    keep_logits: bool = False,
) -> list[Run]:
    """Steps 3 to 7 for all questions of a video: one `Run` each, ready for `conclude`.

    `loop` is one of `LOOPS`; `keep_logits`, which a trace needs, is as in `scan.visit_groups`.
    Questions share a scan where the same words stand before the video; an `Ask` with a `system` of its own has others.
    """
    runs: dict[int, Run] = {}
    for prefix in dict.fromkeys(prompt.prefix_ids for prompt in prompts):
        own = {q: prompt for q, prompt in enumerate(prompts) if prompt.prefix_ids == prefix}
        given = (config, method, time_is_up, on_progress, loop, keep_logits)
        found = _one_scan(model, plan, tokens, [*own.values()], *given)
        runs |= zip(own, found, strict=True)
    return [runs[q] for q in range(len(prompts))]


def _one_scan(model, plan, tokens, prompts, config, method, time_is_up, on_progress, loop, keep_logits) -> list[Run]:
    if not plan.scanned:
        tokens.ensure(np.arange(plan.clip.grid[0]))
    begin, waited = time.perf_counter(), tokens.seconds["waiting"]
    runs = [Run(model, plan, tokens, config, method, prompt, loop=loop) for prompt in prompts]
    scans = [None] * len(prompts)
    if plan.scanned:
        if method == "lite" and config.stop_gain:
            blind = blind_replies(model, tokens, prompts, config)
            runs = [dataclasses.replace(run, blind=each) for run, each in zip(runs, blind, strict=True)]
        stop = _stopping(runs) if method == "lite" else None
        scans = LOOPS[loop](model, tokens, prompts, config, stop, time_is_up, on_progress, keep_logits)
    groups = time.perf_counter() - begin - (tokens.seconds["waiting"] - waited)
    seconds = {"decode": tokens.seconds["decode"], "vision": tokens.seconds["vision"], "groups": groups}
    return [dataclasses.replace(run, scan=scan, seconds=dict(seconds)) for run, scan in zip(runs, scans, strict=True)]


def _stopping(runs: list[Run]) -> Stopping:
    blind = [run.blind.entropy if run.blind else None for run in runs]
    return Stopping(StopRule.of(runs[0].config), blind, lambda q, visits: _stop_reason(runs[q], visits))


def _stop_reason(run: Run, visits: list[Visit]) -> str:
    """Step 7 after these visits, which begin with those of the call before; `run` keeps what was asked on the way."""
    run.answers.extend(agreed_answer(run.model, run.prompt, v.reply) for v in visits[len(run.answers) :])

    def ask_again() -> float:
        run.asked[len(visits)] = conclude(run.after(visits))
        return run.asked[len(visits)].reply.entropy

    return StopRule.of(run.config).reason(
        [v.reply.entropy for v in visits], run.answers, run.blind.entropy if run.blind else None, ask_again
    )


def conclude(run: Run) -> Outcome:
    """Steps 8 to 11 for one question."""
    return answer_from(run, *select_tokens(run))


def answer_from(run: Run, selected: Selected, features=None) -> Outcome:
    """Step 11: the answer from these tokens of the video. Where they are all of it there is nothing to renumber.

    `features` are theirs, as in `ContextTokens`; None reads them from the video.
    """
    features = run.video.gather(selected.tokens) if features is None else features
    renumber = run.config.final_positions == "compact" and len(selected.tokens) < run.plan.clip.tokens
    ids = run.video.position_ids(selected.tokens, len(run.prompt.prefix_ids), renumber)
    context = ContextTokens(features, ids)
    # Lite may select less than the budget; padded to it, every scanned video has the same final pass.
    room = run.config.budget if run.scan else 0
    return Outcome(selected, ids, final_reply(run.model, run.video, context, run.prompt, run.config, room))


def select_tokens(run: Run) -> tuple[Selected, jax.Array | None]:
    """Steps 8 to 10, and the survivors' features if they already lie on the device."""
    # On a CPU compiling costs more than a few selections save, and the NumPy twin skips pairs that are far apart.
    if run.scan and run.loop == "device" and jax.default_backend() != "cpu":
        return device_survivors.select(run)
    if run.scan:
        return select(run), None
    everything = run.video.coordinates(np.arange(run.plan.clip.grid[0]))
    return Selected(np.zeros(0), np.zeros(0, int), everything, everything), None


def answered(run: Run, begin: float, trace: bool = False) -> result.Result:
    """The result of a scanned run that began at `begin` (seconds of `time.perf_counter`).

    Where the stop rule has just asked over the same visits, that answer stands.
    """
    final_begin = time.perf_counter()
    outcome = run.asked.get(len(run.scan.visits)) if run.scan else None
    outcome = outcome or conclude(run)
    now = time.perf_counter()
    run.seconds.update(final=now - final_begin, total=now - begin)
    return make_result(run, outcome, make_trace(run, outcome) if trace else None)


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
        "tokens_per_slot": clip.tokens_per_slot,
        "tokens": clip.tokens,
        "groups": len(plan.groups),
        "slots_per_group": config.slots_per_group if plan.scanned else clip.grid[0],
        "reference_layer": config.reference_layer,
        "budget": min(config.budget, clip.tokens) if plan.scanned else clip.tokens,
        "method": method,
    }
