"""How a program ends: its exit status, and one line on stderr for what went wrong."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from adapttoken_jax import hosts
from adapttoken_jax.errors import UserError
from adapttoken_jax.signals import Terminated, Unwinding

OK, DIFFERENT, USAGE, INTERNAL, INTERRUPTED, CLOSED_PIPE, TERMINATED = 0, 1, 2, 3, 130, 141, 143


def exit_status(name: str, argv: Sequence[str], run: Callable[[], int]) -> int:
    """Runs a program to its exit status, also where a signal, a full disk or a reader of stdout that leaves ends it.

    Args:
      name: of the program, before what it says on stderr.
      argv: its arguments; `--debug` among them shows where a signal found it.
    """
    # Python has None for a stream that the shell closed (`>&-`): who wants no output gets none.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    status = OK
    try:
        with Unwinding():
            status = run()
            sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout)
        status = CLOSED_PIPE
    except OSError as error:  # of stdout: the others are caught where the program runs
        _drop(sys.stdout)
        status = status or fail(name, f"stdout: {error.strerror or error}")
    except KeyboardInterrupt as error:
        word, status = ("terminated", TERMINATED) if isinstance(error, Terminated) else ("interrupted", INTERRUPTED)
        fail(name, word, traceback.format_exc() if "--debug" in argv else "")
    return hosts.leave(status)


def _drop(stream) -> None:
    """Gives a stream that cannot be written to somewhere to go: Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def failed(name: str, error: Exception, debug: bool) -> int:
    """Says in one line what went wrong, after the traceback with `debug`; to be called where `error` was caught.

    Returns:
      The exit status. A `BrokenPipeError` is raised again, as is an interruption: `exit_status` knows what they mean.
    """
    trace = traceback.format_exc() if debug else ""
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error.__context__, KeyboardInterrupt):  # what fails because it was interrupted says nothing else
        raise error.__context__
    if isinstance(error, UserError):
        return fail(name, str(error), trace)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return fail(name, f"{place}{error.strerror or error}", trace)
    if hosts.lost(error) and not debug:
        hosts.end(name)
    first_line = str(error).strip().partition("\n")[0]
    hint = "" if debug else " (run again with --debug for a traceback)"
    return fail(name, f"internal error: {type(error).__name__}: {first_line}{hint}", trace, status=INTERNAL)


def fail(name: str, message: str, trace: str = "", status: int = USAGE) -> int:
    """Prints one line on stderr, after the traceback if there is one."""
    try:
        print(f"{trace}{name}: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    except OSError:  # the status still says it
        _drop(sys.stderr)
    return status
