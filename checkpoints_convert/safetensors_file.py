"""The safetensors file format: eight bytes of header length, a JSON header, then the bytes of the tensors.

Read and written here directly rather than through a library, for three reasons: any part of one tensor is copied
without the rest of its file ever counting as this process's memory, bfloat16 needs no other framework, and a shard is
written one tensor at a time.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np

from adapttoken_jax.errors import UserError, check_no_pointer

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies on disk. `offset` is in bytes from the start of `file`; `key` is as stored."""

    file: pathlib.Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> np.ndarray:
        """Copies the part `index` of the tensor, seen as `shape` (same elements in the same order), into memory."""
        mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return np.array(mapped.reshape(shape)[index])


def read_header(path: pathlib.Path) -> list[StoredTensor]:
    """Lists the tensors of one file in the order of its header; a key that the header repeats is listed twice.

    Raises:
      UserError: not a safetensors file, cut short, longer than its header says, or a dtype other than F32, F16, BF16.
    """
    try:
        header, size = _header_bytes(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    start = 8 + len(header)
    entries = _parse_header(path, header)
    tensors = [_stored_tensor(path, key, entry, start) for key, entry in entries if key != "__metadata__"]
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=start)
    if size != end:
        problem = f"truncated, {end - size} bytes are missing" if size < end else f"{size - end} bytes too long"
        raise UserError(f"{path}: {problem}; fetch it again")
    return tensors


def _header_bytes(path: pathlib.Path) -> tuple[bytes, int]:
    """The JSON header of a file and the size of the whole file."""
    size = path.stat().st_size
    check_no_pointer(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise UserError(f"{path}: truncated, or not a safetensors file; fetch it again")
        return file.read(length), size


def _parse_header(path: pathlib.Path, header: bytes) -> list[tuple[str, object]]:
    try:
        # Pairs, not a dictionary: json would silently keep the last of two equal keys.
        entries = json.loads(header, object_pairs_hook=tuple)
    except ValueError:
        entries = None
    if not isinstance(entries, tuple):
        raise UserError(f"{path}: not a safetensors file (its header is not JSON); fetch it again")
    return entries


def _stored_tensor(path: pathlib.Path, key: str, entry: object, data_start: int) -> StoredTensor:
    try:
        fields = dict(entry)
        code, shape = fields["dtype"], tuple(map(int, fields["shape"]))
        begin, end = map(int, fields["data_offsets"])
    except (TypeError, ValueError, KeyError, OverflowError):
        raise UserError(f"{path}: the header entry of '{key}' is malformed; fetch the file again") from None
    if code not in DTYPES:
        raise UserError(f"{path}: '{key}' is stored as {code}; only {', '.join(DTYPES)} are supported")
    tensor = StoredTensor(path, key, DTYPES[code], shape, data_start + begin)
    if begin < 0 or end - begin != tensor.nbytes:
        raise UserError(f"{path}: the header entry of '{key}' has {end - begin} bytes for shape {list(shape)}")
    return tensor


def write_file(path: pathlib.Path, layout: Sequence[tuple[str, np.dtype, tuple[int, ...]]], data: Iterable) -> None:
    """Writes one file. `layout` lists key, dtype and shape; `data` yields the arrays in the same order, singly.

    Raises:
      ValueError: an array that is not as `layout` says.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, dtype, shape in layout:
        end = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned, as the format's own writer does
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, dtype, shape), array in zip(layout, data, strict=True):
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{key}: {array.dtype}{array.shape} given, {dtype}{shape} announced")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
