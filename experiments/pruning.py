"""What pruning after the reference layer changes, on generated needle videos.

    python -m experiments.pruning --task=pair --frames=1024 --questions=200 --keep=0.5,0.2,0.1 --json=pruning.json

Every share is compared with the unpruned scan of the same questions: how far the groups' entropies move, how much of
the selection stays, and accuracy, with the 95 % interval of the difference. All other settings are flags. What it saves
in time is a row of `python -m experiments.benchmark`.
"""

import dataclasses

import numpy as np
from absl import flags

import adapttoken_jax as at
from adapttoken_jax import terminal
from adapttoken_jax.needle import SPLITS, TASKS
from adapttoken_jax.needle.study import cells, measures, replay
from adapttoken_jax.progress import Progress
from experiments import command

_MODEL = flags.DEFINE_string("model", "needle", "Checkpoint directory, or needle: the bundled model.")
_TASK = flags.DEFINE_enum("task", "single", list(TASKS), "Questions.")
_FRAMES = flags.DEFINE_integer("frames", 1024, "Frames of a video.", lower_bound=2)
_QUESTIONS = flags.DEFINE_integer("questions", 200, "Number of questions.", lower_bound=1)
_SPLIT = flags.DEFINE_enum("split", "validation", list(SPLITS), "Split of the videos.")
_KEEP = flags.DEFINE_list("keep", ["0.5", "0.2", "0.1"], "Shares of a group's tokens that later layers see.")
_JSON = flags.DEFINE_string("json", None, "Write the rows here; - for stdout.")
for _setting in terminal.setting_flags():
    _setting.define(flags.FLAGS)


def pruning_arms(config: at.AdaptTokenConfig, shares) -> dict[str, cells.Arm]:
    """The method with each share, after the one without pruning."""
    return {
        f"{share:g}": cells.Arm("adapttoken", dataclasses.replace(config, keep_after_reference=share))
        for share in (1.0, *shares)
    }


def changes(shot: cells.Shot, arm: cells.Arm, whole: cells.Arm) -> tuple[float, float]:
    """Of one question: mean change of a group's entropy in nats, and the share of the selection that stays."""
    cases = [shot.cases[each.scan_key] for each in (whole, arm)]
    tokens = [
        set(map(tuple, replay.select(c.footage.tokens, c.log, c.footage.prompt, each.config, "adapttoken").tokens))
        for c, each in zip(cases, (whole, arm), strict=True)
    ]
    moved = np.abs(cases[1].log.entropy - cases[0].log.entropy).mean()
    return float(moved), len(tokens[0] & tokens[1]) / len(tokens[0])


def measure(model: at.Model, cell: cells.Cell, arms: dict[str, cells.Arm], on_progress) -> list[dict]:
    """A row per arm."""
    whole, *_ = arms.values()
    parts, moved = [], {name: [] for name in arms}
    for place, numbers in enumerate(cells.parts_of(cell)):
        on_progress("parts", place, len(cells.parts_of(cell)))
        shots = [shot for number in numbers for shot in cells.shoot(model, cell, number, arms)]
        parts.append(cells.answer_shots(model, cell, shots, arms))
        for name, arm in arms.items():
            moved[name] += [changes(shot, arm, whole) for shot in shots]
    return [row(cells.join_results(parts), name, np.asarray(moved[name])) for name in arms]


def row(found: cells.CellResult, name: str, moved: np.ndarray) -> dict:
    """One line of the table, against the unpruned arm "1"."""
    right, before = (found.values(each, "right") for each in (name, "1"))
    gain, half = measures.difference(right, before, found.video)
    return {
        "task": found.cell.task, "frames": found.cell.frames, "questions": len(right), "keep": float(name),
        "accuracy": float(right.mean()), "gain": gain, "interval": half,
        "entropy_moved_nats": float(moved[:, 0].mean()), "selected_in_common": float(moved[:, 1].mean()),
    }  # fmt: skip


def run() -> None:
    """The whole run, from flags to files."""
    terminal.check_outputs({"json": _JSON.value})
    shares = command.numbers(_KEEP, float, 0, 1)
    model = at.load(_MODEL.value)
    config = at.AdaptTokenConfig.for_model(model.config, **terminal.given_settings(flags.FLAGS))
    cell = cells.Cell(_TASK.value, _FRAMES.value, _QUESTIONS.value, split=_SPLIT.value)
    with Progress() as progress:
        rows = measure(model, cell, pruning_arms(config, shares), progress)
    command.show({"rows": rows}, _JSON.value, terminal.table(rows))


if __name__ == "__main__":
    command.start("pruning", run)
