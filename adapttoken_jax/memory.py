"""Too little memory, told in one line: for what, how much is missing, and what helps.

The runtime's own words differ by device: XLA on CPUs and GPUs tells what it asked for, the TPU's runtime also what was
free, the TPU's compiler by how much a program exceeds the chip, NumPy what it asked of the host.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator

import jax

from adapttoken_jax.errors import UserError

LOADING = ("the weights", "split the weights over more devices (fsdp=N or model=N), or take --dtype=bfloat16")
ANSWERING = (
    "a pass",
    "split the weights over more devices (fsdp=N or model=N), take --dtype=bfloat16, or lower --slots_per_group, "
    "--max_pixels, --budget or --max_answer_tokens",
)

_SIZE = r"(\d+\.?\d*) ?([KMGT]?)"
_EXCEEDED = re.compile(rf"capacity by {_SIZE}")
_ASKED = re.compile(rf"(?:allocate|allocating|reserve|request for) {_SIZE}")
_FREE = re.compile(rf"[Tt]here are {_SIZE}\w* free")


@contextlib.contextmanager
def explained(purpose: str, remedy: str) -> Iterator[None]:
    """Turns running out of memory within the block, or the function it decorates, into a `UserError`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"--mesh: too little memory for {purpose}{shortage(str(error))}; {remedy}") from error


def shortage(message: str) -> str:
    """How much is missing by what the runtime said, as a continuation of a sentence; "" if it said nothing."""
    asked, free = _bytes(_ASKED, message), _bytes(_FREE, message)
    missing = _bytes(_EXCEEDED, message)
    if missing is None and asked is not None:
        free = _free_bytes() if free is None else free
        if free is None:
            return f", {asked / 2**30:.2f} GiB were asked for"
        if asked <= free:
            return f", {asked / 2**30:.2f} GiB are not free in one piece"
        missing = asked - free
    return f", {missing / 2**30:.2f} GiB more are needed" if missing else ""


def _bytes(pattern: re.Pattern, message: str) -> float | None:
    found = pattern.search(message)
    return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ") if found else None


def _free_bytes() -> int | None:
    """What the first device has left; the host's memory if the device has none of its own; None if nobody says."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:  # what is free now leaves out what the system would give back
        found = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
