"""The layer probe: recall by hand, needles given as boxes, and relevance as `answer` reports it."""

import json
import math

import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import scene, write_mp4
from adapttoken_jax.needle.study import layers
from adapttoken_jax.needle.study.cells import Cell, film_video
from experiments.questions import read_needles
from tests import launcher
from tests.needle.study_model import SETTINGS, settings, small_model, write_small_model


@pytest.fixture(scope="module")
def footage():
    model = small_model()
    return model, film_video(model, Cell("pair", 48, 2, per_video=2, split="validation"), 0, settings(model))


def test_recall_by_hand():
    relevance = np.array([[0.9, 0.1, 0.8, 0.2], [0.4, 0.3, 0.2, np.nan]])
    shows = np.array([[True, True, False, False], [False, False, True, False]])
    assert layers.recall(relevance, shows, None).tolist() == [0.5, 0.0]
    assert layers.recall(relevance, shows, 3).tolist() == [0.5, 1.0]
    assert layers.recall(relevance, shows, 9).tolist() == [1.0, 1.0]


def test_needles_of_a_scene_are_its_boxes(footage):
    _, shots = footage
    for each in shots:
        boxes = [
            (n.start / 4, (n.stop - 1) / 4, *(np.array([n.cell[0], n.cell[1], n.cell[0] + 1, n.cell[1] + 1]) / 2))
            for n in each.scene.needles
        ]
        own, given = layers.scene_needles(each), layers.boxed_needles(each, boxes)
        # A slot counts where its middle lies inside: one that shares its two frames with others may drop at an end.
        assert (given.shows <= own.shows).all() and own.shows.sum() - given.shows.sum() <= 2 * len(boxes)
        for slot, token in zip(*np.nonzero(own.shows), strict=True):
            assert any(each.scene.visible_in_cells([slot], [token // 2], [token % 2]))
        assert own.shows.sum() == sum(len(n.slots) for n in each.scene.needles)


FRAME = (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("box", "slots", "tokens"),
    [
        # 24 slots of half a second, 2 x 2 tokens. What holds a middle counts by middles alone.
        ((1.3, 1.8, *FRAME), [3], [0, 1, 2, 3]),
        ((1.25, 1.75, 0.25, 0.0, 0.7, 0.3), [2, 3], [0]),
        ((1.0, 1.1, *FRAME), [2], [0, 1, 2, 3]),
        ((1.4, 1.6, *FRAME), [2, 3], [0, 1, 2, 3]),
        ((1.4, 1.5, *FRAME), [2], [0, 1, 2, 3]),
        ((1.5, 1.5, *FRAME), [3], [0, 1, 2, 3]),
        ((1.0, 2.0, 0.3, 0.3, 0.4, 0.4), [2, 3], [0]),
        ((1.0, 2.0, 0.4, 0.6, 0.6, 0.7), [2, 3], [1, 3]),
        ((1.0, 2.0, 0.3, 0.2, 0.4, 0.9), [2, 3], [0, 1]),
        ((10.0, 10.1, 0.3, 0.3, 0.4, 0.4), [20], [0]),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), [0], [0]),
        ((12.0, 12.0, 1.0, 1.0, 1.0, 1.0), [23], [3]),
        ((11.9, 99.0, 0.9, 0.9, 9.0, 9.0), [23], [3]),
        # Outside of the video.
        ((12.1, 13.0, *FRAME), [], []),
        ((-2.0, -1.0, *FRAME), [], []),
        ((1.0, 2.0, 1.1, 0.0, 1.2, 1.0), [], []),
        ((1.0, 2.0, 0.0, -0.2, 1.0, -0.1), [], []),
    ],
)
def test_no_needle_inside_of_the_video_is_lost(footage, box, slots, tokens):
    _, (each, *_) = footage
    clip = each.tokens.clip
    assert (clip.grid[0], clip.token_grid, clip.info.duration_s) == (24, (2, 2), 12.0)
    found = layers.boxed_needles(each, [box])
    expected = np.zeros((24, 4), bool)
    expected[np.ix_(slots, tokens)] = True
    assert (found.shows == expected).all() and found.left_out == (not slots)
    together = layers.boxed_needles(each, [box, (0.5, 1.0, *FRAME), (20.0, 21.0, *FRAME)])
    expected[1] = True
    assert (together.shows == expected).all() and together.left_out == 1 + (not slots)


def test_any_needle_inside_of_the_video_is_shown(footage):
    random, (_, (each, *_)) = np.random.default_rng(0), footage
    for scale in (1e-9, 1e-3, 0.1, 1.0):
        for begin in random.uniform(size=(100, 3)):
            end = np.minimum(begin + scale * random.uniform(size=3), 1.0)
            (start, top, left), (stop, bottom, right) = begin * [12, 1, 1], end * [12, 1, 1]
            found = layers.boxed_needles(each, [(start, stop, top, left, bottom, right)])
            assert found.shows.any() and not found.left_out
            # What the rule by middles alone gives, where it gives anything.
            times, places = np.arange(24) / 2 + 0.25, np.array([0.25, 0.75])
            inside = [(a <= m) & (m <= b) for a, m, b in
                      ((start, times, stop), (top, places, bottom), (left, places, right))]  # fmt: skip
            middles = inside[0][:, None, None] & inside[1][:, None] & inside[2]
            assert not middles.any() or (found.shows == middles.reshape(24, 4)).all()


def test_recall_is_that_of_the_relevance_in_a_result(footage):
    model, shots = footage
    rows = layers.probe_layers(model, map(layers.scene_needles, shots), settings(model), [0, 1], [2])
    assert {(r["layer"], r["taken"]) for r in rows} == {(0, "needle"), (0, 2), (1, "needle"), (1, 2)}
    for row in rows:
        found = []
        for each in shots:
            asked = each.scene.question
            config = settings(model, reference_layer=row["layer"])
            result = at.answer(model, each.frames, asked.text, asked.options, config)
            shows = layers.scene_needles(each).shows
            for group, relevance in zip(result.groups, result.relevance, strict=True):
                own = shows[list(group.slots)].reshape(-1)
                if own.any():
                    taken = own.sum() if row["taken"] == "needle" else row["taken"]
                    best = np.argsort(-relevance[: len(own)], kind="stable")[:taken]
                    found.append(own[best].sum() / own.sum())
        assert row["recall"] == pytest.approx(np.mean(found)) and row["groups"] == len(found)


def test_the_proposal_is_the_best_layer_and_the_lower_one_of_equals():
    rows = [{"layer": i, "taken": t, "recall": r} for i, r in enumerate((0.2, 0.9, 0.9, 0.4)) for t in ("needle", 8)]
    assert layers.proposed_layer(rows) == 1


def test_the_command_reads_videos_with_boxes(tmp_path):
    made = scene(5, "validation", 32)
    write_mp4(made, tmp_path / "video.mp4")
    (needle,) = made.needles
    outside = {"start": 100, "stop": 101, "box": [0, 0, 1, 1]}
    line = {
        "video": "video.mp4", "question": f"\u2028{made.question.text}", "options": made.question.options,
        "needles": [{"start": needle.start / 4, "stop": needle.stop / 4, "box": [0, 0, 1, 1]}, outside],
    }  # fmt: skip
    data, nothing = tmp_path / "needles.jsonl", tmp_path / "nothing.jsonl"
    data.write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8-sig")
    nothing.write_text(json.dumps(line | {"needles": [outside]}))
    given = [f"--{name}={value}" for name, value in SETTINGS.items() if name != "reference_layer"]
    given += [f"--model={write_small_model(tmp_path / 'model')}", "--taken=16", "--json=-"]
    done = launcher.run("probe_layer", f"--data={data}", f"--plot={tmp_path / 'layers.png'}", *given)
    assert done.returncode == 0, done.stderr
    words = "1 of 2 needles lie outside of their videos and are left out; the first: "
    assert done.stderr.splitlines()[-1] == f"{words}--data={data}, line 1"
    found = json.loads(done.stdout)
    assert found["proposed"] in (0, 1) and {r["layer"] for r in found["rows"]} == {0, 1}
    assert all(r["recall"] == 1.0 for r in found["rows"] if r["taken"] == 16), "16 tokens are the whole group"
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    done = launcher.run("probe_layer", f"--data={nothing}", *given)
    words = f"probe_layer: --data={nothing}: no needle lies inside of its video; check times and boxes"
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", [words])


def _needle(**changes):
    return {"start": 1, "stop": 2.5, "box": [0, 0, 1, 1]} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video": 5}, ': "video" and "question" must be texts'),
        ({"question": 3}, ': "video" and "question" must be texts'),
        ({"options": "ab"}, ': "video" and "question" must be texts, "options" a list of texts'),
        ({"options": ["a"]}, ": --option: one option leaves nothing to choose"),
        ({"video": "other.mp4"}, ": .*other.mp4: no such file"),
        ({"needles": None}, ': "needles" must be a list of {"start": seconds'),
        ({"needles": [5]}, ': needle 1 must be {"start": seconds'),
        ({"needles": [_needle(), {"start": 1, "stop": 2}]}, ": needle 2 must be .* all of them finite numbers"),
        ({"needles": [_needle(start=math.nan)]}, ": needle 1 must be"),
        ({"needles": [_needle(stop=math.inf)]}, ": needle 1 must be"),
        ({"needles": [_needle(stop=10**400)]}, ": needle 1 must be"),
        ({"needles": [_needle(start="1")]}, ": needle 1 must be"),
        ({"needles": [_needle(start=True)]}, ": needle 1 must be"),
        ({"needles": [_needle(box=[0, 0, 1])]}, ": needle 1 must be"),
        ({"needles": [_needle(box="0011")]}, ": needle 1 must be"),
        ({"needles": [_needle(box=[0, 0, None, 1])]}, ": needle 1 must be"),
        ({"needles": [_needle(start=3)]}, ": needle 1 ends before it begins"),
        ({"needles": [_needle(box=[0.6, 0, 0.5, 1])]}, ": needle 1 ends before it begins"),
        ({"needles": [_needle(box=[0, 0.6, 1, 0.5])]}, ": needle 1 ends before it begins"),
    ],
)
def test_a_line_that_is_not_as_it_must_be_is_named(tmp_path, changes, words):
    data = tmp_path / "needles.jsonl"
    (tmp_path / "v.mp4").touch()
    line = {"video": "v.mp4", "question": "?", "needles": [_needle()]}
    data.write_text(f"{json.dumps(line)}\n\n{json.dumps(line | changes)}\n")
    with pytest.raises(UserError, match=f"^--data={data}, line 3{words}"):
        read_needles(str(data))


