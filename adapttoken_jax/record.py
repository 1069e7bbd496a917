"""What is written down of a run: the `Result`, and the arrays of the trace."""

import dataclasses

import numpy as np

from adapttoken_jax import costs, result
from adapttoken_jax.loading import Model
from adapttoken_jax.run import Outcome, Plan, Run, Selected, option_probabilities
from adapttoken_jax.scan import full_position_ids, group_limit, group_position_ids, read_answer
from adapttoken_jax.selection import option_consensus


def make_result(run: Run, outcome: Outcome, trace) -> result.Result:
    """The `Result` of one concluded run; `trace` is what `make_trace` gave, or None."""
    selected, final = outcome.selected, outcome.reply
    text, option = read_answer(run.model, run.prompt, final)
    slots, rows, cols = selected.tokens.T
    return result.Result(
        answer=text,
        option=option,
        option_probabilities=option_probabilities(run.prompt, final.option_logits),
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
    said = [list(option_probabilities(run.prompt, v.reply.option_logits).values()) for v in run.scan.visits]
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
        sampled_frames=len(clip.frame_indices), slots=clip.grid[0], grid=clip.grid, tokens=clip.tokens,
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
        result.GroupResult(index=g, slots=slots, times_s=run.plan.clip.slot_times[slots], visited=g in visits,
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
        return result.Stop(False, f"answered directly from all {run.plan.clip.tokens} tokens", 0, 0)
    reason = run.scan.reason or "all groups visited"
    return result.Stop(bool(run.scan.reason), reason, len(run.scan.visits), len(run.plan.groups))


def _cost(run: Run, outcome: Outcome) -> result.Cost:
    """Every pass that this question needed: its groups, the question alone, asking again, the final answer."""
    model, (_, height, width) = run.model.config, run.plan.clip.grid
    prefix, suffix = len(run.prompt.prefix_ids), len(run.prompt.suffix_ids)
    steps = lambda said, limit: min(len(said.answer_ids), limit - 1)  # after the first token, that which ends included
    in_group, most = group_limit(run.prompt, run.config), run.config.max_answer_tokens
    visits = [(len(v.relevance), steps(v.reply, in_group)) for v in run.scan.visits] if run.scan else []
    kept = lambda tokens: costs.pruned(model, run.config, prefix, tokens)
    flops = sum(costs.prompt_flops(model, prefix + n, suffix, answer, kept(n)) for n, answer in visits)
    passes = [(0, steps(run.blind, in_group))] if run.blind else []
    answered = [*(asked for asked in run.asked.values() if asked is not outcome), outcome]
    passes += [(len(each.selected.tokens), steps(each.reply, most)) for each in answered]
    flops += sum(costs.prompt_flops(model, prefix + n, suffix, answer) for n, answer in passes)
    return result.Cost(
        seconds=result.Seconds(**run.seconds),
        visual_tokens_prefilled=sum(n for n, _ in visits + passes),
        flops=flops + costs.vision_flops(model, run.video.encoded, height, width),
    )


def make_trace(run: Run, outcome: Outcome) -> dict[str, np.ndarray]:
    """The arrays of `result.TRACE_ARRAYS`; what is padding or not visited is NaN, -1 for integers, 0 in `budget`."""
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
