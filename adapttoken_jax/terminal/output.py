"""The files that a command is asked to write."""

import errno
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from adapttoken_jax.errors import UserError


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None] | None = None) -> None:
    """Refuses, before any work, a file that could not be written at its end, or that would replace another.

    Args:
      outputs: a flag's name -> the file to write; None for none. "-" is stdout for `json`.
      inputs: what the command reads, as messages name it -> the file.

    Raises:
      UserError: names the flag.
    """
    taken = {os.path.realpath(path): name for name, path in (inputs or {}).items() if path}
    for flag, path in outputs.items():
        if path is None or (flag == "json" and path == "-"):
            continue
        _check_output(flag, path)
        other = taken.setdefault(os.path.realpath(path), f"--{flag}")
        if other != f"--{flag}":
            raise UserError(f"--{flag}={path}: the same file as {other}; choose another")


def _check_output(flag: str, path: str) -> None:
    from adapttoken_jax.result import real_path

    if not path:
        raise UserError(f"--{flag}=: the name is empty; give a file")
    if path == "-":
        raise UserError(f"--{flag}=-: only JSON goes to stdout; give a file")
    target = real_path(path)
    if target.is_dir():
        raise UserError(f"--{flag}={path}: is a directory; name a file in it")
    if not target.parent.is_dir():
        what = "is no directory; name another" if target.parent.exists() else "does not exist; create it first"
        raise UserError(f"--{flag}={path}: the directory {target.parent} {what}")
    # A plain file is replaced, which needs the directory; anything else, as /dev/null, is written to.
    if not os.access(target if target.exists() and not target.is_file() else target.parent, os.W_OK):
        raise UserError(f"--{flag}={path}: {os.strerror(errno.EACCES)}; choose a directory that you can write to")


def write_json(target: str | None, content: Mapping[str, Any]) -> None:
    """Writes JSON where `--json` says: to a file, to stdout for "-", nowhere for None."""
    from adapttoken_jax.result import plain_json, write_text

    text = json.dumps(plain_json(content), indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target:
        write_text(target, text)
