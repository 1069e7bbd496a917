"""Runs an evaluation undisturbed, killed, preempted and in two shards, for a test that compares what they leave.

    python -m tests.evaluation.interruptions DIRECTORY --kills 30 --preemptions 10

Prints one JSON object: the work directories by kind, how many kills and preemptions fell into running processes, the
statuses with which preempted processes ended. Everything heavy is imported once; each run is a fork of this process,
which has not started JAX's backend yet.
"""

import argparse
import json
import math
import os
import pathlib
import random
import signal
import sys
import time

from adapttoken_jax import cli
from adapttoken_jax.evaluation import command  # noqa: F401 (so that the forks need not)
from tests.evaluation import bench


def start(argv: list[str]) -> int:
    """Starts `adapttoken` with these words in a child process; returns its id."""
    process = os.fork()
    if process:
        return process
    os.dup2(2, 1)
    os._exit(cli.main(argv))


def status(process: int) -> int:
    """Waits for a child: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Interrupter:
    """Runs on one benchmark and one model, and ends them early at random moments."""

    def __init__(self, directory: pathlib.Path, seed: int = 0):
        self._directory, self._random = directory, random.Random(seed)
        # The method with the least to compile: what is on the disk when a signal comes does not depend on it.
        self._words = lambda name, *more: bench.evaluate_flags(
            directory / "data", directory / "model", directory / name, "--method=uniform", *more
        )
        self._seconds = math.inf

    def whole(self, name: str, *more: str) -> str:
        """A run that nobody disturbs, or what is left of it. The fastest of them tells how long a run takes."""
        begin, fresh = time.monotonic(), not (self._directory / name).exists()
        _require(status(start(self._words(name, *more))), 0)
        if fresh:
            self._seconds = min(self._seconds, time.monotonic() - begin)
        return name

    def shards(self, name: str, count: int) -> str:
        """One run in `count` processes at the same time."""
        children = [start(self._words(name, f"--shard={i}/{count}")) for i in range(count)]
        for child in children:
            _require(status(child), 0)
        return name

    def interrupted(self, kind: str, number: int, times: int) -> tuple[list[str], list[int]]:
        """Runs ended by a signal `times` times in all, each started again until it is whole: names, and statuses."""
        names, statuses = [f"{kind}-0"], []
        while len(statuses) < times:
            child = start(self._words(names[-1]))
            time.sleep(self._random.uniform(0, 1.2 * self._seconds))
            os.kill(child, number)
            ended = status(child)
            if ended:
                statuses.append(ended)
            else:  # it was faster than the signal
                names.append(f"{kind}-{len(names)}")
        return [self.whole(name) for name in names], statuses


def _require(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"a run ended with status {found}; {wanted} was expected")


def main(argv=None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--preemptions", type=int, default=1)
    asked = parser.parse_args(argv)
    runs = Interrupter(asked.directory)
    found = {"shards": [runs.shards("shards", 2)]}  # which compile
    found["undisturbed"] = [runs.whole("undisturbed")]
    found["killed"], killed = runs.interrupted("killed", signal.SIGKILL, asked.kills)
    found["preempted"], preempted = runs.interrupted("preempted", signal.SIGTERM, asked.preemptions)
    json.dump({"runs": found, "killed": killed, "preempted": preempted}, sys.stdout)


if __name__ == "__main__":
    main()
