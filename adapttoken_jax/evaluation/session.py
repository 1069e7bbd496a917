"""One evaluation from flags to `results.json`: check the data, open the model, go on where the last process stopped."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from adapttoken_jax.benchmarks import BENCHMARKS, PROMPTS, SCORERS, Item, Report, subtitles
from adapttoken_jax.calibration import model_fingerprint
from adapttoken_jax.config import SIZES, AdaptTokenConfig, ModelConfig, read_model_config
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import interchange, workdir
from adapttoken_jax.evaluation.outlook import Outlook
from adapttoken_jax.evaluation.replay import read_replay, replayed
from adapttoken_jax.evaluation.runner import Video, group_by_video, run_videos, scanned, shard
from adapttoken_jax.evaluation.summary import summarise
from adapttoken_jax.evaluation.workdir import RunFiles, Shard
from adapttoken_jax.loading import Model, load
from adapttoken_jax.prompt import plain_ask
from adapttoken_jax.result import write_text
from adapttoken_jax.sharding import MeshShape, make_mesh

PLAIN = "plain"  # the wording of `adapttoken answer`, beside the prompts of each benchmark


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is asked for; the fields are the flags of `adapttoken evaluate`.

    Attributes:
      settings: the fields of `AdaptTokenConfig` that the user gave.
      prompt: None is the benchmark's default.
      shard: "0/4"; None is the whole, or with several JAX processes this one's part.
      replay: directory of a run whose selections are answered again; None to select.
    """

    benchmark: str
    data: str
    model: str
    workdir: str
    method: str = "adapttoken"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    subtitles: bool = False
    limit: int | None = None
    strict: bool = False
    resume: bool = True
    shard: str | None = None
    replay: str | None = None
    mesh: str | None = None
    dtype: str | None = None
    attention: str = "auto"

    @property
    def prompt_name(self) -> str:
        """The prompt set.

        Raises:
          UserError: the benchmark has none of this name.
        """
        name = BENCHMARKS[self.benchmark].default_prompt if self.prompt is None else self.prompt
        known = (*PROMPTS[self.benchmark], PLAIN)
        if name not in known:
            raise UserError(f"--prompt={name}: {self.benchmark} has {', '.join(known)}")
        if name == PLAIN and self.subtitles:
            raise UserError(f"--subtitles: the prompt {PLAIN} has no place for them; drop one of them")
        return name

    def flags(self) -> dict[str, Any]:
        """What `run.json` keeps and a run that goes on is held against."""
        names = ("benchmark", "data", "model", "method", "subtitles", "limit", "replay", "mesh", "dtype", "attention")
        return {"prompt": self.prompt_name, **{name: getattr(self, name) for name in names}}


def check(benchmark: str, data: str, strict: bool = False, subtitles: bool = False) -> Report:
    """What a data directory lacks, without touching a model.

    Raises:
      UserError: it cannot be read; with `strict`, it lacks anything.
    """
    report = BENCHMARKS[benchmark].check(data, subtitles)
    if strict:
        report.require_complete()
    return report


def evaluate(asked: Evaluation) -> dict[str, Any] | None:
    """Runs an evaluation, or the part of it that is left.

    Returns:
      The content of `results.json`; None if other shards have work left.

    Raises:
      UserError: whatever the user can mend, before work where it can be known before.
      OSError: the work directory cannot be written; nothing that was answered is lost.
    """
    part = this_part(asked)
    items, report = BENCHMARKS[asked.benchmark].load(asked.data, asked.subtitles)
    if asked.strict:
        report.require_complete()
    if asked.subtitles and not any(item.subtitles for item in items):
        raise UserError(f"--subtitles: no video of --data={asked.data} has any; drop it, or complete the directory")
    items = items[: asked.limit]
    sizes = read_model_config(asked.model)
    config = AdaptTokenConfig.for_model(sizes, **asked.settings)
    hashes = {"questions": questions_hash(items)}
    if asked.subtitles:
        hashes["subtitles"] = subtitles_hash(items)
    replay = None if asked.replay is None else read_replay(asked.replay, items, asked.benchmark, asked.method)
    if replay:
        hashes["selections"] = replay.sha256
        config = dataclasses.replace(config, budget=_replayed_budget(asked, replay.budget))
    describe = lambda: workdir.describe_run(asked.flags(), dataclasses.asdict(config), hashes, size_name(sizes))
    with workdir.joined(asked.workdir):
        workdir.check_run(asked.workdir, describe(), asked.resume)
        model = load_here(asked)
        hashes["model"] = model_fingerprint(model)
        run = workdir.begin_run(asked.workdir, describe(), asked.resume)
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        videos = group_by_video(items)
        with RunFiles(asked.workdir, part, videos) as files:
            _answer(asked, model, config, files, shard(videos, part.index, part.count), replay)
            files.refresh(videos)
            if len(files.samples) < len(items):
                left = len(items) - len(files.samples)
                print(f"{left} of {len(items)} questions are left to other shards", file=sys.stderr)
                return None
            return finish(asked.workdir, items, [files.samples[item.id] for item in items], report, run)


