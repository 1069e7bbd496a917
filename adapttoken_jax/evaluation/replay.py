"""`--replay`: questions answered again from the visual tokens that an earlier run selected.

Nothing is scanned. The budget may be smaller than it was (the tokens of highest weighted relevance stay; where nothing
was ranked, some all over the video), the model another one of the same frame geometry, the prompt any. The sampling
must be the same, so that a token is where it was.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence

import numpy as np

from adapttoken_jax.benchmarks import Item
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import workdir
from adapttoken_jax.evaluation.runner import Answerer
from adapttoken_jax.evaluation.samples import another_question, head
from adapttoken_jax.evaluation.saved_selection import SavedSelection
from adapttoken_jax.loading import Model
from adapttoken_jax.pipeline import answer_from
from adapttoken_jax.record import make_result
from adapttoken_jax.result import Result, Stop
from adapttoken_jax.run import Run, Selected

REASON = "replayed selection"


@dataclasses.dataclass(frozen=True)
class Replay:
    """What an earlier run selected.

    Attributes:
      selections: by question; those of videos that the run could not read are not there.
      budget: tokens, under which they were selected.
      sha256: of their records.
    """

    selections: Mapping[str, SavedSelection]
    budget: int
    sha256: str


def read_replay(directory, items: Sequence[Item], benchmark: str, method: str) -> Replay:
    """The selections that a run of this benchmark and method made for questions.

    Raises:
      UserError: not the directory of such a run, a damaged file, a question that the run has not come to, or one that
        was another there.
    """
    if not str(directory):  # which would be the current directory
        raise UserError("--replay: the name is empty; give the directory of an evaluation")
    try:
        run = workdir.read_run(directory)
        found, samples = (workdir.read_all(directory, name) for name in ("selections", "samples"))
        records = {item.id: found[item.id] for item in items if item.id in found}
        selections = {name: SavedSelection.from_record(record) for name, record in records.items()}
    except UserError as error:
        raise UserError(f"--replay: {error}") from None
    for flag, ours in (("benchmark", benchmark), ("method", method)):
        if (theirs := run["flags"][flag]) != ours:
            raise UserError(f"--{flag}={ours}: the run of --replay={directory} had {theirs}; give that, or another run")
    answered = {name: sample for name, sample in samples.items() if "error" not in sample}
    if other := another_question({item.id: head(number, item) for number, item in enumerate(items)}, answered):
        raise UserError(
            f"--replay={directory}: question {other} is about another video there, or has another answer; give a "
            "run of the same questions"
        )
    if left := [item.id for item in items if item.id not in records and "error" not in samples.get(item.id, ())]:
        raise UserError(
            f"--replay={directory}: {len(left)} of {len(items)} questions have no selection, the first is "
            f"{left[0]}; finish that run first"
        )
    sha256 = hashlib.sha256(json.dumps(records, sort_keys=True).encode("utf-8")).hexdigest()
    return Replay(selections, run["config"]["budget"], sha256)


def replayed(model: Model, config: AdaptTokenConfig, method: str, replay: Replay) -> Answerer:
    """Answers from saved selections: only a budget in `config` below theirs takes tokens away.

    What was answered without a scan, such as the whole video, may have more tokens than the budget, and keeps them.

    The answerer raises `UserError` for a question without a selection, or one of a video sampled otherwise.
    """

    def answer(plan, tokens, prompts, items, begin):
        chosen = [_chosen(replay.selections, item.id, tokens) for item in items]
        chosen = [each.best(config.budget) if config.budget < replay.budget else each.tokens for each in chosen]
        tokens.ensure(np.unique(np.concatenate(chosen)[:, 0]))
        seconds = {stage: tokens.seconds[stage] for stage in ("decode", "vision")} | {"groups": 0.0}
        runs = [Run(model, plan, tokens, config, method, prompt, seconds=dict(seconds)) for prompt in prompts]
        return [_result(run, each, begin) for run, each in zip(runs, chosen, strict=True)]

    return answer


def _chosen(selections, name: str, video: VisualTokens) -> SavedSelection:
    if name not in selections:  # a reason to pass over this video, not to end the run
        raise UserError("the replayed run could not read this video")
    saved, grid = selections[name], (video.clip.grid[0], *video.clip.token_grid)
    if saved.grid != grid:
        raise UserError(
            f"--replay: question {name} was selected from {'x'.join(map(str, saved.grid))} tokens, and the video has "
            f"{'x'.join(map(str, grid))}; give the settings of sampling that the run had"
        )
    return saved


def _result(run: Run, tokens: np.ndarray, begin: float) -> Result:
    final = time.perf_counter()
    nothing = np.zeros(0)
    outcome = answer_from(run, Selected(nothing, nothing.astype(int), tokens, tokens))
    now = time.perf_counter()
    run.seconds.update(final=now - final, total=now - begin)
    return dataclasses.replace(make_result(run, outcome, None), stop=Stop(False, REASON, 0, 0))
