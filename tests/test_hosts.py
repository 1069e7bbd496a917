"""Several processes as one: real ones on this machine, which talk through JAX's collectives on CPUs (gloo)."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from jax.sharding import NamedSharding

from adapttoken_jax import cli, hosts, parameters, sharding
from adapttoken_jax.config import read_model_config
from adapttoken_jax.result import TRACE_ARRAYS
from adapttoken_jax.signals import Terminated, Unwinding
from adapttoken_jax.video import normalised, plan_clip, probe, read_patches
from tests import hosts_run, media, tiny
from tests.evaluation import bench

_SECONDS = 600  # far more than on a machine that has time


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: exit status, stdout and stderr."""

    status: int
    out: str
    err: str


def start(count: int, words, directory: pathlib.Path, devices: int = 1) -> list[subprocess.Popen]:
    """Starts `count` processes, each with the words that `words` gives for its "INDEX/COUNT@HOST:PORT"."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # JAX has set it for this process
    return [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, words(f"{index}/{count}@{address}"))],
            stdout=open(directory / f"out-{index}", "wb"),
            stderr=open(directory / f"err-{index}", "wb"),
            env=environment,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen], directory: pathlib.Path) -> list[Ended]:
    """Waits for all of them; those that do not end in time are killed, with an error."""
    try:
        until = time.monotonic() + _SECONDS
        statuses = [each.wait(max(1, until - time.monotonic())) for each in processes]
    finally:
        for each in processes:
            each.kill()
    read = lambda name, index: (directory / f"{name}-{index}").read_text()
    # Gloo greets its peers on a stream that we have moved to stderr.
    heard = lambda text: "".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]"))
    return [Ended(status, read("out", i), heard(read("err", i))) for i, status in enumerate(statuses)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a model, a clip and a benchmark."""
    directory = tmp_path_factory.mktemp("hosts")
    tiny.write_checkpoint(directory / "model", tiny.SHAPES["base"])
    media.write(directory / "clip.mp4", 60)
    bench.write_lvbench(directory / "lvbench", videos=3)
    return directory


@pytest.fixture(scope="module")
def alone(files):
    return hosts_run.answers(files, None, hosts_run.CASES)


@pytest.mark.parametrize(
    ("count", "devices", "mesh", "cases"),
    [
        (2, 2, "data=2,model=2", ["full", "lite", "no time"]),
        (4, 1, "fsdp=2,model=2", ["full"]),
        (4, 1, "data=2,context=2", ["full", "lite"]),
    ],
)
def test_processes_on_one_mesh_equal_one_process(files, alone, count, devices, mesh, cases):
    """Two processes that hold a group each; four of which two share a group, by heads and F or by its rows."""
    words = lambda process: ["tests.hosts_run", process, files, mesh, *cases]
    for ended in finish(start(count, words, files, devices), files):
        assert (ended.status, ended.out) == (0, ""), ended.err
    found = [json.loads((files / f"result-{index}.json").read_text()) for index in range(count)]
    for own in found:
        assert own["fingerprint"] == alone["fingerprint"]
        assert own["cache"].startswith("--feature_cache: works on one host only") and not alone["cache"]
        for case in set(cases) - {"no time"}:
            for ours, theirs in zip(own[case], alone[case], strict=True):
                assert_same(ours, theirs)
        # One wave, whose end process 0 has seen.
        assert all(one["stop"]["groups_visited"] == 2 for one in own.get("no time", ()))
    slots = alone["full"][0]["video"]["slots"]
    assert alone["lite"][0]["stop"]["early"] and alone["lite"][0]["stop"]["groups_visited"] == 2
    # An equal share of the slots of the first case, one chunk.
    assert [count * own["slots"][0] for own in found] == [slots] * count
    assert all(own["bytes"] == bytes_of_one_process(files / "model", devices, mesh) for own in found)


