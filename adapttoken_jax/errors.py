"""The one exception that a user's own mistake raises, and the mistake that every kind of a checkpoint's file can be."""

import pathlib


class UserError(ValueError):
    """A mistake in a flag, a file or an argument.

    The message is one line that names the flag or file and says what to do. The command line prints it and exits with
    status 2; Python callers catch it as a `ValueError`.
    """


def check_no_pointer(path: pathlib.Path) -> None:
    """Raises `UserError` for the small text that stands in for a file where a repository was cloned without Git LFS."""
    pointer = b"version https://git-lfs"
    with path.open("rb") as file:
        if file.read(len(pointer)) == pointer:
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull' there")
