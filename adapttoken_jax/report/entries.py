"""What the report is told about one answered question."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from adapttoken_jax.config import AdaptTokenConfig, ModelConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.prompt import Ask
from adapttoken_jax.result import Result
from adapttoken_jax.video import Clip


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A stretch of the video, in seconds, that is known to hold the answer.

    Raises:
      UserError: on construction, unless 0 <= start <= stop.
    """

    start_s: float
    stop_s: float
    label: str = "evidence"

    def __post_init__(self):
        if not 0 <= self.start_s <= self.stop_s < math.inf:
            raise UserError(f"evidence: from {self.start_s} to {self.stop_s} s; give seconds, the start first")


@dataclasses.dataclass(frozen=True)
class ReportEntry:
    """One question as one method answered it. Entries with the same question, options and video share a section.

    Attributes:
      result: what `answer` returned. Relevance is drawn if `result.relevance` is there.
      question, options: as they were asked; no options for an open question.
      clip: the sampled video, to show frames of; None shows none.
      truth: the right answer in words or as a letter, if it is known.
      correct: whether the answer is right, if that is known.
      evidence: where in the video the answer lies, if that is known.
    """

    result: Result
    question: str
    options: tuple[str, ...] = ()
    clip: Clip | None = None
    truth: str | None = None
    correct: bool | None = None
    evidence: tuple[Evidence, ...] = ()

    @property
    def tokens_per_slot(self) -> int:
        """M, visual tokens of one slot."""
        return self.result.video.tokens // self.result.video.slots

    @property
    def merged_grid(self) -> tuple[int, int]:
        """(rows, columns) of a slot's tokens."""
        _, height, width = self.result.video.grid
        merge = round((height * width / self.tokens_per_slot) ** 0.5)
        return height // merge, width // merge

    @property
    def slot_times(self) -> np.ndarray:
        """float64[T] seconds: when each slot begins."""
        video, groups = self.result.video, self.result.groups
        if groups:
            times = np.zeros(video.slots)
            for group in groups:
                times[list(group.slots)] = group.times_s
            return times
        if self.clip is not None:
            return self.clip.slot_times
        return np.arange(video.slots) * (video.duration_s / video.slots)

    @property
    def tokens_of_slots(self) -> np.ndarray:
        """int64[T]: how many tokens of each slot are in the final prompt."""
        return np.bincount(self.result.selected.slots, minlength=self.result.video.slots)


def entry(
    model: ModelConfig, video, result: Result, question: str | Ask, options: Sequence[str] | None = None, **known
) -> ReportEntry:
    """The entry of a result whose video is still at hand: its frames are sampled again by the same rules.

    Args:
      model: `Model.config` of the model that answered.
      video: the path or the frames that were given to `answer`.
      result, question, options: as answered; an `Ask` brings its own options.
      known: `truth`, `correct` and `evidence` of `ReportEntry`.

    Raises:
      UserError: the video cannot be read any more or is another one now, or as many options were not asked.
    """
    from adapttoken_jax.pipeline import plan_run  # starts JAX, which reports of stored results do without

    if isinstance(question, Ask):
        question, options = question.question, question.options
    options = () if options is None else tuple(map(str, options))
    if len(options) != (asked := len(result.option_probabilities or ())):
        raise UserError(f"options: {len(options)} are given, and the result is of {asked}; give those that were asked")
    clip = plan_run(model, video, AdaptTokenConfig(**result.config), result.method).clip
    if clip.grid != result.video.grid:
        sizes = " and ".join("x".join(map(str, grid)) for grid in (clip.grid, result.video.grid))
        raise UserError(f"{result.video.path or 'video'}: changed since it was answered about (grids {sizes})")
    return ReportEntry(result, question, options, clip, **known)
