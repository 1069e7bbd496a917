"""Trains the needle model from nothing and exports it as a Hugging Face directory.

    python -m experiments.train_needle --workdir runs/needle --export runs/needle-model

A run that was stopped goes on where its last checkpoint stands when the same command is given again, with the same
batches and the same numbers. `metrics.jsonl` in the work directory has one line per logged step, `training.json` there
and in the exported directory says how the model came about.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from absl import flags
from tqdm import tqdm

from adapttoken_jax.errors import UserError
from adapttoken_jax.journal import Journal, read_lines
from adapttoken_jax.needle import training
from adapttoken_jax.needle.clips import ClipMaker, ClipSettings
from adapttoken_jax.needle.export import export
from adapttoken_jax.needle.tokenizer import chat_tokenizer
from adapttoken_jax.result import git_commit, library_versions, made_directory, plain_json
from adapttoken_jax.terminal import write_json
from experiments import command

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints and metrics; made if missing", required=True)
_EXPORT = flags.DEFINE_string("export", None, "Hugging Face directory to write at the end; must not exist yet")
_SEED = flags.DEFINE_integer("seed", 0, "seed of parameters and batches", lower_bound=0)
_CLIPS = flags.DEFINE_integer("clips", 32, "clips per batch", lower_bound=1)
_PEAK = flags.DEFINE_float("learning_rate", 1.5e-3, "peak learning rate", lower_bound=0)
_WIDTH = flags.DEFINE_integer("width", 128, "width of the text decoder", lower_bound=8)
_LAYERS = flags.DEFINE_integer("layers", 4, "layers of the text decoder", lower_bound=1)
_PHASES = flags.DEFINE_multi_string(
    "phase",
    [
        # One slot, everything near and clear, and some questions that can be read instead of seen: the letters are
        # learned here or not at all.
        "steps=700,slots=1,choice=2,open=2,pair_share=0.3,seen_share=0.9,reading_share=0.2,grade=0.1,hints=0.5",
        "steps=400,slots=2,choice=2,open=1,pair_share=0.5,seen_share=0.8,reading_share=0.1,grade=0.5,hints=0.5",
        "steps=1400,slots=8,choice=2,open=1,pair_share=0.5,seen_share=0.7,grade=0.7,hints=0.3",
    ],
    "one part of the curriculum, in order: steps and fields of `ClipSettings` as name=value, comma-separated",
)
_LOG_EVERY = flags.DEFINE_integer("log_every", 10, "steps between lines of metrics.jsonl", lower_bound=1)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 200, "steps between checkpoints", lower_bound=1)
_CHECK_EVERY = flags.DEFINE_integer("validate_every", 200, "steps between validations", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the curriculum: `steps` steps of batches made by `settings`."""

    steps: int
    settings: ClipSettings


def parse_phase(text: str) -> Phase:
    """Reads a value of --phase.

    Raises:
      UserError: an unknown or repeated name, a value that is no number, or no steps.
    """
    counts, shares = (
        ("steps", "slots", "choice", "open"),
        ("pair_share", "seen_share", "reading_share", "hints", "grade"),
    )
    kinds = dict.fromkeys(counts, int) | dict.fromkeys(shares, float)
    try:
        given = {name: kinds[name](value) for name, value in (item.split("=") for item in text.split(","))}
        steps = given.pop("steps")
    except (KeyError, ValueError):
        raise UserError(f"--phase={text}: give name=value pairs of {', '.join(kinds)}; steps is needed") from None
    if steps < 1 or given.get("slots", 1) < 1 or given.get("choice", 1) + given.get("open", 1) < 1:
        raise UserError(f"--phase={text}: steps, slots and the number of questions must be at least 1")
    return Phase(steps, ClipSettings(**given))


def settings_at(phases: list[Phase], step: int) -> ClipSettings:
    """Settings of the batch of a step."""
    for phase in phases:
        if step < phase.steps:
            return phase.settings
        step -= phase.steps
    return phases[-1].settings


def batches(maker: ClipMaker, phases: list[Phase], start: int, clips: int) -> Iterator:
    """Batches from step `start` on, each made while the one before it is being learned from."""
    steps = sum(phase.steps for phase in phases)
    make = lambda step: maker.batch(step, clips, settings_at(phases, step))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(make, start) if start < steps else None
        for step in range(start, steps):
            batch = ahead.result()
            ahead = pool.submit(make, step + 1) if step + 1 < steps else None
            yield step, batch


