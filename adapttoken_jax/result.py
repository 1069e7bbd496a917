"""What one answered question leaves behind: `result.json` (version 1) and the trace that recomputes the run elsewhere.

Both files appear whole or not at all. Times are in seconds, entropies in nats, positions in slots and merged tokens.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import types
import typing
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapttoken_jax.errors import UserError

RESULT_VERSION = 1

# The answer of a run that is not certain enough of its own (`--abstain_above`).
NOT_FOUND = "not found in the video"


# ---------------------------------------------------------------------------------------------------------------------
# Result
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Record:
    """A part of the result. NumPy and JAX values become plain Python ones, sequences tuples, on construction."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.metadata.get("saved", True):
                object.__setattr__(self, field.name, _plain(getattr(self, field.name)))


@dataclasses.dataclass(frozen=True)
class VideoSummary(_Record):
    """The video as sampled. `path` is None for one in memory; `grid` is (slots, rows, columns) of 14-pixel patches."""

    path: str | None
    duration_s: float
    source_fps: float
    sampled_frames: int
    slots: int
    grid: tuple[int, int, int]
    tokens: int


@dataclasses.dataclass(frozen=True)
class GroupResult(_Record):
    """One group: `slots` it holds and their `times_s`; what its pass said; the share of the prompt that it earned.

    `entropy` (nats), `certainty` (in the unit of its form), `answer`, `option` and `weight` are None for a group that
    was not visited. `budget` counts the tokens it was allotted before redundancy removal, `selected` those of
    them in the final prompt.
    """

    index: int
    slots: tuple[int, ...]
    times_s: tuple[float, ...]
    visited: bool
    entropy: float | None = None
    certainty: float | None = None
    answer: str | None = None
    option: str | None = None
    weight: float | None = None
    budget: int = 0
    selected: int = 0


@dataclasses.dataclass(frozen=True)
class Selection(_Record):
    """The final prompt's `count` visual tokens in video order: slot, and row and column of the merged grid.

    `candidates` is how many there were before redundancy removal.
    """

    count: int
    candidates: int
    slots: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stop(_Record):
    """Whether the scan over groups ended `early`, and why."""

    early: bool
    reason: str
    groups_visited: int
    groups_total: int


@dataclasses.dataclass(frozen=True)
class Seconds(_Record):
    """Seconds that each stage was busy. Stages overlap: only `total` is the time from the call to the answer.

    Attributes:
      decode: decoding and resizing, summed over the threads that do it beside the other stages.
      vision: the vision tower.
      groups: group passes, without waiting for the two above.
      final: selection and the final pass.
      total: wall seconds.
    """

    decode: float
    vision: float
    groups: float
    final: float
    total: float


@dataclasses.dataclass(frozen=True)
class Cost(_Record):
    """Work done: seconds, visual tokens prefilled in all passes of the question, estimated FLOPs."""

    seconds: Seconds
    visual_tokens_prefilled: int
    flops: float


