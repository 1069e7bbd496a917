"""`result.json` against the keys of its format, literally, and the trace's checks one by one."""

import dataclasses
import json
import math
import os
import pathlib
import resource
import stat

import numpy as np
import pytest

from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.result import (
    NOT_FOUND,
    TRACE_ARRAYS,
    Cost,
    GroupResult,
    ModelSummary,
    Result,
    Seconds,
    Selection,
    Stop,
    VideoSummary,
    abstain,
    atomic_file,
    library_versions,
    write_result,
    write_trace,
)


def make_result(**changes) -> Result:
    """A result of two groups, the second not visited, with the NumPy values that a run has at hand."""
    values = {
        "answer": "B",
        "option": "B",
        "option_probabilities": {"A": np.float32(0.25), "B": 0.75},
        "entropy": np.float32(0.5),
        "method": "lite",
        "video": VideoSummary("a.mp4", 8.0, 25.0, 8, 4, np.array([4, 4, 6]), 24),
        "groups": [
            GroupResult(0, np.array([0, 2]), np.array([0.0, 4.0]), True, 0.5, -0.5, "B", "B", 1.0, np.int64(6), 5),
            GroupResult(1, [1, 3], [2.0, 6.0], False),
        ],
        "selected": Selection(2, 3, np.array([0, 2]), np.array([1, 0]), np.array([2, 1])),
        "stop": Stop(True, "certain groups agree", 1, 2),
        "cost": Cost(Seconds(0.1, 0.2, 0.3, 0.4, 1.0), 14, 1e9),
        "config": dataclasses.asdict(AdaptTokenConfig()),
        "model": ModelSummary("/models/x", "qwen2_5_vl", "float32", {"data": 1, "model": 2}),
        "versions": {"jax": "0.10.2"},
    }
    return Result(**{**values, **changes})


def test_the_json_has_exactly_the_keys_of_version_1():
    content = json.loads(make_result().to_json())
    assert content.pop("config").keys() == {field.name for field in dataclasses.fields(AdaptTokenConfig)}
    assert content == {
        "version": 1,
        "answer": "B",
        "option": "B",
        "option_probabilities": {"A": 0.25, "B": 0.75},
        "entropy": 0.5,
        "method": "lite",
        "video": {
            "path": "a.mp4",
            "duration_s": 8.0,
            "source_fps": 25.0,
            "sampled_frames": 8,
            "slots": 4,
            "grid": [4, 4, 6],
            "tokens": 24,
        },
        "groups": [
            {
                "index": 0,
                "slots": [0, 2],
                "times_s": [0.0, 4.0],
                "visited": True,
                "entropy": 0.5,
                "certainty": -0.5,
                "answer": "B",
                "option": "B",
                "weight": 1.0,
                "budget": 6,
                "selected": 5,
            },
            {
                "index": 1,
                "slots": [1, 3],
                "times_s": [2.0, 6.0],
                "visited": False,
                "entropy": None,
                "certainty": None,
                "answer": None,
                "option": None,
                "weight": None,
                "budget": 0,
                "selected": 0,
            },
        ],
        "selected": {"count": 2, "candidates": 3, "slots": [0, 2], "rows": [1, 0], "cols": [2, 1]},
        "stop": {"early": True, "reason": "certain groups agree", "groups_visited": 1, "groups_total": 2},
        "cost": {
            "seconds": {"decode": 0.1, "vision": 0.2, "groups": 0.3, "final": 0.4, "total": 1.0},
            "visual_tokens_prefilled": 14,
            "flops": 1e9,
        },
        "model": {"path": "/models/x", "type": "qwen2_5_vl", "dtype": "float32", "mesh": {"data": 1, "model": 2}},
        "versions": {"jax": "0.10.2"},
    }


