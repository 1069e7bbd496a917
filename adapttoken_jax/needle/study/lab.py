"""Where cells are measured: in this process, or shared out to several that each use one core.

A small model keeps no more than one core busy, and selection is Python: two processes are twice as fast as two threads.
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Mapping, Sequence

import jax

import adapttoken_jax
from adapttoken_jax.encoding import OnProgress
from adapttoken_jax.loading import Model
from adapttoken_jax.needle.study.cells import Arm, Cell, CellResult, Shot, answer_shots, join_results, parts_of, shoot
from adapttoken_jax.video.ahead import usable_cores


class Lab:
    """Measures cells with one model. Use it as a context manager.

    Args:
      model: loaded in this process.
      processes: workers that load it again and measure; 1 measures here.
      on_progress: called with (stage, done, total).
    """

    def __init__(self, model: Model, processes: int = 1, on_progress: OnProgress = lambda *_: None):
        self.model, self.on_progress = model, on_progress
        self._bench = Bench(model)
        # A pool each: the same videos always go to the same worker, which may still hold their scans.
        make = lambda: concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start, (model.path, jax.config.jax_compilation_cache_dir)
        )
        self._workers = [make() for _ in range(processes)] if processes > 1 else []

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)

    def measure(self, cell: Cell, arms: Mapping[str, Arm], stage: str, keep: bool = False) -> CellResult:
        """Answers every question of a cell by every arm; `keep` holds the scans for the next call about this cell."""
        parts, done = parts_of(cell), 0
        self.on_progress(stage, 0, cell.questions)
        found = []
        for part in self._parts(cell, parts, dict(arms), keep):
            found.append(part)
            done += len(part.video)
            self.on_progress(stage, done, cell.questions)
        return join_results(found)

    def _parts(self, cell, parts, arms, keep):
        if not self._workers:
            yield from (self._bench.measure(cell, numbers, arms, keep) for numbers in parts)
            return
        running = [
            self._workers[place % len(self._workers)].submit(_measure, cell, numbers, arms, keep)
            for place, numbers in enumerate(parts)
        ]
        yield from (each.result() for each in running)


class Bench:
    """One process's share of the work, and the scans that it keeps."""

    def __init__(self, model: Model):
        self.model = model
        self.kept: dict[tuple[Cell, int], list[Shot]] = {}

    def measure(self, cell: Cell, numbers: Sequence[int], arms: Mapping[str, Arm], keep: bool) -> CellResult:
        """The part of a cell that videos of these numbers are."""
        if not keep:
            self.kept.clear()
        shots = [shot for number in numbers for shot in self._shots(cell, number, arms, keep)]
        return answer_shots(self.model, cell, shots, arms)

    def _shots(self, cell, number, arms, keep) -> list[Shot]:
        held = self.kept.get((cell, number))
        if held and all(arm.scan_key in held[0].cases for arm in arms.values()):
            return held
        shots = shoot(self.model, cell, number, arms)
        if keep:
            self.kept[cell, number] = shots
        return shots


def default_processes() -> int:
    """One per core on a CPU, one in all on an accelerator."""
    return usable_cores() if jax.default_backend() == "cpu" else 1


_BENCH: list[Bench] = []  # of a worker process


def _start(path: str, cache: str | None) -> None:
    """Prepares a worker, before its first computation: one thread, the compilation cache of the others, the model."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ["OMP_NUM_THREADS"] = "1"
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
    _BENCH.append(Bench(adapttoken_jax.load(path)))


def _measure(cell, numbers, arms, keep) -> CellResult:
    return _BENCH[0].measure(cell, numbers, arms, keep)