@dataclasses.dataclass(frozen=True)
class ModelSummary(_Record):
    """Which model answered: checkpoint path, `model_type`, parameter dtype, mesh axis sizes (None on one device)."""

    path: str
    type: str
    dtype: str
    mesh: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Result(_Record):
    """The answer to one question and everything that led to it.

    Attributes:
      answer: the generated text.
      option: its letter; None for an open question, and of an answer that `abstain` withholds.
      option_probabilities: letter -> probability of the first token among the letters; None for an open question.
      entropy: response entropy of the final answer, nats.
      method: one of `config.METHODS`.
      config: every field of the `AdaptTokenConfig` that ran.
      versions: package -> version.
      relevance: float32[groups, slots per group x tokens per slot], NaN at padding and where not visited; None where
        the answer was direct. Not part of `result.json`.
      consensus: letter -> probability from the groups' answers taken together, a second answer to hold against the
        first; None where the answer was direct or the question open. Not part of `result.json`.
      trace: the arrays of `write_trace` if they were asked for; not part of `result.json`.
    """

    answer: str
    option: str | None
    option_probabilities: Mapping[str, float] | None
    entropy: float | None
    method: str
    video: VideoSummary
    groups: tuple[GroupResult, ...]
    selected: Selection
    stop: Stop
    cost: Cost
    config: Mapping[str, Any]
    model: ModelSummary
    versions: Mapping[str, str]
    relevance: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False, metadata={"saved": False})
    consensus: Mapping[str, float] | None = dataclasses.field(default=None, compare=False, metadata={"saved": False})
    trace: Mapping[str, np.ndarray] | None = dataclasses.field(
        default=None, repr=False, compare=False, metadata={"saved": False}
    )

    def to_dict(self) -> dict[str, Any]:
        """The content of `result.json`: plain values, numbers that are not finite as None."""
        return {"version": RESULT_VERSION, **_saved(self)}

    def to_json(self) -> str:
        """`result.json`, version 1: one line per key and per group, strictly JSON (no NaN)."""
        content = self.to_dict()
        lines = [f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in content.items()]
        groups = ",\n".join(f"    {json.dumps(group, allow_nan=False)}" for group in content["groups"])
        if groups:
            lines[list(content).index("groups")] = f'  "groups": [\n{groups}\n  ]'
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "result.json") -> "Result":
        """The result that `to_json` wrote; `source` names the file in errors.

        Raises:
          UserError: not JSON, another version, a missing or unknown key, or a value of another type.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}: not valid JSON ({error})") from None
        version = content.pop("version", None) if isinstance(content, dict) else None
        if version != RESULT_VERSION:
            raise UserError(f"{source}: version {version!r} of the result format; this release reads {RESULT_VERSION}")
        return _restored(cls, content, source)


def abstain(result: Result, above: float) -> Result:
    """The result; if its entropy is above `above` nats, with `NOT_FOUND` for its answer and None for its option."""
    if result.entropy is not None and result.entropy <= above:
        return result
    return dataclasses.replace(result, answer=NOT_FOUND, option=None)


def _plain(value):
    """`value` as plain Python, for NumPy and JAX scalars and arrays, paths, mappings and sequences of such."""
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    if value is None or isinstance(value, str | bool | int | float | _Record):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a result cannot hold a {type(value).__name__}: {value!r}")


def _saved(value):
    """`value` as JSON has it."""
    if isinstance(value, _Record):
        fields = [field.name for field in dataclasses.fields(value) if field.metadata.get("saved", True)]
        return {name: _saved(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {key: _saved(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_saved(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restored(record: type[_Record], content, where: str):
    """Builds `record` and the records inside it from what `_saved` made of them."""
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a JSON object")
    types = {field.name: field.type for field in dataclasses.fields(record) if field.metadata.get("saved", True)}
    for key in [*types, *content]:
        if (key in types) != (key in content):
            raise UserError(f"{where}: the key {key!r} is {'missing' if key in types else 'unknown'}")
    return record(**{key: _restored_value(types[key], content[key], f"{where}: {key}") for key in types})


def _restored_value(kind, content, where: str):
    if isinstance(kind, type) and issubclass(kind, _Record):
        return _restored(kind, content, where)
    item = (typing.get_args(kind) or (None,))[0]
    if isinstance(item, type) and issubclass(item, _Record):
        if not isinstance(content, list):
            raise UserError(f"{where}: must be a JSON array")
        return tuple(_restored(item, each, f"{where}[{i}]") for i, each in enumerate(content))
    if not _is_saved(kind, content):
        raise UserError(f"{where}: {json.dumps(content)[:40]} is no {getattr(kind, '__name__', kind)}")
    return content


def _is_saved(kind, content) -> bool:
    """Whether `_saved` may have made `content` of a value of this type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return True
    if origin is types.UnionType:
        return any(_is_saved(each, content) for each in inner)
    if origin is tuple:
        return isinstance(content, list) and all(_is_saved(inner[0], each) for each in content)
    if origin is Mapping:
        return isinstance(content, dict) and all(_is_saved(inner[1], each) for each in content.values())
    if kind in (int, float) and isinstance(content, bool):
        return False
    return isinstance(content, int | float | None if kind is float else kind)  # None: it was not finite


def plain_json(value) -> Any:
    """Nested NumPy or plain values as `json` takes them; numbers that are not finite become None."""
    return _saved(_plain(value))


