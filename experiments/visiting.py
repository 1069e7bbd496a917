"""What the order of visits and giving up change in Lite, on generated needle videos.

    python -m experiments.visiting --task=pair --frames=1024 --questions=200 --give_up=4,8 --json=visiting.json

Every question is answered from the frames on, by the full method and by Lite in both orders, without and with giving
up after so many groups. Neither changes what a group says (`entropy_moved_nats`): they change which groups are visited,
and with that the selection, the answer and the time. All other settings are flags.
"""

import dataclasses
import itertools
import time

import numpy as np
from absl import flags

import adapttoken_jax as at
from adapttoken_jax import terminal
from adapttoken_jax.needle import SPLITS, TASKS, Scene, scene
from adapttoken_jax.needle.study import measures
from adapttoken_jax.needle.study.scans import FPS
from adapttoken_jax.needle.study.videos import draw_frames
from adapttoken_jax.progress import Progress
from experiments import command

_MODEL = flags.DEFINE_string("model", "needle", "Checkpoint directory, or needle: the bundled model.")
_TASK = flags.DEFINE_enum("task", "single", list(TASKS), "Questions.")
_FRAMES = flags.DEFINE_integer("frames", 1024, "Frames of a video.", lower_bound=2)
_QUESTIONS = flags.DEFINE_integer("questions", 200, "Number of questions, each about its own video.", lower_bound=2)
_SPLIT = flags.DEFINE_enum("split", "validation", list(SPLITS), "Split of the videos.")
_GIVE_UP = flags.DEFINE_list("give_up", ["4", "8"], "Groups without a more certain one after which Lite gives up.")
_JSON = flags.DEFINE_string("json", None, "Write the rows here; - for stdout.")
for _setting in terminal.setting_flags():
    _setting.define(flags.FLAGS)

FULL = ("full", 0)


def arms(config: at.AdaptTokenConfig, give_up: list[int]) -> dict[tuple[str, int], tuple[str, at.AdaptTokenConfig]]:
    """(order, groups after which Lite gives up) -> method and settings; the full method first."""
    lite = {
        (order, groups): ("lite", dataclasses.replace(config, group_order=order, give_up_groups=groups))
        for order, groups in itertools.product(("sequential", "bit_reversed"), (0, *give_up))
    }
    return {FULL: ("adapttoken", config), **lite}


def ask(model: at.Model, asked: Scene, method: str, config: at.AdaptTokenConfig) -> tuple[at.Result, float]:
    """The answer to a scene's question, and the wall seconds that it took."""
    video = at.Frames(draw_frames(asked, np.arange(asked.frames)), FPS)
    begin = time.perf_counter()
    result = at.answer(model, video, asked.question.text, asked.question.options, config, method)
    return result, time.perf_counter() - begin


def compared(result: at.Result, full: at.Result, asked: Scene, seconds: float) -> dict[str, float]:
    """One answer beside that of the full method."""
    entropies = [(g.entropy, f.entropy) for g, f in zip(result.groups, full.groups, strict=True) if g.visited]
    tokens, theirs = (set(zip(r.slots, r.rows, r.cols, strict=True)) for r in (result.selected, full.selected))
    return {
        "accuracy": float(ord(result.option) - ord("A") == asked.question.correct),
        "groups_visited_share": result.stop.groups_visited / max(1, result.stop.groups_total),
        "selected_in_common": len(tokens & theirs) / len(theirs),
        "entropy_moved_nats": float(np.abs(np.diff(entropies)).max(initial=0.0)),
        "seconds": seconds,
    }


def measure(model: at.Model, scenes: list[Scene], asked_by: dict, on_progress) -> list[dict]:
    """A row per arm: means over the questions, of what moved the most."""
    found = {arm: [] for arm in asked_by}
    for method, config in asked_by.values():  # what is compiled now is not timed
        ask(model, scenes[0], method, config)
    for place, each in enumerate(scenes):
        on_progress("questions", place, len(scenes))
        full = None
        for arm, (method, config) in asked_by.items():
            result, seconds = ask(model, each, method, config)
            full = full or result
            found[arm].append(compared(result, full, each, seconds))
    return [row(arm, values, found[FULL]) for arm, values in found.items()]


def row(arm: tuple[str, int], values: list[dict], full: list[dict]) -> dict:
    """One line of the table, against the full method."""
    column = lambda name, of=values: np.asarray([each[name] for each in of])
    gain, half = measures.difference(column("accuracy"), column("accuracy", full), np.arange(len(full)))
    means = {name: float(column(name).mean()) for name in values[0]}
    order, groups = arm
    return {"order": order, "give_up_groups": groups, "questions": len(values), **means, "gain": gain, "interval": half,
            "entropy_moved_nats": float(column("entropy_moved_nats").max())}  # fmt: skip


def run() -> None:
    """The whole run, from flags to files."""
    terminal.check_outputs({"json": _JSON.value})
    give_up = command.numbers(_GIVE_UP, low=1)
    model = at.load(_MODEL.value)
    settings = {"max_frames": _FRAMES.value, **terminal.given_settings(flags.FLAGS)}
    config = at.AdaptTokenConfig.for_model(model.config, **settings)
    scenes = [scene(seed, _SPLIT.value, _FRAMES.value, _TASK.value) for seed in range(_QUESTIONS.value)]
    with Progress() as progress:
        rows = measure(model, scenes, arms(config, give_up), progress)
    command.show({"rows": rows}, _JSON.value, terminal.table(rows))


if __name__ == "__main__":
    command.start("visiting", run)
