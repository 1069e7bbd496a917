"""Measures the method on needle videos: one command makes every table, plot and page of evidence.

    python -m experiments.needle_study --output=docs
    python -m experiments.needle_study --task=pair --frames=1024 --questions=400 --arms=uniform,adapttoken --json=-

With `--output` everything is measured: settings chosen on validation videos, all arms on test videos, ablations, stop
rules, options, times, PyTorch; `evidence.md` and the directory `evidence` appear there. Without it only the main table
is, with the settings of the model's preset. Every setting of the method is a flag, as in `adapttoken answer`.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import sys
import time

import jax
from absl import flags

import adapttoken_jax as at
from adapttoken_jax import result, terminal
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import DIFFICULTIES
from adapttoken_jax.needle.study import cells, document, lab, layers, plots, sections, targets
from adapttoken_jax.progress import Progress
from experiments import command

_MODEL = flags.DEFINE_string("model", "needle", "Checkpoint directory, or needle: the bundled model.")
_TASK = flags.DEFINE_enum("task", "all", ["single", "pair", "all"], "Which questions.")
_FRAMES = flags.DEFINE_list("frames", ["64", "256", "1024", "2048", "10000"], "Lengths of the videos, in frames.")
_QUESTIONS = flags.DEFINE_integer("questions", 400, "Questions per task and length.", lower_bound=1)
_PER_VIDEO = flags.DEFINE_integer("questions_per_video", 4, "Variants of a video.", lower_bound=1, upper_bound=4)
_SEED = flags.DEFINE_integer("seed", 0, "Which videos of the split: each seed has its own.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "Which videos.")
_DIFFICULTY = flags.DEFINE_enum("difficulty", "normal", list(DIFFICULTIES), "Difficulty of the videos.")
_ARMS = flags.DEFINE_list("arms", list(sections.ARMS), "Arms of the main table.")
_JSON = flags.DEFINE_string("json", None, "Write the numbers here; - for stdout.")
_OUTPUT = flags.DEFINE_string("output", None, "Measure everything and write evidence.md and evidence/ here.")
_SECTIONS = flags.DEFINE_list(
    "sections", ["layers", "choose", "budget", "stop", "main", "scanned", "hard", "seconds", "torch"],
    "With --output: what to measure; the rest is kept from the last time.",
)  # fmt: skip
_QUICK = flags.DEFINE_bool("quick", False, "Fewer lengths and questions: a look in minutes, no evidence.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Processes that measure; 0: one per core on a CPU.", lower_bound=0)
for _setting in terminal.setting_flags():
    if _setting.name != "seed":  # of sampling, which a study does not do
        _setting.define(flags.FLAGS)


def study_size() -> sections.Size:
    """How much to measure, from the flags.

    Raises:
      UserError: a number of frames that is none.
    """
    size = sections.Size(
        tasks=("single", "pair") if _TASK.value == "all" else (_TASK.value,),
        frames=tuple(command.numbers(_FRAMES, low=1)),
        questions=_QUESTIONS.value,
        seed=_SEED.value,
        split=_SPLIT.value,
        difficulty=_DIFFICULTY.value,
        per_video=_PER_VIDEO.value,
    )
    return dataclasses.replace(size, **_LITTLE) if _QUICK.value else size


_LITTLE = {
    "frames": (64, 256), "questions": 40, "detail_frames": (256,), "scan_questions": 16, "choice_questions": 16,
    "stop_questions": 24, "hard_frames": 256, "timed_videos": 2, "torch_questions": 8,
}  # fmt: skip


def study(own: lab.Lab, size: sections.Size, config) -> dict:
    """Everything, section by section; each is written as soon as it is there.

    Raises:
      UserError: a section that does not exist.
      RuntimeError: the replay is not what `answer` does.
    """
    store = pathlib.Path(_OUTPUT.value) / "evidence" / "study.json"
    store.parent.mkdir(exist_ok=True)
    found = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    todo = {
        "layers": lambda: layers_section(own, size, chosen),
        "choose": lambda: sections.choose(own, size, config),
        "budget": lambda: sections.choose_budget(own, size, chosen),
        "stop": lambda: sections.choose_stop(own, size, chosen),
        "main": lambda: sections.main_section(own, size, chosen, _ARMS.value),
        "scanned": lambda: sections.scanned_section(own, size, chosen),
        "hard": lambda: sections.hard_section(own, size, chosen),
        "seconds": lambda: sections.seconds_section(own, size, chosen),
        "torch": lambda: sections.torch_section(own, size, chosen),
    }
    unknown = set(_SECTIONS.value) - set(todo)
    if unknown:
        raise UserError(f"--sections={','.join(sorted(unknown))}: choose from {', '.join(todo)}")
    found["about"] = about(own.model, size, checked(own.model, size, config))
    begun = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    run_of = {"begun": begun, "commit": (result.git_commit() or "unknown")[:7]}
    for name in [name for name in todo if name in _SECTIONS.value]:
        settings = sections.chosen_settings(found)
        chosen = dataclasses.replace(sections.paper_settings(config), **settings) if settings else config
        found["settings"] = dataclasses.asdict(chosen)
        begin = time.perf_counter()
        found[name] = todo[name]()
        found.setdefault("measured", {})[name] = run_of | {"seconds": time.perf_counter() - begin}
        result.write_text(store, document.json_lines(found))
    return found


def layers_section(own: lab.Lab, size: sections.Size, config) -> dict:
    """The layer probe on validation videos of the first task."""
    cell = size.choice_cell(*size.choice_places[0])
    numbers, model = range(cells.count_videos(cell)), own.model
    footage = (each for number in numbers for each in cells.film_video(model, cell, number, config))
    own.on_progress("layers", 0, len(numbers))
    tried = range(model.config.text.layers)
    rows = layers.probe_layers(model, map(layers.scene_needles, footage), config, tried, (4, 8, 16))
    return {"rows": rows, "proposed": layers.proposed_layer(rows)}


def about(model, size: sections.Size, check: cells.Check) -> dict:
    """What was measured, with which model, where."""
    versions = result.library_versions()
    files = [path for path in pathlib.Path(model.path).rglob("*") if path.is_file()]
    return {
        "command": " ".join(["python -m experiments.needle_study", *_arguments()]),
        "model": _MODEL.value,
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(model.module))),
        "model_bytes": sum(path.stat().st_size for path in files),
        "weights": hashlib.sha256(
            b"".join(p.read_bytes() for p in sorted(files) if p.suffix == ".safetensors")
        ).hexdigest(),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "numpy")),
        "cores": lab.usable_cores(),
        "check": f"{check.options} of {check.answers} answers the same, {check.tokens} from the very same tokens",
        **{name: getattr(size, name) for name in ("split", "difficulty", "questions", "per_video", "seed")},
    }


def _arguments() -> list[str]:
    """The command's own, without the one that measures in instalments: the page names those."""
    return [each for each in sys.argv[1:] if not each.startswith("--sections=")]


