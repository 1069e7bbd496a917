"""The options beyond the paper in the whole method: what they change, what they leave alone, what they cost."""

import dataclasses
import itertools
import math
import re
import time

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import costs, scan
from adapttoken_jax.errors import UserError
from adapttoken_jax.parity import pytorch_method as oracle
from adapttoken_jax.prompt import build_prompt
from adapttoken_jax.result import NOT_FOUND
from adapttoken_jax.selection import debias_relevance, effective_groups, target_groups
from tests import tiny
from tests.method.test_oracle import OPTIONS, random_video, settings

QUESTION = "What is in the video?"
VIDEO = random_video()  # 23 slots of 6 tokens; 6 groups of up to 4 slots


@pytest.fixture(scope="module")
def plain(model):
    return at.answer(model, VIDEO, QUESTION, OPTIONS, settings(model))


def ask(model, method="adapttoken", question=QUESTION, options=OPTIONS, limits=None, **given):
    return at.answer(model, VIDEO, question, options, settings(model, **given), method, **(limits or {}))


def tokens_of(result):
    chosen = result.selected
    return list(zip(chosen.slots, chosen.rows, chosen.cols, strict=True))


# The second answer


def test_the_consensus_is_the_mean_of_what_the_groups_say(model, plain):
    traced = at.answer(model, VIDEO, QUESTION, OPTIONS, settings(model), trace=True)
    ids = list(build_prompt(model.tokenizer, QUESTION, OPTIONS).letter_ids)
    logits = traced.trace["group_first_logits"][:, ids].astype(np.float64)
    said = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    weights = np.exp([g.certainty / 2 for g in traced.groups])
    expected = (weights / weights.sum()) @ said
    np.testing.assert_allclose([traced.consensus[letter] for letter in "ABC"], expected, rtol=1e-6)
    assert plain.consensus == traced.consensus and "consensus" not in plain.to_dict()


# Budget and selection


def test_the_temperature_follows_the_target(model, plain):
    result = ask(model, temperature_target=2.0)
    certainties, weights = ([getattr(g, name) for g in result.groups] for name in ("certainty", "weight"))
    assert effective_groups(weights) == pytest.approx(target_groups(certainties, 2.0), rel=1e-5)
    assert [g.entropy for g in result.groups] == [g.entropy for g in plain.groups]
    assert sum(g.budget for g in result.groups) == result.selected.candidates == 33