def bytes_of_one_process(directory, devices: int, mesh: str) -> int:
    """Of a checkpoint on a mesh of four: what its one device holds; everything if it has both devices of `model`."""
    config, over = read_model_config(directory), sharding.MeshShape.parse(mesh).abstract
    part = lambda p: NamedSharding(over, sharding.parameter_spec(p, over)).shard_shape(p.shape)
    return sum(4 * math.prod(p.shape if devices == 2 else part(p)) for p in parameters.parameters(config))


def assert_same(ours: dict, theirs: dict) -> None:
    """The same answer from the same tokens; entropies within the rounding of sums in another order."""
    for key in ("answer", "option", "selected", "stop"):
        assert ours[key] == theirs[key], key
    assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-5)
    for own, other in zip(ours["groups"], theirs["groups"], strict=True):
        assert (own["visited"], own["budget"], own["answer"]) == (other["visited"], other["budget"], other["answer"])
        assert own["entropy"] == (other["entropy"] and pytest.approx(other["entropy"], abs=1e-5))


def answer_words(files, process: str, *more: str) -> list[str]:
    """The words of `adapttoken answer` in one of several processes."""
    small = [f"--{name}={value}" for name, value in hosts_run.SMALL.items()]
    question = ["--question=What is it?", "--option=a cat", "--option=a dog"]
    places = [f"--model={files / 'model'}", f"--video={files / 'clip.mp4'}", f"--process={process}"]
    return ["adapttoken_jax.cli", "answer", *places, *question, *small, *more]


def test_the_first_process_writes_and_the_others_are_silent(files, tmp_path):
    def words(process):
        own = tmp_path / process.partition("/")[0]
        own.mkdir()
        return answer_words(
            files, process, "--json=-", f"--trace={own / 'trace.npz'}", f"--report={own / 'report.html'}"
        )

    first, second = finish(start(2, words, tmp_path), tmp_path)
    assert first.status == 0 and second == Ended(0, "", ""), (first.err, second.err)
    found = json.loads(first.out)
    assert found["model"]["mesh"] == {"data": 2, "model": 1}  # what is not said is: every device
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["report.html", "trace.npz"]
    assert not list((tmp_path / "1").iterdir())
    with np.load(tmp_path / "0" / "trace.npz") as trace:
        assert set(trace.files) == set(TRACE_ARRAYS)
        clip = plan_clip(probe(files / "clip.mp4"), read_model_config(files / "model").vision, fps=24.0,
                         preset="qwen-vl-utils", max_frames=48, max_pixels=4704, context_frames=8)  # fmt: skip
        patches = np.concatenate([patches for _, patches in read_patches(clip)])
        np.testing.assert_array_equal(trace["patches"], normalised(patches).reshape(trace["patches"].shape))


def test_evaluate_shares_its_videos_among_processes(files, tmp_path):
    flags = lambda name: bench.evaluate_flags(files / "lvbench", files / "model", tmp_path / name)
    words = lambda process: ["adapttoken_jax.cli", *flags("together"), f"--process={process}"]
    ended = finish(start(2, words, tmp_path), tmp_path)
    assert [each.status for each in ended] == [0, 0], ended
    assert any("accuracy" in each.out for each in ended)  # whoever sees that all is done prints the scores
    (alone,) = finish(start(1, lambda _: ["adapttoken_jax.cli", *flags("alone")], tmp_path), tmp_path)
    assert alone.status == 0, alone.err
    assert bench.outcome(tmp_path / "together") == bench.outcome(tmp_path / "alone")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_lost_ends_the_others(files, tmp_path, victim):
    words = lambda process: answer_words(files, process, "--lost_after=6", f"--json={tmp_path / 'result.json'}")
    processes = start(2, words, tmp_path)
    until = time.monotonic() + _SECONDS
    joined = lambda: all(b"[Gloo]" in (tmp_path / f"err-{i}").read_bytes() for i in range(2))
    while not joined() and all(each.poll() is None for each in processes) and time.monotonic() < until:
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ended = finish(processes, tmp_path)
    assert time.monotonic() - killed < 60
    line = "adapttoken answer: another process of this run was lost; start all of them again (--debug shows more)\n"
    assert ended[victim].status == -signal.SIGKILL
    assert ended[1 - victim] == Ended(hosts.LOST, "", line)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_for_others_in_vain_says_so(files, tmp_path, index):
    """The first one, which listens, and the other one, which nobody listens to."""
    words = lambda process: answer_words(files, process.replace("0/1@", f"{index}/2@"), "--join_within=5")
    processes = start(1, words, tmp_path)
    (flag,) = (word for word in processes[0].args if word.startswith("--process="))
    said = (
        "not all processes came within 5 s (--join_within); start all of them, with the same HOST:PORT, which each must"
    )
    assert finish(processes, tmp_path) == [Ended(2, "", f"adapttoken answer: {flag}: {said} reach\n")]


