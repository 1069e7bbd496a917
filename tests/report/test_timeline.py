"""The timeline's geometry: small cases literally, large ones against loops."""

import dataclasses
import re

import numpy as np
import pytest

from adapttoken_jax.report.timeline import (
    ROW,
    WIDTH,
    axis_ticks,
    density,
    timeline,
    visited_order,
)
from adapttoken_jax.result import GroupResult, Selection, Stop, VideoSummary
from adapttoken_jax.video import slot_edges
from tests.report import samples
from tests.test_result import make_result


def four_slots(**changes):
    """Two groups of two slots each in 8 s; group 0 keeps 3 tokens of slot 0 and 1 of slot 2, group 1 is not visited."""
    groups = [
        GroupResult(0, [0, 2], [0.0, 4.0], True, 0.5, -0.5, "B", "B", 1.0, budget=4, selected=4),
        GroupResult(1, [1, 3], [2.0, 6.0], False),
    ]
    values = {
        "groups": groups,
        "video": VideoSummary(None, 8.0, 4.0, 8, 4, (4, 4, 4), 16),
        "selected": Selection(4, 4, [0, 0, 0, 2], [0, 0, 1, 1], [0, 1, 0, 1]),
        "stop": Stop(True, "certain groups agree", 1, 2),
    }
    return samples.entry(make_result(**{**values, **changes}), None)


def strokes(path):
    """The (x, y, length) of each horizontal stroke of a path."""
    return [tuple(map(float, found)) for found in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path)]


def test_a_small_timeline_is_drawn_as_expected():
    line = timeline(four_slots())
    assert line.end == 8.0 and line.axis == (0, 2, 4, 6, 8)
    assert line.density == "M0.0 100V0.0H250.0V100.0H500.0V66.7H750.0V100.0H1000.0V100Z"
    assert (line.peak, line.peak_at) == (1.5, 0.0)
    rows = line.rows
    assert strokes(rows.faint) == [(0, 5, 250), (500, 5, 250), (250, 15, 250), (750, 15, 250)]
    assert [strokes(path) for path in rows.chosen] == [[], [(500, 5, 250)], [], [(0, 5, 250)]]
    assert strokes(rows.budget) == strokes(rows.selected) == [(0, 5, WIDTH)]
    assert rows.top_entropy == pytest.approx(np.log(2)) and rows.top_budget == 4
    assert strokes(rows.entropy) == [(0, 5, round(WIDTH * 0.5 / np.log(2)))]
    assert [(band.start, band.size) for band in rows.unvisited] == [(50, 50)] and rows.stop == 50
    assert [(label.place, label.text) for label in rows.labels] == [(25, "0"), (75, "1")]
    assert [(label.place, label.text) for label in rows.letters] == [(25, "B")]
    assert rows.threshold == pytest.approx(100 * 0.25 / np.log(2), abs=1e-3)


def test_only_the_rule_by_groups_has_a_threshold():
    settings = make_result().config
    assert timeline(four_slots(method="adapttoken")).rows.threshold is None
    assert timeline(four_slots(config={**settings, "stop_rule": "rerun"})).rows.threshold is None
    assert timeline(four_slots(config={**settings, "stop_entropy": 5.0})).rows.threshold is None


def test_rows_stand_in_the_order_of_the_visit():
    groups = [GroupResult(g, [g], [float(g)], g in (0, 4, 2), 0.1, budget=1) for g in range(6)]
    settings = {**make_result().config, "group_order": "bit_reversed"}
    video = VideoSummary(None, 6.0, 2.0, 12, 6, (6, 4, 4), 24)
    entry = four_slots(groups=groups, config=settings, video=video, stop=Stop(True, "", 3, 6))
    assert [group.index for group in visited_order(entry)] == [0, 4, 2, 1, 5, 3]
    rows = timeline(entry).rows
    assert [(band.start, band.size) for band in rows.unvisited] == [(50, 50)]
    assert [x for x, _, _ in strokes(rows.faint)] == [round(WIDTH * g / 6) for g in (0, 4, 2, 1, 5, 3)]


