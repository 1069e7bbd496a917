"""Numbers in words."""

import dataclasses
import math

import pytest

from adapttoken_jax.config import METHODS
from adapttoken_jax.report import words
from adapttoken_jax.report.entries import ReportEntry
from adapttoken_jax.result import Stop
from tests.test_result import make_result

THIN = "\u202f"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.25, "0:07.2"), (12.5, "0:12.5"), (59.97, "1:00"), (60, "1:00"), (599.96, "10:00"),
     (615.4, "10:15"), (3723, "1:02:03"), (86399.6, "24:00:00")],
)  # fmt: skip
def test_clock(seconds, text):
    assert words.clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.456, f"0.46{THIN}s"), (12.34, f"12.3{THIN}s"), (245, f"4{THIN}min 05{THIN}s"), (3725, f"1{THIN}h 02{THIN}min")],
)
def test_span(seconds, text):
    assert words.span(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, f"0{THIN}%"),
        (0.0004, f"<{THIN}0.1{THIN}%"),
        (0.0006, f"0.1{THIN}%"),
        (0.016, f"1.6{THIN}%"),
        (0.0999, f"10{THIN}%"),
        (1, f"100{THIN}%"),
    ],
)
def test_percent(share, text):
    assert words.percent(share) == text


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, f"0{THIN}FLOP"), (999, f"999{THIN}FLOP"), (1e9, f"1{THIN}GFLOP"), (4.1e14, f"410{THIN}TFLOP")],
)
def test_operations(flops, text):
    assert words.operations(flops) == text


def test_counts_and_ordinals():
    assert words.count(1234567) == f"1{THIN}234{THIN}567" and words.count(12) == "12"
    assert [words.ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th",
    ]  # fmt: skip
    assert words.groups(1) == "1 group" and words.slots(2) == "2 slots"
    assert [words.rate(n) for n in (0.02346, 0.5, 1, 9.96, 1234)] == ["0.023", "0.5", "1.0", "10.0", f"1{THIN}234"]
    assert words.decimals(None) == words.decimals(math.nan) == "–" and words.decimals(0.126) == "0.13"


@pytest.mark.parametrize(
    ("entropy", "text"), [(None, "certainty unknown"), (0.4, "certain"), (0.41, "unsure"), (1.0, "close to guessing")]
)
def test_certainty(entropy, text):
    assert words.certainty(entropy) == text


def test_an_entropy_is_as_many_equal_choices():
    assert words.choices(0) == "1.0" and words.choices(math.log(4)) == "4.0" and words.choices(math.log(25)) == "25"


def test_every_method_has_a_name_and_a_note():
    assert set(words.METHOD_NAMES) == set(words.METHOD_NOTES) == set(METHODS)


def test_the_summary_says_what_happened():
    stopped = ReportEntry(make_result(), "?")
    assert words.summary(stopped).startswith("The scan stopped after 1 of 2 groups: certain groups agree. 2 of 24 ")
    whole = dataclasses.replace(stopped, result=make_result(stop=Stop(False, "all groups visited", 2, 2)))
    assert words.summary(whole).startswith("The scan visited all 2 groups. ")
    direct = dataclasses.replace(stopped, result=make_result(groups=[], stop=Stop(False, "", 0, 0)))
    assert words.summary(direct) == "The model saw all 24 visual tokens of 4 slots at once."


def test_the_groups_together_agree_or_not():
    result = make_result()
    assert words.consensus(ReportEntry(result, "?")) == ""
    agreed = ReportEntry(make_result(consensus={"A": 0.2, "B": 0.8}), "?")
    assert words.consensus(agreed) == f"The groups’ own answers taken together say B (80{THIN}%)."
    other = ReportEntry(make_result(consensus={"A": 0.8, "B": 0.2}), "?")
    assert words.consensus(other).endswith("not what the final pass answered.")
