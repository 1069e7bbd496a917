"""Journals and run directories, without a model: every way in which a file can be cut short."""

import errno
import fcntl
import json
import os
import resource
import stat

import pytest

from adapttoken_jax.benchmarks import Item
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation import workdir
from adapttoken_jax.evaluation.runner import Records, group_by_video, shard
from adapttoken_jax.journal import Journal, read_lines


def items(videos=3, questions=2):
    return [Item(f"{v}-{q}", f"v{v}", None, "What?", ("a", "b"), "A") for v in range(videos) for q in range(questions)]


def records(video):
    names = ("doc_id", "video_id", "target", "prediction", "groups", "visual_tokens", "flops")
    made = lambda *names: [dict.fromkeys(names, "é") | {"id": item.id} for _, item in video.questions]
    return Records(made(*names), made("grid", "tokens", "ranks"), made("amortised"))


def open_files(directory, videos, part="0/1"):
    return workdir.RunFiles(directory, workdir.Shard.parse(part), videos)


def test_a_run_cut_at_any_byte_of_its_samples_goes_on_to_the_same_files(tmp_path):
    videos = group_by_video(items())
    names = ("samples", "selections", "costs")
    with open_files(tmp_path, videos) as files:
        for video in videos:
            files.write(records(video))
    whole = {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in names}
    ends = [i + 1 for i, byte in enumerate(whole["samples"]) if byte == ord("\n")]
    for size in range(len(whole["samples"]) + 1):
        (tmp_path / "samples.jsonl").write_bytes(whole["samples"][:size])
        with open_files(tmp_path, videos) as files:
            done = [video for video in videos if files.has(video)]
            assert len(done) == sum(end <= size for end in ends) // 2
            assert len(files.samples) == 2 * len(done)
            for video in videos[len(done) :]:
                files.write(records(video))
        assert {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in names} == whole


def test_two_processes_cannot_write_one_journal(tmp_path):
    journal = Journal(tmp_path / "samples.jsonl")
    with pytest.raises(UserError, match="another process is writing"):
        Journal(tmp_path / "samples.jsonl")
    journal.close()
    Journal(tmp_path / "samples.jsonl").close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])  # either, by the file system
def test_a_lock_that_others_hold_is_one_line_whatever_its_number(tmp_path, monkeypatch, number):
    def flock(file, kind):
        raise OSError(number, "held")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process is writing"):
        Journal(tmp_path / "samples.jsonl")


