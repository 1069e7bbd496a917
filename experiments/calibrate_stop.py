"""Calibrates when AdaptToken-Lite may stop, on videos without labels, and writes the certificate.

    python -m experiments.calibrate_stop --model=DIR --data=questions.jsonl --log=full.jsonl --certificate=stop.json
    python -m experiments.calibrate_stop --needle --videos=500 --frames=256 --log=full.jsonl --certificate=stop.json
    adapttoken answer --lite --stop_calibration=stop.json ...

Runs the full method once on every video and logs it (an interrupted run goes on where it was), replays the stop rule at
each of `--thresholds`, and certifies the boldest one before the first failure: with confidence 1 - delta, on at most
a share alpha of videos like these does Lite answer a question otherwise than the full run. That is the promise of one
test: the log keeps what was tested for a certificate, and any other test of it is refused, before anything is scanned.

`--data` has one JSON object per line: "video" (a path, from the file's directory if relative), "question", and
"options" if there are any; the lines of a video need not stand together. Every setting of the method is a flag, as in
`adapttoken answer`.

Cost: the scan, and a final pass for every number of groups after which a rule might stop. By default these are all, so
that every rule replays on the log and `--signals` can compare; with `--stops_only`, only those that this rule reaches.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

import adapttoken_jax as at
from adapttoken_jax import calibration, terminal
from adapttoken_jax.calibration.record import has_groups, record_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import DIFFICULTIES, SPLITS, TASKS, scene
from adapttoken_jax.progress import Progress
from experiments import command, questions

_MODEL = flags.DEFINE_string("model", "needle", "Checkpoint directory, or needle: the bundled model.")
_DATA = flags.DEFINE_string("data", None, "Videos and questions, JSON lines.")
_NEEDLE = flags.DEFINE_bool("needle", False, "Needle videos instead of --data.")
_VIDEOS = flags.DEFINE_integer("videos", 500, "Needle videos.", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 256, "Frames of a needle video.", lower_bound=1)
_TASK = flags.DEFINE_enum("task", "single", list(TASKS), "Task of the needle videos.")
_DIFFICULTY = flags.DEFINE_enum("difficulty", "normal", list(DIFFICULTIES), "Difficulty of the needle videos.")
_SPLIT = flags.DEFINE_enum("split", "validation", list(SPLITS), "Split of the needle videos' seeds.")
_FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "First seed of the needle videos.", lower_bound=0)
_LOG = flags.DEFINE_string("log", None, "Log of the full runs; continued if it exists.", required=True)
_CERTIFICATE = flags.DEFINE_string("certificate", None, "Write the certificate here.")
_ALPHA = flags.DEFINE_float("alpha", 0.05, "Share of videos in which Lite may differ from the full run.")
_DELTA = flags.DEFINE_float("delta", 0.1, "Probability that the promise fails.")
_THRESHOLDS = flags.DEFINE_list("thresholds", list(map(str, calibration.THRESHOLDS)), "Nats, from cautious to bold.")
_STOPS_ONLY = flags.DEFINE_bool("stops_only", False, "Ask for final answers only where this rule may stop.")
_SIGNALS = flags.DEFINE_bool("signals", False, "Print the AUROC of the stop signals.")
_RESAMPLES = flags.DEFINE_integer(
    "resamples", 0, "Calibrate so often on resampled videos and count broken promises.", lower_bound=0
)
_RESAMPLE_SIZE = flags.DEFINE_integer(
    "resample_size", 0, "Videos per resampled calibration; 0: half of the log.", lower_bound=0
)
_FRESH_LOG = flags.DEFINE_string(
    "fresh_log", None, "With --resamples: the log of other videos, on which the risks are counted."
)
_JSON = flags.DEFINE_string("json", None, "Write the tables here as JSON; - for stdout.")
_HIGHEST = {field.name: field for field in dataclasses.fields(at.AdaptTokenConfig)}["stop_entropy"].metadata["high"]
for _setting in terminal.setting_flags():
    _setting.define(flags.FLAGS)


@dataclasses.dataclass(frozen=True)
class Item:
    """One video with its questions; `load` gives what `at.answer` takes as a video."""

    name: str
    load: Callable[[], object]
    questions: tuple[str, ...]
    options: tuple[tuple[str, ...] | None, ...]


def needle_items() -> list[Item]:
    """The needle videos of the flags, one question each, rendered when their turn comes."""
    return [_needle_item(_FIRST_SEED.value + i) for i in range(_VIDEOS.value)]


def _needle_item(seed: int) -> Item:
    made = scene(seed, _SPLIT.value, _FRAMES.value, _TASK.value, _DIFFICULTY.value)
    name = f"{_SPLIT.value} {_TASK.value} {_DIFFICULTY.value} {_FRAMES.value} {seed}"
    return Item(name, lambda: at.Frames(made.images(), 4.0), (made.question.text,), (made.question.options,))


def read_items() -> list[Item]:
    """The videos of `--data`, in the order of their first lines.

    Raises:
      UserError: as `read_questions`.
    """
    asked: dict[pathlib.Path, list[questions.Line]] = {}  # the unit of the promise is the file, however it is spelled
    for line in questions.read_questions(_DATA.value):
        asked.setdefault(line.path, []).append(line)
    return [
        Item(
            name=lines[0].video,
            load=lambda path=path: str(path),
            questions=tuple(line.question for line in lines),
            options=tuple(line.options for line in lines),
        )
        for path, lines in asked.items()
    ]


def log_runs(writer: calibration.LogWriter, model, items: Sequence[Item], config, thresholds) -> int:
    """Logs the full run of every video that the log does not have yet; how many were too short to need groups.

    Raises:
      UserError: the log has other questions about one of them.
    """
    for item in items:
        if item.name in writer.done and not writer.done[item.name].asks(item.questions, item.options):
            raise UserError(f"--log={_LOG.value}: other questions about {item.name} were logged; name another file")
    points = (lambda log: calibration.stop_points(log, config, thresholds)) if _STOPS_ONLY.value else None
    short = 0
    with Progress() as progress:
        for done, item in enumerate(items, 1):
            if item.name not in writer.done:
                video = record_video(model, item.name, item.load(), item.questions, item.options, config, points)
                if video is None:
                    short += 1
                else:
                    writer.append(video)
            progress("videos", done, len(items))
    return short


def read_log(items: Sequence[Item]) -> calibration.Log:
    """What the log has of these videos."""
    return calibration.read_log(_LOG.value).only({item.name for item in items})


def planned_test(log: calibration.Log, config, thresholds, awaited: int = 0) -> dict:
    """The test of the flags."""
    return calibration.planned_test(log, config, _ALPHA.value, _DELTA.value, thresholds, awaited)


def check_log(model, items: Sequence[Item], config, thresholds) -> None:
    """Raises `UserError` before the scan if the log will not be good for the test after it."""
    log = read_log(items)
    done = {video.video for video in log.videos}
    new = [item for item in items if item.name not in done]
    if log.test is not None and not any(has_groups(model, item.load(), config) for item in new):
        new = []  # too short to be logged, as they were before: the same test again
    planned_test(log, config, thresholds, awaited=len(new))


def read_fresh_log(fingerprint, items: Sequence[Item]) -> calibration.Log | None:
    """The log of `--fresh_log`, if it is given.

    Raises:
      UserError: it was written otherwise, has videos that are calibrated with, or no resample is asked for.
    """
    path = _FRESH_LOG.value
    if path is None:
        return None
    if not _RESAMPLES.value:
        raise UserError("--fresh_log: counts the risks of --resamples; give that, too")
    log = calibration.read_log(path)
    if difference := log.written_otherwise(fingerprint):
        raise UserError(f"--fresh_log={path}: written with {difference}; log other videos the same way")
    if again := sorted({item.name for item in items} & {video.video for video in log.videos}):
        raise UserError(f"--fresh_log={path}: has {again[0]}, which is calibrated with; log other videos")
    if not log.videos:
        raise UserError(f"--fresh_log={path}: holds no video")
    return log


def tables(log, config, thresholds, fresh=None) -> dict[str, list]:
    """What the replay shows: a row per threshold; if asked for, a row per stop signal, and the resampled promise."""
    runs, n = replays(log, config, thresholds), len(log.videos)
    rows = [
        {"threshold": t, "losses": run.losses, "videos": n, "share_visited": run.share,
         "p_value": calibration.binomial_tail(run.losses, n, _ALPHA.value)}
        for t, run in zip(thresholds, runs, strict=True)
    ]  # fmt: skip
    found = {"thresholds": rows}
    if _SIGNALS.value:
        found["signals"] = calibration.compare_signals(log.videos)
    if _RESAMPLES.value:
        found["promise"] = [promise(losses(runs), losses(replays(fresh, config, thresholds)) if fresh else None)]
    return found


def replays(log, config, thresholds) -> list:
    """What the rule would have done at each threshold."""
    return [calibration.replay(log.videos, calibration.at_threshold(config, t)) for t in thresholds]


def losses(runs) -> np.ndarray:
    """Which videos are lost at which threshold: bool[videos, thresholds]."""
    return np.stack([run.lost for run in runs], 1)


def promise(lost: np.ndarray, fresh: np.ndarray | None) -> dict[str, float]:
    """How often resampled calibrations broke their promise; both are of `losses`, `fresh` of other videos."""
    size = _RESAMPLE_SIZE.value or len(lost) // 2
    risks = calibration.resampled_risks(lost, size, _ALPHA.value, _DELTA.value, _RESAMPLES.value, fresh=fresh)
    certified = risks[~np.isnan(risks)]
    return {
        "resamples": len(risks), "size": size, "alpha": _ALPHA.value, "delta": _DELTA.value,
        "fresh": 0 if fresh is None else len(fresh),
        "certified": len(certified), "broken": int((certified > _ALPHA.value).sum()),
        "mean_risk": float(certified.mean()) if certified.size else None,
    }  # fmt: skip


def calibrate() -> None:
    """The whole run, from flags to files."""
    if _NEEDLE.value == (_DATA.value is not None):
        raise UserError("--data: give either it or --needle")
    outputs = {"log": _LOG.value, "certificate": _CERTIFICATE.value, "json": _JSON.value}
    terminal.check_outputs(outputs, {"--data": _DATA.value, "--fresh_log": _FRESH_LOG.value})
    thresholds = command.numbers(_THRESHOLDS, float, high=_HIGHEST)
    calibration.check_levels(_ALPHA.value, _DELTA.value)
    items = needle_items() if _NEEDLE.value else read_items()
    if _CERTIFICATE.value:
        calibration.check_plan(len(items), _ALPHA.value, _DELTA.value, thresholds)
    model = at.load(_MODEL.value)
    config = at.AdaptTokenConfig.for_model(model.config, **terminal.given_settings(flags.FLAGS))
    if _CERTIFICATE.value:
        calibration.check_unpruned(config)
    fingerprint = calibration.config_fingerprint(config, calibration.model_fingerprint(model))
    fresh = read_fresh_log(fingerprint, items)
    with calibration.LogWriter(_LOG.value, fingerprint) as writer:
        if _CERTIFICATE.value:
            check_log(model, items, config, thresholds)
        short = log_runs(writer, model, items, config, thresholds)
        if short:
            print(f"{short} videos are too short for groups; Lite does not run on them", file=sys.stderr)
        log = read_log(items)
        if not log.videos:
            raise UserError(f"--log={_LOG.value}: no video was long enough for groups; nothing to calibrate")
        if _CERTIFICATE.value:
            test = planned_test(log, config, thresholds)
            if log.test is None:
                writer.record_test(test)
    show(tables(log, config, thresholds, fresh))
    if _CERTIFICATE.value:
        certificate = calibration.certify(log, config, _ALPHA.value, _DELTA.value, thresholds)
        calibration.write_certificate(_CERTIFICATE.value, certificate)
        print(describe(certificate), file=sys.stderr)


def show(content: dict[str, list]) -> None:
    """Prints the tables, or writes them as JSON."""
    command.show(content, _JSON.value, "\n".join(map(terminal.table, content.values())))


def describe(certificate) -> str:
    """The certificate in one line."""
    stop = certificate.stop
    return (
        f"{_CERTIFICATE.value}: rule {stop['stop_rule']}, stop_entropy {stop['stop_entropy']:g}: with confidence "
        f"{1 - certificate.delta:g} Lite differs from the full run in at most {certificate.alpha:.1%} of videos; "
        f"{certificate.losses} of {certificate.videos} did, {certificate.mean_share_visited:.0%} of the groups visited"
    )


if __name__ == "__main__":
    command.start("calibrate_stop", calibrate)
