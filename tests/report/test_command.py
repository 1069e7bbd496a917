"""`adapttoken answer --report`, from files to a file."""

import os

import pytest

from adapttoken_jax import cli
from tests import media


def answer(checkpoint, video, *more):
    return cli.main(
        ["answer", f"--model={checkpoint}", f"--video={video}", "--question=Is it <here>?", "--option=a cat",
         "--option=a dog", "--max_pixels=4704", "--slots_per_group=4", "--budget=20", "--max_frames=40", "--fps=12",
         *more]
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lite", "uniform"])
def test_answer_writes_a_report(checkpoint, tmp_path, method, capsys):
    video, path = media.write(tmp_path / "a&b.mp4", 50), tmp_path / "r.html"
    assert answer(checkpoint, video, f"--report={path}", f"--method={method}") == 0
    page = path.read_text(encoding="utf-8")
    assert "Is it &lt;here&gt;?</h1>" in page and "a&amp;b.mp4" in page
    assert page.count("data:image/png") >= 3 and ("Group passes" in page)
    assert ("The groups as a table" in page) == (method == "lite")
    assert capsys.readouterr().out.count("\n") == 1  # the answer alone


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_an_answer_is_told_even_if_its_report_cannot_be_written(checkpoint, tmp_path, capsys):
    video = media.write(tmp_path / "v.mp4", 50)
    assert answer(checkpoint, video, "--report=/dev/full") == 2
    out, err = capsys.readouterr()
    assert out.strip() and err.endswith("adapttoken answer: /dev/full: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_file_that_cannot_be_written_keeps_no_other_back(checkpoint, tmp_path, capsys):
    video, paths = media.write(tmp_path / "v.mp4", 50), [tmp_path / "r.html", tmp_path / "r.json"]
    assert answer(checkpoint, video, "--trace=/dev/full", f"--report={paths[0]}", f"--json={paths[1]}") == 2
    assert "/dev/full" in capsys.readouterr().err and all(path.stat().st_size for path in paths)


def test_the_name_of_a_video_need_not_be_utf_8(checkpoint, tmp_path):
    video = media.write(tmp_path / "v.mp4", 50).rename(tmp_path / os.fsdecode(b"caf\xe9.mp4"))
    assert answer(checkpoint, video, f"--report={tmp_path}/r.html", f"--json={tmp_path}/r.json") == 0
    assert "caf?.mp4" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dry_run", "--report=r.html"], "--report: a dry run has nothing to report; drop one of --report and"),
        (["--report=/no/such/r.html"], "--report=/no/such/r.html: the directory /no/such does not exist"),
        (["--report=v.mp4"], "--report=v.mp4: the same file as --video; choose another"),
        (["--report=r", "--json=r"], "--report=r: the same file as --json; choose another"),
    ],
)
def test_mistakes_are_found_before_any_work(tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert answer("no-model", "v.mp4", *more) == 2
    assert words in capsys.readouterr().err
