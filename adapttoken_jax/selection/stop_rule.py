"""The whole stop rule of Lite as one value: `should_stop` with its variants, the same live and when logs are replayed.

Rules
- `groups`: enough visited groups are certain by themselves (step 7; `should_stop`).
- `rerun`: the question, asked again over the tokens selected so far, gets a certain answer. Sees evidence that lies in
  several groups, of which none is certain by itself. Costs a final pass per check; the last check is the final answer.
Either rule may also give up, and may demand that certainty exceeds what the question alone already gives.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from adapttoken_jax.selection.stopping import GO_ON, should_stop

# Reasons beside those of `should_stop`; texts, because they are written to `result.json`.
CERTAIN_OVER_ALL = "certain over the groups so far"
GAVE_UP = "no group more certain for long"


def blind_gain(entropies, blind: float) -> np.ndarray:
    """C' = H_blind - H_g: how much more certain each group is than the question alone, nats.

    The same number is added to every group's certainty, so a softmax over groups, and with it every budget, stays as it
    is. The gain changes what is compared with a threshold: stopping, and trust in the answer.
    """
    return blind - np.asarray(entropies, np.float64)


def gave_up(entropies: Sequence[float], groups: int) -> bool:
    """Whether the lowest entropy has not fallen during the last `groups` visits; 0 never gives up."""
    return 0 < groups < len(entropies) and not min(entropies[-groups:]) < min(entropies[:-groups])


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When Lite stops. Every field but `give_up` is `AdaptTokenConfig`'s with `stop_` in front.

    Attributes:
      rule: `groups` or `rerun`.
      groups: `groups`: certain groups that suffice; `rerun`: groups between two checks.
      entropy: highest entropy that counts as certain, nats.
      agreement: `groups`: whether the certain groups must give the same answer.
      gain: least certainty gained over the question alone, nats; 0 asks for none.
      give_up: stop too when no group was more certain for this many visits; 0 never does (`give_up_groups`).
    """

    rule: str
    groups: int
    entropy: float
    agreement: bool
    gain: float = 0.0
    give_up: int = 0

    @classmethod
    def of(cls, config) -> "StopRule":
        """The rule that an `AdaptTokenConfig` sets."""
        return cls(
            rule=config.stop_rule, groups=config.stop_groups, entropy=config.stop_entropy,
            agreement=config.stop_agreement, gain=config.stop_gain, give_up=config.give_up_groups,
        )  # fmt: skip

    @property
    def stride(self) -> int:
        """After how many groups it may stop first, and after how many more each time."""
        return self.groups if self.rule == "rerun" and not self.give_up else 1

    def reason(
        self,
        entropies: Sequence[float],
        answers: Sequence[Hashable | None],
        blind: float | None,
        rerun: Callable[[], float],
    ) -> str:
        """Why to stop after the groups visited so far; "" to go on.

        Args:
          entropies: of those groups in visiting order, nats.
          answers: as in `should_stop`.
          blind: entropy of the answer to the question alone; used if `gain` is not 0.
          rerun: gives the entropy of the answer from the tokens selected so far; called only when it is needed.
        """
        if self.rule == "rerun":
            due = len(entropies) % self.groups == 0
            stop = CERTAIN_OVER_ALL if due and self._gained([rerun()], blind)[0] <= self.entropy else GO_ON
        else:
            stop = should_stop(
                self._gained(entropies, blind), answers,
                groups=self.groups, entropy=self.entropy, agreement=self.agreement,
            )  # fmt: skip
        return stop or (GAVE_UP if gave_up(entropies, self.give_up) else GO_ON)

    def _gained(self, entropies, blind) -> np.ndarray:
        """The entropies, those with too little gain as NaN, which is never certain."""
        entropies = np.asarray(entropies, np.float64)
        if self.gain == 0:
            return entropies
        return np.where(blind_gain(entropies, blind) >= self.gain, entropies, np.nan)
