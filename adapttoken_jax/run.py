"""What one question carries through the pipeline: its plan, its scan, what was selected, what was answered."""

import dataclasses

import numpy as np

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens
from adapttoken_jax.loading import Model
from adapttoken_jax.prompt import Prompt
from adapttoken_jax.scan import Reply, Scan, Visit
from adapttoken_jax.video import Clip


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do, known before any work: the sampled clip and the groups (none: answer directly)."""

    clip: Clip
    groups: list[np.ndarray]

    @property
    def scanned(self) -> bool:
        """Whether there are groups to visit."""
        return bool(self.groups)


@dataclasses.dataclass(frozen=True)
class Selected:
    """Steps 8 to 10 for one question.

    Attributes:
      weights: float64[v], softmax weight per visited group, in visiting order.
      budgets: int[v], tokens allotted to it, those of the coverage floor included.
      candidates: int64[n, 3], (slot, row, column) before redundancy removal, in video order.
      tokens: int64[B, 3], the survivors, in video order.
    """

    weights: np.ndarray
    budgets: np.ndarray
    candidates: np.ndarray
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Steps 8 to 11 for one question: the tokens selected, their M-RoPE ids int32[3, B], and the answer from them."""

    selected: Selected
    position_ids: np.ndarray
    reply: Reply


@dataclasses.dataclass(frozen=True)
class Run:
    """One question on its way from the scan to the result.

    Attributes:
      scan: None where the answer is direct.
      seconds: wall seconds per stage so far.
      blind: the answer to the question alone, if the stop rule asked for it.
      loop: `device` or `host`, as in `pipeline.LOOPS`.
      asked: {groups visited: outcome} of the times that the stop rule asked again over the tokens selected so far.
      answers: what the groups that the stop rule has seen answered, as `scan.agreed_answer` says it.
    """

    model: Model
    plan: Plan
    video: VisualTokens
    config: AdaptTokenConfig
    method: str
    prompt: Prompt
    scan: Scan | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    blind: Reply | None = None
    loop: str = "device"
    asked: dict[int, Outcome] = dataclasses.field(default_factory=dict)
    answers: list[str | None] = dataclasses.field(default_factory=list)

    def after(self, visits: list[Visit]) -> "Run":
        """This run as if the scan had ended with these visits."""
        return dataclasses.replace(self, scan=Scan(visits, ""))


def option_probabilities(prompt: Prompt, option_logits: np.ndarray) -> dict[str, float] | None:
    """Probability of each letter as the first token, among the letters; of a reply's `option_logits`."""
    if not prompt.letters:
        return None
    logits = option_logits[: len(prompt.letters)].astype(np.float64)
    weights = np.exp(logits - logits.max())
    return dict(zip(prompt.letters, (weights / weights.sum()).tolist(), strict=True))
