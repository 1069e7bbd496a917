"""How an experiment starts and ends: with the statuses and the one line on stderr of the `adapttoken` commands."""

import json
import math
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from adapttoken_jax import terminal
from adapttoken_jax.errors import UserError

_DEBUG = flags.DEFINE_bool("debug", False, "Show a traceback with an error.")


def start(name: str, run: Callable[..., int | None], words: bool = False) -> None:
    """Reads the flags, runs the experiment and leaves with its status, 0 if it returns none.

    Args:
      name: of the experiment, before a mistake's message.
      run: called without arguments, or with the command line's words that belong to no flag.
      words: whether there may be such words.
    """
    argv = sys.argv[1:]
    sys.exit(terminal.exit_status(name, argv, lambda: _run(name, argv, run, words)))


def _run(name: str, argv: Sequence[str], run: Callable[..., int | None], words: bool) -> int:
    debug = "--debug" in argv  # until the flags are parsed
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators it looked for, Orbax every file
    app.define_help_flags()
    try:
        try:
            given = terminal.read_flags(f"python -m experiments.{name}", flags.FLAGS, argv)
        except SystemExit:  # absl has printed the help, and would leave with status 1
            return terminal.OK
        debug = _DEBUG.value
        if given and not words:
            raise UserError(f"{given[0]!r} belongs to no flag")
        return (run(given) if words else run()) or terminal.OK
    except Exception as error:
        return terminal.failed(name, error, debug)


def resident(field: str) -> int:
    """A size of this process in bytes, as Linux counts it: VmRSS now, VmHWM at its peak.

    `ru_maxrss` would include the parent's peak.
    """
    text = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def in_fresh_process(name: str, *words: str) -> dict:
    """The JSON that an experiment prints; where it fails, it has said why, and its status ends this process too."""
    done = subprocess.run([sys.executable, "-m", f"experiments.{name}", *words], stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def numbers(flag: flags.FlagHolder, kind: type = int, low: float = 0, high: float = math.inf) -> list:
    """The numbers that the list of a flag holds, at least one.

    Raises:
      UserError: none, or one that is no number or out of bounds.
    """
    try:
        found = [kind(text) for text in flag.value]
    except ValueError:
        found = []
    if not found or not all(low <= number <= high for number in found):
        bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"--{flag.name}={','.join(flag.value)}: give numbers {bounds}, separated by commas")
    return found


def show(content: dict, target: str | None, text: str) -> None:
    """Prints the text, and writes the content as JSON to the file `target`; "-" prints that in place of the text."""
    terminal.write_json(target, content)
    if target != "-":
        sys.stdout.write(text)
