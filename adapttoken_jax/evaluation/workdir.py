"""The directory of a run: what was asked for, and what has been answered so far.

    run.json           flags, settings, hashes of model and questions, versions, git commit, when it began
    samples.jsonl      one line per question; samples-0-of-2.jsonl for a shard until all shards are done
    selections.jsonl   the visual tokens of every question's final prompt, for --replay
    costs.jsonl        wall seconds
    results.json       scores, once every question has its line
    .lock              held by the processes that run here, so that none takes the run of another for one that ended

A sample is what makes a question done. Its lines in the other files are written before it. One that says why its video
could not be read stands until there is an answer: a run that goes on tries the video again. A run without a sample has
not begun: its files are removed.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation.runner import Records, Video
from adapttoken_jax.journal import Journal, json_line, read_lines
from adapttoken_jax.result import git_commit, library_versions, made_directory, naming, partial_path, write_text

# What of a journal's records is read again; a sample also says why there is no answer, or what the answer took.
_JOURNALS = {
    "samples": ("id", "doc_id", "video_id", "target", "prediction"),
    "selections": ("id", "grid", "tokens", "ranks"),
    "costs": ("id", "amortised"),
}
_ANSWERED = ("groups", "visual_tokens", "flops")
_LOCK = ".lock"
RUN_VERSION = 2  # 1: samples did not tell what the scan took
# What of `run.json` is read again.
_RUN = {
    "flags": ("benchmark", "method", "model", "prompt", "replay", "subtitles"),
    "config": ("budget",),
    "hashes": ("questions",),
    "model_size": (),
    "git_commit": (),
    "begun": (),
}

# Flags that name places and may differ between two parts of one run; hashes tell whether the content is the same.
_FREE = ("data", "model", "replay")
# What is hashed -> the flag that names it.
_HASHED = {"questions": "data", "subtitles": "data", "model": "model", "selections": "replay"}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` parts of a run."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads "0/4".

        Raises:
          UserError: anything else.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"--shard={text}: write INDEX/COUNT, the first index is 0, as in 0/4")
        return cls(int(index), int(count))

    @property
    def suffix(self) -> str:
        """What the names of this part's files end with."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


