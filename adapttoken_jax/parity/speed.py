"""Both sides of a speed comparison: this library and the fast PyTorch version, on the same weights and patches.

A `Pair` holds one random model in both frameworks, one generated video and one question. Its stages are pairs of calls
that do the same work from the same inputs and end with their results on the host (features of visual tokens: where the
side keeps them). `agreement` holds the two results together; nothing should be timed before it has passed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from adapttoken_jax import costs, device_scan, encoding, parameters, passes, pipeline, scan
from adapttoken_jax.compilation import compiled
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import SlotEncoder, VisualTokens, chunk_slots
from adapttoken_jax.loading import Model
from adapttoken_jax.model.text import TextDecoder
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
      patches: uint8 [T, h w, features], generated pixels.
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
    patches = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    inputs = plain.MethodInputs(
        patches=patches.reshape(-1, count[-1]), grid=plan.clip.grid, frame_times=plan.clip.frame_times,
        seconds_per_slot=plan.clip.seconds_per_slot, prefix_ids=prompts[0].prefix_ids,
        suffix_ids=prompts[0].suffix_ids, question_span=prompts[0].question_span,
        letter_ids=list(prompts[0].letter_ids), eos_ids=model.tokenizer.eos,
    )  # fmt: skip
    return Pair(
        shape, model, torch_model, plan, patches, prompts, inputs, config, chunk_slots(model, plan.clip, scanned=True)
    )


def torch_weights(model: Model) -> dict[str, torch.Tensor]:
    """Our parameters as tensors under the checkpoint's keys."""
    weights = {}
    for parameter in parameters.parameters(model.config):
        value = functools.reduce(getattr, parameter.path, model.module)[...]
        layers = [value] if parameter.layers is None else value
        own = tuple(map(slice, parameter.layer_shape))  # the model may have padded it
        for key, layer in zip(parameter.keys, layers, strict=True):
            weights[key] = _tensor(parameter.to_stored(np.asarray(layer)[own]))
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
    return Plan(clip, group_slots(slots, shape.slots_per_group))


# ---------------------------------------------------------------------------------------------------------------------
# Our side
# ---------------------------------------------------------------------------------------------------------------------