def test_a_direct_answer_has_a_density_and_no_rows():
    clip = samples.clip_of(samples.film(16))
    line = timeline(samples.entry(samples.direct(clip, samples.config()), clip))
    assert line.rows is None and line.peak == pytest.approx(24 / 0.5)


@pytest.mark.parametrize("frames", [1, 3])
def test_the_shortest_videos_have_a_timeline(frames):
    clip = samples.clip_of(samples.film(frames))
    line = timeline(samples.entry(samples.direct(clip, samples.config()), clip))
    assert line.end > 0 and np.isfinite(line.peak) and "nan" not in line.density
    # A picture whose file gives it no duration at all.
    still = dataclasses.replace(samples.direct(clip, samples.config()))
    still = dataclasses.replace(still, video=dataclasses.replace(still.video, duration_s=0.0))
    assert timeline(samples.entry(still, None)).end > 0


def test_slots_end_where_the_video_does():
    np.testing.assert_allclose(slot_edges(np.array([0.0, 0.5, 1.0]), 1.9), [0, 0.5, 1, 1.9])
    np.testing.assert_allclose(slot_edges(np.array([0.0, 0.5, 1.0]), 1.0), [0, 0.5, 1, 1.5])
    np.testing.assert_allclose(slot_edges(np.array([0.0]), 3.0), [0, 3])
    np.testing.assert_allclose(slot_edges(np.array([0.2, 0.7]), 1.0), [0, 0.7, 1])
    # Few frames from the first to the last of a video: the last slot is shorter.
    np.testing.assert_allclose(slot_edges(np.array([0.0, 170.5]), 256.0), [0, 170.5, 256])


@pytest.mark.parametrize("slots", [1, 2, 119, 120, 121, 512, 5000])
def test_density_keeps_every_token(slots):
    rng = np.random.default_rng(slots)
    edges = slot_edges(np.cumsum(rng.uniform(0.1, 0.6, slots)), 0.0)
    counts = rng.integers(0, 50, slots)
    bins, rates = density(edges, counts)
    assert len(rates) == len(bins) - 1 <= 120 and (bins[0], bins[-1]) == (edges[0], edges[-1])
    assert (rates * np.diff(bins)).sum() == pytest.approx(counts.sum())
    assert set(np.round(bins, 9)) <= set(np.round(edges, 9))
    of_bins = np.diff(np.searchsorted(edges, bins))
    assert np.ptp(of_bins) <= 1 and of_bins.max() == -(-slots // 120)


def test_slots_of_one_time_do_not_divide_by_zero():
    _, rates = density(np.array([0.0, 1.0, 1.0, 2.0]), np.array([1, 2, 3]))
    assert np.isfinite(rates).all()


@pytest.mark.parametrize(
    ("end", "ticks"),
    [
        (0.5, (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        (8, (0, 2, 4, 6, 8)),
        (256, (0, 60, 120, 180, 240)),
        (3600, (0, 600, 1200, 1800, 2400, 3000, 3600)),
    ],
)
def test_axis_ticks_are_round(end, ticks):
    assert axis_ticks(end) == pytest.approx(ticks)


def test_axis_ticks_are_few_at_any_length():
    for end in np.geomspace(0.002, 1e7, 60):
        ticks = axis_ticks(end)
        assert 1 <= len(ticks) <= 8 and ticks[0] == 0 and ticks[-1] <= end * (1 + 1e-6)


@pytest.mark.parametrize(("slots_per_group", "groups"), [(64, 79), (8, 625)])
def test_many_groups_stay_small(slots_per_group, groups):
    clip = samples.clip_of(samples.film(10000, 56, 56))
    settings = samples.config(slots_per_group=slots_per_group, budget=1500)
    entry = samples.entry(samples.grouped(clip, settings, options=("a", "b"), needle_s=(620,)), clip)
    rows = timeline(entry).rows
    assert rows.count == groups and rows.count * rows.height <= 640
    assert rows.faint == "" and rows.letters == () and len(rows.labels) <= 45
    assert len(strokes("".join(rows.chosen))) == len(set(entry.result.selected.slots))
    assert max(y for _, y, _ in strokes(rows.entropy)) <= ROW * groups
    assert sum(map(len, (*rows.chosen, rows.entropy, rows.budget, rows.selected))) < 80_000
