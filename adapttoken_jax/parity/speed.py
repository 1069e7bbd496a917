"""Both sides of a speed comparison: this library and the fast PyTorch version, on the same weights and patches.

A `Pair` holds one random model in both frameworks, one generated video and one question. Its stages are pairs of calls
that do the same work from the same inputs and end with their results on the host (features of visual tokens: where the
side keeps them). `agreement` holds the two results together; nothing should be timed before it has passed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from adapttoken_jax import costs, device_scan, parameters, passes, pipeline, scan, survivors
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens, chunk_slots
from adapttoken_jax.loading import Model
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.parity import pytorch_fast as fast
from adapttoken_jax.parity import pytorch_method as plain
from adapttoken_jax.parity.shapes import Shape, random_model
from adapttoken_jax.prompt import build_prompt
from adapttoken_jax.run import Outcome, Plan, Run
from adapttoken_jax.selection import group_slots
from adapttoken_jax.video import Clip, VideoInfo

FPS = 4.0
_OPTIONS = ("red", "green", "blue", "yellow")
_THINGS = ("star", "ring", "square", "triangle", "cross", "disc")

# Largest difference of a group's entropy in nats, and smallest share of selected tokens in common, at which results
# count as the same. bfloat16 keeps 8 bits: tokens near the end of a group's ranking change places.
TOLERANCES = {"float32": (1e-4, 0.99), "bfloat16": (0.05, 0.5)}


# ---------------------------------------------------------------------------------------------------------------------
# One model, twice
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """One model in both frameworks, one video, one question and further ones.

    Attributes:
      shape: sizes.
      model: ours.
      torch_model: the PyTorch one, same weights.
      plan: the video's clip and groups.
      patches: float32 [T, h w, features], generated.
      prompts: the question first, then the further ones.
      inputs: video and question as the PyTorch side takes them.
      config: settings of the method.
      chunk: slots per call of the vision tower, on both sides.
    """

    shape: Shape
    model: Model
    torch_model: fast.Model
    plan: Plan
    patches: np.ndarray
    prompts: list
    inputs: plain.MethodInputs
    config: AdaptTokenConfig
    chunk: int


def make_pair(shape: Shape, dtype: str, *, questions: int = 1, answer_tokens: int = 2, seed: int = 0) -> Pair:
    """Random weights and patches of a seed, on JAX's default device and on PyTorch's GPU if there is one."""
    model = random_model(shape.model, dtype, seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_model = fast.build_model(shape.model, torch_weights(model), getattr(torch, dtype), device)
    # The paper's settings, whatever the model's preset: what the fast PyTorch version has.
    config = AdaptTokenConfig(
        slots_per_group=shape.slots_per_group, budget=shape.budget, max_answer_tokens=answer_tokens
    ).resolve(shape.model)
    plan = make_plan(shape)
    things = [_THINGS[i % len(_THINGS)] for i in range(questions)]
    prompts = [build_prompt(model.tokenizer, f"What colour is the {thing}?", _OPTIONS) for thing in things]
    count = (plan.clip.grid[0], shape.grid[0] * shape.grid[1], shape.model.vision.patch_features)
    patches = np.random.default_rng(seed).standard_normal(count, np.float32)
    inputs = plain.MethodInputs(
        patches=patches.reshape(-1, count[-1]), grid=plan.clip.grid, frame_times=plan.clip.frame_times,
        seconds_per_slot=plan.clip.seconds_per_slot, prefix_ids=prompts[0].prefix_ids,
        suffix_ids=prompts[0].suffix_ids, question_span=prompts[0].question_span,
        letter_ids=list(prompts[0].letter_ids), eos_ids=model.tokenizer.eos,
    )  # fmt: skip
    return Pair(shape, model, torch_model, plan, patches, prompts, inputs, config, chunk_slots(model, plan.clip))


def torch_weights(model: Model) -> dict[str, torch.Tensor]:
    """Our parameters as tensors under the checkpoint's keys."""
    weights = {}
    for parameter in parameters.parameters(model.config):
        value = functools.reduce(getattr, parameter.path, model.module)[...]
        layers = [value] if parameter.layers is None else value
        for key, layer in zip(parameter.keys, layers, strict=True):
            weights[key] = _tensor(parameter.to_stored(np.asarray(layer)))
    return weights


