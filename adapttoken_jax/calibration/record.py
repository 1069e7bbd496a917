"""Full runs, recorded: every group's answer, and the final answer from the first v groups for every v asked for.

Cost, in visual tokens prefilled per question: the scan takes all T of them, and each v one final pass of at most
`budget`. All v of a 4096-frame video (32 groups of 14 080 tokens, budget 7040) take half as much again as the scan; the
few v that a rule can stop at take far less.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from adapttoken_jax.calibration.full_runs import QuestionLog, Said, VideoLog
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import encode_video
from adapttoken_jax.loading import Model
from adapttoken_jax.pipeline import conclude, plan_run, scan_video
from adapttoken_jax.prompt import Prompt, build_prompt
from adapttoken_jax.run import Run, option_probabilities
from adapttoken_jax.scan import Reply, agreed_answer, blind_replies


def record_video(
    model: Model,
    name: str,
    video,
    questions: Sequence[str],
    options: Sequence[Sequence[str] | None],
    config: AdaptTokenConfig,
    points: Callable[[QuestionLog], Iterable[int]] | None = None,
) -> VideoLog | None:
    """Runs the full method on all questions of a video.

    Args:
      name: of the video in the log.
      video: as in `answer`.
      questions, options: one entry of options per question, None for an open one.
      config: resolved for the model.
      points: from a question's log without `after`, the numbers of groups v after which to ask for the final answer;
        all groups are always among them. None: every v.

    Returns:
      None for a video so short that it is answered directly: Lite does not run on it.
    """
    prompts = [build_prompt(model.tokenizer, q, o) for q, o in zip(questions, options, strict=True)]
    plan = plan_run(model.config, video, config, "adapttoken")
    if not plan.scanned:
        return None
    tokens = encode_video(model, plan.clip, scanned=True)
    blind = blind_replies(model, tokens, prompts, config)
    is_open = not all(prompt.letters for prompt in prompts)  # then the margin is among all tokens
    runs = scan_video(model, plan, tokens, prompts, config, "adapttoken", keep_logits=is_open)
    logs = [_question_log(*each, points) for each in zip(questions, options, runs, blind, strict=True)]
    return VideoLog(name, tuple(logs))


def has_groups(model: Model, video, config: AdaptTokenConfig) -> bool:
    """Whether Lite runs on a video, so that `record_video`, with the same arguments, gives something to log."""
    return plan_run(model.config, video, config, "adapttoken").scanned


def _question_log(question: str, options, run: Run, blind: Reply, points) -> QuestionLog:
    say = lambda reply: _said(run.model, run.prompt, reply)
    visits = run.scan.visits
    log = QuestionLog(question, say(blind), tuple(say(visit.reply) for visit in visits), {})
    wanted = range(1, len(visits)) if points is None else points(log)
    after = {v: say(conclude(run.after(visits[:v])).reply) for v in sorted({*wanted, len(visits)})}
    return dataclasses.replace(log, after=after, options=tuple(options) if options else None)


def _said(model: Model, prompt: Prompt, reply: Reply) -> Said:
    among = option_probabilities(prompt, reply.option_logits)
    shares = np.asarray(list(among.values()) if among else _softmax(reply.first_logits))
    second, first = np.sort(shares)[-2:]
    options = tuple(among.values()) if among else None
    return Said(agreed_answer(model, prompt, reply), reply.entropy, float(first - second), options)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()
