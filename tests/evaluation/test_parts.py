"""The runner's parts on inputs that need no model: places, saved selections, time left, decoding ahead."""

import dataclasses
import io
import time
import types

import numpy as np
import pytest

from adapttoken_jax.benchmarks import Item
from adapttoken_jax.benchmarks.items import SubtitleFile
from adapttoken_jax.config import SIZES, AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import ahead as ahead_module
from adapttoken_jax.evaluation.ahead import DecodeAhead
from adapttoken_jax.evaluation.localisation import localise, slots_inside
from adapttoken_jax.evaluation.outlook import Outlook, hours_minutes
from adapttoken_jax.evaluation.runner import group_by_video
from adapttoken_jax.evaluation.saved_selection import SavedSelection, saved_selection
from adapttoken_jax.evaluation.session import questions_hash, size_name, subtitles_hash
from adapttoken_jax.evaluation.summary import mean_cost
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.selection import visiting_order
from adapttoken_jax.video import FrameReader, read_patches
from adapttoken_jax.video import ahead as frames_ahead
from tests import media


def group(slots, budget, weight=0.5, visited=True):
    return types.SimpleNamespace(slots=slots, budget=budget, weight=weight, visited=visited)


def result(groups, selected, grid=(4, 2, 4), relevance=None):
    slots, rows, cols = np.array(selected).T
    chosen = types.SimpleNamespace(slots=slots, rows=rows, cols=cols)
    video = types.SimpleNamespace(grid=grid)
    return types.SimpleNamespace(groups=groups, selected=chosen, video=video, relevance=relevance)


def test_localisation_by_hand():
    # Slots begin at 0, 2, 4, 6 s of 8; the reference 4.5 to 5 s touches the third alone.
    groups = [group((0, 2), budget=30), group((1, 3), budget=10)]
    found = localise(result(groups, [(0, 0, 0), (2, 0, 0), (2, 0, 1), (3, 0, 0), (1, 0, 0)]), [0, 2, 4, 6], 8, (4.5, 5))
    assert found == {"chance": 0.25, "budget": 30 * 0.5 / 40, "selected": 0.4, "hit": 1.0}
    missed = localise(result([], [(0, 0, 0)]), [0, 2, 4, 6], 8, (4.5, 5))
    assert missed == {"chance": 0.25, "budget": 0.25, "selected": 0.0, "hit": 0.0}


@pytest.mark.parametrize(
    ("reference", "inside"),
    [((0, 0), [1, 0, 0]), ((2, 2), [0, 1, 0]), ((1.9, 2), [1, 1, 0]), ((5.9, 60), [0, 0, 1]), ((60, 61), [0, 0, 0]),
     ((6, 6), [0, 0, 1])],
)  # fmt: skip
def test_slots_of_a_closed_interval(reference, inside):
    assert slots_inside([0, 2, 4], 6.0, reference).astype(int).tolist() == inside


def test_no_moment_of_a_video_is_in_no_slot():
    # Few frames, from the first to the last of a video: slots begin further apart than its length by their number.
    times, length = [0.25, 8.75, 17.25, 25.75, 34.25, 42.75, 51.25, 59.75], 64.0
    for moment in np.arange(0, 64.01, 0.1):
        assert slots_inside(times, length, (moment, moment)).sum() == (moment <= length)


def test_a_selection_comes_back_from_its_record_and_ranks_by_weighted_relevance():
    # A slot has 1 x 2 tokens. Group 1 weighs 3 times as much as group 0; group 2 was not visited.
    groups = [group((0, 3), 3, 0.25), group((1,), 3, 0.75), group((2,), 0, visited=False)]
    relevance = np.array([[0.9, 0.1, 0.5, 0.8], [0.2, 0.6, np.nan, np.nan], [np.nan] * 4], np.float32)
    selected = [(0, 0, 0), (1, 0, 0), (1, 0, 1), (3, 0, 1)]
    saved = saved_selection(result(groups, selected, (4, 2, 4), relevance), merge=2)
    weighted = [0.25 * 0.9, 0.75 * 0.2, 0.75 * 0.6, 0.25 * 0.8]
    assert saved.grid == (4, 1, 2) and saved.ranks.tolist() == np.argsort(np.argsort(-np.array(weighted))).tolist()
    assert saved.best(2).tolist() == [[0, 0, 0], [1, 0, 1]]
    again = SavedSelection.from_record(saved.to_record("q"))
    assert again.grid == saved.grid
    np.testing.assert_array_equal(again.tokens, saved.tokens)
    np.testing.assert_array_equal(again.ranks, saved.ranks)


def test_where_nothing_was_ranked_fewer_tokens_are_of_the_whole_video():
    whole = [(slot, row, col) for slot in range(4) for row in range(1) for col in range(2)]
    saved = saved_selection(result([], whole), merge=2)
    # 0.618 times 0 … 7, modulo 1: 0, .62, .24, .85, .47, .09, .71, .33; the smallest are those of 0, 5, 2 and 7.
    assert saved.best(3).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 1]]
    assert saved.best(4).tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 1], [3, 0, 1]]
    assert saved.best(1).tolist() == [[0, 0, 0]]
    for enough in (8, 9):
        assert saved.best(enough).tolist() == [list(token) for token in whole]