def _tensor(array: np.ndarray) -> torch.Tensor:
    """NumPy's bfloat16 is an extension that PyTorch does not know; its bits are the same."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def make_plan(shape: Shape) -> Plan:
    """A video in memory of whole groups at `FPS` frames per second."""
    vision, slots = shape.model.vision, shape.slots_per_group * shape.groups
    frames = np.arange(slots * vision.temporal_patch)
    height, width = (side * vision.patch for side in shape.grid)
    info = VideoInfo(None, len(frames) / FPS, FPS, frames / FPS, frames, width, height)
    clip = Clip(
        info=info, frame_indices=frames, frame_times=info.times, height=height, width=width,
        grid=(slots, *shape.grid), seconds_per_slot=vision.temporal_patch / FPS, preset="qwen-vl-utils", vision=vision,
    )  # fmt: skip
    return Plan(clip, shape.grid[0] * shape.grid[1] // vision.merge**2, group_slots(slots, shape.slots_per_group))


# ---------------------------------------------------------------------------------------------------------------------
# Our side
# ---------------------------------------------------------------------------------------------------------------------


def encode(pair: Pair, slots: Sequence[int]) -> np.ndarray:
    """Features [n, M, D] of some slots, every call of the vision tower as large as in `encoding.encode_video`."""
    _, height, width = pair.plan.clip.grid
    size, parts = min(pair.chunk, len(slots)), []
    for start in range(0, len(slots), size):
        chunk = pair.patches[slots[start : start + size]]
        padded = np.pad(chunk, ((0, size - len(chunk)), (0, 0), (0, 0)))
        parts.append(passes.encode_slots(pair.model.module, padded, height, width))
    return np.concatenate([np.asarray(part) for part in parts])[: len(slots)]


def visual_tokens(pair: Pair, features: np.ndarray) -> VisualTokens:
    """The encoded video."""
    vision = pair.shape.model.vision
    seconds = {"decode": 0.0, "vision": 0.0, "waiting": 0.0}
    return VisualTokens(features, pair.plan.clip, vision.merge, vision.tokens_per_second, None, seconds)


def wave(pair: Pair) -> list[np.ndarray]:
    """Slots of the groups that run side by side in one pass, as in `device_scan`."""
    size = pair.shape.slots_per_group * pair.plan.tokens_per_slot
    return pair.plan.groups[: device_scan.side_by_side(pair.model, size)]


def pass_groups(pair: Pair, video: VisualTokens, questions: int = 1) -> dict[str, np.ndarray]:
    """Steps 4 to 6 for the first wave of groups and the first few questions: what `run_prompts` returned."""
    prompts = pair.prompts[:questions]
    contexts = [scan.group_context(video, slots, prompts, pair.config) for slots in wave(pair)]
    batch = scan.prompt_batch(pair.model, video, contexts, prompts, pair.config, len(contexts[0].features))
    return scan.run_and_read(pair.model, batch, scan.group_spec(pair.model, prompts, pair.config))


def prefill(pair: Pair, embeddings: jax.Array, position_ids: np.ndarray):
    """A plain prefill of prompts [B, S, D] with ids int [B, 3, S]: the caches, and logits [B, V] after the last token.

    Every layer runs on every row, as engines do it.
    """
    kernel = scan.group_spec(pair.model, pair.prompts[:1], pair.config).kernel
    return jax.block_until_ready(_prefill(pair.model.module, embeddings, jnp.asarray(position_ids), kernel=kernel))


@functools.partial(jax.jit, static_argnames="kernel")
@passes.exact
def _prefill(model: Qwen25VL, embeddings, position_ids, kernel):
    text = model.text
    valid = jnp.ones(embeddings.shape[:2], bool)
    last = model.config.text.layers - 1
    context, found = text.prefill(embeddings, position_ids, valid, keep_layer=last, kernel=kernel)
    return context, text.logits(found["kept"][:, -1])


def scan_once(pair: Pair, video: VisualTokens, questions: int = 1) -> list[Run]:
    """Steps 3 to 7 for the first few questions, as `pipeline.answer` runs them."""
    return pipeline.scan_video(pair.model, pair.plan, video, pair.prompts[:questions], pair.config, "adapttoken")


def answer(pair: Pair) -> tuple[Run, Outcome]:
    """The whole question, from patches to answer."""
    (run,) = scan_once(pair, visual_tokens(pair, encode(pair, np.arange(len(pair.patches)))))
    return run, pipeline.conclude(run)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------------


def agreement(pair: Pair) -> dict:
    """Answers the question on both sides and compares.

    Returns:
      "entropy_difference" (largest, nats), "selected_in_common" (share), "same_answer", "dtype", and "ok": within
      `TOLERANCES`, and in float32 the same answer.
    """
    run, outcome = answer(pair)
    theirs = fast.run(pair.torch_model, pair.inputs, pair.config, pair.chunk)
    ours = [visit.reply.entropy for visit in sorted(run.scan.visits, key=lambda visit: visit.index)]
    difference = float(np.max(np.abs(np.subtract(ours, [visit.entropy for visit in theirs.passes]))))
    both = set(map(tuple, outcome.selected.tokens)) & set(map(tuple, theirs.selection.selected))
    share, dtype = len(both) / len(theirs.selection.selected), pair.model.dtype.name
    same = tuple(outcome.reply.answer_ids) == theirs.answer_ids
    nats, least = TOLERANCES[dtype]
    return {
        "dtype": dtype, "entropy_difference": difference, "selected_in_common": share, "same_answer": same,
        "ok": difference <= nats and share >= least and (same or dtype != "float32"),
    }  # fmt: skip


def questions_agree(pair: Pair) -> dict[str, float]:
    """Largest differences between asking all questions in one pass of the first groups and asking each alone."""
    video = visual_tokens(pair, encode(pair, np.arange(len(pair.patches))))
    together = pass_groups(pair, video, len(pair.prompts))
    worst = {"entropy": 0.0, "relevance": 0.0}
    for q, prompt in enumerate(pair.prompts):
        alone = pass_groups(dataclasses.replace(pair, prompts=[prompt]), video)
        for name in worst:
            difference = float(np.max(np.abs(together[name][:, q] - alone[name][:, 0])))
            worst[name] = max(worst[name], difference)
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Stages
# ---------------------------------------------------------------------------------------------------------------------

VISION, GROUP, PREFILL, SELECT, FINAL, WHOLE = (
    "vision encode of a group", "group pass", "plain prefill of the same tokens", "budget and redundancy",
    "final pass", "whole question",
)  # fmt: skip
MORE = "group pass, further questions"
PRUNED = "group pass, 20 % of the tokens after the reference layer"
_PRUNED_TO = 0.2


@dataclasses.dataclass(frozen=True)
class Stage:
    """The same work on both sides.

    Attributes:
      name: of its row.
      ours, theirs: one call; `theirs` is None where only ours is of interest.
      flops: of one group, or of what is done once.
      groups: groups that one call handles; seconds are per group.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object] | None
    flops: float
    groups: int = 1