def test_where_there_are_no_locks_a_journal_is_written(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = Journal(tmp_path / "samples.jsonl")
    journal.append([{"a": 1}])
    journal.close()
    assert (tmp_path / "samples.jsonl").read_text() == '{"a": 1}\n'


def test_what_is_added_or_dropped_is_on_the_disk_before_anything_follows(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"{}\nhalf")
    journal = Journal(path)
    assert synced == [3]
    journal.append([{}, {}])
    assert synced == [3, 9]
    journal.close()


def test_a_full_disk_loses_nothing_that_was_written(tmp_path):
    path = tmp_path / "samples.jsonl"
    journal = Journal(path)
    journal.append([{"id": "first"}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(OSError) as caught:
            journal.append([{"id": "second"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.close()
    assert caught.value.filename == str(path) and not path.read_bytes().endswith(b"\n")
    assert read_lines(path) == [{"id": "first"}]
    journal = Journal(path)
    journal.append([{"id": "second"}])
    journal.close()
    assert path.read_text() == '{"id": "first"}\n{"id": "second"}\n'


def test_shards_partition_the_videos_and_see_one_another(tmp_path):
    videos = group_by_video(items(5))
    parts = [shard(videos, i, 2) for i in range(2)]
    assert [[video.id for video in part] for part in parts] == [["v0", "v2", "v4"], ["v1", "v3"]]
    for index, part in enumerate(parts):
        with open_files(tmp_path, videos, f"{index}/2") as files:
            for video in part:
                files.write(records(video))
            assert len(files.samples) == (6, 10)[index]
    assert sorted(file.name for file in tmp_path.glob("samples*")) == ["samples-0-of-2.jsonl", "samples-1-of-2.jsonl"]


@pytest.mark.parametrize("mended_by", ["0/1", "0/2"])
def test_an_answer_replaces_an_error_whichever_file_is_read_first(tmp_path, mended_by):
    (video,) = group_by_video(items(1))
    broken = Records([line | {"error": "cannot be read"} for line in records(video).samples])
    for part, found in (("0/1" if mended_by == "0/2" else "0/2", broken), (mended_by, records(video))):
        with open_files(tmp_path, [video], part) as files:
            assert not files.has(video)
            files.write(found)
            assert len(files.samples) == 2
    with open_files(tmp_path, [video]) as files:
        assert files.has(video) and [*files.samples.values()] == records(video).samples


@pytest.mark.parametrize("text", ["2", "2/2", "-1/2", "a/b", "1/", "/2", "0/0", "0/²"])
def test_a_shard_that_is_none(text):
    with pytest.raises(UserError, match=f"--shard={text}"):
        workdir.Shard.parse(text)


def description(**changed):
    flags = {"benchmark": "lvbench", "method": "lite", "prompt": "official", "subtitles": False}
    flags |= {"data": "/a", "model": "/m", "limit": None, "replay": None} | changed
    return workdir.describe_run(flags, {"budget": 20}, {"questions": "q", "model": "m"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["flags"].update(prompt="qwen"), "--prompt=qwen: the run in .* began with official"),
        (lambda d: d["flags"].update(limit=3), "--limit=3: the run in .* began with nothing"),
        (lambda d: d["flags"].update(replay="/r"), "--replay=/r: the run in .* began with nothing"),
        (lambda d: d["config"].update(budget=21), "--budget=21: the run in .* began with 20"),
        (lambda d: d["hashes"].update(questions="other"), "--data=/a: not the same questions"),
        (lambda d: d["hashes"].update(model="other"), "--model=/m: not the same model"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, change, words):
    begun = workdir.begin_run(tmp_path / "run", description())
    other = description(data="/elsewhere")  # a place may change
    assert workdir.begin_run(tmp_path / "run", other) == begun
    other = description()
    change(other)
    with pytest.raises(UserError, match=words):
        workdir.begin_run(tmp_path / "run", other)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == begun


@pytest.mark.parametrize("nfs", [False, True], ids=["local", "nfs"])
def test_a_run_without_samples_is_forgotten_unless_somebody_runs_it(tmp_path, monkeypatch, nfs):
    if nfs:  # directories' locks are not told to other hosts, and only what is open for writing is locked alone
        lock = fcntl.flock

        def flock(file, kind):
            handle = file if isinstance(file, int) else file.fileno()
            if kind & fcntl.LOCK_EX and not fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
                raise OSError(errno.EBADF, "not open for writing")
            return None if stat.S_ISDIR(os.fstat(handle).st_mode) else lock(handle, kind)

        monkeypatch.setattr(fcntl, "flock", flock)
    begin = lambda **changed: workdir.begin_run(tmp_path, description(**changed))["flags"]["prompt"]
    begin()
    with workdir.joined(tmp_path):  # one that was killed
        assert os.listdir(tmp_path) == [".lock"]
        begin()
        (tmp_path / "selections-0-of-2.jsonl").touch()
        with workdir.joined(tmp_path), pytest.raises(UserError, match="began with official"):  # another shard
            begin(prompt="qwen")
        assert (tmp_path / "run.json").exists()
    assert os.listdir(tmp_path) == [".lock"]
    with workdir.joined(tmp_path):
        assert begin(prompt="qwen") == "qwen"
        with open_files(tmp_path, group_by_video(items())) as files:
            files.write(records(group_by_video(items())[0]))
    with workdir.joined(tmp_path), pytest.raises(UserError, match="began with qwen"):
        begin()


def test_a_run_json_of_something_else_is_kept(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json: "), workdir.joined(tmp_path):
        pass
    assert (tmp_path / "run.json").read_text() == "{}"


def test_without_resume_a_run_is_not_touched(tmp_path):
    workdir.begin_run(tmp_path, description())
    with pytest.raises(UserError, match="drop --noresume"):
        workdir.begin_run(tmp_path, description(), resume=False)
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/proc/run", "choose a directory that you can write to"),
        ("file/run", "Not a directory; choose a directory that you can write to"),
        ("file", "is no directory; name another"),
    ],
)
def test_a_directory_that_cannot_be_is_one_line(tmp_path, place, reason):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--workdir=.*{reason}$"):
        workdir.check_run(tmp_path / place, description())


@pytest.mark.parametrize("name", ["samples", "selections", "costs"])
@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize(
    "line",
    ["garbage", "", "\0" * 8, "[]", "{}", "5", "null", '{"id"', '{"id": "0-0"}', '{"id": []}', "[" * 100_000, "é"],
)
def test_a_damaged_line_is_reported_and_nothing_dropped(tmp_path, name, place, line):
    videos = group_by_video(items())
    with open_files(tmp_path, videos) as files:
        for video in videos[:2]:
            files.write(records(video))
    path = tmp_path / f"{name}.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    whole.insert(place, line.encode("latin-1") + b"\n")
    path.write_bytes(b"".join(whole))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=rf"^{path}: damaged \(.*\); remove the run's directory and begin again$"):
        open_files(tmp_path, videos)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("foreign", ["other", "2-0"])
@pytest.mark.parametrize("place", [2, 3])
def test_what_no_crash_leaves_before_finished_answers_deletes_none_of_them(tmp_path, foreign, place):
    videos = group_by_video(items())
    with open_files(tmp_path, videos) as files:
        for video in videos[:2]:
            files.write(records(video))
    path = tmp_path / "samples.jsonl"
    before = path.read_text().splitlines(keepends=True)
    before.insert(place, before[0].replace("0-0", foreign))
    path.write_text("".join(before))
    reason = rf"samples\.jsonl: damaged \(line {place + 1}: no record of this run, or part of one\)"
    with pytest.raises(UserError, match=reason):
        open_files(tmp_path, videos)
    assert path.read_text() == "".join(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: [],
        lambda run: {},
        lambda run: None,
        lambda run: {"version": run["version"]},
        lambda run: run | {"flags": []},
        lambda run: run | {"config": {}},
        lambda run: {name: run[name] for name in run if name != "begun"},
    ],
)
def test_a_damaged_run_json_is_one_line(tmp_path, change):
    begun = workdir.begin_run(tmp_path, description())
    (tmp_path / "run.json").write_text(json.dumps(change(begun)))
    with pytest.raises(UserError, match=r"run\.json: [^\n]*; begin again$"):
        workdir.begin_run(tmp_path, description())