def test_a_selection_of_many_tokens_is_small_and_a_damaged_one_is_refused():
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.choice(2048 * 220, 7040, replace=False))
    tokens = np.stack(np.unravel_index(numbers, (2048, 11, 20)), 1)
    record = SavedSelection((2048, 11, 20), tokens, rng.permutation(7040)).to_record("q")
    assert len(record["tokens"]) + len(record["ranks"]) < 40_000
    np.testing.assert_array_equal(SavedSelection.from_record(record).tokens, tokens)
    with pytest.raises(UserError, match="selection of 'q': damaged"):
        SavedSelection.from_record(record | {"tokens": record["tokens"][:-8]})


def test_whatever_a_prompt_shows_is_in_the_hash_of_the_questions(tmp_path):
    shown = {"question": "Why? (A) x (B) y", "options": ["A. x", "B. y"]}
    item = Item("1", "v", None, "Why?", ("x", "y"), "A", extra=shown)
    changes = [{}, {"id": "2"}, {"video_id": "w"}, {"question": "How?"}, {"options": ("x", "z")}, {"answer": "B"}]
    changes += [{"extra": shown | {name: "else"}} for name in shown]
    hashes = [questions_hash([dataclasses.replace(item, **change)]) for change in changes]
    assert len(set(hashes)) == len(changes)
    assert questions_hash([dataclasses.replace(item, video=tmp_path, labels={"task": ("order",)})]) == hashes[0]


def test_the_hash_of_the_subtitles_is_of_their_lines_and_their_clock(tmp_path):
    without = Item("1", "v", None, "?", ("x", "y"), "A")

    def hashed(text, offset_s=0.0, name="a.srt"):
        (tmp_path / "a.srt").write_text(text)
        return subtitles_hash([dataclasses.replace(without, subtitles=SubtitleFile(tmp_path / name, offset_s))])

    hashes = [
        hashed("one"),
        hashed("two"),
        hashed("one", 5.0),
        hashed("one", name="none.srt"),
        subtitles_hash([without]),
    ]
    assert len(set(hashes)) == 5 and hashed("one") == hashes[0]


def test_the_time_left_is_the_work_left_at_the_mean_speed():
    config = AdaptTokenConfig(fps=1.0, max_frames=100)
    items = [Item(str(i), f"v{i}", None, "?", ("a", "b"), "A", duration_s=d) for i, d in enumerate((84, 34, 34, 1000))]
    now, stream = [0.0], io.StringIO()
    videos = group_by_video(items)
    outlook = Outlook(videos, config, 6, stream, clock=lambda: now[0])
    assert outlook.seconds_left() == float("inf")
    now[0] = 50.0
    outlook.video_done(videos[0])  # 84 frames and a question, 16: 100 of 100 + 50 + 50 + 116
    assert outlook.seconds_left() == pytest.approx(50 * 216 / 100)
    assert stream.getvalue() == "7 of 10 questions, about 2 min left\n"
    now[0] = 60.0
    outlook.video_done(videos[1])
    assert stream.getvalue().count("\n") == 1  # not every second
    assert outlook.seconds_left() == pytest.approx(60 * 166 / 150)


@pytest.mark.parametrize(("seconds", "text"), [(40.4, "40 s"), (300, "5 min"), (12_000, "3 h 20 min")])
def test_hours_and_minutes(seconds, text):
    assert hours_minutes(seconds) == text


def test_decoding_ahead_gives_what_decoding_gives_within_its_memory(tmp_path):
    model = types.SimpleNamespace(config=SIZES["qwen2.5-vl-7b"], mesh=None, wave=1)
    config = AdaptTokenConfig(max_pixels=4704, max_frames=40, fps=25.0)
    videos = [media.write(tmp_path / f"{i}.mp4", 30 + 8 * i) for i in range(3)]
    broken = media.truncated(videos[1], tmp_path / "broken.mp4")
    row = [videos[0], broken, None, videos[1], videos[2]]
    with DecodeAhead(model, row, config, "adapttoken", most_bytes=1) as ahead:
        for place, decoded in enumerate(ahead):
            if place in (1, 2):
                with pytest.raises(UserError, match=("broken.mp4", "no video file")[place - 1]):
                    decoded.plan()
                continue
            plan = decoded.plan()
            whole = plan_run(model.config, row[place], config, "adapttoken")
            np.testing.assert_array_equal(plan.clip.frame_indices, whole.clip.frame_indices)
            if place == 3:
                continue  # chunks that nobody takes are dropped
            slots, patches = zip(*decoded.chunks(), strict=True)
            expected = np.concatenate([chunk for _, chunk in read_patches(whole.clip)])
            np.testing.assert_array_equal(np.concatenate(patches), expected)
            assert np.concatenate(slots).tolist() == list(range(plan.clip.grid[0]))