def test_the_coverage_floor_puts_a_token_into_every_stretch(model, plain):
    result = ask(model, coverage=0.3)  # 9 of 30 tokens
    stretches = lambda r: {slot * 9 // 23 for slot, _, _ in tokens_of(r)}
    assert stretches(result) == set(range(9))
    assert result.selected.count == 30 and result.selected.candidates == 9 + round(1.1 * 21)
    assert sum(g.budget for g in result.groups) == result.selected.candidates
    assert sum(g.selected for g in result.groups) == 30 and tokens_of(result) == sorted(set(tokens_of(result)))
    best = best_of_stretches(plain, 9)
    assert best <= set(tokens_of(result)) and not best <= set(tokens_of(plain))


def best_of_stretches(plain, count):
    """The most relevant token of each stretch, weighted, from the relevance and weights of a plain result."""
    best = {}
    for group, row in zip(plain.groups, plain.relevance, strict=True):
        for place, value in enumerate(row[~np.isnan(row)]):
            slot, cell = group.slots[place // 6], place % 6
            token, key = (group.weight * float(value), (slot, *divmod(cell, 3))), slot * count // 23
            best[key] = max(best.get(key, token), token)
    return {token for _, token in best.values()}


def test_debias_selects_by_what_is_left_of_the_relevance(model, plain):
    result = ask(model, debias=True, over_selection=1.0)
    assert [g.budget for g in result.groups] == [g.budget for g in ask(model, over_selection=1.0).groups]
    expected = set()
    for group, row in zip(result.groups, result.relevance, strict=True):
        cleaned = debias_relevance(row[~np.isnan(row)].reshape(-1, 6)).reshape(-1)
        for place in np.argsort(-cleaned, kind="stable")[: group.budget]:
            expected.add((group.slots[place // 6], *divmod(int(place) % 6, 3)))
    assert set(tokens_of(result)) == expected
    np.testing.assert_array_equal(result.relevance, plain.relevance)  # what is reported is attention itself


def test_a_minimum_that_does_not_fit_beside_the_floor_is_refused_at_once(model):
    with pytest.raises(UserError, match=r"--budget=30: .* beside --coverage=0.4; raise the budget to 40$"):
        ask(model, coverage=0.4, min_tokens_per_group=4)
    assert ask(model, coverage=0.4, min_tokens_per_group=4, budget=40).selected.count == 40


def test_a_minimum_counts_no_more_than_a_group_has_and_not_for_flexselect(model):
    with pytest.raises(UserError, match=r"--min_tokens_per_group=1000 for each of 6 groups; raise the budget to 138$"):
        ask(model, min_tokens_per_group=1000)  # of 23 slots of 6 tokens
    assert ask(model, "flexselect", min_tokens_per_group=1000).selected.count == 30


def test_flexselect_is_left_alone(model):
    changed = ask(model, "flexselect", debias=True, coverage=0.3, temperature_target=1.0)
    assert changed.selected == ask(model, "flexselect").selected


def test_ties_in_the_budget_go_to_the_lower_group_in_any_order_of_visits(model):
    budgets = [
        ask(model, "flexselect", budget=33, group_order=order).groups for order in ("sequential", "bit_reversed")
    ]
    assert [g.budget for g in budgets[0]] == [g.budget for g in budgets[1]] == [6, 6, 6, 5, 5, 5]


# Stopping


def test_the_blind_pass_is_the_prompt_without_the_video(model, checkpoint):
    for options in (OPTIONS, None):
        prompt = build_prompt(model.tokenizer, QUESTION, options)
        config = settings(model).resolve(model.config)
        features = np.zeros((1, 6, model.config.vision.out_width), np.float32)
        video = dataclasses.make_dataclass("Video", ["features"])(features)
        [reply] = scan.blind_replies(model, video, [prompt], config)
        torch_model = tiny.load_torch(checkpoint)
        embeddings = oracle.embed(torch_model, [*prompt.prefix_ids, *prompt.suffix_ids])
        ids = np.tile(np.arange(len(embeddings)), (3, 1))
        theirs = oracle.answer_greedily(torch_model, embeddings, ids, 1 if options else 5, model.tokenizer.eos)
        assert tuple(reply.answer_ids) == theirs.ids
        assert reply.entropy == pytest.approx(oracle.answer_entropy(theirs.logits, 0.1), abs=1e-4)


def test_flops_are_those_of_every_pass(model):
    result = at.answer(model, VIDEO, QUESTION, OPTIONS, settings(model, max_answer_tokens=3), trace=True)
    prefix, suffix = (len(result.trace[name]) for name in ("prefix_ids", "suffix_ids"))
    slots, height, width = result.video.grid
    per_slot = result.video.tokens // slots
    # A group says one letter; the final answer takes a step for every further token, and for the one that ends it.
    passes = [(per_slot * len(group.slots), 0) for group in result.groups]
    passes.append((result.selected.count, min(len(result.trace["answer_ids"]), 2)))
    expected = costs.vision_flops(model.config, slots, height, width)
    expected += sum(costs.prompt_flops(model.config, prefix + n, suffix, steps) for n, steps in passes)
    assert result.cost.flops == pytest.approx(expected, rel=1e-12)


def test_a_certain_group_must_also_gain_over_the_question_alone(model, plain):
    certain = {"stop_groups": 1, "stop_entropy": 9.0, "stop_agreement": False}
    assert ask(model, "lite", **certain).stop.groups_visited == 1
    stops = [ask(model, "lite", **certain, stop_gain=gain).stop for gain in (1e-6, 20.0)]
    assert [stop.groups_visited for stop in stops][1] == 6 and not stops[1].early
    extra = ask(model, "lite", **certain, stop_gain=20.0).cost
    assert extra.visual_tokens_prefilled == plain.cost.visual_tokens_prefilled and extra.flops > plain.cost.flops


def test_asking_again_ends_the_scan_with_the_answer_it_got(model, plain):
    result = ask(model, "lite", stop_rule="rerun", stop_groups=2, stop_entropy=9.0)
    assert (result.stop.groups_visited, result.stop.reason) == (2, "certain over the groups so far")
    same = ask(model, "lite", stop_groups=2, stop_entropy=9.0, stop_agreement=False)
    assert result.answer == same.answer and result.entropy == same.entropy and result.selected == same.selected
    assert result.cost.visual_tokens_prefilled == same.cost.visual_tokens_prefilled  # asked once, not twice
    never = ask(model, "lite", stop_rule="rerun", stop_groups=2, stop_entropy=0.0)
    assert never.answer == plain.answer and never.selected == plain.selected and not never.stop.early
    # Asked after 2 and 4 groups in vain; the third time, after all 6, is the final answer.
    assert never.cost.visual_tokens_prefilled == plain.cost.visual_tokens_prefilled + 2 * 30


def test_giving_up_ends_the_scan(model, plain):
    entropies = [g.entropy for g in plain.groups]
    result = ask(model, "lite", stop_entropy=0.0, give_up_groups=1)
    falls = [later < earlier for earlier, later in itertools.pairwise(entropies)]
    assert result.stop.groups_visited == falls.index(False) + 2
    assert result.stop.early and result.stop.reason == "no group more certain for long"
    assert not ask(model, "lite", stop_entropy=0.0, give_up_groups=6).stop.early


def test_a_reply_is_read_from_the_answers_own_tokens():
    out = {
        "option_logits": np.array([[[0.1, 0.4, 0.4]]]),
        "tokens": np.array([[[7, 8, 9]]]),
        "counted": np.array([[[True, True, False]]]),
        "entropy": np.array([[[0.2, 0.4, 9.0]]]),
        "certainty": np.array([[[0.9, 0.5, 0.0]]]),
    }
    reply = scan.reply(out, 0, 0, at.AdaptTokenConfig(bottom_fraction=1.0))
    assert reply.answer_ids.tolist() == [7, 8] and reply.option_logits.tolist() == [0.1, 0.4, 0.4]
    assert reply.first_logits is None  # not among what was read
    certain = scan.reply(out | {"entropy": np.zeros((1, 1, 3))}, 0, 0, at.AdaptTokenConfig())
    assert str(certain.entropy) == "0.0"  # and not -0.0
    assert (reply.entropy, reply.certainty) == pytest.approx((0.3, 0.7))
    for name in ("entropy", "certainty"):  # that of the options alone has none to divide among, say
        with pytest.raises(at.UserError, match=r"^--dtype: the model's logits are not finite"):
            scan.reply(out | {name: np.full((1, 1, 3), np.nan)}, 0, 0, at.AdaptTokenConfig())


def test_replies_agree_by_their_option_or_by_their_text_without_capitals(model):
    opened, closed = build_prompt(model.tokenizer, QUESTION), build_prompt(model.tokenizer, QUESTION, OPTIONS)
    logits = np.array([0, 1, 0.5, 0, 9, 9, 9, 9], np.float32)  # four options, and padding

    def agreed(prompt, text):
        said = scan.Reply(None, logits, np.array(model.tokenizer.encode(text)), 0.0, 0.0)
        return scan.agreed_answer(model, prompt, said)

    assert agreed(opened, "The Video ") == agreed(opened, "the video") == "the video" and agreed(opened, " ") is None
    assert [agreed(closed, text) for text in ("C", "the old dog", "hm")] == ["C", "B", "B"]


def test_slots_are_renumbered_where_others_went(model):
    times = lambda method, positions: at.answer(
        model, VIDEO, QUESTION, OPTIONS, settings(model, final_positions=positions), method, trace=True
    ).trace["final_position_ids"][0]
    for whole in ("full", "uniform"):
        np.testing.assert_array_equal(times(whole, "compact"), times(whole, "original"))
    assert (times("adapttoken", "compact") != times("adapttoken", "original")).any()


# Deadlines and abstaining


class Clock:
    """Stands still until the method reports progress on its groups; each report takes a second."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __call__(self, stage, done, total):
        self.now += stage == "groups"


@pytest.mark.parametrize("method", ["adapttoken", "lite", "flexselect"])
@pytest.mark.parametrize(("deadline", "visited"), [(0, 1), (1, 1), (2.5, 3), (5, 5), (6, 6), (99, 6), (None, 6)])
def test_a_deadline_ends_the_scan_between_groups(model, monkeypatch, method, deadline, visited):
    clock = Clock(monkeypatch)
    limits = {"deadline": deadline, "on_progress": clock}
    result = ask(model, method, limits=limits, stop_entropy=0.0)
    assert result.stop.groups_visited == visited and result.stop.early == (visited < 6)
    assert result.stop.reason == ("deadline reached" if visited < 6 else "all groups visited")
    assert result.selected.count == min(30, visited * 24) and result.answer


def test_the_log_of_a_scan_keeps_what_came_before_the_deadline():
    """Three questions of six groups: one certain after two, one that goes on, one that has seen all."""
    visits = [[None] * 2, [None] * 3, [None] * 6]
    log = scan.ScanLog([None] * 6, None, visits, ["certain groups agree", "", ""])
    told = []
    log.after_wave(lambda: False, lambda *progress: told.append(progress))
    assert told == [("groups", 6, 6)] and log.reasons == ["certain groups agree", "", ""] and not log.done
    log.after_wave(lambda: True, None)
    assert log.done and [s.reason for s in log.scans()] == ["certain groups agree", "deadline reached", ""]


def test_all_questions_share_the_deadline(model, monkeypatch):
    clock = Clock(monkeypatch)
    both = ask(
        model, question=[QUESTION, "Why?"], options=[OPTIONS, None], limits={"deadline": 2, "on_progress": clock}
    )
    assert [r.stop.groups_visited for r in both] == [2, 2]


def test_an_uncertain_answer_is_withheld(model, plain):
    below, above = (ask(model, limits={"abstain_above": plain.entropy + step}) for step in (-1e-3, 1e-3))
    assert (below.answer, below.option) == (NOT_FOUND, None)
    assert (above.answer, above.option) == (plain.answer, plain.option)
    assert below.option_probabilities == plain.option_probabilities and below.entropy == plain.entropy
    assert '"answer": "not found in the video"' in below.to_json()
    assert ask(model, limits={"abstain_above": math.inf}).answer == plain.answer


@pytest.mark.parametrize(
    "limits", [{"deadline": -1}, {"abstain_above": -0.1}, {"deadline": math.nan}, {"deadline": "5"}]
)
def test_limits_below_zero_are_refused(model, limits):
    with pytest.raises(UserError, match=f"--{next(iter(limits))}=.*: must be a number of at least 0"):
        ask(model, limits=limits)


def test_arguments_of_another_kind_are_named(model, checkpoint):
    calls = [
        ("model: give what", lambda: at.answer("needle", VIDEO, QUESTION)),
        ("question: give a text", lambda: at.answer(model, VIDEO, {"q": QUESTION})),
        ("question: give a text", lambda: at.answer(model, VIDEO, 5)),
        ("question: give a text", lambda: at.answer(model, VIDEO, b"Why?")),
        ("question: give a text", lambda: at.answer(model, VIDEO, [])),
        ("video: the name is empty", lambda: at.answer(model, "", QUESTION)),
        ("feature_cache=3: give a directory", lambda: at.answer(model, VIDEO, QUESTION, feature_cache=3)),
        ("loop=['host']: choose one of", lambda: at.answer(model, VIDEO, QUESTION, loop=["host"])),
        ("model: give a ModelConfig", lambda: at.AdaptTokenConfig.for_model(model)),
        ("model: the name is empty", lambda: at.load("")),
        ("--dtype=3: choose one of", lambda: at.load(checkpoint, dtype=3)),
        ("options: give a list with one", lambda: at.answer(model, VIDEO, [QUESTION], {QUESTION: None})),
        ("config: give an", lambda: at.answer(model, VIDEO, QUESTION, config={"budget": 8})),
        ("model: None is no path", lambda: at.load(None)),
        ("mesh: {'data': 1} is no mesh", lambda: at.load(checkpoint, mesh={"data": 1})),
        ("Frames.fps=None", lambda: at.Frames(VIDEO.images, None)),
        ("no such file", lambda: at.answer(model, b"no.mp4", QUESTION)),
    ]
    for words, call in calls:
        with pytest.raises(UserError, match=re.escape(words)):
            call()


def test_a_target_below_one_group_is_refused():
    with pytest.raises(UserError, match=r"--temperature_target=0.5: must be 0 \(off\) or at least 1"):
        at.AdaptTokenConfig(temperature_target=0.5)