def test_lines_are_read_as_they_are(tmp_path):
    data = tmp_path / "needles.jsonl"
    (tmp_path / "v.mp4").touch()
    lines = [{"video": "v.mp4", "question": "?", "needles": []}]
    lines += [{"video": "./v.mp4", "question": "!", "options": ["a", "b"], "needles": [_needle(), _needle(start=0.5)]}]
    data.write_text("\r\n".join(map(json.dumps, lines)))
    (first, none), (second, boxes) = read_needles(str(data))
    assert none == [] and boxes == [(1, 2.5, 0, 0, 1, 1), (0.5, 2.5, 0, 0, 1, 1)]
    assert first.path == second.path == tmp_path.resolve() / "v.mp4"
    assert (first.question, first.options, second.options) == ("?", None, ("a", "b"))
    data.write_bytes(b'{"video": "v.mp4", "question": "\xff", "needles": []}')
    with pytest.raises(UserError, match=f"^--data={data}, line 1: is not valid UTF-8$"):
        read_needles(str(data))


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"video": "v.mp4"}\n')  # told before the model, which is not there either
    model = write_small_model(tmp_path / "model")
    for arguments, message in (
        (["--model=none", f"--data={tmp_path / 'bad.jsonl'}"], f"--data={tmp_path / 'bad.jsonl'}, line 1:"),
        ([f"--model={model}", "--layers=0,9"], "--layers=0,9: give numbers from 0 to 1"),
    ):
        done = launcher.run("probe_layer", *arguments)
        assert (
            done.returncode == 2 and done.stderr.startswith(f"probe_layer: {message}") and done.stderr.count("\n") == 1
        )