def test_of_a_video_that_lite_scans_what_it_visits_for_certain_is_decoded_ahead(tmp_path):
    """Three groups of 8 slots, and what a call of the vision tower takes with them."""
    model = types.SimpleNamespace(config=SIZES["qwen2.5-vl-7b"], mesh=None, wave=1)
    settings = {"max_frames": 250, "slots_per_group": 8, "budget": 16, "stop_groups": 3}
    config = AdaptTokenConfig(max_pixels=4704, fps=25.0, **settings)
    video = media.write(tmp_path / "v.mp4", 2000, gop=4, sc_threshold="0")
    with DecodeAhead(model, [video], config, "lite") as ahead:
        decoded = next(iter(ahead))
        plan = decoded.plan()
        [(slots, patches)] = decoded.chunks()
    visits = [plan.groups[g] for g in visiting_order(len(plan.groups), config.group_order)]
    assert len(visits) == 16 and slots.tolist() == np.concatenate(visits)[:64].tolist()
    np.testing.assert_array_equal(patches, np.concatenate([chunk for _, chunk in read_patches(plan.clip, slots)]))


def test_few_videos_are_planned_ahead(tmp_path, monkeypatch):
    model = types.SimpleNamespace(config=SIZES["qwen2.5-vl-7b"], mesh=None, wave=1)
    config = AdaptTokenConfig(max_pixels=4704, max_frames=40, fps=25.0, slots_per_group=4, budget=16)
    videos, planned = [media.write(tmp_path / "v.mp4", 40)] * 50, []
    counted = lambda *arguments: planned.append(1) or plan_run(*arguments)
    monkeypatch.setattr(ahead_module, "plan_run", counted)
    with DecodeAhead(model, videos, config, "lite") as ahead:
        for place, decoded in enumerate(ahead):
            assert decoded.plan().groups
            time.sleep(0.01 if place else 1.0)
            assert len(planned) <= place + 1 + ahead_module._VIDEOS_AHEAD
    assert len(planned) == 50


def test_a_video_given_up_is_not_decoded_to_its_end(tmp_path, monkeypatch):
    model = types.SimpleNamespace(config=SIZES["qwen2.5-vl-7b"], mesh=None, wave=1)
    config = AdaptTokenConfig(max_pixels=4704, fps=25.0, slots_per_group=4, budget=16)
    long = media.write(tmp_path / "long.mp4", 2000, (56, 84), gop=2000, sc_threshold="0")
    short, decoded = media.write(tmp_path / "short.mp4", 40), []

    class Counting(FrameReader):
        def _decode(self, packets):
            for item in super()._decode(packets):
                decoded.append(self)
                yield item

    monkeypatch.setattr(frames_ahead, "FrameReader", Counting)
    with DecodeAhead(model, [long, short], config, "adapttoken", most_bytes=1) as ahead:
        row = iter(ahead)
        assert next(row).plan().clip.grid[0] == 1000
        second = next(row)
        assert second.plan().clip.grid[0] == 20 and sum(len(slots) for slots, _ in second.chunks()) == 20
    assert sum(reader is decoded[0] for reader in decoded) < 1500


def test_leaving_early_ends_the_thread(tmp_path):
    model = types.SimpleNamespace(config=SIZES["qwen2.5-vl-7b"], mesh=None, wave=1)
    videos = [media.write(tmp_path / "v.mp4", 40)] * 3
    with DecodeAhead(model, videos, AdaptTokenConfig(max_pixels=4704), "adapttoken", most_bytes=1) as ahead:
        next(iter(ahead)).plan()
    assert not ahead._thread.is_alive()


def test_released_sizes_are_known_by_name():
    assert [size_name(config) for config in SIZES.values()] == list(SIZES)


def test_questions_of_a_video_share_its_longest_scan_in_any_order():
    """Scans of 100 and 60 tokens of one video are one of 100; 15 of another; and 10 + 8 + 5 in the final prompts."""
    cost = lambda video, scanned, prefilled, selected: {
        "video_id": video,
        "visual_tokens": {"scanned": scanned, "prefilled": prefilled, "selected": selected},
        "groups": {"visited": 1, "total": 2},
        "flops": 1.0,
    }
    samples = [cost("a", 100, 110, 10), cost("a", 60, 68, 8), cost("b", 15, 20, 5)]
    for order in (samples, samples[::-1]):
        means = mean_cost(order)
        assert means["visual_tokens_shared"] == (100 + 15 + 23) / 3 and means["visual_tokens"] == 198 / 3
    # Asking again on the way, over 4 and 6 tokens, is each question's own.
    again = [cost("a", 100, 120, 10), cost("a", 100, 116, 10)]
    assert mean_cost(again)["visual_tokens_shared"] == (100 + 20 + 16) / 2
