import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax.selection import CERTAIN_GROUPS_AGREE, ENOUGH_CERTAIN_GROUPS, GO_ON, should_stop

NAN = float("nan")


@pytest.mark.parametrize(
    "entropies, answers, agreement, reason",
    [
        ([], "", True, GO_ON),
        ([0.1, 0.2], "BB", True, GO_ON),
        ([0.1, 0.2, 0.25], "BBB", True, CERTAIN_GROUPS_AGREE),
        ([0.1, 0.2, 0.26], "BBB", True, GO_ON),
        ([0.1, 0.2, 0.0], "BBC", True, GO_ON),
        ([0.1, 0.2, 0.0], "BBC", False, ENOUGH_CERTAIN_GROUPS),
        ([0.1, 1.2, 0.0, 0.2, 0.1], "BBCBB", True, CERTAIN_GROUPS_AGREE),
        ([0.1, 1.2, 0.0, 0.2, 0.9], "BBCBB", True, GO_ON),
        ([0.1, 0.1, 0.1], [None] * 3, True, GO_ON),
        ([0.1, 0.1, 0.1], [None] * 3, False, ENOUGH_CERTAIN_GROUPS),
        ([NAN, 0.1, 0.1], "BBB", True, GO_ON),
        ([NAN, 0.1, 0.1], "BBB", False, GO_ON),
    ],
)
def test_default_rule_literally(entropies, answers, agreement, reason):
    assert should_stop(entropies, answers, groups=3, entropy=0.25, agreement=agreement) == reason


def test_only_going_on_is_falsy():
    assert not GO_ON and CERTAIN_GROUPS_AGREE and ENOUGH_CERTAIN_GROUPS


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_arrays_are_accepted(asarray):
    reason = should_stop(asarray([0.1, 0.2]), asarray([3, 3]), groups=2, entropy=0.25, agreement=True)
    assert reason == CERTAIN_GROUPS_AGREE


def test_the_rule_against_its_wording():
    for seed in range(100):
        random = np.random.default_rng(seed)
        count, groups = int(random.integers(0, 12)), int(random.integers(1, 5))
        entropies, answers = random.uniform(0, 1.4, count), random.choice(list("ABC"), count).tolist()
        certain = [answer for answer, entropy in zip(answers, entropies, strict=True) if entropy <= 0.7]
        rule = {"groups": groups, "entropy": 0.7}
        agree = any(certain.count(letter) >= groups for letter in "ABC")
        assert (should_stop(entropies, answers, agreement=True, **rule) == CERTAIN_GROUPS_AGREE) == agree, seed
        assert bool(should_stop(entropies, answers, agreement=False, **rule)) == (len(certain) >= groups), seed


def test_one_answer_per_entropy():
    with pytest.raises(ValueError):
        should_stop([0.1, 0.2], "B", groups=1, entropy=0.25, agreement=True)
