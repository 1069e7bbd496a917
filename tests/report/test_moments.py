"""Which frames are shown and what is drawn over them, against loops over single cells."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from adapttoken_jax.report.moments import (
    chosen_slots,
    frame_uri,
    heat_of_slots,
    heat_uri,
    moments,
    outline,
    selected_cells,
    telling_frames,
    where,
)
from adapttoken_jax.video import Frames
from tests.report import samples


@pytest.fixture(scope="module")
def entry():
    clip = samples.clip_of(samples.film(160, 112, 168))
    settings = samples.config(slots_per_group=16, budget=300, temperature=0.5)
    result = samples.grouped(clip, settings, options=("a", "b"), needle_s=(20,), visited=4, method="lite")
    return samples.entry(result, clip, options=("a", "b"))


def picture(uri):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", uri).groups()
    raw = base64.b64decode(content)
    return kind, raw, np.asarray(Image.open(io.BytesIO(raw)))


def test_moments_are_the_slots_with_most_tokens_apart_from_each_other(entry):
    slots, counts, times = chosen_slots(entry, 6), entry.tokens_of_slots, entry.slot_times
    assert len(slots) == 6 and list(slots) == sorted(slots) and counts[slots].min() > 0
    assert int(np.argmax(counts)) in slots
    gap = (times[-1] - times[0]) / 40
    assert np.diff(times[slots]).min() > gap
    for slot in np.flatnonzero(counts > counts[slots].min()):
        # Whatever gave more tokens and is not shown is close to something that is, and that gave at least as many.
        near = slots[np.abs(times[slots] - times[slot]) <= gap]
        assert slot in slots or counts[near].max() >= counts[slot]


def test_among_slots_with_as_many_tokens_the_most_relevant_are_shown():
    clip = samples.clip_of(samples.film(160, 56, 56))
    result = samples.grouped(clip, samples.config(slots_per_group=16, budget=clip.tokens), seed=3)
    entry = samples.entry(result, clip)
    assert set(entry.tokens_of_slots) == {4}
    peaks = {
        s: result.relevance[g.index, 4 * k : 4 * k + 4].max() for g in result.groups for k, s in enumerate(g.slots)
    }
    (first,) = chosen_slots(entry, 1)
    assert first == max(peaks, key=peaks.get)


def test_a_direct_answer_shows_frames_at_even_distances():
    clip = samples.clip_of(samples.film(40))
    entry = samples.entry(samples.direct(clip, samples.config()), clip)
    assert chosen_slots(entry, 5).tolist() == [0, 5, 10, 14, 19]
    assert chosen_slots(entry, 50).tolist() == list(range(20))
    shown = moments(entry, 5, 10_000)
    assert all(moment.heat is None and moment.outline == "" and moment.where == "" for moment in shown)
    assert [moment.tokens for moment in shown] == [24] * 5


def test_without_a_clip_nothing_is_shown(entry):
    assert moments(samples.entry(entry.result, None), 4, 10_000) == ()


def test_a_moment_says_where_its_tokens_are(entry):
    for moment in moments(entry, 4, 20_000):
        cells = selected_cells(entry, moment.slot)
        selected = entry.result.selected
        expected = {
            (r, c) for s, r, c in zip(selected.slots, selected.rows, selected.cols, strict=True) if s == moment.slot
        }
        assert {tuple(cell) for cell in np.argwhere(cells)} == expected and moment.tokens == len(expected)
        assert moment.slot in entry.result.groups[moment.group].slots
        assert moment.time_s == pytest.approx(entry.clip.slot_times[moment.slot])


def test_a_frame_that_changes_a_kept_cell_is_shown_too():
    still = np.random.default_rng(0).integers(0, 200, (56, 84, 3), dtype=np.uint8)
    noisy, changed = still + np.uint8(9), still.copy()
    changed[28:, 28:56] += 55  # the cell in the second row and column
    cells = np.zeros((2, 3), bool)
    cells[1, 1] = True
    assert telling_frames(np.stack([still, noisy]), cells) == [0]
    assert telling_frames(np.stack([still, changed]), cells) == [0, 1]
    assert telling_frames(np.stack([changed, still]), cells) == [0, 1]
    assert telling_frames(np.stack([still, noisy, changed, changed]), cells) == [0, 2]
    assert telling_frames(np.stack([still, changed]), ~cells) == [0]


def test_frames_of_a_moment_have_their_own_times_and_share_its_bytes():
    images = np.repeat(samples.film(1).images, 32, 0)
    images[11, :56] = 255 - images[11, :56]  # the second frame of slot 5
    clip = samples.clip_of(Frames(images, 4.0))
    result = samples.grouped(clip, samples.config(slots_per_group=4, budget=clip.tokens), seed=3)
    shown = {moment.slot: moment for moment in moments(samples.entry(result, clip), 16, 12_000)}
    assert sorted(shown) == list(range(16))
    assert [times for times, _ in shown[5].images] == clip.frame_times[10:12].tolist()
    assert sum(len(picture(uri)[1]) for _, uri in shown[5].images) <= 12_000
    assert all([times for times, _ in shown[s].images] == [clip.slot_times[s]] for s in shown if s != 5)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ((0, 0), "at the top on the left"),
        ((0, 3), "at the top"),
        ((2, 6), "on the right"),
        ((4, 6), "at the bottom on the right"),
        ((2, 3), "around the centre"),
    ],
)
def test_places_in_words(cell, words):
    cells = np.zeros((5, 7), bool)
    cells[cell] = True
    assert where(cells) == words
    assert where(np.zeros((5, 7), bool)) == ""


def test_the_outline_runs_where_a_cell_meets_none():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cells = rng.random((rng.integers(1, 7), rng.integers(1, 9))) < 0.5
        assert drawn_sides(outline(cells)) == expected_sides(cells)
    assert outline(np.ones((2, 3), bool)) == "M0 0h3M0 2h3M0 0v2M3 0v2"


def drawn_sides(path):
    sides = []
    for x, y, way, length in re.findall(r"M(\d+) (\d+)([hv])(\d+)", path):
        for i in range(int(length)):
            sides.append((way, int(y), int(x) + i) if way == "h" else (way, int(y) + i, int(x)))
    assert len(sides) == len(set(sides))
    return set(sides)


def expected_sides(cells):
    inside = {tuple(map(int, cell)) for cell in np.argwhere(cells)}
    sides = set()
    for r, c in inside:
        sides |= {("h", r, c)} if (r - 1, c) not in inside else set()
        sides |= {("h", r + 1, c)} if (r + 1, c) not in inside else set()
        sides |= {("v", r, c)} if (r, c - 1) not in inside else set()
        sides |= {("v", r, c + 1)} if (r, c + 1) not in inside else set()
    return sides


def test_heat_is_the_rank_among_all_tokens_scanned(entry):
    relevance, per_slot = entry.result.relevance, entry.tokens_per_slot
    everything = relevance[np.isfinite(relevance)].tolist()
    slot = int(chosen_slots(entry, 1)[0])
    heat = heat_of_slots(entry, np.array([slot]))[slot]
    group = slot % len(entry.result.groups)
    place = entry.result.groups[group].slots.index(slot)
    for i in range(per_slot):
        own = relevance[group, place * per_slot + i]
        share = sum(value >= own for value in everything) / len(everything)
        expected = np.log(0.5 / share) / np.log(50)
        assert heat[i] == pytest.approx(min(max(expected, 0), 1))


def test_slots_that_were_not_scanned_have_no_heat(entry):
    skipped = next(group for group in entry.result.groups if not group.visited)
    assert heat_of_slots(entry, np.array(skipped.slots[:1])) == {}


def test_the_heat_map_is_clear_where_nothing_is_relevant():
    kind, _, pixels = picture(heat_uri(np.array([[0.0, 0.2, 0.6], [1.0, 0.0, 0.9]])))
    assert kind == "png" and pixels.shape == (2, 3, 4)
    opacity = pixels[..., 3].astype(int)
    assert opacity[0, 0] == opacity[1, 1] == 0
    assert opacity[0, 1] < opacity[0, 2] < opacity[1, 2] < opacity[1, 0] < 200
    assert pixels[1, 0, 1] < pixels[0, 1, 1]  # hotter is redder


def test_a_small_frame_is_kept_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    kind, _, pixels = picture(frame_uri(image, 20_000))
    assert kind == "png" and np.array_equal(pixels, image)
    assert picture(frame_uri(image, 3_000))[0] == "jpeg"  # noise does not fit


@pytest.mark.parametrize("most_bytes", [40_000, 8_000, 2_500])
def test_a_large_frame_is_made_to_fit(most_bytes):
    noise = np.random.default_rng(0).integers(0, 256, (308, 560, 3), dtype=np.uint8)
    kind, raw, pixels = picture(frame_uri(noise, most_bytes))
    assert kind == "jpeg" and len(raw) <= most_bytes
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(560 / 308, rel=0.05)
