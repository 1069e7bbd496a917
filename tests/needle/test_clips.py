"""Training batches: labels against what is kept, prompts against the one builder, positions and reproducibility."""

import jax
import numpy as np
import pytest

from adapttoken_jax import needle, prompt
from adapttoken_jax.needle import clips
from adapttoken_jax.needle.clips import ClipMaker, ClipSettings
from adapttoken_jax.needle.tokenizer import chat_tokenizer

_TOKENIZER = chat_tokenizer()
_SETTINGS = ClipSettings(slots=4, choice=2, open=2, hints=0.5)


@pytest.fixture(scope="module")
def batch():
    return ClipMaker(_TOKENIZER, 0).batch(3, 24, _SETTINGS)


def _questions(block):
    """Clips, token ids and indices of their questions of every question of a block, padding removed."""
    clips_, count = block.ids.shape[:2]
    for b in range(clips_):
        for q in range(count):
            yield b, block.ids[b, q][block.valid[b, q]].tolist(), q


def test_batches_repeat_and_differ_by_step_seed_and_split(batch):
    same = ClipMaker(_TOKENIZER, 0).batch(3, 24, _SETTINGS)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(same), strict=True))
    keys = {tuple(batch.table.key.ravel())}
    for maker, step in (
        (ClipMaker(_TOKENIZER, 0), 4),
        (ClipMaker(_TOKENIZER, 1), 3),
        (ClipMaker(_TOKENIZER, 0, "test"), 3),
    ):
        keys.add(tuple(maker.batch(step, 24, _SETTINGS).table.key.ravel()))
    assert len(keys) == 4


def test_prompts_are_those_of_build_prompt_and_labels_read_their_answer(batch):
    newline = _TOKENIZER.encode("\n")
    header = [_TOKENIZER.im_end, *newline, _TOKENIZER.im_start, *_TOKENIZER.encode("assistant\n")]
    for name, block in batch.blocks.items():
        for b, ids, q in _questions(block):
            end = len(ids) - next(i for i in range(len(ids)) if ids[-i - len(header) : len(ids) - i] == header)
            text = _TOKENIZER.decode(ids[1 : end - len(header)])
            question, *rest = text.split("\n")
            options = [line[3:] for line in rest[:-1]] or None
            built = prompt.build_prompt(_TOKENIZER, question, options)
            assert ids[:end] == list(built.suffix_ids)
            answer = [*ids[end:], _TOKENIZER.eos[0]]
            for place, token in enumerate(answer):
                assert block.answer.read[b, q, place] == end - 1 + place
                mass = dict(zip(block.answer.targets[b, q, place], block.answer.beliefs[b, q, place], strict=True))
                assert mass.get(token, 0) > 0 and block.answer.weight[b, q, place] == 1
            assert not block.answer.weight[b, q, len(answer) :].any()
            assert (options is not None) == (name == "choice")


def test_every_belief_is_a_distribution(batch):
    for block in batch.blocks.values():
        for labels in (block.answer, block.hints, block.matches):
            assert np.allclose(labels.beliefs.sum(-1), labels.weight > 0)


def test_hints_stand_at_the_keys_and_the_options(batch):
    """Read as text: a hint at a word of an option is that option's letter, any other stands at a key, for a value."""
    names = {*needle.COLOURS, *needle.SHAPES}
    for block in batch.blocks.values():
        for b, ids, q in _questions(block):
            text = _TOKENIZER.decode(ids).split("assistant")[0]
            expected = []
            for line in text.split("\n"):
                words = line.replace("?", "").replace(".", "").split()
                letter = words[0] if words and words[0] in "ABCDE" else None
                expected += [(word, letter) for word in words if word in names]
            found = []
            for place, targets, beliefs, weight in zip(*(field[b, q] for field in block.hints), strict=True):
                if weight:
                    meaning = [_TOKENIZER.decode([t]).strip() for t, p in zip(targets, beliefs, strict=True) if p > 0]
                    at_option = len(meaning) == 1 and meaning[0] in "ABCDE"
                    assert at_option or set(meaning) <= names
                    found.append((_TOKENIZER.decode([ids[place]]).strip(), meaning[0] if at_option else None))
            assert found == expected


def test_hints_follow_what_is_seen_as_answers_do(batch):
    block = batch.blocks["open"]
    of_answers = np.where(block.value, block.answer.beliefs.max(-1), 0)
    for b, _, q in _questions(block):
        hints = block.hints.beliefs[b, q].max(-1)[block.hints.weight[b, q] > 0]
        assert sorted(hints) == sorted(of_answers[b, q][block.value[b, q]])