def stages(pair: Pair) -> list[Stage]:
    """All stages, each from inputs computed here once and shared by both sides."""
    model, inputs, config = pair.torch_model, pair.inputs, pair.config
    features = encode(pair, np.arange(len(pair.patches)))
    video, torch_features = visual_tokens(pair, features), _tensor(features).to(model.device)
    (run,) = scan_once(pair, video)
    visits = [fast.pass_group(model, inputs, torch_features, slots, config) for slots in pair.plan.groups]
    selection = survivors.select(run)
    encoded = np.concatenate(wave(pair))
    patches, grid = pair.patches[encoded].reshape(-1, pair.patches.shape[-1]), (len(encoded), *pair.shape.grid)
    prompts = [group_prompt(pair, torch_features, slots) for slots in wave(pair)]
    embeddings = jnp.stack([jnp.asarray(rows.float().cpu().numpy(), pair.model.dtype) for rows, _ in prompts])
    ids = np.stack([ids for _, ids in prompts])
    found = [
        Stage(VISION, lambda: encode(pair, encoded), lambda: fast.encode(model, patches, grid, pair.chunk), 0),
        Stage(GROUP, lambda: pass_groups(pair, video),
              lambda: [fast.pass_group(model, inputs, torch_features, slots, config) for slots in wave(pair)], 0),
        Stage(PREFILL, lambda: prefill(pair, embeddings, ids),
              lambda: [fast.prefill(model, *prompt) for prompt in prompts], 0),
        Stage(SELECT, lambda: survivors.select(run),
              lambda: fast.select(model, inputs, torch_features, visits, config), 0),
        Stage(FINAL, lambda: pipeline.answer_from(run, selection),
              lambda: fast.final_answer(model, inputs, torch_features, selection.tokens, config), 0),
        Stage(WHOLE, lambda: answer(pair), lambda: fast.run(model, inputs, config, pair.chunk), 0),
    ]  # fmt: skip
    pruned = dataclasses.replace(pair, config=dataclasses.replace(config, keep_after_reference=_PRUNED_TO))
    found.append(Stage(PRUNED, lambda: pass_groups(pruned, video), None, 0))
    if len(pair.prompts) > 1:
        found.append(Stage(MORE, lambda: pass_groups(pair, video, len(pair.prompts)), None, 0))
    counted = flops(pair)
    of_groups = {name: len(prompts) for name in (VISION, GROUP, PREFILL, PRUNED, MORE)}
    return [dataclasses.replace(s, flops=counted[s.name], groups=of_groups.get(s.name, 1)) for s in found]


