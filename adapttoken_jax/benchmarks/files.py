"""Reading published files: tables of rows, and videos under one of several names."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from adapttoken_jax.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv")


def first_file(directory: pathlib.Path, patterns: Sequence[str]) -> pathlib.Path:
    """The first file that matches one of the glob patterns, tried in order.

    Raises:
      UserError: none does.
    """
    for pattern in patterns:
        for path in sorted(directory.glob(pattern)):
            return path
    raise UserError(f"--data={directory}: no {' nor '.join(patterns)} in it; download the benchmark's annotations")


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .parquet, a .jsonl, or a .json that holds a list.

    Raises:
      UserError: a file that cannot be read, or that does not hold rows.
    """
    try:
        rows = _READERS[path.suffix](path)
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); download it again") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: holds no rows with named columns; download it again")
    return rows


def _parquet_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    from pyarrow import parquet  # not needed for the benchmarks that come as JSON

    return parquet.read_table(path).to_pylist()


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # Windows puts a mark before the first byte


_READERS = {
    ".parquet": _parquet_rows,
    ".json": lambda path: json.loads(_text(path)),
    ".jsonl": lambda path: [json.loads(line) for line in _text(path).split("\n") if line.strip()],
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def find_video(folders: Sequence[pathlib.Path], name: str) -> pathlib.Path | None:
    """The video called `name`, with its own suffix or another one, in the first folder that has it."""
    stem = name.removesuffix(pathlib.PurePath(name).suffix) if name.endswith(VIDEO_SUFFIXES) else name
    names = dict.fromkeys([name, *(stem + suffix for suffix in VIDEO_SUFFIXES)])
    return next((path for folder in folders for each in names if (path := existing(folder / each))), None)


def existing(path: pathlib.Path) -> pathlib.Path | None:
    """The path of a file that is there; None for any other, names that no file can have included."""
    return path if os.path.isfile(path) else None
