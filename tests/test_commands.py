"""The commands as a user runs them, from files to files, on a tiny checkpoint and real video files."""

import html
import json
import re

import numpy as np
import pytest

from adapttoken_jax import cli
from adapttoken_jax.result import TRACE_ARRAYS, Result
from tests import media, tiny

SMALL = ["--max_pixels=4704", "--slots_per_group=4", "--budget=20", "--max_answer_tokens=2", "--max_frames=40"]
SMALL.append("--fps=12")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model"), tiny.SHAPES["base"], shards=2)


def run(capsys, *argv, status=0):
    """Runs a command; returns its standard output, and its standard error, which is printed if the status is wrong."""
    found = cli.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def ask(capsys, checkpoint, video, *more):
    argv = ["answer", f"--model={checkpoint}", f"--video={video}", "--question=What is it?", *SMALL, "--json=-", *more]
    return Result.from_json(run(capsys, *argv, "--option=a cat", "--option=a dog")[0])


def rotated(path):
    return media.write(path, 50, rotation=90)


def variable_rate(path):
    return media.write(path, 40, milliseconds=np.cumsum(np.r_[0, np.tile([20, 60, 110], 13)]), codec="mpeg4")


VIDEOS = {
    "h264.mp4": lambda path: media.write(path, 50),
    "no_count.mkv": lambda path: media.write(path, 50),
    "variable.mkv": variable_rate,
    "rotated.mp4": rotated,
    "portrait.mp4": lambda path: media.write(path, 50, (128, 72)),
    "three.mp4": lambda path: media.write(path, 3),
    "sound.mp4": media.with_audio,
}
GRIDS = {"rotated.mp4": (6, 4), "portrait.mp4": (6, 2)}


@pytest.mark.parametrize("name", VIDEOS)
def test_answers_about_every_kind_of_file(checkpoint, tmp_path, capsys, name):
    video = VIDEOS[name](tmp_path / name)
    result = ask(capsys, checkpoint, video, f"--trace={tmp_path / 'trace.npz'}")
    slots, *side = result.video.grid
    assert tuple(side) == GRIDS.get(name, (4, 6))
    assert result.option in ("A", "B") and sum(result.option_probabilities.values()) == pytest.approx(1)
    assert result.video.path == str(video) and result.video.slots == slots == (result.video.sampled_frames + 1) // 2
    assert result.selected.count == min(20, result.video.tokens)
    with np.load(tmp_path / "trace.npz") as trace:
        assert set(trace) == set(TRACE_ARRAYS)
        assert trace["frame_indices"].shape == (result.video.sampled_frames,)
        assert trace["selected"].tolist() == np.transpose([result.selected.slots, result.selected.rows,
                                                           result.selected.cols]).tolist()  # fmt: skip


def test_answers_about_twenty_minutes(checkpoint, tmp_path, capsys):
    result = ask(capsys, checkpoint, media.long_clip(tmp_path / "long.mp4"), "--max_frames=400", "--lite")
    assert result.video.duration_s == pytest.approx(1200, abs=1) and result.video.sampled_frames == 400
    assert len(result.groups) == 50 and result.groups[-1].times_s[-1] > 1100


def test_an_open_question_gets_text_and_the_files_asked_for(checkpoint, tmp_path, capsys):
    video = media.write(tmp_path / "v.mp4", 50)
    out, _ = run(capsys, "answer", f"--model={checkpoint}", f"--video={video}", "--question=Why?", *SMALL,
                 f"--json={tmp_path / 'r.json'}")  # fmt: skip
    saved = Result.from_json((tmp_path / "r.json").read_text())
    assert out.strip() == saved.answer and saved.option is None and saved.option_probabilities is None
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["config"]["slots_per_group"] == 4 and content["config"]["reference_layer"] == 3
    assert content["model"] == {"path": str(checkpoint), "type": "qwen2_5_vl", "dtype": "float32", "mesh": None}


def test_a_converted_checkpoint_answers_the_same_and_comes_back(checkpoint, tmp_path, capsys):
    video = media.write(tmp_path / "v.mp4", 30)
    run(capsys, "convert", f"--source={checkpoint}", f"--target={tmp_path / 'orbax'}")
    run(capsys, "convert", f"--source={tmp_path / 'orbax'}", f"--target={tmp_path / 'back'}", "--to=huggingface")
    first, *others = (ask(capsys, path, video) for path in (checkpoint, tmp_path / "orbax", tmp_path / "back"))
    for other in others:
        assert (other.answer, other.entropy, other.groups, other.selected) == (
            first.answer, first.entropy, first.groups, first.selected,
        )  # fmt: skip


def test_compare_passes_and_fails_by_its_tolerance(checkpoint, tmp_path, capsys):
    video = media.write(tmp_path / "v.mp4", 40)
    argv = ["compare", f"--model={checkpoint}", f"--video={video}", "--question=What?", *SMALL]
    out, err = run(capsys, *argv)
    assert err == "all stages are within --tolerance=0.0001\n"  # no progress bar where there is no terminal
    stages = [line.split()[0] for line in out.splitlines()]
    assert stages[:3] == ["stage", "patches", "vision"] and "method:" in stages
    run(capsys, *argv, "--tolerance=1e-12", status=1)
    run(capsys, "convert", f"--source={checkpoint}", f"--target={tmp_path / 'orbax'}")
    _, err = run(capsys, *argv, f"--model={tmp_path / 'orbax'}", status=2)
    assert err.endswith("orbax: transformers cannot read it; adapttoken convert --to huggingface first\n")
    _, err = run(capsys, *argv, "--debias", f"--video={tmp_path / 'v.mp4'}", status=2)
    assert err.endswith("--debias: the PyTorch reference has the paper's steps alone; leave it out\n")