def group_prompt(pair: Pair, features: torch.Tensor, slots: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """A group's whole prompt on the PyTorch side: embeddings [S, D] and ids int [3, S]."""
    embeddings = fast.prompt_embeddings(pair.torch_model, pair.inputs, features[torch.as_tensor(slots)].flatten(0, 1))
    return embeddings, plain.group_position_ids(pair.torch_model, pair.inputs, slots, pair.config)


def flops(pair: Pair) -> dict[str, float]:
    """Floating-point operations of each stage, counted from the sizes (`costs`)."""
    shape, prompt = pair.shape, pair.prompts[0]
    prefix, suffix = len(prompt.prefix_ids), len(prompt.suffix_ids)
    group = shape.slots_per_group * pair.plan.tokens_per_slot
    count = functools.partial(costs.prompt_flops, shape.model)
    further = sum(costs.question_flops(shape.model, len(p.suffix_ids), 0, prefix + group) for p in pair.prompts[1:])
    settings = dataclasses.replace(pair.config, keep_after_reference=_PRUNED_TO)
    pruned = count(prefix + group, suffix, 0, costs.pruned(shape.model, settings, prefix, group, group))
    vision = costs.vision_flops(shape.model, shape.slots_per_group, *shape.grid)
    one, final = (
        count(prefix + group, suffix, 0),
        count(prefix + shape.budget, suffix, pair.config.max_answer_tokens - 1),
    )
    whole = costs.text_flops(shape.model, prefix + group + suffix) + costs.head_flops(shape.model, 1)
    return {VISION: vision, GROUP: one, PREFILL: whole, SELECT: 0.0, FINAL: final, MORE: one + further,
            PRUNED: pruned, WHOLE: shape.groups * (vision + one) + final}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    """Wall seconds of one stage: our first call, and each repetition on both sides (`theirs` may be empty)."""

    first: float
    ours: list[float]
    theirs: list[float]


def measure(stages: Sequence[Stage], repetitions: int, least_seconds: float = 0.3) -> dict[str, Times]:
    """Warms every stage up, then runs all of them again and again, the two sides in turn and in changing order.

    Load from outside then falls on both sides alike, which is what makes their ratio robust. Short calls are timed
    several in a row, for `least_seconds`: the threads of the other side keep a core busy for a while after their work.
    """
    times, calls = {}, {}
    for stage in stages:
        times[stage.name] = Times(_seconds(stage.ours) / stage.groups, [], [])
        warm = max(_seconds(call) for call in (stage.theirs, stage.ours) if call)
        calls[stage.name] = max(1, round(least_seconds / warm))
    for repetition in range(repetitions):
        for stage in stages:
            sides = [(stage.ours, times[stage.name].ours), (stage.theirs, times[stage.name].theirs)]
            for call, seconds in sides if repetition % 2 == 0 else sides[::-1]:
                if call:
                    seconds.append(_seconds(call, calls[stage.name]) / stage.groups)
    return times


def _seconds(call: Callable[[], object], times: int = 1) -> float:
    """Wall seconds of one call, the mean of several in a row."""
    begin = time.perf_counter()
    for _ in range(times):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def summary(stage: Stage, times: Times, peak: float | None) -> dict:
    """One row of the table.

    Returns:
      "stage"; medians "ours_s" and "pytorch_s"; "ratio", the median of the repetitions' ratios (above 1: ours is
      faster); "compile_s", our first call less a warm one; FLOP/s of both sides and their share of `peak`; None where
      there is nothing to say. Raw seconds under "ours_all_s" and "pytorch_all_s".
    """
    ours, theirs = np.median(times.ours), np.median(times.theirs) if times.theirs else None
    ratio = np.median(np.divide(times.theirs, times.ours)) if times.theirs else None
    rate = lambda seconds: stage.flops / seconds if stage.flops and seconds else None
    share = lambda seconds: rate(seconds) / peak if rate(seconds) and peak else None
    return {
        "stage": stage.name, "ours_s": ours, "pytorch_s": theirs, "ratio": ratio,
        "compile_s": max(0.0, times.first - ours), "flops": stage.flops,
        "ours_flops_per_s": rate(ours), "pytorch_flops_per_s": rate(theirs),
        "ours_share_of_peak": share(ours), "pytorch_share_of_peak": share(theirs),
        "ours_all_s": times.ours, "pytorch_all_s": times.theirs,
    }  # fmt: skip


def overhead(times: dict[str, Times]) -> dict[str, float]:
    """What relevance and entropy add to a plain prefill, as a share of it: medians over the repetitions."""
    extra = lambda side: np.median(np.divide(getattr(times[GROUP], side), getattr(times[PREFILL], side))) - 1
    return {"ours": float(extra("ours")), "pytorch": float(extra("theirs"))}


def further_question(times: dict[str, Times], questions: int) -> dict[str, float]:
    """Seconds that each question after the first adds to a group's pass, and their share of the first one's scan.

    The scan of a group is its vision encode and its pass.
    """
    one, many, vision = (np.asarray(times[name].ours) for name in (GROUP, MORE, VISION))
    added = (many - one) / (questions - 1)
    return {"seconds": float(np.median(added)), "share": float(np.median(added / (vision + one)))}


# ---------------------------------------------------------------------------------------------------------------------
# Peaks
# ---------------------------------------------------------------------------------------------------------------------

# Dense tensor-core bfloat16 and plain float32, FLOP/s, from NVIDIA's data sheets; the first name that occurs counts.
_CARDS = {
    "B200": (2250e12, 75e12), "H200": (989e12, 67e12), "H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12), "L40S": (362e12, 91.6e12), "L4": (121e12, 30.3e12), "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
}  # fmt: skip


def device_peak(dtype: str, size: int = 2048) -> float | None:
    """FLOP/s that the device can do: of a GPU by its data sheet (None: not in the table), of a CPU as measured.

    On a CPU it is the faster of the two frameworks at a square product of `size`, best of several runs.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        known = (peaks for name, peaks in _CARDS.items() if name in device.device_kind)
        return next(known, (None, None))[dtype == "float32"]
    left = np.random.default_rng(0).standard_normal((size, size), np.float32)
    ours, theirs = jnp.asarray(left, dtype), torch.from_numpy(left).to(getattr(torch, dtype))
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    runs = (lambda: product(ours).block_until_ready(), lambda: torch.mm(theirs, theirs))
    best = min(_seconds(run) for run in runs for _ in range(6))
    return 2 * size**3 / best
