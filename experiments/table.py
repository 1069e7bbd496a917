"""Tables from the work directories of finished evaluations, beside the published numbers.

    python -m experiments.table runs/7b/* --baseline=runs/7b/videomme_uniform --plot=pareto.png > table.md

Prints accuracy, cost, localisation where the benchmark has time references, and with `--baseline` paired comparisons.
"""

import os
import pathlib
import sys

from absl import flags

from adapttoken_jax import terminal
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import tables
from experiments import command

_RULE = flags.DEFINE_string("rule", "lmms-eval", "Which scorer's accuracy.")
_FORMAT = flags.DEFINE_enum("format", "markdown", ["markdown", "latex"], "How the tables are written.")
_BASELINE = flags.DEFINE_string(
    "baseline", None, "Work directory that the others are compared with, question by question."
)
_PLOT = flags.DEFINE_string("plot", None, "Write accuracy over cost here, a PNG.")


def run(directories: list[str]) -> None:
    """Prints the tables and writes the plot.

    Raises:
      UserError: a directory that is not a finished run, or an unknown rule.
    """
    if not directories:
        raise UserError("give the work directories of finished evaluations")
    records = [str(path) for directory in directories for path in pathlib.Path(directory).glob("*.json*")]
    terminal.check_outputs({"plot": _PLOT.value}, {path: path for path in records})
    runs = tables.read_runs(directories)
    found = [tables.accuracy_table(runs, _RULE.value), tables.cost_table(runs, _RULE.value)]
    found.append(tables.localisation_table(runs))
    if _BASELINE.value:
        found.append(tables.paired_table(runs, _baseline(runs, _BASELINE.value), _RULE.value))
    write = {"markdown": tables.markdown, "latex": tables.latex}[_FORMAT.value]
    sys.stdout.write("\n".join(write(rows) for rows in found if rows))
    if _PLOT.value:
        tables.pareto_plot(os.fspath(_PLOT.value), runs, _RULE.value)


def _baseline(runs: list[tables.FinishedRun], directory: str) -> tables.FinishedRun:
    """The run of a directory, as it is called among `runs` if it is one of them."""
    found = tables.read_finished(directory)
    return next((run for run in runs if run.path == found.path), found)


if __name__ == "__main__":
    command.start("table", run, words=True)
