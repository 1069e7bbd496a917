"""Decoding the videos to come while one is on the accelerator, in one thread and a bounded amount of memory.

This goes from video to video; `video.ahead` goes from frame to frame inside one and does the decoding here too. Two,
because they bound different things: there images of one file in one order, here bytes of however many files wait, each
opened, indexed and planned ahead as well, which takes seconds where a video is long. What is wrong with a file is kept
until its turn comes.

Only decoding runs ahead. The accelerator is driven from the main thread alone, so that on a mesh every program starts
in the same order on every device. Of a video that Lite scans the groups that it visits in any case are decoded ahead;
which others it will want nobody knows.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import chunk_slots
from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import Model
from adapttoken_jax.pipeline import plan_run, slot_order
from adapttoken_jax.run import Plan
from adapttoken_jax.video import read_patches
from adapttoken_jax.video.ahead import raise_and_forget

_END = object()
_VIDEOS_AHEAD = 16  # indexed and planned before their turn: what decodes nothing ahead, or little, fills no memory


def memory_for_chunks() -> int:
    """Bytes of decoded patches that may wait: 8 GiB, or a quarter of the machine's memory if that is less."""
    return min(8 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


class DecodedVideo:
    """One video on its way: first its plan, then its chunks, each to be taken once.

    What went wrong in the thread, a `UserError` about the video first of all, is raised where the plan or the chunk was
    due.
    """

    def __init__(self, take):
        self._take = take
        self._ended = False

    def plan(self) -> Plan:
        """What the run will do. To be called before the chunks are taken."""
        return self._next()

    def chunks(self) -> Iterator:
        """What `stream_video` takes: the slots that are wanted for certain."""
        while (chunk := self._next()) is not _END:
            yield chunk

    def drop(self) -> None:
        """Drops what has not been taken."""
        while not self._ended:
            with contextlib.suppress(Exception):  # nobody waited for it
                self._next()

    def _next(self):
        made = self._take()
        self._ended = made is _END or isinstance(made, BaseException)
        if self._ended and made is not _END:
            errors = [made]
            del made
            raise_and_forget(errors)
        return made


class DecodeAhead:
    """Decodes a row of videos in a thread that starts at once. A context manager, which ends the thread."""

    def __init__(
        self, model: Model, videos: Sequence, config: AdaptTokenConfig, method: str, most_bytes: int | None = None
    ):
        self._model, self._config, self._method = model, config, method
        self._videos = list(videos)
        self._most = memory_for_chunks() if most_bytes is None else most_bytes
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting, self._begun, self._given_up, self._closed = 0, 0, 0, False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._decode_all, name="decode ahead", daemon=True)

    def __enter__(self) -> "DecodeAhead":
        try:
            self._thread.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def __iter__(self) -> Iterator[DecodedVideo]:
        for number in range(len(self._videos)):
            video = DecodedVideo(self._take)
            with self._change:
                self._begun += 1
                self._change.notify()
            yield video
            self._given_up = number + 1
            video.drop()

    def _take(self):
        made = self._made.get()
        with self._change:
            self._waiting -= _size(made)
            self._change.notify()
        return made

    def _put(self, made) -> bool:
        """Waits for room; one chunk always has some. Whether somebody still wants it."""
        with self._change:
            self._change.wait_for(
                lambda: self._closed or not self._waiting or self._waiting + _size(made) <= self._most
            )
            self._waiting += _size(made)
            self._made.put(made)
            return not self._closed

    def _decode_all(self) -> None:
        for number, video in enumerate(self._videos):
            with self._change:
                self._change.wait_for(lambda number=number: self._closed or number < self._begun + _VIDEOS_AHEAD)
            try:
                wanted = self._decode(number, video)
            except BaseException as error:  # raised again in the thread that waits for it
                wanted = self._put(error)
            if not wanted:
                return

    def _decode(self, number: int, video) -> bool:
        if video is None:
            raise UserError("no video file in the data directory")
        plan = plan_run(self._model.config, video, self._config, self._method)
        if not self._put(plan):
            return False
        size = chunk_slots(self._model, plan.clip, scanned=plan.scanned)
        first = slot_order(self._model, plan, self._config, self._method)[0]
        useless = lambda: self._closed or number < self._given_up
        for chunk in read_patches(plan.clip, first.certain_slots(size), size, cancelled=useless):
            if not self._put(chunk):
                return False
        return self._put(_END)


def _size(made) -> int:
    return made[1].nbytes if isinstance(made, tuple) else 0
