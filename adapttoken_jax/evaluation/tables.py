"""Tables and a plot from the work directories of finished runs: accuracy beside the published numbers, cost, places.

A table is a list of rows, dictionaries with the same keys; a cell is a text or a number.
"""

import collections
import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from adapttoken_jax.benchmarks import BENCHMARKS, SCORERS
from adapttoken_jax.benchmarks.statistics import paired_difference
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import workdir
from adapttoken_jax.evaluation.published import COLUMNS, published
from adapttoken_jax.evaluation.samples import another_question
from adapttoken_jax.result import atomic_file

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A work directory.

    Attributes:
      path: the directory, links followed.
      run, results: the contents of `run.json` and `results.json`.
      samples, costs: records by question.
      setting: what tells it from others of its model, method and frames, such as "budget 2048"; "" if there are none.
    """

    path: pathlib.Path
    run: Mapping[str, Any]
    results: Mapping[str, Any]
    samples: Mapping[str, Mapping[str, Any]]
    costs: Mapping[str, Mapping[str, Any]]
    setting: str = ""

    @property
    def benchmark(self) -> str:
        """As in `--benchmark`."""
        return self.results["benchmark"]

    @property
    def key(self) -> tuple[str, str, int]:
        """Model, method, most frames: a row of the table."""
        return self.model, self.method, self.results["config"]["max_frames"]

    @property
    def model(self) -> str:
        """The name of a released size, else that of the checkpoint's directory."""
        return self.run["model_size"] or pathlib.PurePath(self.run["flags"]["model"]).name

    @property
    def method(self) -> str:
        """As in `--method`, whether its selections were replayed and subtitles shown, and its `setting`."""
        marks = {"replayed": self.replayed, "subtitles": self.results["subtitles"], self.setting: self.setting}
        return self.results["method"] + "".join(f" ({mark})" for mark, holds in marks.items() if holds)

    @property
    def label(self) -> str:
        """`key` in words."""
        return f"{self.model} {self.method}, {self.key[2]} frames"

    @property
    def replayed(self) -> bool:
        """Whether it answered from another run's selections; its cost is then that of its answers alone."""
        return self.run["flags"]["replay"] is not None

    def cell(self, rule: str) -> Mapping[str, Any]:
        """The overall score under a rule.

        Raises:
          UserError: the benchmark has no such rule.
        """
        scores = self.results["scores"]
        if rule not in scores:
            raise UserError(f"--rule={rule}: {self.benchmark} has {', '.join(scores)}")
        return scores[rule]["overall"]

    @property
    def seconds(self) -> float | None:
        """Median seconds per question, what a video's questions share divided among them. Robust to compilation."""
        found = [cost["amortised"] for cost in self.costs.values()]
        return statistics.median(found) if found else None


def read_runs(directories: Sequence) -> list[FinishedRun]:
    """Reads work directories; of those that share a benchmark and a `key`, the settings are told that differ.

    Raises:
      UserError: one is not a run, or not finished.
    """
    runs = [read_finished(directory) for directory in directories]
    alike = collections.defaultdict(list)
    for run in runs:
        alike[run.benchmark, run.key].append(_settings(run))
    return [dataclasses.replace(run, setting=_differing(_settings(run), alike[run.benchmark, run.key])) for run in runs]


def _settings(run: FinishedRun) -> dict[str, Any]:
    return {"budget": run.results["config"]["budget"], "prompt": run.results["prompt"]}


def _differing(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in own.items() if any(each[name] != value for each in others))


def read_finished(directory) -> FinishedRun:
    """Reads a work directory.

    Raises:
      UserError: not a run, or not finished.
    """
    path = pathlib.Path(directory) / "results.json"
    run = workdir.read_run(directory)
    if not path.is_file():
        raise UserError(f"{directory}: not finished; run the same evaluation again to go on")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run the same evaluation again") from None
    records = {name: workdir.read_all(directory, name) for name in ("samples", "costs")}
    if any("verdicts" not in sample for sample in records["samples"].values()):  # it went on, and was interrupted
        raise UserError(f"{directory}: not finished; run the same evaluation again to go on")
    return FinishedRun(pathlib.Path(directory).resolve(), run, results, **records)


