"""Progress of a run on stderr: a bar per stage on a terminal, a line now and then elsewhere."""

import os
import sys
import time
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Called as `progress(stage, done, total)`; stages may overlap. Use it as a context manager.

    On a terminal that can move its cursor each stage has a bar. Elsewhere a stage writes a line every
    `SECONDS_BETWEEN_LINES` seconds, and one at its end if it took that long: a short run that fails leaves its error
    alone on stderr.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._bars: dict[str, object] = {}
        self._started: dict[str, float] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._show_bar(stage, done, total)
        elif self._line_is_due(stage, done, total):
            print(f"{stage}: {done} of {total}", file=self._stream, flush=True)

    def _show_bar(self, stage: str, done: int, total: int) -> None:
        import tqdm  # only a terminal pays for it

        if stage not in self._bars:
            layout = "{desc:<8} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
            self._bars[stage] = tqdm.tqdm(total=total, desc=stage, file=self._stream, bar_format=layout)
        self._bars[stage].update(done - self._bars[stage].n)

    def _line_is_due(self, stage: str, done: int, total: int) -> bool:
        now = time.monotonic()
        started = self._started.setdefault(stage, now)
        since = started if done >= total else self._last_line.get(stage, started)
        if now - since < SECONDS_BETWEEN_LINES:
            return False
        self._last_line[stage] = now
        return True
