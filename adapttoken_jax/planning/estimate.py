"""From what the compiler says to memory, seconds and the best mesh.

Two estimates stand side by side. `compiler` is the compiler's own count of cycles, every loop body as often as it runs,
plus what it does not count: kernels at the chip's published rates, and waiting for links. `roofline` is the least that
the published rates allow: the longest of arithmetic, memory traffic and links, as if everything overlapped.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from adapttoken_jax.config import SIZES, AdaptTokenConfig, ModelConfig, checkpoint_directory, read_model_config
from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import Model
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.planning.chips import Chip, Topology
from adapttoken_jax.planning.compiler import Compiled, compile_program, make_tpu_mesh, versions
from adapttoken_jax.planning.programs import Program, Work, abstract_model, parameter_bytes, programs
from adapttoken_jax.sharding import MeshShape, check_mesh
from adapttoken_jax.video import VideoInfo

_PREFIX = 15  # tokens of the default system turn and of the opening of the user's turn
_SOURCE_FPS = 30.0


@dataclasses.dataclass(frozen=True)
class ProgramEstimate:
    """One program on one chip.

    Attributes:
      name: "vision", "group" or "final".
      runs: how often it runs for one video and all questions about it.
      groups: that one run of it visits; 0 if it is not the group pass.
      memory: bytes of "arguments", "temporaries", "outputs", "code", "beside" (parameters that it does not use, and
        the next chunk of groups) and "peak", the sum at the worst moment.
      missing: bytes by which it does not fit.
      flops: operations compiled, per chip; `model_flops` is what the model needs on all chips together.
      collectives: kind -> {"times", "bytes"} per chip and run.
      seconds: one run: "compiler", and of this "kernels" and "collectives", which is waiting for links; "roofline", the
        longest of "arithmetic", "memory" and "links".
      share_of_peak: model_flops / (chips x peak x seconds by the compiler).
      limit: what the roofline is made of, and `longest`: scopes of the program with most cycles and their share.
    """

    name: str
    runs: int
    groups: int
    memory: Mapping[str, int]
    missing: int
    flops: float = 0.0
    model_flops: float = 0.0
    collectives: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    share_of_peak: float = 0.0
    limit: str = ""
    longest: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What answering costs on a slice.

    Attributes:
      model, topology, mesh, chips: what was planned for.
      hbm: bytes of memory per chip that a program may use.
      video: frames, slots, tokens_per_slot, groups and final_tokens.
      questions: asked about the video in one scan.
      programs: in the order in which they run.
      advice: what to do if it does not fit; "" if it does.
      seconds: {"group", "video", "question"} by the compiler and {"roofline_question"}; every group visited. "video" is
        everything for all questions, "question" its share.
      tried: with mesh "auto", every mesh: seconds per question, or what is missing.
      versions: of jax and libtpu.
    """

    model: str
    topology: str
    mesh: str
    chips: int
    hbm: int
    video: Mapping[str, int]
    questions: int
    programs: tuple[ProgramEstimate, ...]
    advice: str
    seconds: Mapping[str, float]
    tried: Mapping[str, str]
    versions: Mapping[str, str]

    @property
    def fits(self) -> bool:
        """Whether every program fits into the memory of a chip."""
        return not any(program.missing for program in self.programs)

    def chip_hours(self, questions: int) -> float:
        """Chip-hours of a benchmark of so many questions, asked as here, decoding and starting up not included."""
        return questions * self.seconds["question"] * self.chips / 3600


def plan(
    model: str,
    topology: str,
    mesh: str = "auto",
    *,
    settings: Mapping | None = None,
    method: str = "adapttoken",
    video_size: tuple[int, int] = (560, 308),
    duration: float | None = None,
    questions: int = 1,
    question_tokens: int = 160,
    on_progress=lambda text: None,
) -> Plan:
    """Compiles what answers questions about a video for a TPU slice and says what it costs.

    Weights are bfloat16, questions have four options, and every group is visited: for Lite an upper bound.

    Args:
      model: a key of `config.SIZES`, or a directory with a `config.json`.
      topology: a slice, such as "v5e:4x4".
      mesh: "data=4,model=2", or "auto" for the fastest that fits.
      settings: fields of `AdaptTokenConfig`.
      method: one of `config.METHODS`.
      video_size: width and height of the source, pixels.
      duration: of the video, seconds; None: as long as `max_frames` lasts at `fps`.
      questions: asked about the video in one scan.
      question_tokens: prompt tokens after the video, of each question.
      on_progress: called with a line of text before each compilation.

    Raises:
      UserError: an unknown model, slice or method, a mesh that does not suit, or libtpu is not installed.
    """
    config, slice_ = model_sizes(model), Topology.parse(topology)
    resolved = AdaptTokenConfig.for_model(config, **(settings or {}))
    frames, work = workload(config, resolved, method, video_size, duration, questions, question_tokens)
    planner = _Planner(config, slice_, work, on_progress)
    shape, tried = (MeshShape.parse(mesh), {}) if mesh != "auto" else planner.best_mesh()
    estimates = planner.estimates(shape)
    return Plan(
        model=model,
        topology=str(slice_),
        mesh=str(shape),
        chips=slice_.chips,
        hbm=slice_.chip.hbm,
        video={
            "frames": frames,
            "slots": work.grid[0],
            "tokens_per_slot": work.grid[1] * work.grid[2] // config.vision.merge**2,
            "groups": work.groups,
            "final_tokens": work.final_tokens,
        },
        questions=questions,
        programs=estimates,
        advice=planner.advice(shape, estimates),
        seconds=_seconds(estimates, questions),
        tried=tried,
        versions=versions(),
    )