def test_a_match_is_the_belief_in_the_options_that_say_the_same(batch):
    """Read as text: every word of an option is right as often as the options with that word in that place are."""
    names, block = {*needle.COLOURS, *needle.SHAPES}, batch.blocks["choice"]
    for b, ids, q in _questions(block):
        lines = [line.split() for line in _TOKENIZER.decode(ids).split("assistant")[0].split("\n")]
        options = {
            words[0].rstrip("."): [w for w in words if w in names]
            for words in lines
            if words and words[0].rstrip(".") in tuple("ABCDE")
        }
        answer = {
            _TOKENIZER.decode([t]).strip(): p
            for t, p in zip(block.answer.targets[b, q, 0], block.answer.beliefs[b, q, 0], strict=True)
        }
        expected = [
            (letter, word, sum(answer[other] for other, said in options.items() if said[place] == word))
            for letter, words in options.items()
            for place, word in enumerate(words)
        ]
        found = [
            (_TOKENIZER.decode([targets[0]]).strip(), _TOKENIZER.decode([ids[place]]).strip(), beliefs[0])
            for place, targets, beliefs, weight in zip(*(field[b, q] for field in block.matches), strict=True)
            if weight
        ]
        assert [each[:2] for each in found] == [each[:2] for each in expected]
        assert np.allclose([each[2] for each in found], [each[2] for each in expected])
    assert batch.blocks["open"].matches.weight.shape[-1] == 0


def test_labels_follow_the_pixels_that_are_kept():
    """A question about a sprite is certain if and only if a kept token holds that sprite, by the table itself."""
    settings = ClipSettings(slots=2, choice=0, open=4, pair_share=0.0)
    batch = ClipMaker(_TOKENIZER, 5).batch(0, 40, settings)
    colours = np.asarray([*needle.COLOURS.values()], np.float32)
    checked = 0
    for b, ids, q in _questions(batch.blocks["open"]):
        words = _TOKENIZER.decode(ids).replace("?", " ").replace(".", " ").replace("\n", " ").split()
        key = next(w for w in words if w in needle.SHAPES or w in needle.COLOURS)
        kept = batch.order[b][batch.valid[b, 15:]]
        shown = False
        for frame in range(4):
            for n in range(2):
                shape = batch.table.shape[b, frame, n]
                if shape < 0:
                    continue
                colour = np.argmin(np.abs(colours - batch.table.rgb[b, frame, n]).sum(-1))
                row, col = (batch.table.centre[b, frame, n] // 28).astype(int)
                names = (needle.SHAPES[shape], [*needle.COLOURS][colour])
                shown |= key in names and frame // 2 * 4 + row * 2 + col in kept
        block = batch.blocks["open"]
        certain = block.answer.beliefs[b, q].max(-1)[block.value[b, q]]
        assert np.all(np.isclose(certain, 1.0 if shown else 1 / 6))
        checked += 1
    assert checked == 160


@pytest.mark.parametrize("seed", range(30))
def test_positions_are_a_legal_prompt(seed):
    rng = np.random.default_rng(seed)
    layout = clips.draw_layout(rng, ClipSettings(), prefix=15)
    ids, kept = layout.position_ids, layout.kept
    assert ids[:, :15].tolist() == [list(range(15))] * 3
    time, row, col = ids[:, 15:] - 15
    assert sorted(layout.order) == list(range(32))
    assert np.array_equal(row * 2 + col, layout.order % 4)  # a token keeps its place in the frame
    steps = np.diff(time)
    same = steps == 0
    assert np.all(steps >= 0) and np.all(np.diff(row * 2 + col)[same] > 0)  # video order: slot, row, column
    highest = ids[:, 15:][:, kept].max(initial=14)
    assert layout.text_start in (highest + 1, 15 + 2)


def test_layouts_cover_what_the_method_does():
    rng = np.random.default_rng(0)
    layouts = [clips.draw_layout(rng, ClipSettings(), 15) for _ in range(400)]
    grids = [np.array_equal(one.order, np.arange(32)) for one in layouts]
    compact = [np.array_equal(one.position_ids[0, 15::4], 15 + 2 * np.arange(8)) for one in layouts]
    whole = [one.kept.all() for one in layouts]
    hf5 = [one.text_start == 17 for one in layouts]
    for found in (grids, compact, whole, hf5):
        assert 0.05 < np.mean(found) < 0.9
    assert max(one.position_ids.max() for one in layouts) > 4000 and min(one.kept.sum() for one in layouts) <= 2


def test_each_kind_of_question_comes_up():
    batch = ClipMaker(_TOKENIZER, 2).batch(0, 64, ClipSettings())
    choice = batch.blocks["choice"].answer.beliefs[:, :, 0].max(-1)
    for belief in (1 / 5, 1 / 4, 1 / 3, 1 / 2, 1):
        assert 0.01 < np.mean(np.isclose(choice, belief)) < 0.8
