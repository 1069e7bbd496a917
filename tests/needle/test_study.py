"""The needle study: its variants of a video, its replay against the real method, its figures and its command."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import scene
from adapttoken_jax.needle.render import COLOURS, SHAPES, render
from adapttoken_jax.needle.study import document, measures, plots, scans, sections, targets
from adapttoken_jax.needle.study.cells import Arm, Cell, check_replay, film_video, shoot
from adapttoken_jax.needle.study.lab import Lab
from adapttoken_jax.needle.study.videos import differing_frames, draw_frames, variant
from adapttoken_jax.selection import group_slots
from tests import launcher
from tests.needle.study_model import SETTINGS, settings, small_model, write_small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


# ---------------------------------------------------------------------------------------------------------------------
# Variants of a video
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["single", "pair"])
def test_variants_move_the_needles_and_change_nothing_else(task):
    for seed in range(6):
        made = scene(seed, "validation", 64, task)
        images = render(made.table, 56, 56)
        asked, letters = made.question.asked, set()
        for number in range(4):
            moved = variant(made, number)
            letters.add(moved.question.letter)
            same = np.setdiff1d(np.arange(64), differing_frames(made, moved))
            own = render(moved.table, 56, 56)
            np.testing.assert_array_equal(own[same], images[same])
            for needle, value in zip(moved.needles, moved.question.beliefs[moved.question.correct], strict=True):
                assert getattr(needle, asked) == value
                frames = slice(needle.start, needle.stop)
                assert (moved.table.shape[frames, 0] == SHAPES.index(needle.shape)).all()
                np.testing.assert_allclose(
                    moved.table.rgb[frames, 0], np.tile(COLOURS[needle.colour], (6, 1)), atol=1e-6
                )
            assert moved.question.answer == " and ".join(moved.question.beliefs[moved.question.correct])
        assert letters == set("ABCD")


def test_nothing_but_the_needles_shows_what_is_asked_for():
    """Counts sprites with the asked key frame by frame: the needle's frames and no others, in every variant."""
    for seed in range(8):
        made = scene(seed, "validation", 48, "pair")
        for number in range(4):
            moved = variant(made, number)
            for needle in moved.needles:
                inside = np.isin(np.arange(48), np.arange(needle.start, needle.stop))
                if moved.question.asked == "colour":
                    shows = (moved.table.shape == SHAPES.index(needle.shape)).any(1)
                else:
                    near = np.abs(moved.table.rgb - np.float32(COLOURS[needle.colour])).max(-1) < 1e-6
                    shows = (near & (moved.table.shape >= 0)).any(1)
                np.testing.assert_array_equal(shows, inside)


def test_variants_need_room_and_options():
    with pytest.raises(UserError, match="--frames=20: too few"):
        variant(scene(0, "validation", 20, "pair"), 1)
    with pytest.raises(UserError, match="--questions_per_video: a question has 4 options"):
        variant(scene(0, "validation", 64), 4)


def test_frames_are_drawn_as_the_video_file_has_them():
    made = scene(3, "validation", 40)
    frames = np.array([0, 7, 8, 39])
    ours, expected = draw_frames(made, frames), made.images()[frames]
    assert np.abs(ours.astype(int) - expected).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Scans and replay
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [False, True])
def test_scanning_what_differs_is_scanning_everything(model, contiguous):
    config = settings(model)
    footage = film_video(model, Cell("pair", 48, 4), 0, config)
    logs = scans.log_scans(model, footage, config, contiguous)
    groups = scans.contiguous_slots(24, 4) if contiguous else group_slots(24, 4)
    for each, log in zip(footage, logs, strict=True):
        alone = scans.ask_groups(model, [(each, slots) for slots in groups], config)
        np.testing.assert_array_equal(log.slots, alone.slots)
        np.testing.assert_array_equal(log.options, alone.options)
        np.testing.assert_allclose(log.relevance, alone.relevance, atol=1e-6)
        np.testing.assert_allclose(log.logits, alone.logits, atol=1e-4)


