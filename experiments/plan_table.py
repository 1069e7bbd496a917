"""Plans several models on several TPU slices and prints the table of `docs/pods.md`.

    python -m experiments.plan_table --plans=plans --cases=qwen2.5-vl-7b@v5e:2x4,qwen2.5-vl-72b@v6e:4x4

Each case is one plan, of the mesh that `auto` finds unless it names one (`qwen2.5-vl-7b@v5e:2x4@data=2:model=4`), and
kept as JSON in `--plans`: a case that is there already is not compiled again.
"""

import json
import os
import pathlib
import re
import sys

from absl import flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is run

from adapttoken_jax import planning
from adapttoken_jax.errors import UserError
from adapttoken_jax.planning.command import as_json
from adapttoken_jax.result import made_directory, plain_json, write_text
from experiments import command

_PLANS = flags.DEFINE_string("plans", "plans", "Directory of the plans, made if missing.")
_CASES = flags.DEFINE_list("cases", ["qwen2.5-vl-7b@v5e:2x4"], "MODEL@SLICE or MODEL@SLICE@MESH, one or more.")
_FRAMES = flags.DEFINE_integer("max_frames", 4096, "Frames of the video.", lower_bound=1)

_COLUMNS = ("model", "slice", "mesh", "peak GiB", "s per group", "s per question", "roofline", "of peak", "limit")


def planned(case: str, frames: int, workdir: pathlib.Path) -> dict:
    """The plan of one case as JSON, from the directory of plans if it is there."""
    model, topology, mesh = (*case.split("@"), "auto")[:3]
    target = workdir / f"{re.sub('[:/]', '-', case).replace('@', '_')}_{frames}.json"
    if not target.is_file():
        settings = {"max_frames": frames}
        progress = lambda text: print(text, file=sys.stderr, flush=True)
        plan = planning.plan(model, topology, mesh.replace(":", ","), settings=settings, on_progress=progress)
        write_text(target, json.dumps(plain_json(as_json(plan)), indent=2))
    return json.loads(target.read_text())


def row(plan: dict) -> tuple[str, ...]:
    """The cells of one plan: of all its programs the highest peak, of the group pass its speed."""
    peak = max(program["memory"]["peak"] for program in plan["programs"]) / 2**30
    names = (plan["model"], plan["topology"], plan["mesh"])
    size = f"{peak:.1f} of {plan['hbm'] / 2**30:.1f}"
    if not plan["fits"]:
        return *names, size, "does not fit", "", "", "", ""
    group = next(program for program in plan["programs"] if program["name"] == "group")
    seconds = (f"{plan['seconds'][name]:.3g}" for name in ("group", "question", "roofline_question"))
    return *names, size, *seconds, f"{group['share_of_peak']:.0%}", group["limit"]


def table(plans: list[dict]) -> str:
    """Markdown."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *map(row, plans)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run() -> None:
    """The whole run, from flags to the table.

    Raises:
      UserError: a model, slice or mesh that cannot be.
    """
    if not _CASES.value or not all(case.count("@") in (1, 2) for case in _CASES.value):
        raise UserError(f"--cases={','.join(_CASES.value)}: give MODEL@SLICE or MODEL@SLICE@MESH, separated by commas")
    workdir = made_directory("plans", _PLANS.value)
    print(table([planned(case, _FRAMES.value, workdir) for case in _CASES.value]), end="")


if __name__ == "__main__":
    command.start("plan_table", run)
