"""Frames decoded and prepared by several threads, ahead of whoever takes them, and handed out in the order asked for.

What is handed out is an item, made of one frame or of several. The order is cut at key frames into runs of items. Each
thread takes the next run, decodes it with a reader of its own and prepares every frame as soon as it is decoded, so
that decoded frames, which are large, are never kept. A thread that is too far ahead of the consumer waits: the number
of prepared items in memory has a bound whatever the video's length.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np

from adapttoken_jax.video.decode import SEEK_FRAMES, FrameReader, decoding_cost, key_starts
from adapttoken_jax.video.probe import VideoInfo

# Decoding work of a run before another may begin: a thread jumps to each run that it takes, which must stay cheap.
_RUN_FRAMES = 16 * SEEK_FRAMES
_ITEMS_PER_RUN = 16  # where there is nothing to decode

Prepare = Callable[[Iterator[np.ndarray]], np.ndarray]


class ReadAhead:
    """A context manager; leaving it stops all threads.

    Args:
      info: the video.
      order: int64 [n, k] frames of each item, in any order.
      prepare: from an item's images uint8 [H, W, 3], decoded as they are asked for, to what is handed out; runs in the
        reading threads.
      ahead: most prepared items held, at least 1.
      threads: None for one per core.
      cancelled: asked before every frame is decoded; `take` raises `Cancelled` once it says yes.

    Attributes:
      busy_s: seconds that the threads have spent decoding and preparing, summed over them.
    """

    def __init__(
        self,
        info: VideoInfo,
        order: np.ndarray,
        prepare: Prepare,
        ahead: int,
        threads: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self._order, self._prepare = np.asarray(order, np.int64), prepare
        self._ahead, self._taken, self._closed = max(1, ahead), 0, False
        self._ready: dict[int, np.ndarray | Exception] = {}
        self._awaited: set[int] = set()
        self._end = len(self._order)  # places from here on need not be handed in
        self._lock = threading.Lock()
        self._arrived, self._room = threading.Condition(self._lock), threading.Condition(self._lock)
        runs = cut_runs(info, self._order)
        cores = threads or usable_cores()
        count = max(1, min(cores, len(runs)))
        self._runs = iter(runs)
        ended = lambda: self._closed or cancelled()
        readers = [FrameReader(info, self._order.reshape(-1), cores // count, ended) for _ in range(count)]
        self._threads = [threading.Thread(target=self._read_runs, args=(each,), daemon=True) for each in readers]
        self.busy_s = 0.0

    def __enter__(self):
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        with self._lock:
            self._closed = True
            self._room.notify_all()
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()
        self._ready.clear()

    def take(self, count: int) -> list[np.ndarray]:
        """The next `count` items; fewer at the end of the order.

        Raises:
          UserError: the file ends early or is damaged at one of them.
        """
        items, until = [], min(self._taken + count, len(self._order))
        while self._taken < until:
            items += self._take_together(min(until - self._taken, self._ahead))  # there is room for no more at once
        return items

    def _take_together(self, count: int) -> list[np.ndarray]:
        """Wakes up once, when all have arrived: the threads then need not hand over to this one at every item."""
        with self._lock:
            places = range(self._taken, self._taken + count)
            self._awaited = {place for place in places if place < self._end and place not in self._ready}
            self._arrived.wait_for(lambda: not self._awaited)
            items = [self._ready.pop(place) for place in places if place in self._ready]
            self._taken += count
            self._room.notify_all()
        if errors := [item for item in items if isinstance(item, Exception)]:
            del items
            raise_and_forget(errors)
        return items

    def _read_runs(self, reader: FrameReader) -> None:
        with reader:
            while (run := self._next_run()) and self._read_run(reader, run):
                pass

    def _next_run(self) -> range | None:
        with self._lock:
            return next(self._runs, None)

    def _read_run(self, reader: FrameReader, run: range) -> bool:
        """Hands in the items of a run, or what went wrong in place of one; whether to go on with other runs."""
        for place in run:
            begin = time.perf_counter()
            try:
                item = self._prepare(image for _, image in reader.read(self._order[place]))
            except Exception as error:  # raised again in the thread that takes this item
                self._hand_in(place, error, time.perf_counter() - begin)
                return False
            if not self._hand_in(place, item, time.perf_counter() - begin):
                return False
        return True

    def _hand_in(self, place: int, item: np.ndarray | Exception, seconds: float) -> bool:
        """Waits until there is room. The earliest item missing always has some, so that the consumer never starves."""
        with self._lock:
            self.busy_s += seconds
            self._room.wait_for(lambda: self._closed or place < self._taken + self._ahead)
            self._ready[place] = item
            if isinstance(item, Exception):
                self._end = min(self._end, place + 1)
                self._awaited = {other for other in self._awaited if other < self._end}
            self._awaited.discard(place)
            if not self._awaited:
                self._arrived.notify()
            return not self._closed


def raise_and_forget(errors: list[BaseException]) -> NoReturn:
    """Raises the first. No frame on the way then holds the error that holds the frame, and all that it knows, alive."""
    try:
        raise errors[0]
    finally:
        errors.clear()


def cut_runs(info: VideoInfo, order: np.ndarray) -> list[range]:
    """Cuts places of `order`, int64 [n, k], into runs that readers can decode at little more cost than one reader.

    A cut lies where the next item begins in another group of pictures than the one before it, or goes back. What is not
    seekable is not cut except there; what needs no decoding is cut into even parts.
    """
    if info.frames is not None:
        cuts = range(0, len(order), _ITEMS_PER_RUN)
        return [range(*ends) for ends in itertools.pairwise([*cuts, len(order)])]
    spent = np.concatenate([[0], np.cumsum(decoding_cost(info, order.reshape(-1)))])[:: order.shape[1]]
    first, last = order[:, 0], order[:, -1]
    groups = key_starts(info, first) if info.seekable else np.zeros(len(order))
    apart = 1 + np.flatnonzero((np.diff(groups) > 0) | (first[1:] < last[:-1]))
    cuts = [0]
    for place in apart:
        if spent[place] - spent[cuts[-1]] >= _RUN_FRAMES:
            cuts.append(int(place))
    return [range(*ends) for ends in itertools.pairwise([*cuts, len(order)] if len(order) else cuts)]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