def chunks(pair: Pair, slots: np.ndarray, patches: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slots and their patches in portions of what one call of the vision tower takes, as if read from a file."""
    for start in range(0, len(slots), pair.chunk):
        part = slice(start, start + pair.chunk)
        yield slots[part], patches[part]


def encode(pair: Pair, slots: np.ndarray, patches: np.ndarray) -> SlotEncoder:
    """Encodes some slots as `encoding.encode_video` does all of them."""
    with SlotEncoder(pair.model, pair.plan.clip, [], chunks=chunks(pair, slots, patches), scanned=True) as done:
        done.encode(slots)
    return done


def encode_video(pair: Pair) -> VisualTokens:
    """The encoded video."""
    every = np.arange(len(pair.patches))
    return encoding.encode_video(pair.model, pair.plan.clip, chunks=chunks(pair, every, pair.patches), scanned=True)


def wave(pair: Pair) -> list[np.ndarray]:
    """Slots of the groups that run side by side in one pass, as in `device_scan`."""
    size = pair.shape.slots_per_group * pair.plan.clip.tokens_per_slot
    return pair.plan.groups[: device_scan.side_by_side(pair.model, size)]


def pass_groups(pair: Pair, video: VisualTokens, questions: int = 1) -> dict[str, np.ndarray]:
    """Steps 4 to 6 for the first wave of groups and the first few questions: what `run_prompts` returned."""
    return scan.run_and_read(pair.model, wave_batch(pair, video, questions), group_spec(pair, questions))


def group_spec(pair: Pair, questions: int = 1) -> passes.PassSpec:
    """What is compiled into the pass of the first few questions."""
    return scan.group_spec(pair.model, pair.prompts[:questions], pair.config)


def wave_batch(pair: Pair, video: VisualTokens, questions: int = 1) -> passes.PromptBatch:
    """The first wave of groups and the first few questions, ready for the compiled pass."""
    prompts = pair.prompts[:questions]
    contexts = [scan.group_context(video, slots, prompts[0], pair.config) for slots in wave(pair)]
    return scan.prompt_batch(pair.model, video, contexts, prompts, pair.config, len(contexts[0].features))


def prefill(pair: Pair, embeddings: jax.Array, position_ids: np.ndarray):
    """A plain prefill of prompts [B, S, D] with ids int [B, 3, S]: the caches, and logits [B, V] after the last token.

    Every layer runs on every row, as engines do it.
    """
    kernel = pair.model.kernel
    return jax.block_until_ready(_prefill(pair.model.module.text, embeddings, jnp.asarray(position_ids), kernel=kernel))


@functools.partial(jax.jit, static_argnames="kernel")
@passes.exact
def _prefill(text: TextDecoder, embeddings, position_ids, kernel):
    valid = jnp.ones(embeddings.shape[:2], bool)
    last = text.config.layers - 1
    context, found = text.prefill(embeddings, position_ids, valid, keep_layer=last, kernel=kernel)
    return context, text.logits(found["kept"][:, -1])


def _bare_pass(text: TextDecoder, batch: passes.PromptBatch, spec: passes.PassSpec) -> dict[str, jax.Array]:
    """A pass that has neither relevance nor entropy: as it is not asked for, the compiler leaves it out."""
    out = passes.prompts_pass(text, batch, dataclasses.replace(spec, relevance=None))
    return {name: out[name] for name in ("first_logits", "tokens")}


bare_pass = compiled(static=("spec",), tpu_options=passes.TPU_OPTIONS, gpu_options=passes.GPU_OPTIONS)(_bare_pass)


def answer(pair: Pair) -> tuple[Run, Outcome]:
    """The whole question, from patches to answer."""
    (run,) = pipeline.scan_video(pair.model, pair.plan, encode_video(pair), pair.prompts[:1], pair.config, "adapttoken")
    return run, pipeline.conclude(run)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answers:
    """The question answered on both sides."""

    run: Run
    outcome: Outcome
    theirs: fast.Answered


def answers(pair: Pair) -> Answers:
    """Answers the question on both sides."""
    return Answers(*answer(pair), fast.run(pair.torch_model, pair.inputs, pair.config, pair.chunk))


def agreement(answers: Answers) -> dict:
    """Compares two answers.

    Returns:
      "entropy_difference" (largest, nats), "selected_in_common" (share), "same_answer", "dtype", and "ok": within
      `TOLERANCES`, and in float32 the same answer.
    """
    run, outcome, theirs = answers.run, answers.outcome, answers.theirs
    ours = [visit.reply.entropy for visit in sorted(run.scan.visits, key=lambda visit: visit.index)]
    difference = float(np.max(np.abs(np.subtract(ours, [visit.entropy for visit in theirs.passes]))))
    both = set(map(tuple, outcome.selected.tokens)) & set(map(tuple, theirs.selection.selected))
    share, dtype = len(both) / len(theirs.selection.selected), run.model.dtype.name
    same = tuple(outcome.reply.answer_ids) == theirs.answer_ids
    nats, least = TOLERANCES[dtype]
    return {
        "dtype": dtype, "entropy_difference": difference, "selected_in_common": share, "same_answer": same,
        "ok": difference <= nats and share >= least and (same or dtype != "float32"),
    }  # fmt: skip


def questions_agree(pair: Pair, video: VisualTokens) -> dict[str, float]:
    """Largest differences between asking all questions in one pass of the first groups and asking each alone."""
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
UNCHANGED = "the same, PyTorch with transformers' tower as it is"
RESIDENT = "group pass, inputs on the device"
BARE = "the same without relevance and entropy"
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
      warm: both sides have run it before.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object] | None
    flops: float
    groups: int = 1
    warm: bool = False


def stages(pair: Pair, answers: Answers) -> list[Stage]:
    """All stages, each from inputs computed here or on the way to the answers, and shared by both sides."""
    model, inputs, config, run = pair.torch_model, pair.inputs, pair.config, answers.run
    video, visits = run.video, answers.theirs.passes
    features = _tensor(video.features).to(model.device)
    selected = pipeline.select_tokens(run)
    tokens = selected[0].tokens
    slots = np.concatenate(wave(pair))
    patches, grid = pair.patches[slots], (len(slots), *pair.shape.grid)
    rows = patches.reshape(-1, patches.shape[-1])
    prompts = [group_prompt(pair, features, slots) for slots in wave(pair)]
    embeddings = jnp.stack([jnp.asarray(rows.float().cpu().numpy(), pair.model.dtype) for rows, _ in prompts])
    ids = np.stack([ids for _, ids in prompts])
    text, batch, spec = pair.model.module.text, jax.device_put(wave_batch(pair, video)), group_spec(pair)
    found = [
        Stage(VISION, lambda: encode(pair, slots, patches), lambda: fast.encode(model, rows, grid, pair.chunk), 0),
        Stage(UNCHANGED, lambda: encode(pair, slots, patches), lambda: encode_as_transformers(pair, rows, grid), 0),
        Stage(GROUP, lambda: pass_groups(pair, video),
              lambda: [fast.pass_group(model, inputs, features, slots, config) for slots in wave(pair)], 0),
        Stage(RESIDENT, lambda: jax.block_until_ready(passes.run_prompts(text, batch, spec)), None, 0),
        Stage(BARE, lambda: jax.block_until_ready(bare_pass(text, batch, spec)), None, 0),
        Stage(PREFILL, lambda: prefill(pair, embeddings, ids),
              lambda: [fast.prefill(model, *prompt) for prompt in prompts], 0),
        Stage(SELECT, lambda: pipeline.select_tokens(run),
              lambda: fast.select(model, inputs, features, visits, config), 0),
        Stage(FINAL, lambda: pipeline.answer_from(run, *selected),
              lambda: fast.final_answer(model, inputs, features, tokens, config), 0),
        Stage(WHOLE, lambda: answer(pair), lambda: fast.run(model, inputs, config, pair.chunk), 0, warm=True),
    ]  # fmt: skip
    pruned = dataclasses.replace(pair, config=dataclasses.replace(config, keep_after_reference=_PRUNED_TO))
    found.append(Stage(PRUNED, lambda: pass_groups(pruned, video), None, 0))
    if len(pair.prompts) > 1:
        found.append(Stage(MORE, lambda: pass_groups(pair, video, len(pair.prompts)), None, 0))
    counted = flops(pair)
    of_groups = dict.fromkeys((VISION, UNCHANGED, GROUP, RESIDENT, BARE, PREFILL, PRUNED, MORE), len(prompts))
    return [dataclasses.replace(s, flops=counted[s.name], groups=of_groups.get(s.name, 1)) for s in found]


def encode_as_transformers(pair: Pair, rows: np.ndarray, grid: tuple[int, int, int]) -> torch.Tensor:
    """What the PyTorch side's `encode` gives, by transformers' tower as it is."""
    with fast.unchanged_tower(pair.torch_model):
        return fast.encode(pair.torch_model, rows, grid, pair.chunk)


def group_prompt(pair: Pair, features: torch.Tensor, slots: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """A group's whole prompt on the PyTorch side: embeddings [S, D] and ids int [3, S]."""
    embeddings = fast.prompt_embeddings(pair.torch_model, pair.inputs, features[torch.as_tensor(slots)].flatten(0, 1))
    return embeddings, plain.group_position_ids(pair.torch_model, pair.inputs, slots, pair.config)


def flops(pair: Pair) -> dict[str, float]:
    """Floating-point operations of each stage, counted from the sizes (`costs`)."""
    shape, prompt = pair.shape, pair.prompts[0]
    prefix, suffix = len(prompt.prefix_ids), len(prompt.suffix_ids)
    group = shape.slots_per_group * pair.plan.clip.tokens_per_slot
    count = functools.partial(costs.prompt_flops, shape.model)
    further = sum(costs.question_flops(shape.model, len(p.suffix_ids), 0, prefix + group) for p in pair.prompts[1:])
    settings = dataclasses.replace(pair.config, keep_after_reference=_PRUNED_TO)
    pruned = count(prefix + group, suffix, 0, costs.pruned(shape.model, settings, prefix, group))
    vision = costs.vision_flops(shape.model, shape.slots_per_group, *shape.grid)
    one, final = (
        count(prefix + group, suffix, 0),
        count(prefix + shape.budget, suffix, pair.config.max_answer_tokens - 1),
    )
    whole = costs.text_flops(shape.model, prefix + group + suffix) + costs.head_flops(shape.model, 1)
    return {VISION: vision, UNCHANGED: vision, GROUP: one, RESIDENT: one, BARE: one, PREFILL: whole, SELECT: 0.0,
            FINAL: final, MORE: one + further, PRUNED: pruned,
            WHOLE: shape.groups * (vision + one) + final}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Times:
    """Wall seconds of one stage: our first call, and each repetition on both sides (`theirs` may be empty)."""

    first: float
    ours: list[float]
    theirs: list[float]


def measure(
    stages: Sequence[Stage],
    repetitions: int,
    least_seconds: float = 0.3,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Times]:
    """Warms every stage up, then runs all of them again and again, the two sides in turn and in changing order.

    Load from outside then falls on both sides alike, which is what makes their ratio robust. Short calls are timed
    several in a row, for `least_seconds`, after some that are not: threads of the call before keep a core busy for a
    while after their work. `tell` is told every time taken.
    """
    times, calls = {}, {}
    for stage in stages:
        first = _seconds(stage.ours)
        tell(f"{stage.name}: {first:.3g} s at first")
        times[stage.name] = Times(first / stage.groups, [], [])
        again = [stage.theirs, stage.ours] if not stage.warm else []
        slowest = max((_seconds(call) for call in again if call), default=first)
        calls[stage.name] = max(1, round(least_seconds / slowest))
    for repetition in range(repetitions):
        for stage in stages:
            sides = [("ours", stage.ours, times[stage.name].ours), ("PyTorch", stage.theirs, times[stage.name].theirs)]
            for side, call, seconds in sides if repetition % 2 == 0 else sides[::-1]:
                if call:
                    for _ in range(calls[stage.name] // 3):
                        call()
                    seconds.append(_seconds(call, calls[stage.name]) / stage.groups)
                    tell(f"{stage.name}, {side}: {seconds[-1]:.3g} s")
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
    """What a group pass takes more than a pass without some of it, as a share of that: medians over the repetitions.

    All of them begin with the inputs on the device.

    Returns:
      "relevance_and_entropy", of our pass; "ours" and "pytorch", more than a plain prefill. Ours can be less than
      nothing: no later token looks at what a group's tokens become in the last layer, which a prefill computes.
    """
    extra = lambda passed, plain: float(np.median(np.divide(passed, plain)) - 1)
    return {"relevance_and_entropy": extra(times[RESIDENT].ours, times[BARE].ours),
            "ours": extra(times[RESIDENT].ours, times[PREFILL].ours),
            "pytorch": extra(times[GROUP].theirs, times[PREFILL].theirs)}  # fmt: skip


def rates(pair: Pair, times: dict[str, Times]) -> dict[str, float]:
    """Tokens per second of our side, medians.

    Returns:
      "prefill" of prompt tokens; "group" of visual tokens, vision tower and group pass one after the other; "whole" of
      the video's visual tokens, over the whole question.
    """
    visual, prompt = pair.shape.slots_per_group * pair.plan.clip.tokens_per_slot, pair.prompts[0]
    text = len(prompt.prefix_ids) + len(prompt.suffix_ids)
    seconds = {name: np.asarray(times[name].ours) for name in (VISION, GROUP, PREFILL, WHOLE)}
    per_second = lambda tokens, seconds: float(np.median(tokens / seconds))
    return {
        "prefill": per_second(visual + text, seconds[PREFILL]),
        "group": per_second(visual, seconds[VISION] + seconds[GROUP]),
        "whole": per_second(visual * pair.shape.groups, seconds[WHOLE]),
    }


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


# Sizes of the products that find a CPU's peak; a large one that would take longer than this is not run.
_SMALL, _LARGE, _SLOW_S = 512, 2048, 2.0


def device_peak(dtype: str) -> float | None:
    """FLOP/s that the device can do: of a GPU by its data sheet (None: not in the table), of a CPU as measured.

    On a CPU it is the faster of the two frameworks at a square product, best of several runs.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        known = (peaks for name, peaks in _CARDS.items() if name in device.device_kind)
        return next(known, (None, None))[dtype == "float32"]
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))

    def reached(side: int) -> list[float]:
        left = np.random.default_rng(0).standard_normal((side, side), np.float32)
        ours, theirs = jnp.asarray(left, dtype), torch.from_numpy(left).to(getattr(torch, dtype))
        runs = (lambda: product(ours).block_until_ready(), lambda: torch.mm(theirs, theirs))
        return [2 * side**3 / min(_seconds(run) for _ in range(6)) for run in runs]

    # A processor without instructions for bfloat16 may multiply it number by number, half a minute for a large product.
    found = reached(_SMALL)
    return max(found) if min(found) < 2 * _LARGE**3 / _SLOW_S else max(reached(_LARGE))