@pytest.mark.parametrize(("number", "status", "word"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")])
def test_a_process_that_waits_for_others_hears_signals(files, tmp_path, number, status, word):
    (waiting,) = start(1, lambda process: answer_words(files, process.replace("0/1@", "0/2@")), tmp_path)
    (port,) = (int(word.rpartition(":")[2]) for word in waiting.args if word.startswith("--process="))
    until = time.monotonic() + _SECONDS
    while waiting.poll() is None and time.monotonic() < until:
        with socket.socket() as peer:
            if peer.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.05)
    waiting.send_signal(getattr(signal, number))
    sent = time.monotonic()
    assert finish([waiting], tmp_path) == [Ended(status, "", f"adapttoken answer: {word}\n")]
    assert time.monotonic() - sent < 30


def test_a_signal_that_comes_to_another_thread_ends_the_wait():
    """As one does that comes just before the wait: nothing wakes a main thread that waits for a lock."""
    sent = threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    begin = time.monotonic()
    with pytest.raises(Terminated), Unwinding():
        sent.start()
        hosts._wait(lambda: False, _SECONDS)
    assert time.monotonic() - begin < _SECONDS / 10


def test_a_mesh_that_does_not_fit_is_one_line_in_every_process(files, tmp_path):
    message = "--mesh=data=1,model=1: takes 1 of the 2 devices of 2 processes; their product must be all"
    ended = finish(start(2, lambda process: answer_words(files, process, "--mesh=data=1"), tmp_path), tmp_path)
    assert ended == [Ended(2, "", f"adapttoken answer: {message}\n")] * 2


@pytest.mark.parametrize(
    ("process", "message"),
    [
        ("1/1@h:1", "INDEX counts from 0"),
        ("0/1@h:65536", "write"),
        ("0/1@h:0", "write"),
        ("0/2", "write INDEX/COUNT@HOST:PORT"),
        ("a", "write"),
        ("", "write"),
    ],
)
def test_who_a_process_is_must_be_readable(files, capsys, process, message):
    assert cli.main(answer_words(files, process)[1:]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"adapttoken answer: --process={process}: ") and message in err and err.count("\n") == 1


def test_without_a_cluster_the_message_says_how_to_go_on(files):
    """In a process of its own, as joining must be the first thing that JAX does."""
    words = [word for word in answer_words(files, "") if word != "--process="]
    words = [sys.executable, "-m", *words, "--distributed"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "--distributed: " in done.stderr and "--process=INDEX/COUNT@HOST:PORT" in done.stderr


@pytest.mark.parametrize(
    ("backend", "processes", "shared_cache", "may"),
    [
        ("cpu", 1, False, True), ("cpu", 2, False, False), ("cpu", 2, True, False),
        ("gpu", 1, False, True), ("gpu", 2, False, False), ("gpu", 2, True, True), ("tpu", 8, False, False),
    ],
)  # fmt: skip
def test_no_process_finds_programs_that_others_must_compile(backend, processes, shared_cache, may):
    assert hosts._may_skip_compiling(backend, processes, shared_cache) == may
