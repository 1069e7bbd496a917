"""Step 7 of the method, AdaptToken-Lite: when enough groups are certain to skip the remaining ones."""

from collections import Counter
from collections.abc import Hashable, Sequence

# What `should_stop` answers. Texts, because they are written to `result.json` as the reason.
GO_ON = ""
CERTAIN_GROUPS_AGREE = "certain groups agree"
ENOUGH_CERTAIN_GROUPS = "enough certain groups"


def should_stop(
    entropies: Sequence[float],
    answers: Sequence[Hashable | None],
    *,
    groups: int,
    entropy: float,
    agreement: bool,
) -> str:
    """Whether the scan may stop after the groups visited so far, and why.

    A group is certain if its entropy is at most `entropy`.

    Args:
      entropies: of the groups, nats, in any order; NaN (a group not visited) is never certain.
      answers: one per group, compared with `==`: a letter, or a text that the caller has normalised. None (no answer
        could be read) agrees with nothing, not even another None.
      groups: certain groups that suffice, at least 1.
      entropy: threshold, nats.
      agreement: whether that many certain groups must also give the same answer. Certain groups with other answers do
        not hinder them.

    Returns:
      `CERTAIN_GROUPS_AGREE`, `ENOUGH_CERTAIN_GROUPS` (only without `agreement`), or `GO_ON`, which is falsy.

    Raises:
      ValueError: numbers of entropies and answers differ.
    """
    answers = answers.tolist() if hasattr(answers, "tolist") else answers  # of a JAX array's elements none has a hash
    certain = [answer for h, answer in zip(entropies, answers, strict=True) if h <= entropy]
    if not agreement:
        return ENOUGH_CERTAIN_GROUPS if len(certain) >= groups else GO_ON
    votes = Counter(answer for answer in certain if answer is not None)
    return CERTAIN_GROUPS_AGREE if max(votes.values(), default=0) >= groups else GO_ON
