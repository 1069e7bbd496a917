"""Launchers as `python -m experiments.NAME` runs them, each in a fork of one process that has imported its libraries.

Importing takes longer than most of what tests ask of a launcher. The process has not started JAX's backend yet.

    python -m tests.launcher

reads one line of JSON per launcher, [name, words, file for stdout, file for stderr], and prints its exit status.
"""

import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(name: str, *argv) -> subprocess.CompletedProcess:
    """A launcher with these words, run to its end."""
    words, server = list(map(str, argv)), _server()
    with tempfile.TemporaryDirectory() as directory:
        out, err = (pathlib.Path(directory) / stream for stream in ("out", "err"))
        server.stdin.write(json.dumps([name, words, str(out), str(err)]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, status, out.read_text("utf-8"), err.read_text("utf-8"))


@functools.cache
def _server() -> subprocess.Popen:
    line = [sys.executable, "-m", "tests.launcher"]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def _serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(name: str, words: list[str], *files: str) -> None:
    for stream, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv, status = [name, *words], 0
    try:
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    from adapttoken_jax import calibration, demo, planning  # noqa: F401 (so that the forks need not)
    from adapttoken_jax.evaluation import command  # noqa: F401

    _serve()
