"""What both formats write beside the weights: the new directory itself, the companion files and the provenance."""

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import secrets
import shutil
from collections.abc import Iterator

from adapttoken_jax.errors import UserError

# Everything of a Hugging Face directory that is not weights and that answering, or a later export, needs.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "LICENSE",
)
_DISTRIBUTIONS = ("jax", "jaxlib", "numpy", "orbax-checkpoint")


@contextlib.contextmanager
def new_directory(target) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling that becomes `target` when the block succeeds and vanishes when it does not.

    Raises:
      UserError: `target` exists, its parent does not or cannot be written to, or the disk is full.
    """
    target = pathlib.Path(target)
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: already exists; name a new directory or remove this one first")
    partial = target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{target}: cannot be created ({error.strerror})") from None
    try:
        yield partial
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{target}: not written, the disk is full; free some space or name another disk") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source, target: pathlib.Path) -> None:
    """Copies the companion files that `source` has into `target`, byte for byte."""
    for name in COMPANIONS:
        if (path := pathlib.Path(source) / name).is_file():
            shutil.copyfile(path, target / name)


def write_provenance(target: pathlib.Path, source, files: list[pathlib.Path], dtypes: set[str]) -> None:
    """Writes `provenance.json`: where the weights come from, by name and SHA-256, never by a path of this machine."""
    source = pathlib.Path(source)
    content = {
        "source": source.resolve().name,
        "files": {path.relative_to(source).as_posix(): _sha256(path) for path in files},
        "dtypes": sorted(dtypes),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "adapttoken-jax": _version("adapttoken-jax"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _DISTRIBUTIONS},
    }
    (target / "provenance.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(distribution: str) -> str | None:
    """Installed version; None for a package that runs from its source tree without being installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