def accuracy_table(runs: Sequence[FinishedRun], rule: str) -> list[Row]:
    """A row per model, method and number of frames, a column per benchmark.

    A cell is the accuracy in percent, [its 95 % interval], (the published number, the difference from it), and how many
    of the benchmark's questions have an answer if not all.

    Raises:
      UserError: an unknown rule, or two runs for one cell.
    """
    names = [name for name in COLUMNS if any(run.benchmark == name for run in runs)]
    rows: dict[tuple, Row] = {}
    for run in runs:
        empty = dict(zip(("model", "method", "frames"), run.key, strict=True)) | dict.fromkeys(names, "–")
        row = rows.setdefault(run.key, empty)
        if row[run.benchmark] != "–":
            raise UserError(f"{run.path}: a second run of {' '.join(map(str, run.key))} on {run.benchmark}; give one")
        row[run.benchmark] = _accuracy(run, rule)
    return list(rows.values())


def _accuracy(run: FinishedRun, rule: str) -> str:
    cell, (model, method, frames) = run.cell(rule), run.key
    if cell["accuracy"] is None:
        return "–"
    ours, known = 100 * cell["accuracy"], published(model, method, frames, run.benchmark)
    spread = "" if cell["low"] is None else f" [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
    beside = "" if known is None else f" ({known:.1f}, {ours - known:+.1f})"
    answered, asked = run.results["answered"], BENCHMARKS[run.benchmark].questions
    part = "" if answered == asked else f", {answered} of {asked} questions"
    return f"{ours:.1f}{spread}{beside}{part}"


def cost_table(runs: Sequence[FinishedRun], rule: str) -> list[Row]:
    """A row per run: accuracy, what a question cost, and how much of the scan was needed.

    Raises:
      UserError: an unknown rule.
    """
    rows = []
    for run in runs:
        cost, accuracy = run.results["cost"], run.cell(rule)["accuracy"]
        if not cost:
            continue
        rows.append({
            "benchmark": run.benchmark,
            "model": run.model,
            "method": run.method,
            "frames": run.results["config"]["max_frames"],
            "accuracy": None if accuracy is None else round(100 * accuracy, 1),
            "seconds": None if run.seconds is None else round(run.seconds, 3),
            "visual tokens": round(cost["visual_tokens"]),
            "tokens, shared scan": round(cost["visual_tokens_shared"]),
            "TFLOPs": round(cost["flops"] / 1e12, 4),
            "groups": f"{cost['groups_visited']:.1f} of {cost['groups_total']:.1f}" if cost["groups_total"] else None,
        })  # fmt: skip
    return rows


def localisation_table(runs: Sequence[FinishedRun]) -> list[Row]:
    """A row per run whose benchmark has time references; shares in percent (`localisation.localise`)."""
    return [
        {"benchmark": run.benchmark, "model": run.model, "method": run.method,
         "frames": run.key[2], "questions": found["questions"],
         **{f"{name}, %": round(100 * found[name], 2) for name in ("chance", "budget", "selected", "hit")}}
        for run in runs if (found := run.results["localisation"])
    ]  # fmt: skip


def paired_table(runs: Sequence[FinishedRun], baseline: FinishedRun, rule: str) -> list[Row]:
    """A row per other run on the baseline's benchmark: the difference in accuracy, clustered by video.

    Raises:
      UserError: no such run, an unknown rule, samples without labels, or a question that is another one elsewhere.
    """
    others = [run for run in runs if run.benchmark == baseline.benchmark and run.path != baseline.path]
    if not others:
        raise UserError(f"--baseline={baseline.path}: no other run on {baseline.benchmark}; give one, or drop it")
    rows = []
    for run in others:
        _check_same_questions(baseline, run)
        verdicts = [_verdicts(each, rule) for each in (baseline, run)]
        clusters = {name: sample["video_id"] for name, sample in run.samples.items()}
        found = paired_difference(*verdicts, clusters, _strata(run, rule))
        rows.append({
            "benchmark": run.benchmark,
            "run": run.label,
            "against": baseline.label,
            "difference, %": round(100 * found.difference, 2),
            "low": round(100 * found.low, 2),
            "high": round(100 * found.high, 2),
            "p": float(f"{found.p_value:.2g}"),
            "questions": found.n,
            "only run": found.only_second,
            "only baseline": found.only_first,
        })  # fmt: skip
    return rows