def test_numbers_that_json_does_not_have_become_null():
    group = GroupResult(0, [0], [0.0], True, entropy=math.nan, certainty=-math.inf)
    result = make_result(entropy=np.float32("nan"), groups=[group], option_probabilities={"A": math.inf})
    content = json.loads(result.to_json())
    assert content["entropy"] is content["groups"][0]["entropy"] is content["groups"][0]["certainty"] is None
    assert content["option_probabilities"] == {"A": None}


def test_values_are_plain_python():
    result = make_result()
    assert type(result.entropy) is float and type(result.groups[0].budget) is int
    assert result.video.grid == (4, 4, 6) and type(result.video.grid[0]) is int
    assert result.groups[0].slots == (0, 2)
    with pytest.raises(TypeError, match="object"):
        make_result(versions={"x": object()})


def test_a_result_reads_back_equal(tmp_path):
    for result in (make_result(), make_result(groups=[], option=None, option_probabilities=None, answer="é\n\"'")):
        write_result(tmp_path / "result.json", result)
        assert Result.from_json((tmp_path / "result.json").read_text("utf-8")) == result


def test_the_trace_is_no_part_of_the_json():
    assert make_result(trace={"x": np.zeros(3)}).to_json() == make_result().to_json()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.pop("stop"), "the key 'stop' is missing"),
        (lambda c: c["groups"][1].pop("budget"), r"groups\[1\]: the key 'budget' is missing"),
        (lambda c: c["cost"]["seconds"].update(idle=1), "cost: seconds: the key 'idle' is unknown"),
        (lambda c: c.update(video=[]), "video: must be a JSON object"),
        (lambda c: c.update(groups={}), "groups: must be a JSON array"),
        (lambda c: c.update(entropy="x"), 'entropy: "x" is no float | None'),
        (lambda c: c.update(option=5), "option: 5 is no str | None"),
        (lambda c: c.update(config=3), "config: 3 is no "),
        (lambda c: c["video"].update(slots=True), "video: slots: true is no int"),
        (lambda c: c["groups"][0].update(slots=[0, "1"]), r"groups\[0\]: slots: "),
    ],
)
def test_another_format_is_refused(change, words):
    content = json.loads(make_result().to_json())
    change(content)
    with pytest.raises(UserError, match=words):
        Result.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("entropy", "above", "answer"),
    [(0.5, 0.6, "B"), (0.5, 0.5, "B"), (0.0, 0.0, "B"), (0.5, 0.49, NOT_FOUND), (None, math.inf, NOT_FOUND)],
)
def test_an_answer_is_withheld_above_the_limit_not_at_it(entropy, above, answer):
    got = abstain(make_result(entropy=entropy), above)
    assert (got.answer, got.option) == (answer, None if answer == NOT_FOUND else "B")


def test_what_is_no_result_is_refused():
    with pytest.raises(UserError, match=r"bad\.json: not valid JSON"):
        Result.from_json("{", "bad.json")
    with pytest.raises(UserError, match="version None"):
        Result.from_json("[]")
    with pytest.raises(UserError, match="not valid JSON"):
        Result.from_json("[" * 100_000)


def test_versions_name_what_is_installed():
    versions = library_versions()
    assert versions["numpy"] == np.__version__
    assert all(isinstance(version, str) for version in versions.values())


# Trace


def make_trace(groups=2) -> dict[str, np.ndarray]:
    """T = 3 slots of 2 x 4 patches, M = 2, D = 5, K = 2, V = 7."""
    shapes = {
        "frame_indices": (6,),
        "frame_times": (6,),
        "grid": (3,),
        "patches": (24, 1176),
        "visual_features": (3, 2, 5),
        "groups": (groups, 2),
        "prefix_ids": (4,),
        "suffix_ids": (9,),
        "group_position_ids": (groups, 3, 17),
        "group_first_logits": (groups, 7),
        "group_entropy": (groups,),
        "group_certainty": (groups,),
        "group_relevance": (groups, 4),
        "budget": (groups,),
        "candidates": (4, 3),
        "selected": (3, 3),
        "final_position_ids": (3, 16),
        "final_first_logits": (7,),
        "answer_ids": (1,),
    }
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        values = rng.integers(0, 100, shape)
        arrays[name] = values.astype(np.float32) if TRACE_ARRAYS[name][0] == "float" else values
    arrays["grid"] = np.array([3, 2, 4])
    return arrays


