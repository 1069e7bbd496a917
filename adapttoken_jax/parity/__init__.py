"""Checks of this library against PyTorch. Only this package, the benchmark and the tests import torch."""

import contextlib
from collections.abc import Iterator

from adapttoken_jax.errors import UserError


@contextlib.contextmanager
def needed_by(command: str) -> Iterator[None]:
    """Raises `UserError` where torch or transformers, which a command compares with, is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise UserError(f"{command} needs {error.name}; in the source tree: pip install -e '.[test]'") from None