def model_sizes(name: str) -> ModelConfig:
    """Sizes of a model, by its name or from its directory.

    Raises:
      UserError: neither.
    """
    if name.lower() in SIZES:
        return SIZES[name.lower()]
    if not checkpoint_directory(name).is_dir():
        raise UserError(f"--model={name}: no such directory, and no name of a model ({', '.join(SIZES)})")
    return read_model_config(name)


def workload(config, settings, method, video_size, duration, questions, question_tokens) -> tuple[int, Work]:
    """Frames sampled from such a video, and the `Work` that follows: the pipeline's own plan of a run."""
    duration = duration or settings.max_frames / settings.fps
    times = np.arange(max(1, round(duration * _SOURCE_FPS))) / _SOURCE_FPS
    width, height = video_size
    video = VideoInfo(None, duration, _SOURCE_FPS, times, np.zeros(1, int), width, height)
    run = plan_run(config, video, settings, method)
    final = min(settings.budget, run.clip.tokens) if run.groups else run.clip.tokens
    work = Work(run.clip.grid, len(run.groups), final, _PREFIX, question_tokens, questions, method == "lite", settings)
    return len(run.clip.frame_indices), work


def _seconds(estimates, questions: int) -> dict[str, float]:
    """Sums over the programs; empty where one of them does not fit."""
    if any(each.missing for each in estimates):
        return {}
    total = lambda kind: sum(each.runs * each.seconds[kind] for each in estimates)
    groups = {each.name: each.seconds["compiler"] / each.groups for each in estimates if each.groups}
    video = total("compiler")
    return groups | {"video": video, "question": video / questions, "roofline_question": total("roofline") / questions}