def checked(model, size: sections.Size, config) -> cells.Check:
    """Holds the replay against `answer` on videos of the shortest length.

    Raises:
      RuntimeError: they differ.
    """
    arms = sections.main_arms(config, [name for name in sections.ARMS if name not in ("attention", "certain")])
    parts = [cells.check_replay(model, size.cell(task, min(size.frames)), arms) for task in size.tasks]
    counts = (sum(getattr(part, name) for part in parts) for name in ("answers", "options", "tokens"))
    check = cells.Check(*counts, max(part.entropy for part in parts))
    if not check.holds:
        raise RuntimeError(f"the replay is not what adapttoken_jax.answer does: {check}")
    return check


def write_page(found: dict) -> None:
    """evidence.md and the figures."""
    directory = pathlib.Path(_OUTPUT.value)
    found["targets"] = targets.check_targets(found)
    figures = plots.draw_all(found, directory / "evidence")
    if "layers" in found:
        plots.draw_layers(found["layers"]["rows"], directory / "evidence" / "layers.png")
        figures.append("layers.png")
    result.write_text(directory / "evidence.md", document.evidence_page(found, figures))


def run() -> None:
    """The whole run, from flags to files.

    Raises:
      UserError: a flag that cannot be.
    """
    size = study_size()
    unknown = set(_ARMS.value) - set(sections.ARMS)
    if unknown or not _ARMS.value:
        raise UserError(f"--arms={','.join(_ARMS.value)}: choose from {', '.join(sections.ARMS)}")
    terminal.check_outputs({"json": _JSON.value})
    if _OUTPUT.value and not pathlib.Path(_OUTPUT.value).is_dir():
        raise UserError(f"--output={_OUTPUT.value}: no such directory; create it first")
    model = at.load(_MODEL.value)
    config = at.AdaptTokenConfig.for_model(model.config, **(terminal.given_settings(flags.FLAGS) | {"seed": 0}))
    processes = _PROCESSES.value or lab.default_processes()
    with Progress() as progress, lab.Lab(model, processes, progress) as own:
        if _OUTPUT.value:
            found = study(own, size, config)
            write_page(found)
            rows = found.get("main", {}).get("rows", [])
        else:
            rows = sections.rows_only(own, size, config, _ARMS.value)
            found = {"rows": rows}
    show(rows, found)


def show(rows: list[dict], found: dict) -> None:
    """Prints the main table, or writes all numbers as JSON."""
    names = ("arm", "task", "frames", "questions", "accuracy", "accuracy_low", "accuracy_high", "groups_visited_share")
    short = [
        {name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in names} for row in rows
    ]
    command.show({**found, "rows": rows}, _JSON.value, terminal.table(short))


if __name__ == "__main__":
    command.start("needle_study", run)
