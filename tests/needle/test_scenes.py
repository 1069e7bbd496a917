"""Scenes: seeds, ground truth against the pixels, and difficulty."""

import dataclasses

import numpy as np
import pytest

from adapttoken_jax import needle
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle.questions import VALUES
from adapttoken_jax.needle.render import NO_SHAPE


def _same(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first.table, second.table, strict=True))


def _without_needle(scene, number):
    needle_ = scene.needles[number]
    opacity = scene.table.opacity.copy()
    opacity[needle_.start : needle_.stop, 0] = 0
    return dataclasses.replace(scene, table=scene.table._replace(opacity=opacity))


def test_a_seed_gives_the_same_scene_every_time():
    first, second = (needle.scene(7, "train", 64, "pair") for _ in range(2))
    assert _same(first, second)
    assert first.question == second.question and first.open_question == second.open_question
    assert [dataclasses.astuple(n)[:5] for n in first.needles] == [dataclasses.astuple(n)[:5] for n in second.needles]


def test_scenes_are_pinned_so_that_published_figures_stay_reproducible():
    scene = needle.scene(3, "test", 64, "single")
    found = (scene.question.text, scene.question.options, scene.question.letter, scene.needles[0].start)
    assert found == ("What shape is blue?", ("disc", "star", "square", "cross"), "B", 44)


def test_splits_share_no_scene_and_no_noise():
    keys = {}
    for split in needle.SPLITS:
        tables = [needle.scene(seed, split, 32).table for seed in range(20)]
        keys[split] = {tuple(table.key) for table in tables} | {tuple(table.phase) for table in tables}
        assert len(keys[split]) == 40
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]


def test_the_question_of_a_seed_does_not_depend_on_the_difficulty():
    questions = {needle.scene(5, "test", 64, "pair", name).question for name in needle.DIFFICULTIES}
    assert len(questions) == 1


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
@pytest.mark.parametrize("size", [(56, 56), (84, 140)])
def test_needles_change_exactly_the_pixels_in_their_boxes(difficulty, size):
    scene = needle.scene(11, "test", 80, "pair", difficulty, size)
    for number, one in enumerate(scene.needles):
        changed = np.any(scene.images() != _without_needle(scene, number).images(), -1)
        assert np.flatnonzero(changed.any((1, 2))).tolist() == list(range(one.start, one.stop))
        for frame, (top, left, bottom, right) in zip(range(one.start, one.stop), one.boxes, strict=True):
            rows, cols = np.nonzero(changed[frame])
            assert top <= rows.min() and rows.max() < bottom and left <= cols.min() and cols.max() < right
            assert set(zip(rows // 28, cols // 28, strict=True)) == {one.cell}


def test_a_needle_has_its_colour_in_its_middle():
    for seed in range(12):
        scene = needle.scene(seed, "test", 32, difficulty=needle.Difficulty(noise=0.0))
        one = scene.needles[0]
        if one.shape == "ring":  # a ring's middle is background
            continue
        top, left, bottom, right = one.boxes[0]
        middle = scene.images()[one.start, (top + bottom) // 2, (left + right) // 2]
        assert np.abs(middle - np.asarray(needle.COLOURS[one.colour]) * 255).max() <= 1


def test_no_other_sprite_has_an_asked_key():
    for seed in range(30):
        scene = needle.scene(seed, "validation", 200, "pair", "hard")
        attribute = {"colour": "shape", "shape": "colour"}[scene.question.asked]
        asked = [VALUES[attribute].index(key) for key in scene.question.keys]
        colours = np.argmin(np.abs(scene.table.rgb[..., None, :] - np.asarray([*needle.COLOURS.values()])).sum(-1), -1)
        kind = scene.table.shape if attribute == "shape" else np.where(scene.table.shape < 0, -1, colours)
        for one, key in zip(scene.needles, asked, strict=True):
            shown = np.any(kind == key, axis=1)
            assert np.flatnonzero(shown).tolist() == list(range(one.start, one.stop))


def test_sprites_of_one_frame_are_in_different_cells():
    scene = needle.scene(2, "test", 400, difficulty=needle.Difficulty(companion_share=1.0, sprite_share=1.0))
    both = np.all(scene.table.shape != NO_SHAPE, 1)
    cells = scene.table.centre[both] // 28
    assert both.sum() > 300 and np.all(np.any(cells[:, 0] != cells[:, 1], -1))


def test_backgrounds_never_stand_still():
    scene = needle.scene(4, "test", 64, difficulty="easy")
    images = _without_needle(scene, 0).images().astype(int)
    assert np.all(np.abs(np.diff(images, axis=0)).max((1, 2, 3)) >= 1)


def test_visible_follows_slots_and_cells():
    scene = needle.scene(9, "test", 64, "pair")
    first, _ = scene.needles
    assert first.slots.tolist() == sorted({f // 2 for f in range(first.start, first.stop)})
    slot, (row, col) = first.slots[0], first.cell
    assert scene.visible_in_cells([slot], [row], [col]) == (True, False)
    assert scene.visible_in_cells([slot], [row], [1 - col]) == (False, False)


def test_needles_lie_anywhere_and_values_are_uniform():
    scenes = [needle.scene(seed, "train", 64) for seed in range(300)]
    starts = np.asarray([s.needles[0].start for s in scenes])
    assert starts.min() <= 2 and starts.max() >= 56
    letters = np.bincount([s.question.correct for s in scenes], minlength=4)
    assert letters.min() > 50
    assert {s.needles[0].cell for s in scenes} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": "dev"}, "split 'dev'"),
        ({"task": "triple"}, "task 'triple'"),
        ({"difficulty": "mild"}, "difficulty 'mild'"),
        ({"size": (50, 56)}, "size (50, 56)"),
        ({"size": (28, 28)}, "size (28, 28)"),
        ({"frames": 6}, "frames 6"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_mistakes_are_named(change, named):
    with pytest.raises(UserError) as caught:
        needle.scene(**{"seed": 0} | change)
    assert named in str(caught.value) and "\n" not in str(caught.value)