def _check_same_questions(baseline: FinishedRun, run: FinishedRun) -> None:
    if other := another_question(baseline.samples, run.samples):
        raise UserError(
            f"--baseline={baseline.path}: question {other} is about another video in {run.path}, or has another "
            "answer; give runs of the same questions"
        )


def _verdicts(run: FinishedRun, rule: str) -> dict[str, bool]:
    verdicts = {name: run.samples[name]["verdicts"][rule] for name in _strata(run, rule)}
    return {name: verdict["correct"] for name, verdict in verdicts.items() if verdict["counted"]}


def _strata(run: FinishedRun, rule: str) -> dict[str, str]:
    """Of the questions that the overall accuracy is made of, the part whose mean each enters."""
    run.cell(rule)  # names an unknown rule
    stratum = SCORERS[run.benchmark][rule].stratum
    try:
        found = {name: stratum(sample.get("labels", {})) for name, sample in run.samples.items()}
    except KeyError:
        raise UserError(
            f"{run.path}: scored by an earlier version; run the same evaluation again to score it"
        ) from None
    return {name: stratum for name, stratum in found.items() if stratum is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """A table of GitHub's Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_LATEX = {each: f"\\{each}" for each in "%_&#${}"} | {
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "–": "--", "−": "$-$"
}  # fmt: skip


def latex(rows: Sequence[Row]) -> str:
    """A `tabular` with booktabs' rules."""
    line = lambda cells: " & ".join(_text(cell).translate(str.maketrans(_LATEX)) for cell in cells) + " \\\\\n"
    begin = f"\\begin{{tabular}}{{{'l' * len(rows[0])}}}\n\\toprule\n"
    body = "".join(line(row.values()) for row in rows)
    return f"{begin}{line(rows[0])}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def _text(value) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def pareto_plot(path, runs: Sequence[FinishedRun], rule: str) -> None:
    """Accuracy over cost, one panel per benchmark; a line joins the runs that no other beats in both. A PNG.

    Replays are left out: the scan that they answer from is none of their cost.

    Raises:
      UserError: there are only replays, or an unknown rule.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [run for run in runs if not run.replayed]
    names = [name for name in COLUMNS if any(run.benchmark == name for run in runs)]
    if not names:
        raise UserError("--plot: a replay's cost is without its scan; give the runs that are replayed, too")
    figure = Figure(figsize=(5 * len(names), 3.6), dpi=130, layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        points = [_point(run, rule) for run in runs if run.benchmark == name]
        for label, cost, accuracy in (point for point in points if point):
            axes.plot(cost, accuracy, "o")
            axes.annotate(label, (cost, accuracy), xytext=(4, 4), textcoords="offset points", fontsize=8)
        best = pareto_front([point[1:] for point in points if point])
        axes.plot([cost for cost, _ in best], [accuracy for _, accuracy in best], color="#999999", zorder=0)
        axes.set(
            title=name, xscale="log", xlabel="visual tokens prefilled per question", ylabel=f"accuracy, % ({rule})"
        )
        axes.spines[["top", "right"]].set_visible(False)  # the names of the dearest runs reach beyond
        _plain_ticks(axes)
    with atomic_file(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def _plain_ticks(axes) -> None:
    """Ticks of a logarithmic x axis as 500, 1k, 2k; the locator itself finds others within less than a decade."""
    from matplotlib.ticker import EngFormatter, LogLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()


def _point(run: FinishedRun, rule: str) -> tuple[str, float, float] | None:
    accuracy, cost = run.cell(rule)["accuracy"], run.results["cost"]
    return None if accuracy is None or not cost else (run.label, cost["visual_tokens"], 100 * accuracy)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, accuracy) pairs that no other one beats in both, by ascending cost."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front
