"""How far a run is and how long it will take, by what was measured in this process, its start included."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.evaluation.runner import Video

_SECONDS_BETWEEN_LINES = 30.0
_QUESTION_FRAMES = 16  # a further question about a video costs about as much as so many more frames of it


def video_weights(videos: Sequence[Video], config: AdaptTokenConfig) -> list[float]:
    """Expected work per video, in frames. One of unknown length counts like the mean of the others."""
    known = [video.duration_s for video in videos if video.duration_s]
    usual = sum(known) / len(known) if known else config.max_frames / config.fps
    return [
        min(config.fps * (video.duration_s or usual), config.max_frames) + _QUESTION_FRAMES * len(video.questions)
        for video in videos
    ]


class Outlook:
    """Shows the progress of a run on stderr: a bar on a terminal, a line now and then elsewhere. A context manager.

    The time left is the work left, by `video_weights`, at the mean speed so far. What an earlier process has done is
    neither work nor speed.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        config: AdaptTokenConfig,
        done_before: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._begin, self._last = clock, clock(), clock()
        self._weights = dict(zip((video.id for video in videos), video_weights(videos, config), strict=True))
        self._work, self._left = sum(self._weights.values()), sum(self._weights.values())
        self._done, self._total = done_before, done_before + sum(len(video.questions) for video in videos)
        self._bar = None

    def __enter__(self) -> "Outlook":
        if self._stream.isatty():
            import tqdm  # only a terminal pays for it

            layout = "{percentage:3.0f}%|{bar}| {desc} [{elapsed}, {postfix} left]"
            self._bar = tqdm.tqdm(total=self._total, initial=self._done, file=self._stream, bar_format=layout)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def video_done(self, video: Video) -> None:
        """Counts a video's questions as done and shows where the run stands."""
        self._left -= self._weights[video.id]
        self._done += len(video.questions)
        now = self._clock()
        if self._bar is not None:
            self._bar.set_description_str(f"{self._done}/{self._total} questions", refresh=False)
            self._bar.set_postfix_str(hours_minutes(self.seconds_left()), refresh=False)
            self._bar.update(len(video.questions))
        elif now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            left = hours_minutes(self.seconds_left())
            print(f"{self._done} of {self._total} questions, about {left} left", file=self._stream, flush=True)

    def seconds_left(self) -> float:
        """At the mean speed so far."""
        finished = self._work - self._left
        return (self._clock() - self._begin) / finished * self._left if finished else float("inf")


def hours_minutes(seconds: float) -> str:
    """3 h 20 min, 5 min, 40 s."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
