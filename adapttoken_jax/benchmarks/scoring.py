"""Scores under each named rule: which letter counts, which questions count, and what is averaged.

`SCORERS[benchmark][rule]` judges one response and aggregates many; `score_all` reports every rule side by side. The
names: `official`, the authors' script; `lmms-eval`, version 0.7; `flexselect`, the earlier lmms-eval that FlexSelect
brought along; `VLMEvalKit`, without a judge model. docs/benchmarks.md says where each of them differs.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from adapttoken_jax.benchmarks import answers
from adapttoken_jax.benchmarks.items import Item
from adapttoken_jax.benchmarks.statistics import accuracy_interval


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judged response.

    Attributes:
      letter: the letter read from it; None where there is none.
      correct: whether the answer is right.
      counted: whether the question stands in the denominator.
    """

    letter: str | None
    correct: bool
    counted: bool


@dataclasses.dataclass(frozen=True)
class Cell:
    """An accuracy (0 to 1) over n questions with its 95 % interval, clustered by video; None where it has no value."""

    accuracy: float | None
    low: float | None
    high: float | None
    correct: int
    n: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """A run under one rule.

    Attributes:
      overall: the headline number.
      breakdowns: breakdown -> label -> cell; labels in alphabetical order.
      unread: responses without a letter, whether they count or not.
      missing: questions without a response (a video that is missing or broken); never counted.
    """

    overall: Cell
    breakdowns: Mapping[str, Mapping[str, Cell]]
    unread: int
    missing: int

    def to_json(self) -> dict:
        """As in `results.json`."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """One rule.

    Attributes:
      read: response and item -> the letters that it accepts as the choice.
      unread_counts: a response without a letter is wrong; otherwise it leaves the denominator.
      macro: the overall number is the mean over this breakdown's labels, those that occur; None: over all questions.
      without: (breakdown, label) whose questions the overall number leaves out.
      first_label: a question counts under the first of its labels alone.
      guess_seed: a response without a letter is given one at random, the same for a question in every run.
    """

    read: Callable[[str, Item], answers.Letters]
    unread_counts: bool = True
    macro: str | None = None
    without: tuple[str, str] | None = None
    first_label: bool = False
    guess_seed: int | None = None

    def judge(self, item: Item, response: str | None) -> Verdict:
        """What the rule makes of a response; None stands for a question that could not be asked."""
        if response is None:
            return Verdict(None, False, False)
        letters = self.read(response, item)
        if not letters and self.guess_seed is not None:
            letters = (random.Random(f"{self.guess_seed}/{item.id}").choice(item.letters),)
        return Verdict(
            letter=letters[0] if letters else None,
            correct=item.answer in letters,
            counted=bool(letters) or self.unread_counts,
        )

    def aggregate(self, samples: Iterable[tuple[Item, str | None]]) -> Scores:
        """The scores of a run's (item, response) pairs."""
        samples = list(samples)
        judged = [(item, self.judge(item, response)) for item, response in samples]
        counted = [(item, verdict) for item, verdict in judged if verdict.counted]
        missing = sum(response is None for _, response in samples)
        unread = sum(response is not None and not self.read(response, item) for item, response in samples)
        return Scores(self._overall(counted), self._breakdowns(counted), unread, missing)

    def stratum(self, labels: Mapping[str, Sequence[str]]) -> str | None:
        """Of a question's labels the one whose mean its answer enters, "" for all questions; None: not overall."""
        if self.without and self.without[1] in labels[self.without[0]]:
            return None
        return labels[self.macro][0] if self.macro else ""

    def _overall(self, counted: list[tuple[Item, Verdict]]) -> Cell:
        counted = [(item, verdict) for item, verdict in counted if self.stratum(item.labels) is not None]
        return _cell(counted, [self.stratum(item.labels) for item, _ in counted])

    def _breakdowns(self, counted: list[tuple[Item, Verdict]]) -> dict[str, dict[str, Cell]]:
        members: dict[str, dict[str, list]] = {}
        for item, verdict in counted:
            for breakdown, labels in item.labels.items():
                for label in dict.fromkeys(labels[:1] if self.first_label else labels):
                    members.setdefault(breakdown, {}).setdefault(label, []).append((item, verdict))
        return {
            breakdown: {label: _cell(groups[label]) for label in sorted(groups)}
            for breakdown, groups in members.items()
        }


def _cell(counted: Sequence[tuple[Item, Verdict]], strata: Sequence[str] | None = None) -> Cell:
    right = [verdict.correct for _, verdict in counted]
    if not right:
        return Cell(None, None, None, 0, 0)
    accuracy, low, high = accuracy_interval(right, [item.video_id for item, _ in counted], strata)
    ends = (None, None) if math.isnan(low) else (low, high)
    return Cell(accuracy, *ends, correct=sum(right), n=len(right))


SCORERS: dict[str, dict[str, Scorer]] = {
    "videomme": {
        "official": Scorer(answers.videomme_official, unread_counts=False),
        "lmms-eval": Scorer(answers.lmms_eval_ranked),
        "flexselect": Scorer(answers.videomme_official),
        "VLMEvalKit": Scorer(answers.vlmevalkit),
    },
    "longvideobench": {
        "official": Scorer(answers.longvideobench_official),
        "lmms-eval": Scorer(answers.longvideobench_official),
        "lmms-eval-guess": Scorer(answers.longvideobench_official, guess_seed=0),
        "VLMEvalKit": Scorer(answers.vlmevalkit_longvideobench),
    },
    "lvbench": {
        "official": Scorer(answers.lvbench_official),
        "lmms-eval": Scorer(answers.lmms_eval_ranked),
        "flexselect": Scorer(answers.videomme_official, first_label=True),
        "VLMEvalKit": Scorer(answers.vlmevalkit),
    },
    "mlvu": {
        "official": Scorer(answers.mlvu_official, macro="task"),
        "lmms-eval": Scorer(answers.lmms_eval_ranked, macro="task"),
        "VLMEvalKit": Scorer(answers.vlmevalkit_mlvu),
        "VLMEvalKit-printed": Scorer(answers.vlmevalkit_mlvu, without=("task", "order")),
    },
}


def score_all(benchmark: str, samples: Iterable[tuple[Item, str | None]]) -> dict[str, Scores]:
    """The scores of a run under each rule of its benchmark."""
    samples = list(samples)
    return {rule: scorer.aggregate(samples) for rule, scorer in SCORERS[benchmark].items()}
