"""Whatever ends a run early, going on leaves the very bytes of a run that nobody disturbed."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest

from tests import tiny
from tests.evaluation import bench

# More of them take minutes: ADAPTTOKEN_KILLS=30 ADAPTTOKEN_PREEMPTIONS=10 pytest tests/evaluation/test_interruptions.py
KILLS, PREEMPTIONS = (os.environ.get(f"ADAPTTOKEN_{name}", few) for name, few in (("KILLS", "1"), ("PREEMPTIONS", "1")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of all runs, and what `interruptions` printed."""
    directory = tmp_path_factory.mktemp("runs")
    bench.write_lvbench(directory / "data", videos=4)
    tiny.write_checkpoint(directory / "model", tiny.SHAPES["base"])
    words = [sys.executable, "-m", "tests.evaluation.interruptions", str(directory)]
    words += [f"--kills={KILLS}", f"--preemptions={PREEMPTIONS}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("kind", ["shards", "killed", "preempted"])
def test_the_same_bytes_as_undisturbed(runs, kind):
    directory, found, _ = runs
    whole = bench.outcome(directory / "undisturbed")
    assert [json.loads(line)["doc_id"] for line in whole["samples.jsonl"].splitlines()] == list(range(8))
    assert found["runs"][kind]
    for name in found["runs"][kind]:
        assert bench.outcome(directory / name) == whole, name


def test_every_question_stands_once_in_every_file(runs):
    directory, found, _ = runs
    for name in itertools.chain(*found["runs"].values()):
        for file in directory.glob(f"{name}/*.jsonl"):
            ids = [json.loads(line)["id"] for line in file.read_bytes().splitlines()]
            assert len(ids) == len(set(ids)), file


def test_kills_were_kills_and_a_preemption_ends_with_one_line(runs):
    _, found, err = runs
    assert found["killed"] == [-signal.SIGKILL] * int(KILLS)
    # Python itself ends by the signal's default before the run has begun to listen.
    assert len(found["preempted"]) == int(PREEMPTIONS) and set(found["preempted"]) <= {143, -signal.SIGTERM}
    assert err.count("adapttoken evaluate: terminated") == found["preempted"].count(143)
    assert "Traceback" not in err
