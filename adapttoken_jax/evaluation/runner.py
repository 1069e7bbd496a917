"""The loop over a benchmark's videos: decode ahead, answer all questions of a video in one scan, write, go on.

The unit of work is the video. Its questions are answered together and written together, so that the numbers do not
depend on where a run was interrupted: a video whose lines are not all there is answered again, whole.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from adapttoken_jax import memory
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens, stream_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation.ahead import DecodeAhead, DecodedVideo
from adapttoken_jax.evaluation.samples import answered_sample, broken_sample, costs
from adapttoken_jax.evaluation.saved_selection import saved_selection
from adapttoken_jax.loading import Model
from adapttoken_jax.pipeline import answered, scan_video, slot_order
from adapttoken_jax.prompt import Prompt, build_prompt
from adapttoken_jax.result import Result
from adapttoken_jax.run import Plan
from adapttoken_jax.video import Clip


@dataclasses.dataclass(frozen=True)
class Video:
    """A video and its questions: (place in the benchmark, `benchmarks.Item`)."""

    id: str
    questions: tuple[tuple[int, Any], ...]

    @property
    def path(self):
        """The file; None if it is missing."""
        return self.questions[0][1].video

    @property
    def duration_s(self) -> float:
        """As the benchmark says, seconds; 0.0 if it does not."""
        return self.questions[0][1].duration_s or 0.0


@dataclasses.dataclass(frozen=True)
class Records:
    """What one video leaves behind: lines of `samples.jsonl`, `selections.jsonl` and `costs.jsonl`."""

    samples: Sequence[dict]
    selections: Sequence[dict] = ()
    costs: Sequence[dict] = ()


# (item, the video as sampled) -> what `build_prompt` takes as a question.
Wording = Callable[[Any, Clip], Any]
# All questions of a video, encoded: (plan, tokens, prompts, items, begin) -> results.
Answerer = Callable[[Plan, VisualTokens, list[Prompt], list, float], list[Result]]


def group_by_video(items: Sequence) -> list[Video]:
    """The videos of a benchmark in the order of their first questions."""
    questions: dict[str, list] = {}
    for number, item in enumerate(items):
        questions.setdefault(str(item.video or item.video_id), []).append((number, item))
    return [Video(own[0][1].video_id, tuple(own)) for own in questions.values()]


def shard(videos: Sequence[Video], index: int, count: int) -> list[Video]:
    """Every `count`-th video from `index` on: all questions of a video stay in one process."""
    return list(videos[index::count])


def scanned(model: Model, config: AdaptTokenConfig, method: str) -> Answerer:
    """Answers as `pipeline.answer` does for a list of questions."""

    def answer(plan, tokens, prompts, items, begin):
        runs = scan_video(model, plan, tokens, prompts, config, method)
        return [answered(run, begin) for run in runs]

    return answer


def run_videos(
    model: Model,
    videos: Sequence[Video],
    wording: Wording,
    config: AdaptTokenConfig,
    method: str,
    write: Callable[[Video, Records], None],
    *,
    answerer: Answerer | None = None,
    strict: bool = False,
    fits: bool = False,
) -> None:
    """Answers the questions of videos, in order, and hands each video's records to `write` as soon as they are there.

    Args:
      config: resolved for the model.
      answerer: how an encoded video is answered; None: `scanned`.
      strict: a video that cannot be read ends the run; else it is recorded as broken.
      fits: whether the run has answered about a video before, so that too little memory for one is no setting's fault.

    Raises:
      UserError: a setting with which no video can be answered, or with `strict` a video that cannot be read.
    """
    answerer = answerer or scanned(model, config, method)
    with DecodeAhead(model, [video.path for video in videos], config, method) as ahead:
        for video, decoded in zip(videos, ahead, strict=True):
            try:
                records = _answer_video(model, video, decoded, wording, config, method, answerer)
            except UserError as error:
                passed_over = fits and not strict and _out_of_memory(error)
                if str(error).startswith("--") and not passed_over:  # a flag to change, not a video to pass over
                    raise UserError(f"{error} (video {video.id})") from None
                if strict:
                    raise UserError(f"--strict: {error}") from None
                reason = _without_places(str(error), video)
                records = Records([broken_sample(number, item, reason) for number, item in video.questions])
            else:
                fits = True
            write(video, records)


def _without_places(reason: str, video: Video) -> str:
    """Why a video failed, but for where its files lie, which no record tells."""
    files = [item.subtitles.path for _, item in video.questions if item.subtitles]
    for file in files:
        reason = reason.replace(str(file), file.name)
    return reason.removeprefix(f"{video.path}: ")


def _out_of_memory(error: UserError) -> bool:
    """Whether `memory.explained` made it."""
    return isinstance(error.__cause__, (jax.errors.JaxRuntimeError, MemoryError))


@memory.explained(*memory.ANSWERING)
def _answer_video(
    model: Model,
    video: Video,
    decoded: DecodedVideo,
    wording: Wording,
    config: AdaptTokenConfig,
    method: str,
    answerer: Answerer,
) -> Records:
    begin = time.perf_counter()
    items = [item for _, item in video.questions]
    plan = decoded.plan()
    prompts = [build_prompt(model.tokenizer, wording(item, plan.clip)) for item in items]
    order = slot_order(model, plan, config, method)
    with stream_video(model, plan.clip, order, scanned=plan.scanned, chunks=decoded.chunks()) as tokens:
        results = answerer(plan, tokens, prompts, items, begin)
    merge = model.config.vision.merge
    return Records(
        [answered_sample(number, item, result, plan.clip)
         for (number, item), result in zip(video.questions, results, strict=True)],
        [saved_selection(result, merge).to_record(item.id) for item, result in zip(items, results, strict=True)],
        costs(items, results, time.perf_counter() - begin),
    )  # fmt: skip
