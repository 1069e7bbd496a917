"""Files of JSON lines that survive a crash at any moment.

A record is on the disk when `append` returns. A process that dies while it writes leaves at most the beginning of a
line, or some of the lines of one `append`, behind whole ones: the next `Journal` on that file drops them.
"""

import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapttoken_jax.errors import UserError
from adapttoken_jax.result import naming

# What a file system without locks answers; who starts two processes on one of its files is not told.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Journal:
    """One file of JSON lines, written by one process at a time.

    Raises:
      UserError: another process writes the file.
      OSError: the file cannot be written.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._file.close()
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise UserError(f"{path}: another process is writing this run; wait for it, or name another") from None
        self._truncate(self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds records, in one write, and waits until they are on the disk."""
        lines = "".join(json_line(record) for record in records).encode("utf-8")
        with naming(self.path):
            while lines:
                lines = lines[self._file.write(lines) :]
            os.fsync(self._file.fileno())

    def keep_while(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Drops the records at the end that are not wanted.

        Raises:
          UserError: a line that is no record, or a wanted record after one that is not: no crash leaves that.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        keep = [wanted(_record(self.path, number, line)) for number, line in enumerate(lines, 1)]
        count = keep.index(False) if False in keep else len(keep)
        if any(keep[count:]):
            raise _damaged(self.path, count + 1, "no record of this run, or part of one")
        self._truncate(sum(map(len, lines[:count])))

    def close(self) -> None:
        """Closes the file and lets other processes write it."""
        self._file.close()

    def _truncate(self, size: int) -> None:
        if size != os.fstat(self._file.fileno()).st_size:
            self._file.truncate(size)
            os.fsync(self._file.fileno())


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line; the same record gives the same bytes."""
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def read_lines(path) -> list[dict[str, Any]]:
    """The whole lines of a file; an unfinished last one is left out. A file that does not exist has none.

    Raises:
      UserError: a line that is no JSON object.
    """
    path = pathlib.Path(path)
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    return [_record(path, number, line) for number, line in enumerate(whole, 1)]


def _record(path: pathlib.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))  # of bytes with zeros, `json` would guess another encoding
    except (ValueError, RecursionError) as error:
        raise _damaged(path, number, str(error)) from None
    if not isinstance(record, dict):
        raise _damaged(path, number, "no JSON object")
    return record


def _damaged(path: pathlib.Path, number: int, reason: str) -> UserError:
    return UserError(f"{path}: damaged (line {number}: {reason}); remove the run's directory and begin again")