def shorten(directory, name):
    file = directory / name
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "config.json": (lambda d: (d / "config.json").unlink(), "config.json"),
    "model_type": (
        lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace("qwen2_5_vl", "llava")),
        "model_type",
    ),
    "shard": (lambda d: (d / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors"),
    "truncated": (
        lambda d: shorten(d, "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors",
    ),
    "tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_line_and_leaves_nothing(tmp_path, capsys, name):
    directory = tiny.write_checkpoint(tmp_path / "model", tiny.SHAPES["base"], shards=2)
    video = media.write(tmp_path / "v.mp4", 10)
    damage, words = BROKEN[name]
    damage(directory)
    refused(capsys, tmp_path, words, directory, video)


def refused(capsys, tmp_path, words, directory, video, *more):
    before = sorted(tmp_path.rglob("*"))
    out, err = run(capsys, "answer", f"--model={directory}", f"--video={video}", "--question=What?", *SMALL,
                   f"--json={tmp_path / 'r.json'}", f"--trace={tmp_path / 't.npz'}", *more, status=2)  # fmt: skip
    assert out == "" and err.count("\n") == 1 and words in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (media.audio_only, "audio only"),
        (lambda path: media.truncated(media.write(path.with_name("whole.mp4"), 50), path), "v.mp4"),
        (lambda path: media.truncated(media.write(path.with_name("whole.mkv"), 250, gop=250), path, 0.5), "v.mp4"),
    ],
    ids=["audio_only", "truncated_mp4", "truncated_mkv"],
)
def test_a_broken_video_is_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys, make, words):
    path = tmp_path / "v.mp4"
    make(path)
    refused(capsys, tmp_path, words, checkpoint, path)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--mesh=data=1,model=8", "--mesh: model=8 does not divide the 4 attention heads"),
        ("--mesh=data=4,model=4", "needs 16 devices"),
        ("--mesh=rows=2", "--mesh=rows=2"),
        ("--mesh=data=2,fsdp=2", "either data or fsdp"),
        ("--dtype=float8", "--dtype"),
        ("--reference_layer=9", "--reference_layer=9"),
        ("--min_tokens_per_group=19", "--budget=20"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys, flag, words):
    refused(capsys, tmp_path, words, checkpoint, media.write(tmp_path / "v.mp4", 50), flag)


def test_convert_does_not_touch_a_directory_that_exists(checkpoint, tmp_path, capsys):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("kept")
    _, err = run(capsys, "convert", f"--source={checkpoint}", f"--target={tmp_path / 'target'}", status=2)
    assert "target" in err and err.count("\n") == 1
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["mine"]


def test_the_demo_answers_every_question_by_every_method(tmp_path, capsys):
    argv = ["demo", f"--output={tmp_path / 'demo'}", "--frames=256", "--seed=3"]
    out, err = run(capsys, *argv)
    assert "they hold what had to be compiled, which a second" in err
    lines = out.splitlines()
    assert lines[0].split() == ["method", "answer", "right", "entropy", "groups", "tokens", "seconds"]
    everything = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert len(everything["rows"]) == len(everything["results"]) == 16 and len(lines) == 1 + 4 * (1 + 1 + 4)
    assert max(map(len, lines)) <= 80
    first = Result.from_json((tmp_path / "demo" / "result.json").read_text())
    assert first.method == "adapttoken" and first.stop.groups_total == 16 and first.selected.count == 8
    page = (tmp_path / "demo" / "report.html").read_text()
    # The open question has the words of the one before it, which has options.
    asked = list(dict.fromkeys(row["question"] for row in everything["rows"]))
    shown = [re.sub("<[^>]*>", "", entry) for entry in re.findall(r'<li><a href="#question-\d+".*?</li>', page)]
    assert page.count("where questions share a scan") == 4
    assert len(asked) == 4 and shown == [html.escape(text) for text in asked]
    right = {
        method: sum(r["right"] for r in everything["rows"] if r["method"] == method)
        for method in ("adapttoken", "uniform")
    }
    assert right["adapttoken"] > right["uniform"]


def test_a_demo_too_short_for_its_needles_is_one_line(tmp_path, capsys):
    _, err = run(capsys, "demo", f"--output={tmp_path / 'demo'}", "--frames=8", status=2)
    assert err.count("\n") == 1 and "--frames" in err and not (tmp_path / "demo").exists()


def test_a_demo_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "demo").write_text("")
    _, err = run(capsys, "demo", f"--output={tmp_path / 'demo'}", status=2)
    assert err.count("\n") == 1 and f"--output={tmp_path / 'demo'}: " in err


def test_a_demo_whose_files_cannot_be_written_does_nothing(tmp_path, capsys):
    (tmp_path / "results.json").mkdir()
    _, err = run(capsys, "demo", f"--output={tmp_path}", "--frames=64", status=2)
    assert err == f"adapttoken demo: --output={tmp_path}: results.json in it is a directory; choose another\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