def describe_run(
    flags: Mapping[str, Any], config: Mapping[str, Any], hashes: Mapping[str, str], model_size: str | None = None
) -> dict[str, Any]:
    """The content of `run.json`: what was asked for, in which surroundings, when it began."""
    return {
        "version": RUN_VERSION,
        "flags": dict(flags),
        "config": dict(config),
        "hashes": dict(hashes),
        "model_size": model_size,
        "device": jax.local_devices()[0].device_kind,
        "versions": library_versions(),
        "git_commit": git_commit(),
        "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@contextlib.contextmanager
def joined(directory) -> Iterator[None]:
    """Within the block this process is one of those that run in a directory, which is made if missing.

    If no other process does, a run without a sample is removed at both ends: a mistaken flag ties nothing to itself.

    Raises:
      UserError: the directory cannot be written, or holds files that are no run's.
    """
    directory = made_directory("workdir", directory)
    # A file and not the directory, whose locks NFS does not tell other hosts; open for writing, as it demands there.
    with naming(directory / _LOCK):
        handle = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _forget_empty_run(directory, handle)
        _locked(handle, fcntl.LOCK_SH)
        yield
    finally:
        with contextlib.suppress(UserError, OSError):  # the block's own error counts
            _forget_empty_run(directory, handle)
        os.close(handle)


def _forget_empty_run(directory: pathlib.Path, handle: int) -> None:
    if not (directory / "run.json").exists() or not _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return
    read_run(directory)  # else it is not ours to remove
    if read_all(directory, "samples"):
        return
    for name in _JOURNALS:
        for file in directory.glob(f"{name}*.jsonl"):
            file.unlink()
    (directory / "run.json").unlink()


def _locked(handle: int, kind: int) -> bool:
    """Whether the lock is held: not if others hold it, nor where the file system has no locks."""
    try:
        fcntl.flock(handle, kind)
    except OSError:
        return False
    return True


def check_run(directory, description: Mapping[str, Any], resume: bool = True) -> bool:
    """Whether a directory holds a run already, which is held against the description.

    Raises:
      UserError: it cannot be written, holds a run of another configuration, or any run without `resume`.
    """
    directory = made_directory("workdir", directory)
    if not (directory / "run.json").exists():
        return False
    if not resume:
        raise UserError(f"--workdir={directory}: holds a run; drop --noresume to continue it, or name another")
    _hold_against(directory, description)
    return True


def begin_run(directory, description: Mapping[str, Any], resume: bool = True) -> dict[str, Any]:
    """Writes `run.json`; where there is one, as `check_run`.

    Returns:
      The content of `run.json`, that of the run's beginning where it goes on.
    """
    directory = pathlib.Path(directory)
    if not check_run(directory, description, resume):
        try:
            _create(directory / "run.json", json.dumps(description, indent=1, ensure_ascii=False) + "\n")
        except FileExistsError:  # another shard was faster
            _hold_against(directory, description)
    return read_run(directory)


def _create(path: pathlib.Path, text: str) -> None:
    """Writes a file that must not exist yet: of several processes one succeeds, and none sees half of it."""
    partial = partial_path(path)
    try:
        write_text(partial, text)
        os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_run(directory) -> dict[str, Any]:
    """The content of a directory's `run.json`.

    Raises:
      UserError: not the directory of a run.
    """
    path = pathlib.Path(directory) / "run.json"
    if not path.is_file():
        raise UserError(f"{directory}: no run.json; give the directory of an evaluation")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    version = run.get("version") if isinstance(run, dict) else None
    if version != RUN_VERSION:
        raise UserError(f"{path}: version {version!r} of a run's files; this release reads {RUN_VERSION}; begin again")
    for name, keys in _RUN.items():
        if name not in run or (keys and not (isinstance(run[name], dict) and run[name].keys() >= {*keys})):
            raise UserError(f"{path}: damaged (no {name}{' with ' * bool(keys)}{', '.join(keys)}); begin again")
    return run


def _hold_against(directory: pathlib.Path, ours: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the first flag in which the directory's run differs from ours."""
    theirs = read_run(directory)
    for part in ("flags", "config"):
        for name in {**theirs[part], **ours[part]}:
            then, now = theirs[part].get(name), json.loads(json.dumps(ours[part].get(name)))
            if then != now and (name not in _FREE or None in (then, now)):  # a run is a replay, or it is none
                raise UserError(
                    f"--{name}={_shown(now)}: the run in {directory} began with {_shown(then)}; "
                    "give that, or another --workdir"
                )
    for name, digest in ours["hashes"].items():
        if theirs["hashes"].get(name) != digest:
            flag = _HASHED[name]
            raise UserError(
                f"--{flag}={ours['flags'][flag]}: not the same {name} as when the run in {directory} began; "
                "give those, or another --workdir"
            )


def _shown(value) -> str:
    return "nothing" if value is None else str(value)


class RunFiles:
    """The journals of one shard, and what all shards have done. A context manager.

    Attributes:
      samples: id -> sample of every question that is done or whose video is broken, by whatever shard.

    Raises:
      UserError: another process writes this shard, or a file is damaged.
    """

    def __init__(self, directory, shard: Shard, videos: Sequence[Video]):
        """`videos` are all of the benchmark, whichever shard they belong to."""
        self._directory = pathlib.Path(directory)
        with contextlib.ExitStack() as stack:
            self._journals = {
                name: stack.enter_context(contextlib.closing(Journal(self._path(name, shard)))) for name in _JOURNALS
            }
            self.samples = self._whole_videos(videos)
            for name, journal in self._journals.items():
                read_all(self._directory, name)  # its errors, before anything is dropped
                journal.keep_while(functools.partial(self._belongs, name))
            self._stack = stack.pop_all()

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _path(self, name: str, shard: Shard) -> pathlib.Path:
        return self._directory / f"{name}{shard.suffix}.jsonl"

    def _whole_videos(self, videos: Sequence[Video]) -> dict[str, dict]:
        """Samples of the videos whose every question has one."""
        found = read_all(self._directory, "samples")
        ids = [[item.id for _, item in video.questions] for video in videos]
        return {name: found[name] for own in ids if found.keys() >= {*own} for name in own}

    def _belongs(self, name: str, record: Mapping[str, Any]) -> bool:
        """Whether a record is one of a question that is done: a broken video's has a sample alone."""
        sample = self.samples.get(record["id"])
        return sample is not None and (name == "samples" or "error" not in sample)

    def has(self, video: Video) -> bool:
        """Whether all questions of a video are answered."""
        own = [self.samples.get(item.id) for _, item in video.questions]
        return all(sample is not None and "error" not in sample for sample in own)

    def write(self, records: Records) -> None:
        """Adds what a video gave. It is on the disk when this returns. Scores of before it are none of the run's."""
        (self._directory / "results.json").unlink(missing_ok=True)
        self._journals["selections"].append(records.selections)
        self._journals["costs"].append(records.costs)
        self._journals["samples"].append(records.samples)
        self.samples |= {sample["id"]: sample for sample in records.samples}

    def refresh(self, videos: Sequence[Video]) -> None:
        """Sees what other shards have done since."""
        self.samples = self._whole_videos(videos)


def read_all(directory, name: str) -> dict[str, dict]:
    """Records of a run by question, from the files of all its shards. An answer replaces an error anywhere.

    Raises:
      UserError: a line that is no such record.
    """
    files = sorted(pathlib.Path(directory).glob(f"{name}*.jsonl"))
    records = [_whole(file, name, record) for file in files for record in read_lines(file)]
    return {record["id"]: record for record in sorted(records, key=lambda record: "error" not in record)}


def _whole(file: pathlib.Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
    columns = _JOURNALS[name] + (_ANSWERED if name == "samples" and "error" not in record else ())
    lacks = [column for column in columns if column not in record]
    if lacks or not isinstance(record["id"], str):
        reason = f"a record without {lacks[0]}" if lacks else f"the id {record['id']!r}"
        raise UserError(f"{file}: damaged ({reason}); remove the run's directory and begin again")
    return record


def write_samples(directory, samples: Sequence[Mapping[str, Any]]) -> None:
    """Replaces `samples.jsonl` by all samples, in the order given."""
    write_text(pathlib.Path(directory) / "samples.jsonl", "".join(map(json_line, samples)))
