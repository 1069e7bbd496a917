"""How every launcher under `experiments/` starts and ends: as the commands of `adapttoken` do."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import launcher
from tests.launcher import ROOT

NAMES = sorted(
    file.stem for file in (ROOT / "experiments").glob("*.py") if "__main__" in file.read_text(encoding="utf-8")
)


def line(name, *argv):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, argv)]


@pytest.mark.parametrize("name", NAMES)
def test_help_is_no_failure(name):
    done = launcher.run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "") and "  --" in done.stdout


FILES = {
    "zero": "--workdir=a\0b\n",  # which no argument can hold
    "results.json": "{}",
    "bad": '{"video": "bad", "question": "?"}\n{"video": "bad", "question": "?", "options": ["a"]}\n',
    "gone": '{"video": "v.mp4", "question": "?"}\n',
    "empty": "\n",
    "deep": "[" * 100_000,
    "surrogate": '{"video": "\\ud800", "question": "?"}\n',
    "blind": '{"video": "bad", "question": "?", "needles": []}\n',
}


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("scaling", ["--frames=abc"], "--frames=abc: give numbers of at least 1, separated by commas"),
        ("scaling", ["--frames="], "--frames=: give numbers of at least 1"),
        ("calibrate_stop", ["--needle", "--log=log", "--thresholds="], "--thresholds=: give numbers from 0 to 1e+06"),
        ("calibrate_stop", ["--needle", "--log=log", "--alpha=2"], "--alpha=2.0: must lie between 0 and 1"),
        ("load_memory", ["--flagfile={at}/zero"], "--workdir=a\0b: holds a zero byte"),
        ("load_memory", ["--workdir=/proc/x"], "--workdir=/proc/x: No such file or directory; choose a directory"),
        ("load_memory", ["--dtype=bfloat16"], "--dtype: goes with --load alone"),
        ("needle_benchmark", ["--output=/proc/x"], "--output=/proc/x: No such file or directory; choose a directory"),
        ("train_needle", ["--workdir=/proc/x"], "--workdir=/proc/x: No such file or directory; choose a directory"),
        ("train_needle", [], "--workdir is required"),
        ("plan_table", ["--cases=foo"], "--cases=foo: give MODEL@SLICE or MODEL@SLICE@MESH"),
        ("plan_table", ["--cases="], "--cases=: give MODEL@SLICE or MODEL@SLICE@MESH"),
        ("pruning", ["--keep=0.5,2"], "--keep=0.5,2: give numbers from 0 to 1"),
        ("visiting", ["--give_up=0"], "--give_up=0: give numbers of at least 1, separated by commas"),
        ("benchmark", ["--models=huge"], "--models=huge: choose from needle, 118m, 3b, 7b"),
        ("benchmark", ["--dtypes=int8"], "--dtypes=int8: choose from float32, bfloat16"),
        ("benchmark", ["--threads=4096"], "--threads=4096: this process may use"),
        ("benchmark", ["needle"], "'needle' belongs to no flag"),
        ("table", ["--formt=latex"], "--formt: unknown flag; did you mean --format?"),
        ("table", ["/proc/x"], "/proc/x: no run.json"),
        ("table", ["{at}", "--plot={at}/results.json"], "--plot={at}/results.json: the same file as {at}/results.json"),
        ("scaling", ["--json={at}/none/x"], "--json={at}/none/x: the directory {at}/none does not exist"),
        ("benchmark", ["--json={at}"], "--json={at}: is a directory"),
        ("calibrate_stop", ["--needle", "--log={at}/a", "--certificate={at}/./a"], "--certificate={at}/./a: the same"),
        ("calibrate_stop", ["--data={at}/bad", "--log=l", "--json={at}/bad"], "--json={at}/bad: the same file as"),
        ("calibrate_stop", ["--data={at}/bad", "--log=l"], "--data={at}/bad, line 2: --option: one option leaves"),
        ("calibrate_stop", ["--data={at}/gone", "--log=l"], "--data={at}/gone, line 1: {at}/v.mp4: no such file"),
        ("calibrate_stop", ["--data={at}/empty", "--log=l"], "--data={at}/empty: holds no question"),
        ("calibrate_stop", ["--data={at}/deep", "--log=l"], "--data={at}/deep, line 1: must be a JSON object"),
        ("calibrate_stop", ["--data={at}/surrogate", "--log=l"], "--data={at}/surrogate, line 1: {at}/?: no such file"),
        ("probe_layer", ["--data={at}/gone", "--model=none"], "--data={at}/gone, line 1: {at}/v.mp4: no such file"),
        ("probe_layer", ["--data={at}/blind", "--model=none"], "--data={at}/blind: holds no needle"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, name, argv, words):
    for file, text in FILES.items():
        (tmp_path / file).write_text(text)
    done = launcher.run(name, *(word.format(at=tmp_path) for word in argv))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{name}: {words.format(at=tmp_path)}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == FILES


def test_an_order_of_visits_changes_what_is_visited_and_not_what_it_says():
    """Lite that is never certain visits all groups in either order; giving up is what ends it."""
    never = ["--paper", "--stop_entropy=0", "--slots_per_group=4", "--frames=64", "--questions=2", "--give_up=2"]
    done = launcher.run("visiting", *never, "--json=-")
    assert done.returncode == 0, done.stderr
    full, *lite = json.loads(done.stdout)["rows"]
    arms = [("sequential", 0), ("sequential", 2), ("bit_reversed", 0), ("bit_reversed", 2)]
    assert [(each["order"], each["give_up_groups"]) for each in lite] == arms
    for each in (full, *lite):
        assert each["questions"] == 2 and each["seconds"] > 0
        assert each["entropy_moved_nats"] < 1e-5
    for each in (full, *lite[::2]):
        assert each["groups_visited_share"] == each["selected_in_common"] == 1 and each["gain"] == 0
    for each in lite[1::2]:
        assert 3 / 8 <= each["groups_visited_share"] < 1 and each["selected_in_common"] < 1


def importing(process, directory):
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    return bool(blocked >> (signal.SIGINT - 1) & 1)


def at_work(process, directory):
    return any(directory.rglob("*.mp4"))


@pytest.mark.parametrize(("number", "status", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
@pytest.mark.parametrize("there", [importing, at_work])
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's record of a process")
def test_a_signal_is_one_line(tmp_path, number, status, word, there):
    words = line("needle_benchmark", f"--output={tmp_path}", "--videos=1000")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while not there(process, tmp_path):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(getattr(signal, number))
        assert process.communicate(timeout=60)[1].splitlines()[-1] == f"needle_benchmark: {word}"
    assert process.returncode == status