@pytest.mark.parametrize("groups", [2, 0])
def test_a_trace_reads_back_with_int32_and_float32(tmp_path, groups):
    arrays = make_trace(groups)
    write_trace(tmp_path / "trace.npz", arrays)
    with np.load(tmp_path / "trace.npz") as read:
        assert set(read) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].dtype == (np.float32 if array.dtype == np.float32 else np.int32)


def test_the_trace_has_the_contracts_keys():
    assert set(make_trace()) == set(TRACE_ARRAYS)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("frame_times", np.zeros(6), "frame_times is float64"),
        ("budget", np.zeros(2, np.float32), "budget is float32"),
        ("frame_indices", np.full(6, 2**31), "beyond int32"),
        ("frame_indices", np.full(6, -(2**31) - 1), "beyond int32"),
        ("grid", np.zeros((1, 3), int), "grid has shape"),
        ("frame_indices", np.zeros(5, int), "axis N"),
        ("candidates", np.zeros((4, 2), int), "axis 3 of candidates is 2"),
        ("final_first_logits", np.zeros(8, np.float32), "axis V"),
        ("visual_features", np.zeros((4, 2, 5), np.float32), "4 slots"),
        ("grid", np.array([3, 2, 6]), "24 patches"),
        ("group_relevance", np.zeros((2, 5), np.float32), "5 columns for 2 x 2"),
    ],
)
def test_a_wrong_array_is_refused_and_nothing_is_written(tmp_path, name, value, words):
    with pytest.raises(ValueError, match=words):
        write_trace(tmp_path / "trace.npz", {**make_trace(), name: value})
    assert list(tmp_path.iterdir()) == []


def test_missing_and_unknown_arrays_are_named(tmp_path):
    arrays = make_trace()
    del arrays["budget"]
    with pytest.raises(ValueError, match=r"missing \['budget'\], unknown \['extra'\]"):
        write_trace(tmp_path / "trace.npz", {**arrays, "extra": np.zeros(1)})


# Files


def test_a_file_is_replaced_only_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, (tmp_path / "file").exists())))
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert synced == [(3, False)]


def test_two_containers_on_one_file_system_whose_processes_have_the_same_id_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as first:  # the id of this process is the same as its own, too
        first.write(b"first")
        with atomic_file(path) as second:
            second.write(b"2")
        assert path.read_bytes() == b"2"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError) as caught, atomic_file(path) as file:
            file.write(bytes(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"), atomic_file("/dev/full") as file:
        file.write(b"x")


def test_a_file_that_cannot_be_begun_is_named_as_it_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, atomic_file(tmp_path / "missing" / "r.json"):
        pass
    assert raised.value.filename == str(tmp_path / "missing" / "r.json")


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")]
    assert modes[0] == modes[1]


def test_links_are_followed_and_pipes_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"x"
    with atomic_file(os.devnull) as file:
        file.write(b"x")
    assert not os.path.isfile(os.devnull)
    read, write = os.pipe()  # the link of such a path leads to a name that no file has
    with atomic_file(f"/dev/fd/{write}") as file:
        file.write(b"x")
    assert os.read(read, 2) == b"x"
    os.close(read)
    os.close(write)


def test_every_key_and_array_is_documented():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "result.md").read_text(encoding="utf-8")
    records = (VideoSummary, GroupResult, Selection, Stop, Seconds, Cost, ModelSummary, Result)
    keys = {field.name for record in records for field in dataclasses.fields(record)} - {"trace"}
    assert {name for name in keys | set(TRACE_ARRAYS) if f"`{name}`" not in page} == set()