class _Planner:
    """Compiles for one slice; each program of each mesh at most once."""

    def __init__(self, config: ModelConfig, topology: Topology, work: Work, on_progress):
        self.config, self.topology, self.work, self.on_progress = config, topology, work, on_progress
        self._known: dict[tuple[MeshShape, str], ProgramEstimate] = {}

    def model(self, shape: MeshShape) -> Model:
        """The model on a mesh, without weights."""
        check_mesh(self.config, shape.abstract)
        return abstract_model(self.config, make_tpu_mesh(self.topology, shape))

    def estimates(self, shape: MeshShape) -> tuple[ProgramEstimate, ...]:
        model = self.model(shape)
        return tuple(self.estimate(each, shape, model) for each in programs(model, self.work))

    def estimate(self, program: Program, shape: MeshShape, model: Model) -> ProgramEstimate:
        if (shape, program.name) not in self._known:
            self.on_progress(f"compiling {program.name} for {self.topology}, {shape}")
            self._known[shape, program.name] = self._estimate(program, model)
        return self._known[shape, program.name]

    def _estimate(self, program: Program, model: Model) -> ProgramEstimate:
        beside = parameter_bytes(model, program.absent)
        if self.holds_weights(model):
            compiled, beside = compile_program(program, self.topology.chip), beside + program.next_chunk
        else:  # which needs no compiler
            compiled = Compiled(peak=parameter_bytes(model, {"text": "vision", "vision": "text"}[program.absent]))
        return estimate_program(program, compiled, beside, self.topology.chip, self.topology.chips)

    def holds_weights(self, model: Model) -> bool:
        """Whether a chip's part of the weights fits into its memory."""
        return sum(parameter_bytes(model, tower) for tower in ("vision", "text")) <= self.topology.chip.hbm

    def best_mesh(self) -> tuple[MeshShape, dict[str, str]]:
        """The fastest mesh whose programs all fit, else the one that lacks least; and what each mesh tried came to.

        Meshes are ranked by the program that takes longest; the others are compiled for the winner alone. Both ways of
        splitting weights cost links: `fsdp` is tried where they do not fit without, and wider layers pay off until
        there is a place for every group: once wider is slower, it stays so.
        """
        cost, tried, fastest = {}, {}, math.inf
        for shape in self.shapes():
            if shape.fsdp and not cost[dataclasses.replace(shape, fsdp=False)][0]:
                continue
            longest = self.longest(shape)
            seconds = longest.runs * longest.seconds.get("compiler", 0)
            cost[shape], tried[str(shape)] = (longest.missing, seconds), _outcome(longest)
            if not longest.missing and seconds > fastest:
                break
            fastest = fastest if longest.missing else seconds
        ranked = sorted(cost, key=cost.get)
        fitting = (shape for shape in ranked if not cost[shape][0])
        return next((s for s in fitting if not any(e.missing for e in self.estimates(s))), ranked[0]), tried

    def longest(self, shape: MeshShape) -> ProgramEstimate:
        """The estimate of the program with most operations."""
        model = self.model(shape)
        every = programs(model, self.work)
        return self.estimate(max(every, key=lambda each: each.runs * each.flops), shape, model)

    def shapes(self) -> list[MeshShape]:
        """Every mesh of the slice whose `model` axis divides the decoder's attention heads, from narrow to wide."""
        chips, heads = self.topology.chips, self.config.text.heads
        sizes = [model for model in range(1, chips + 1) if chips % model == 0 and heads % model == 0]
        over = [self.shape(chips // model, model, fsdp) for model in sizes for fsdp in (False, True)]
        return [shape for shape in over if shape.data > 1 or not shape.fsdp]

    def shape(self, places: int, model: int, fsdp: bool) -> MeshShape:
        """The mesh with so many places for groups; where there are fewer groups, they are cut into pieces."""
        most = self.work.groups or places
        data = max(size for size in range(1, places + 1) if places % size == 0 and size <= most)
        return MeshShape(data, model, fsdp, places // data)

    def advice(self, shape: MeshShape, estimates) -> str:
        """What is missing and which flag helps; "" if all fits."""
        worst = max(estimates, key=lambda each: each.missing)
        if not worst.missing:
            return ""
        splits = lambda each: (each.model, each.fsdp)
        wider = next((each for each in self.shapes() if splits(each) > splits(shape)), None)
        smaller = {"vision": "--max_pixels", "group": "--slots_per_group", "final": "--budget"}[worst.name]
        chip = self.topology.chip
        room = self.holds_weights(self.model(shape))
        fewer = f"lower {smaller} or take" if room else "the weights alone do not fit: take"
        helps = f"try --mesh={wider}" if wider else f"{fewer} a larger --topology"
        return (
            f"--mesh={shape}: the {worst.name} program needs {worst.missing / 2**30:.2f} GiB more than the "
            f"{chip.hbm / 2**30:.2f} GiB of a {chip.name} chip; {helps}"
        )


def _outcome(longest: ProgramEstimate) -> str:
    if longest.missing:
        return f"{longest.missing / 2**30:.2f} GiB missing"
    return f"{longest.runs * longest.seconds['compiler']:.2f} s in {longest.name}"


def estimate_program(program: Program, compiled: Compiled, beside: int, chip: Chip, chips: int) -> ProgramEstimate:
    """Memory and seconds of one program; `beside` are bytes that it does not use."""
    memory = {
        "arguments": compiled.arguments,
        "temporaries": compiled.temporaries,
        "outputs": compiled.outputs,
        "code": compiled.code,
        "beside": beside,
        "peak": compiled.peak + beside,
    }
    missing, cost = max(0, memory["peak"] - chip.hbm), compiled.cost
    if cost is None:
        return ProgramEstimate(program.name, program.runs, program.groups, memory, missing)
    bounds = {
        "arithmetic": cost.flops / chip.flops,
        "memory": cost.bytes / chip.bandwidth,
        "links": cost.sent / chip.link,
    }
    cycles = {"compiler": cost.time, "kernels": cost.kernels, "collectives": cost.waits}
    seconds = {name: count / chip.clock for name, count in cycles.items()} | {"roofline": max(bounds.values())}
    return ProgramEstimate(
        name=program.name,
        runs=program.runs,
        groups=program.groups,
        memory=memory,
        missing=missing,
        flops=cost.flops,
        model_flops=program.flops,
        collectives={kind: {"times": times, "bytes": size} for kind, (times, size) in cost.collectives.items()},
        seconds=seconds | bounds,
        share_of_peak=program.flops / (chips * chip.flops * seconds["compiler"]),
        limit=max(bounds, key=bounds.get),
        longest=_longest(cost.by_scope),
    )


def _longest(by_scope: Mapping[str, float], count: int = 3) -> dict[str, float]:
    """The parts of the program with most cycles, and their share of all."""
    parts = collections.Counter()
    for scope, cycles in by_scope.items():
        parts[_short(scope)] += cycles
    return {part: cycles / parts.total() for part, cycles in parts.most_common(count)}


def _short(scope: str) -> str:
    """A scope without what tracing adds: "jit(f)/context/while/body/closed_call/add" -> "context/add"."""
    parts = scope.split("/")
    noise = {"while", "body", "closed_call"}
    return "/".join(part for part in parts if part not in noise and not part.startswith("jit(")) or "(unnamed)"