def library_versions() -> dict[str, str]:
    """Versions of Python, this package and the packages that a result depends on; those not installed are left out."""
    packages = ("adapttoken-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors", "av", "pillow")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of the source tree that this package runs from, "-dirty" if files differ from it; None without."""
    place = pathlib.Path(__file__).parent
    run = lambda *words: subprocess.run(["git", *words], cwd=place, capture_output=True, text=True, check=True).stdout
    try:
        # Only a tree that has this very file under version control is the source tree.
        run("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return run("rev-parse", "HEAD").strip() + ("-dirty" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Trace
# ---------------------------------------------------------------------------------------------------------------------

# name -> (kind, axes). Equal letters are equal sizes: N frames, T slots, P patches (of F numbers), M merged tokens per
# slot, D width, G groups, K slots per group, R = K * M, S and U prompt lengths (group, final), V vocabulary, C
# candidates, B selected tokens; A, X, Y appear once. A digit is a size itself.
TRACE_ARRAYS: dict[str, tuple[str, str]] = {
    "frame_indices": ("int", "N"),
    "frame_times": ("float", "N"),
    "grid": ("int", "3"),
    "patches": ("float", "PF"),
    "visual_features": ("float", "TMD"),
    "groups": ("int", "GK"),
    "prefix_ids": ("int", "X"),
    "suffix_ids": ("int", "Y"),
    "group_position_ids": ("int", "G3S"),
    "group_first_logits": ("float", "GV"),
    "group_entropy": ("float", "G"),
    "group_certainty": ("float", "G"),
    "group_relevance": ("float", "GR"),
    "budget": ("int", "G"),
    "candidates": ("int", "C3"),
    "selected": ("int", "B3"),
    "final_position_ids": ("int", "3U"),
    "final_first_logits": ("float", "V"),
    "answer_ids": ("int", "A"),
}


def write_trace(path, arrays: Mapping[str, Any]) -> None:
    """Writes the arrays of `--trace` as an uncompressed `.npz`, integers as int32.

    Raises:
      ValueError: a missing or unknown name, floats that are not float32, integers beyond int32, or shapes that
        contradict `TRACE_ARRAYS` or one another.
    """
    missing, unknown = set(TRACE_ARRAYS) - set(arrays), set(arrays) - set(TRACE_ARRAYS)
    if missing or unknown:
        raise ValueError(f"trace: missing {sorted(missing)}, unknown {sorted(unknown)}")
    checked = {name: _trace_array(name, np.asarray(arrays[name])) for name in TRACE_ARRAYS}
    _check_trace_shapes(checked)
    with atomic_file(path) as file:
        np.savez(file, **checked)


def _trace_array(name: str, array: np.ndarray) -> np.ndarray:
    kind, axes = TRACE_ARRAYS[name]
    if array.ndim != len(axes):
        raise ValueError(f"trace: {name} has shape {array.shape}; its axes are {axes}")
    if kind == "float":
        if array.dtype != np.float32:
            raise ValueError(f"trace: {name} is {array.dtype}; it must be float32")
        return array
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"trace: {name} is {array.dtype}; it must be an integer type")
    if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
        raise ValueError(f"trace: {name} has values beyond int32")
    return array.astype(np.int32)


def _check_trace_shapes(arrays: Mapping[str, np.ndarray]) -> None:
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        for axis, size in zip(TRACE_ARRAYS[name][1], array.shape, strict=True):
            expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            # Without groups (`uniform`, `full`) the other axes of their arrays mean nothing.
            if size != expected and array.size:
                raise ValueError(f"trace: axis {axis} of {name} is {size}; it must be {expected}")
    slots, rows, cols = arrays["grid"].tolist()
    if sizes["P"] != slots * rows * cols:
        raise ValueError(f"trace: {sizes['P']} patches, but the grid is {(slots, rows, cols)}")
    if (sizes["T"], 4 * sizes["M"]) != (slots, rows * cols):
        raise ValueError(f"trace: {sizes['T']} slots of {sizes['M']} tokens, but the grid is {(slots, rows, cols)}")
    if sizes["G"] and sizes["R"] != sizes["K"] * sizes["M"]:
        raise ValueError(f"trace: group_relevance has {sizes['R']} columns for {sizes['K']} x {sizes['M']} tokens")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def real_path(path) -> pathlib.Path:
    """`path` with links followed; itself where they lead to no name, as those of /dev/stdout do when it is a pipe."""
    real = pathlib.Path(os.path.realpath(path))
    return pathlib.Path(path) if os.path.exists(path) and not real.exists() else real


@contextlib.contextmanager
def atomic_file(path) -> Iterator[typing.BinaryIO]:
    """Opens a binary file that replaces `path` when the block ends well and leaves nothing behind when it does not.

    A link is followed. Something that is not a plain file, as /dev/null, is written to directly.

    Raises:
      OSError: it cannot be written; names the file, also where the disk is full.
    """
    path = real_path(path)
    if path.exists() and not path.is_file():
        with naming(path), open(path, "wb") as file:
            yield file
        return
    partial = partial_path(path)
    try:
        with naming(path, partial):
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """Replaces a file by this text, in UTF-8; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


PARTIAL_PATHS = f".{'[0-9a-f]' * 32}.part"  # the names that `partial_path` gives, as a glob


def partial_path(path: pathlib.Path) -> pathlib.Path:
    """A name beside a file under which to write it first: no other process has it, on no host and in no container.

    It does not hold the file's own name, which may be as long as the file system allows.
    """
    return path.with_name(f".{uuid.uuid4().hex}.part")


def made_directory(flag: str, path) -> pathlib.Path:
    """The directory of a flag, made if missing.

    Raises:
      UserError: it has no name, or cannot be made or written to.
    """
    if not str(path):  # which would be the current directory
        raise UserError(f"--{flag}: the name is empty; give a directory")
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileExistsError:
        raise UserError(f"--{flag}={path}: is no directory; name another") from None
    except OSError as error:
        raise UserError(f"--{flag}={path}: {error.strerror}; choose a directory that you can write to") from None
    return path


@contextlib.contextmanager
def naming(path, partial=None) -> Iterator[None]:
    """Within the block an `OSError` that names no file, or the `partial` one, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, partial and str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_result(path, result: Result) -> None:
    """Writes `result.json` to `path`."""
    write_text(path, result.to_json())