def _replayed_budget(asked: Evaluation, selected: int) -> int:
    """That of the flags, else the one under which the replayed run selected."""
    budget = asked.settings.get("budget", selected)
    if budget > selected:
        raise UserError(
            f"--budget={budget}: the run of --replay={asked.replay} selected {selected} tokens; give at most that, or "
            "drop one of the flags"
        )
    return budget


def this_part(asked: Evaluation) -> Shard:
    """The shard of this process: as asked for, else by its number among the JAX processes."""
    if asked.shard is not None:
        return Shard.parse(asked.shard)
    return Shard(jax.process_index(), jax.process_count())


def load_here(asked: Evaluation) -> Model:
    """The model, on devices of this host alone: shards share nothing but the work directory."""
    mesh = None if asked.mesh is None else make_mesh(MeshShape.parse(asked.mesh), jax.local_devices())
    return load(asked.model, mesh=mesh, dtype=asked.dtype, attention=asked.attention)


def _answer(asked: Evaluation, model: Model, config, files: RunFiles, videos: Sequence[Video], replay) -> None:
    todo = [video for video in videos if not files.has(video)]
    done = sum(len(video.questions) for video in videos) - sum(len(video.questions) for video in todo)
    if done:
        print(f"going on after {done} questions that are done", file=sys.stderr)
    answerer = replayed(model, config, asked.method, replay) if replay else scanned(model, config, asked.method)
    with Outlook(todo, config, done) as outlook:

        def write(video, records):
            files.write(records)
            outlook.video_done(video)

        run_videos(
            model, todo, wording(asked), config, asked.method, write,
            answerer=answerer, strict=asked.strict, fits=done > 0,
        )  # fmt: skip


def wording(asked: Evaluation):
    """How a question is put: (item, video as sampled) -> `prompt.Ask`, with the subtitles that its frames see."""
    if asked.prompt_name == PLAIN:
        return lambda item, clip: plain_ask(item.question, item.options)
    put = PROMPTS[asked.benchmark][asked.prompt_name]

    def words(item: Item, clip):
        if not asked.subtitles:
            return put(item, None)
        if item.subtitles is None:
            return put(item, "")
        return put(item, subtitles.text_at(subtitles.read(item.subtitles, clip.info.duration_s), clip.frame_times))

    return words


def size_name(sizes: ModelConfig) -> str | None:
    """The released model that has these sizes; None if none has."""
    shape = lambda config: (config.text.width, config.text.layers, config.vision.ff)
    return next((name for name, released in SIZES.items() if shape(released) == shape(sizes)), None)


def questions_hash(items: Sequence[Item]) -> str:
    """SHA-256 of what is asked: ids, videos' names, questions, options, answers, and the published texts of these."""
    published = lambda item: [item.extra.get(name) for name in ("question", "options")]  # which prompts show
    return _hash_of(
        [item.id, item.video_id, item.question, list(item.options), item.answer, *published(item)] for item in items
    )


def subtitles_hash(items: Sequence[Item]) -> str:
    """SHA-256 of the videos' subtitles: the content of the files, and where the videos begin on their clock."""

    @functools.cache
    def content(path: pathlib.Path) -> str | None:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:  # a reason to pass over its video, which says so
            return None

    found = [item.subtitles for item in items]
    return _hash_of([content(file.path), file.offset_s] if file else None for file in found)


def _hash_of(contents: Iterable) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(json.dumps(content, ensure_ascii=False).encode("utf-8"))
    return digest.hexdigest()


def with_verdicts(benchmark: str, items: Sequence[Item], samples: Sequence[dict]) -> list[dict]:
    """The samples with "labels", those of the question, and "verdicts": what each rule makes of the prediction."""
    judge = lambda item, text: {
        rule: dataclasses.asdict(scorer.judge(item, text)) for rule, scorer in SCORERS[benchmark].items()
    }
    return [
        sample | {"labels": dict(item.labels), "verdicts": judge(item, sample["prediction"])}
        for item, sample in zip(items, samples, strict=True)
    ]


def finish(directory, items: Sequence[Item], samples: Sequence[dict], report: Report, run: Mapping) -> dict[str, Any]:
    """Writes what a whole run leaves: samples in the benchmark's order, results, and the files that other tools read.

    Returns:
      The content of `results.json`.
    """
    directory = pathlib.Path(directory)
    workdir.write_samples(directory, with_verdicts(run["flags"]["benchmark"], items, samples))
    results = summarise(items, samples, report, run)
    interchange.write_exports(directory, items, samples, results, run)
    write_text(directory / "results.json", json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return results