def test_contiguous_groups():
    assert [slots.tolist() for slots in scans.contiguous_slots(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


def test_evidence_names_the_groups_that_show_a_needle(model):
    config = settings(model)
    shot = shoot(model, Cell("single", 48, 1), 0, {"a": Arm("adapttoken", config)})[0]
    case = next(iter(shot.cases.values()))
    needle = case.footage.scene.needles[0]
    expected = [
        any(needle.start <= f < needle.stop for s in slots for f in (2 * s, 2 * s + 1)) for slots in group_slots(24, 4)
    ]
    assert scans.evidence(case.footage.scene, case.log)[:, 0].tolist() == expected


def test_the_replay_is_what_answer_does(model):
    """Every arm that `answer` has, under settings that touch every branch of the replay."""
    changed = [
        ("adapttoken", {}),
        ("adapttoken", {"certainty": "option_entropy", "final_positions": "compact", "coverage": 0.2, "debias": True}),
        (
            "adapttoken",
            {"similarity": "reference_layer", "over_selection": 1.6, "temperature_target": 2.0, "proximity": "window"},
        ),
        ("flexselect", {}),
        ("uniform", {}),
        ("lite", {"stop_groups": 1, "stop_entropy": 5.46, "group_order": "bit_reversed"}),
        ("lite", {"stop_rule": "rerun", "stop_groups": 2, "stop_entropy": 5.5}),
    ]
    arms = {str(i): Arm(method, settings(model, **fields)) for i, (method, fields) in enumerate(changed)}
    cell = Cell("pair", 48, 2, per_video=2)
    check = check_replay(model, cell, arms)
    assert (check.answers, check.options, check.tokens) == (14, 14, 14)
    assert check.entropy < 1e-4 and check.holds
    found = Lab(model).measure(cell, arms, "")
    for rule in ("5", "6"):
        assert (found.values(rule, "visited") < 1).any(), "the stop rule never fired: a wrong one would go unnoticed"


def test_a_broken_replay_is_noticed(model):
    """A check of arms against settings that differ from what was replayed must fail."""

    class Wrong(Arm):
        @property
        def scan_key(self):
            return ("the same log for both",)

    arms = {"a": Arm("adapttoken", settings(model)), "b": Wrong("adapttoken", settings(model, reference_layer=0))}
    arms["a"] = Wrong("adapttoken", arms["a"].config)
    check = check_replay(model, Cell("single", 64, 4), arms)
    assert check.tokens < check.answers and not check.holds


def test_arms_without_a_final_pass_and_of_one_pool(model):
    config = settings(model)
    arms = {name: Arm(name, config) for name in ("certain", "attention", "consensus")}
    found = Lab(model).measure(Cell("single", 48, 2, per_video=2), arms, "")
    shots = shoot(model, Cell("single", 48, 2, per_video=2), 0, arms)
    for place, shot in enumerate(shots):
        case = next(iter(shot.cases.values()))
        best = int(np.argmin(case.log.entropy))
        assert found.answers["certain"][place].option == case.log.options[best]
        mean = np.average(
            case.log.option_probabilities(case.footage.prompt), axis=0, weights=_softmax(-case.log.entropy / 0.02)
        )
        assert found.answers["consensus"][place].option == mean.argmax()
        order = np.argsort(-case.log.relevance.reshape(-1), kind="stable")[:10]
        tokens = np.stack([case.log.slots.repeat(4, axis=1).reshape(-1)[order], (order % 4) // 2, order % 2], 1)
        assert found.answers["attention"][place].found == all(case.footage.scene.visible_in_cells(*tokens.T))


def _softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def test_cells_that_cannot_be_measured(model):
    arms = {"a": Arm("adapttoken", settings(model))}
    with pytest.raises(UserError, match="--frames=41: give an even number"):
        Lab(model).measure(Cell("single", 41, 1), arms, "")
    with pytest.raises(UserError, match="--frames=8: all in one group; give more than 8"):
        Lab(model).measure(Cell("single", 8, 1, per_video=1), arms, "")


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def test_wilson_interval_of_independent_questions():
    right = np.array([1] * 8 + [0] * 2)
    # 0.4902 and 0.9433: the textbook's interval for 8 of 10.
    np.testing.assert_allclose(measures.wilson(right, np.arange(10)), (0.49016, 0.94331), atol=1e-4)


@pytest.mark.parametrize("n", range(1, 60))
def test_a_wilson_interval_holds_its_share(n):
    for right in (np.ones(n), np.zeros(n)):
        low, high = measures.wilson(right, np.arange(n))
        assert 0 <= low <= right[0] <= high <= 1


def test_videos_that_share_their_outcome_count_once():
    video = np.repeat(np.arange(25), 4)
    outcome = np.arange(25) % 5 != 0
    together = np.repeat(outcome, 4)
    assert measures.design_effect(together, video) == pytest.approx(4.0)
    assert measures.wilson(together, video) == pytest.approx(measures.wilson(outcome, np.arange(25)))
    balanced = np.tile([1, 0, 1, 0], 25)  # the same share in every video: nothing is lost by sharing
    assert measures.design_effect(balanced, video) == 1.0
    assert measures.design_effect(np.ones(100), video) == 4.0  # nothing to estimate: the cautious end


def test_paired_difference():
    rng = np.random.default_rng(0)
    first, second, video = rng.random(60) < 0.7, rng.random(60) < 0.5, np.repeat(np.arange(30), 2)
    gain, half = measures.difference(first, second, video)
    sums = [(first[video == v].astype(float) - second[video == v]).sum() for v in range(30)]
    assert gain == pytest.approx(np.mean(sums) / 2)
    assert half == pytest.approx(1.96 * np.std(sums, ddof=1) * np.sqrt(30) / 60, rel=1e-3)


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(6, size=80), rng.random(80) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert measures.auc(scores, positive, np.arange(80))[0] == pytest.approx(np.mean(pairs))
    assert measures.auc(scores, np.ones(80), np.arange(80)) == (None, None)


def test_the_interval_of_an_auc_is_delongs_and_that_of_its_videos():
    rng = np.random.default_rng(2)
    scores, positive = rng.integers(9, size=60) / 3 + (np.arange(60) % 3 == 0), np.arange(60) % 3 == 0
    wins = (scores[positive][:, None] > scores[~positive]) + 0.5 * (scores[positive][:, None] == scores[~positive])
    delong = np.var(wins.mean(1), ddof=1) / 20 + np.var(wins.mean(0), ddof=1) / 40
    half = measures.auc(scores, positive, np.arange(60))[1]
    assert half == pytest.approx(measures.Z95 * np.sqrt(delong), rel=0.03)  # which divides by n - 1 in each kind
    # Every observation four times over, as four questions of one video: nothing is learned by repeating it.
    again = [np.repeat(each, 4) for each in (scores, positive, np.arange(60))]
    assert measures.auc(*again) == pytest.approx(measures.auc(scores, positive, np.arange(60)))
    assert measures.auc(*again[:2], np.arange(240))[1] < 0.6 * half


def test_a_mean_is_a_paired_difference_to_nothing():
    values, video = np.random.default_rng(3).random(40), np.repeat(np.arange(10), 4)
    assert measures.mean(values, video) == measures.difference(values, np.zeros(40), video)
    alone = measures.mean(values, np.arange(40))[1]
    assert alone == pytest.approx(measures.Z95 * np.std(values, ddof=1) / np.sqrt(40))


def test_the_page_says_by_which_runs_it_was_measured():
    one = {"begun": "2026-01-02 03:04", "commit": "abc1234", "seconds": 1.0}
    other = one | {"commit": "def5678"}
    assert document._when({"main": one, "hard": one}) == "in one run, begun 2026-01-02 03:04 (UTC) at commit abc1234"
    assert document._when({"main": one, "hard": other}) == (
        "in instalments: main begun 2026-01-02 03:04 (UTC) at commit abc1234; "
        "hard begun 2026-01-02 03:04 (UTC) at commit def5678"
    )


def test_risk_and_coverage():
    coverage, risk = measures.risk_coverage([0.3, 0.1, 0.2, 0.4], [False, True, True, True])
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])
    assert measures.area_under_risk([1, 2], [True, False]) == 0.25


def test_a_setting_is_replaced_only_by_a_clearly_better_one():
    assert sections.preferred({"a": 0.5, "b *": 0.5, "c": 0.504}) == "b *"
    assert sections.preferred({"a": 0.5, "b *": 0.5, "c": 0.52}) == "c"
    assert sections.preferred({"a": 0.5, "b": 0.503}) == "a"


def test_the_rule_for_the_temperature():
    """At it, G groups that know nothing weigh a given share of one that has ruled out half of the options."""
    for groups in (4, 64, 625):
        for factor in (2, 8):
            temperature = sections.rule_temperature(groups, factor)
            nothing, half = np.exp(-np.log(4) / temperature), np.exp(-np.log(2) / temperature)
            assert groups * nothing == pytest.approx(half / factor)


def test_published_settings_are_the_defaults_of_the_method(model):
    config = settings(model, temperature=0.1, coverage=0.1, stop_rule="rerun", over_selection=1.5)
    paper = sections.paper_settings(config)
    assert (paper.temperature, paper.coverage, paper.stop_rule, paper.over_selection) == (2.0, 0.0, "groups", 1.1)
    assert (paper.budget, paper.slots_per_group, paper.reference_layer) == (10, 4, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and page
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def little_study(model):
    size = sections.Size(("single",), (64,), 4, detail_frames=(64,), hard_frames=64, scan_questions=2,
                         choice_questions=4, stop_questions=8)  # fmt: skip
    config = settings(model)
    found = {
        "about": {"command": "make", "model": "m", "parameters": 1, "model_bytes": 1, "versions": "v", "cores": 2,
                  "check": "held", "split": "test", "difficulty": "normal", "questions": 4, "per_video": 4},
        "measured": {"main": {"begun": "2026-01-02 03:04", "commit": "abc1234", "seconds": 60.0}},
        "settings": dataclasses.asdict(config),
        "budget": sections.choose_budget(Lab(model), size, config),
        "stop": sections.choose_stop(Lab(model), size, config),
        "main": sections.main_section(Lab(model), size, config, ("uniform", "certain", "adapttoken", "lite")),
    }  # fmt: skip
    found["targets"] = targets.check_targets(found)
    return found


def test_the_page_says_what_was_measured(little_study, tmp_path):
    figures = plots.draw_all(little_study, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    page = document.evidence_page(json.loads(document.json_lines(little_study)), figures)
    row = next(r for r in little_study["main"]["rows"] if r["arm"] == "adapttoken")
    assert f"| AdaptToken | {100 * row['accuracy']:.1f} ({100 * row['accuracy_low']:.1f}–" in page
    assert "(evidence/risk.png)" not in page, "a figure that was not drawn is shown"
    assert all(f"(evidence/{name})" in page for name in figures)
    widths = [line.count("|") for line in page.split("\n\n")[-1].strip().splitlines()]
    assert len(set(widths)) == 1


def test_the_figure_of_stop_rules_draws_each_row_of_their_table(little_study):
    rows = little_study["main"]["lite"]
    figure = plots._lite(rows)
    drawn = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert {"sequential", "bit_reversed"} <= {row["order"] for row in rows}
    page = document.evidence_page(little_study, [])
    assert len(drawn) > 2 and all(page.count(f"\n| {line.get_label()} |") == 1 for line in drawn)
    points = sorted((row["groups_visited_share"], row["accuracy"]) for row in rows)
    assert sorted(point for line in drawn for point in zip(*line.get_data(), strict=True)) == points
    plots.plt.close(figure)


def test_the_figures_hide_nothing_of_themselves():
    """Lengths under the axis stay apart, and no legend lies over a line."""
    rows = [{"arm": "adapttoken", "task": task, "frames": frames, "accuracy": 0.5, "accuracy_low": 0.4,
             "accuracy_high": 0.6} for task in plots.TITLES for frames in (64, 256, 1024, 2048, 10000)]  # fmt: skip
    curves = [{"arm": "adapttoken", "task": task, "frames": 1024, "difficulty": "normal", "coverage": [0, 1],
               "risk": [0, 0.7]} for task in plots.TITLES]  # fmt: skip
    with plots.plt.rc_context(plots._STYLE):
        for figure in (plots._accuracy(rows), plots._risk(curves)):
            figure.draw_without_rendering()
            (legend,) = figure.legends
            for axis in figure.axes:
                boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
                assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
                assert axis.get_legend() is None and not axis.bbox.overlaps(legend.get_window_extent())
            plots.plt.close(figure)


def test_the_smallest_budget_that_is_accurate_enough_is_chosen(little_study):
    rows = [row for row in little_study["budget"]["rows"] if row["arm"] == "adapttoken"]
    assert [row["budget"] for row in rows] == list(sections.BUDGETS)
    enough = [row["budget"] for row in rows if row["accuracy"] >= 0.97]
    assert little_study["budget"]["settings"]["budget"] == min(enough, default=sections.BUDGETS[-1])
    (step,) = little_study["budget"]["steps"]
    assert step["chosen"] == sections.preferred(step["mean"])


def test_the_safe_stop_rule_that_visits_least_is_chosen(little_study):
    stop = little_study["stop"]
    assert (
        len(stop["tried"]) == 42 and set(stop["decided"]) <= set(stop["tried"]) and stop["cells"] == [["single", 64, 8]]
    )
    safe = {name: row["share"] for name, row in stop["decided"].items() if max(row["loss_at_most"]) <= 0.01}
    if not safe:
        assert stop["chosen"] == "full" and stop["settings"] == {}
        return
    assert safe[stop["chosen"]] == min(safe.values())
    rule, groups, nats, order = stop["chosen"].split()
    assert stop["settings"] == {
        "group_order": order,
        "stop_rule": rule,
        "stop_groups": int(groups),
        "stop_entropy": float(nats),
    }
    assert sections.chosen_settings(little_study) == little_study["budget"]["settings"] | stop["settings"]


def test_the_numbers_on_disk_are_the_numbers_measured(little_study):
    text = document.json_lines(little_study | {"odd": {"a": {"b": {"c": float("nan")}}, "none": []}})
    assert json.loads(text)["odd"] == {"a": {"b": {"c": None}}, "none": []}
    assert json.loads(text)["main"] == json.loads(json.dumps(little_study["main"]))
    assert max(map(len, text.splitlines())) < 5000, "a table is on one line"


def test_group_figures_add_up(little_study):
    (groups,) = little_study["main"]["groups"]
    assert sum(map(sum, groups["by_needles"])) == sum(map(sum, groups["by_right"])) == 4 * groups["groups"]
    assert len(little_study["main"]["lite"]) == 6 * 7
    base = next(r for r in little_study["main"]["rows"] if r["arm"] == "adapttoken")["accuracy"]
    for each in little_study["main"]["replayed"]:
        assert each["accuracy"] - each["gain"] == pytest.approx(base)


def test_targets_compare_with_what_was_measured():
    shares = (0.96, 0.5, 0.7, 0.6, 0.945)
    rows = [
        {"arm": arm, "task": task, "frames": frames, "accuracy": accuracy, "groups_visited_share": 0.5}
        for frames in (256, 1024)
        for task in ("single", "pair")
        for arm, accuracy in zip(("adapttoken", "uniform", "flexselect", "certain", "lite"), shares, strict=True)
    ]  # fmt: skip
    groups = [
        {
            "task": "single",
            "frames": 256,
            "auc_needle": 0.97,
            "auc_needle_half_width": 0.01,
            "entropy_by_needles": [1.2, 0.1],
            "prior_entropy": 1.386,
        }
    ]
    study = {"main": {"rows": rows, "groups": groups}, "torch": {"questions": 200, "identical": 199, "share": 0.995}}
    met = [each["met"] for each in targets.check_targets(study)]
    #      AUC, prior, single, pair, over uniform, over equal, over certain, lite single, lite pair, torch
    assert met == [True, False, True, True, True, False, True, False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_rows(tmp_path):
    directory = write_small_model(tmp_path / "model")
    given = [f"--{name}={value}" for name, value in SETTINGS.items()]
    given += ["--task=pair", "--frames=64", "--questions=4", "--seed=7", "--arms=adapttoken,uniform"]
    done = launcher.run("needle_study", f"--model={directory}", "--json=-", *given)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(r["arm"], r["task"], r["frames"], r["questions"]) for r in rows] == [
        ("adapttoken", "pair", 64, 4), ("uniform", "pair", 64, 4)
    ]  # fmt: skip
    assert all(0 <= r["accuracy_low"] <= r["accuracy"] <= r["accuracy_high"] <= 1 for r in rows)
    assert rows[0]["groups_visited_share"] == 1.0 and 0 <= rows[0]["entropy_auc_needle"] <= 1
    assert rows[0]["accuracy"] == _accuracy_of_real_answers(directory)


def _accuracy_of_real_answers(directory) -> float:
    """The same four questions, put to `at.answer` one by one."""
    model = at.load(directory)
    footage = film_video(model, Cell("pair", 64, 4, seed=7), 0, settings(model))
    asked = [each.scene.question for each in footage]
    found = [
        at.answer(model, each.frames, q.text, q.options, settings(model)).option == q.letter
        for each, q in zip(footage, asked, strict=True)
    ]
    return sum(found) / 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--arms=best",), "needle_study: --arms=best: choose from uniform,"),
        (("--frames=many",), "needle_study: --frames=many: give numbers"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = launcher.run("needle_study", "--model=nowhere", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1