class Metrics:
    """`metrics.jsonl`: lines of steps that a resumed run does again are dropped, every new line is on disk at once."""

    def __init__(self, journal: Journal, start: int):
        self.journal = journal
        journal.keep_while(lambda row: row["step"] <= start)
        before = (read_lines(journal.path) or [{"seconds": 0.0, "cpu_seconds": 0.0}])[-1]
        self.clock = time.perf_counter() - before["seconds"], time.process_time() - before["cpu_seconds"]

    def write(self, step: int, values: dict) -> dict:
        """Appends a line; `seconds` and `cpu_seconds` count over all parts of a resumed run."""
        spent = {"seconds": time.perf_counter() - self.clock[0], "cpu_seconds": time.process_time() - self.clock[1]}
        row = {"step": step} | {k: round(float(v), 6) for k, v in (values | spent).items()}
        self.journal.append([plain_json(row)])
        return row


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that stays the same during a run."""

    config: training.ModelConfig
    maker: ClipMaker
    checker: ClipMaker
    phases: list[Phase]
    schedule: training.Schedule
    clips: int
    seed: int
    log_every: int
    save_every: int
    validate_every: int

    @property
    def steps(self) -> int:
        """Optimiser steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def fixed(self) -> dict:
        """The arguments of the loss that no step changes."""
        return {"config": self.config, "prefix_ids": self.maker.prefix_ids}

    def validate(self, values, batches: int = 4) -> dict:
        """Mean metrics over validation clips of the last phase."""
        settings, found = self.phases[-1].settings, []
        for number in range(batches):
            batch = self.checker.batch(number, self.clips, settings)
            planes = training.draw(batch.table, settings.size)
            found.append(training.evaluate_batch(values, planes, batch, **self.fixed))
        return {f"validation_{key}": sum(float(m[key]) for m in found) / batches for key in found[0]}

    def learn(self, state, batch, settings):
        """One step."""
        planes = training.draw(batch.table, settings.size)
        return training.train_step(state, planes, batch, schedule=self.schedule, **self.fixed)


def make_run() -> Run:
    """A run from the flags."""
    tokenizer = chat_tokenizer()
    phases = [parse_phase(text) for text in _PHASES.value]
    steps = sum(phase.steps for phase in phases)
    return Run(
        config=training.needle_config(tokenizer, _WIDTH.value, _LAYERS.value),
        maker=ClipMaker(tokenizer, _SEED.value, "train"),
        checker=ClipMaker(tokenizer, _SEED.value, "validation"),
        phases=phases,
        schedule=training.Schedule(_PEAK.value, steps, min(100, max(1, steps // 4))),
        clips=_CLIPS.value,
        seed=_SEED.value,
        log_every=_LOG_EVERY.value,
        save_every=_SAVE_EVERY.value,
        validate_every=_CHECK_EVERY.value,
    )


def train(run: Run, workdir: pathlib.Path):
    """Trains to the end of the curriculum, from the last checkpoint if there is one. Returns the parameters."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=1, max_to_keep=2, enable_async_checkpointing=False)
    with (
        contextlib.closing(Journal(workdir / "metrics.jsonl")) as journal,
        ocp.CheckpointManager(workdir.absolute() / "checkpoints", options=options) as manager,
    ):
        state, start = restore(manager, training.initial_state(run.config, run.seed, run.schedule))
        metrics = Metrics(journal, start)
        bar = tqdm(total=run.steps, initial=start, disable=not sys.stderr.isatty(), unit="step")
        for step, batch in batches(run.maker, run.phases, start, run.clips):
            state, found = run.learn(state, batch, settings_at(run.phases, step))
            done, last = step + 1, step + 1 == run.steps
            if done % run.validate_every == 0 or last:
                found |= run.validate(state.values)
            if done % run.log_every == 0 or "validation_loss" in found:
                row = metrics.write(done, found)
                bar.set_postfix(loss=row["loss"])
            if done % run.save_every == 0 or last:
                manager.save(done, args=ocp.args.StandardSave(state._asdict()))
            bar.update()
    return state.values


def restore(manager: ocp.CheckpointManager, state: training.TrainState) -> tuple[training.TrainState, int]:
    """The last checkpoint and its step, or the given state and 0."""
    if manager.latest_step() is None:
        return state, 0
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(shapes))
    return training.TrainState(**found), manager.latest_step()


def note_start(workdir: pathlib.Path) -> dict:
    """How this run began: its command, seed, curriculum, commit and versions. A resumed run keeps its first note.

    Raises:
      UserError: it is resumed with another flag.
    """
    path = workdir / "training.json"
    line = "python -m experiments.train_needle"
    given = [f"--{flag.name}={flag.value}" for flag in (_SEED, _CLIPS, _PEAK, _WIDTH, _LAYERS)]
    note = {
        "command": " ".join([line, *given]),
        "seed": _SEED.value,
        "phases": _PHASES.value,
        "commit": git_commit(),
        "versions": library_versions(),
    }
    if not path.exists():
        write_json(str(path), note)
    begun = json.loads(path.read_text(encoding="utf-8"))
    phases = [[f"--phase={text}" for text in each["phases"]] for each in (note, begun)]
    ours, theirs = (each["command"].split() + own for each, own in zip((note, begun), phases, strict=True))
    for now, then in itertools.zip_longest(ours, theirs, fillvalue="no further --phase"):
        if now != then:
            raise UserError(f"{now}: the run in {workdir} began with {then}; give that, or another --workdir")
    return begun


def start() -> None:
    """The whole run, from flags to the exported checkpoint.

    Raises:
      UserError: a setting that cannot be, or a checkpoint that is there already.
    """
    run = make_run()
    if _EXPORT.value and pathlib.Path(_EXPORT.value).exists():
        raise UserError(f"--export={_EXPORT.value}: already exists; name a new directory")
    workdir = made_directory("workdir", _WORKDIR.value)
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    note = note_start(workdir)
    values = train(run, workdir)
    if _EXPORT.value:
        export(_EXPORT.value, run.config, values)
        last = read_lines(workdir / "metrics.jsonl")[-1]
        write_json(f"{_EXPORT.value}/training.json", note | {"last": last})


if __name__ == "__main__":
    command.start("train_needle", start)
