"""Finds the decoder layer whose attention points at the evidence: the reference layer of a checkpoint.

    python -m experiments.probe_layer --model=needle --json=layers.json --plot=layers.png
    python -m experiments.probe_layer --model=DIR --data=needles.jsonl --json=-

Takes generated needle videos, or with `--data` any videos whose evidence is known: one JSON object per line with
"video" (a path, from the file's directory if relative), "question", "options" if there are any, and "needles", a list
of {"start", "stop"} in seconds with "box": [top, left, bottom, right] as shares of the frame. For every layer it prints
how many of the needle's tokens are among the most relevant ones of their group, and proposes the best layer. Needles
outside of their videos are left out, and counted on stderr.

Every layer costs a pass over the groups that show a needle; `--layers` restricts them.
"""

import sys
from collections.abc import Iterator

from absl import flags

import adapttoken_jax as at
from adapttoken_jax import terminal
from adapttoken_jax.encoding import encode_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import DIFFICULTIES, SPLITS, TASKS
from adapttoken_jax.needle.study import layers, plots
from adapttoken_jax.needle.study.cells import Cell, count_videos, film_video
from adapttoken_jax.needle.study.scans import Footage
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.progress import Progress
from adapttoken_jax.prompt import build_prompt
from experiments import command, questions

_MODEL = flags.DEFINE_string("model", "needle", "Checkpoint directory, or needle: the bundled model.")
_DATA = flags.DEFINE_string("data", None, "Videos with known evidence, JSON lines, instead of generated ones.")
_TASK = flags.DEFINE_enum("task", "single", list(TASKS), "Questions of the generated videos.")
_FRAMES = flags.DEFINE_integer("frames", 256, "Frames of a generated video.", lower_bound=2)
_QUESTIONS = flags.DEFINE_integer("questions", 200, "Generated questions.", lower_bound=1)
_PER_VIDEO = flags.DEFINE_integer("questions_per_video", 4, "Variants of a video.", lower_bound=1, upper_bound=4)
_SEED = flags.DEFINE_integer("seed", 0, "Which generated videos.", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "validation", list(SPLITS), "Split of the generated videos.")
_DIFFICULTY = flags.DEFINE_enum("difficulty", "normal", list(DIFFICULTIES), "Difficulty of the generated videos.")
_LAYERS = flags.DEFINE_list("layers", None, "Layers to try; all by default.")
_TAKEN = flags.DEFINE_list("taken", ["4", "8", "16"], "Tokens taken per group, beside as many as show the needle.")
_JSON = flags.DEFINE_string("json", None, "Write the numbers here; - for stdout.")
_PLOT = flags.DEFINE_string("plot", None, "Write the figure here, as PNG.")
for _setting in terminal.setting_flags():
    if _setting.name != "seed":  # of sampling, which a probe does not do
        _setting.define(flags.FLAGS)


def generated(model, config, progress) -> Iterator[layers.Needles]:
    """The needles of generated videos."""
    cell = Cell(
        _TASK.value, _FRAMES.value, _QUESTIONS.value, _SEED.value, _SPLIT.value, _DIFFICULTY.value, _PER_VIDEO.value
    )
    for number in range(count_videos(cell)):
        progress("videos", number, count_videos(cell))
        yield from map(layers.scene_needles, film_video(model, cell, number, config))


def given(model, config, progress, evidence, left_out: list[str]) -> Iterator[layers.Needles]:
    """The needles of `--data`; `evidence` is `read_needles`'s. `left_out` gets the line of each that no token shows."""
    for number, (line, boxes) in enumerate(evidence):
        progress("videos", number, len(evidence))
        plan = plan_run(model.config, str(line.path), config, "adapttoken")
        prompt = build_prompt(model.tokenizer, line.question, line.options)
        needles = layers.boxed_needles(Footage(None, None, encode_video(model, plan.clip), prompt), boxes)
        left_out += [line.where] * needles.left_out
        yield needles


def probe() -> None:
    """The whole run, from flags to files."""
    terminal.check_outputs({"json": _JSON.value, "plot": _PLOT.value}, {"--data": _DATA.value})
    taken = command.numbers(_TAKEN)
    evidence = questions.read_needles(_DATA.value) if _DATA.value else None
    model = at.load(_MODEL.value)
    last = model.config.text.layers - 1
    tried = command.numbers(_LAYERS, high=last) if _LAYERS.value else list(range(last + 1))
    settings = terminal.given_settings(flags.FLAGS) | {"seed": 0}
    config = at.AdaptTokenConfig.for_model(model.config, **settings)
    left_out: list[str] = []
    with Progress() as progress:
        common = model, config, progress
        needles = given(*common, evidence, left_out) if evidence else generated(*common)
        rows = layers.probe_layers(model, needles, config, tried, taken)
    if not rows:
        raise UserError(f"--data={_DATA.value}: no needle lies inside of its video; check times and boxes")
    if left_out:
        count = sum(len(boxes) for _, boxes in evidence)
        words = f"{len(left_out)} of {count} needles lie outside of their videos and are left out"
        print(f"{words}; the first: {left_out[0]}", file=sys.stderr)
    show(rows, layers.proposed_layer(rows))


def show(rows: list[dict], best: int) -> None:
    """Prints the table or writes the files."""
    if _PLOT.value:
        plots.draw_layers(rows, _PLOT.value)
    text = f"{terminal.table(rows)}\nproposed reference layer: {best}\n"
    command.show({"proposed": best, "rows": rows}, _JSON.value, text)


if __name__ == "__main__":
    command.start("probe_layer", probe)
