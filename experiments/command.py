"""How an experiment starts and ends: a user's mistake is one line and status 2, as in the `adapttoken` commands."""

import json
import sys
from collections.abc import Callable

from absl import app, flags, logging

from adapttoken_jax.errors import UserError
from adapttoken_jax.result import atomic_file, plain_json

_DEBUG = flags.DEFINE_bool("debug", False, "Show a traceback with an error.")


def start(name: str, run: Callable[..., int | None], words: bool = False) -> None:
    """Reads the flags, runs the experiment and leaves with its status, 0 if it returns none.

    Args:
      name: of the experiment, before a mistake's message.
      run: called without arguments, or with the command line's words that belong to no flag.
      words: whether there may be such words.
    """

    def main(argv):
        logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators it looked for, Orbax every file
        try:
            if argv[1:] and not words:
                raise UserError(f"{argv[1]!r} belongs to no flag")
            return run(argv[1:]) if words else run()
        except UserError as error:
            if _DEBUG.value:
                raise
            return _fail(name, error)

    def read_flags(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(_fail(name, error))

    app.run(main, flags_parser=read_flags)


def show(content: dict, target: str | None, text: str) -> None:
    """Prints the text, and writes the content as JSON to the file `target`; "-" prints that in place of the text."""
    numbers = json.dumps(plain_json(content), indent=2) + "\n"
    if target and target != "-":
        with atomic_file(target) as file:
            file.write(numbers.encode("utf-8"))
    sys.stdout.write(numbers if target == "-" else text)


def _fail(name: str, error: Exception) -> int:
    print(f"{name}: {error}", file=sys.stderr)
    return 2
