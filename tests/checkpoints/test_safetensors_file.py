"""The file format, against the safetensors library."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapttoken_jax.errors import UserError
from checkpoints_convert.safetensors_file import read_header, write_file
from tests.checkpoints.random_bits import random_array, same_bits


def _arrays():
    rng = np.random.default_rng(0)
    shapes = {"a": ((5, 7), ml_dtypes.bfloat16), "b.c": ((3,), np.float16), "d": ((2, 3, 4), np.float32)}
    return {key: random_array(shape, dtype, rng) for key, (shape, dtype) in shapes.items()}


def _raw(path: pathlib.Path, header: object, data: bytes) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path):
    arrays = _arrays()
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = {tensor.key: tensor for tensor in read_header(tmp_path / "x.safetensors")}
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert found[key].shape == array.shape and found[key].nbytes == array.nbytes
        assert same_bits(found[key].read(array.shape), array)


def test_reads_a_part_of_a_reshaped_tensor(tmp_path):
    array = random_array((6, 10), ml_dtypes.bfloat16, np.random.default_rng(1))
    save_file({"a": array}, tmp_path / "x.safetensors")
    (tensor,) = read_header(tmp_path / "x.safetensors")
    part = tensor.read((3, 2, 10), (slice(1, 3), slice(None), slice(4, 9)))
    assert same_bits(part, np.stack([array[2:4, 4:9], array[4:6, 4:9]]))
    assert part.flags.c_contiguous and not isinstance(part, np.memmap)


def test_the_library_reads_what_we_write(tmp_path):
    arrays = _arrays()
    layout = [(key, array.dtype, array.shape) for key, array in arrays.items()]
    write_file(tmp_path / "x.safetensors", layout, (np.asfortranarray(array) for array in arrays.values()))
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0  # data begins aligned
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    assert all(same_bits(found[key], array) for key, array in arrays.items())


def test_write_refuses_another_array_than_announced(tmp_path):
    layout = [("a", np.dtype(np.float32), (2, 2))]
    for array in (np.zeros((2, 3), np.float32), np.zeros((2, 2), np.float16)):
        with pytest.raises(ValueError, match="a: "):
            write_file(tmp_path / "x.safetensors", layout, iter([array]))
    with pytest.raises(ValueError, match="shorter"):
        write_file(tmp_path / "x.safetensors", layout, iter([]))


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1, -50])
def test_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file(_arrays(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.safetensors: truncated"):
        read_header(path)


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "its header is not JSON"),
        (b"[1, 2]", b"", "its header is not JSON"),
        (b"\xff\xfe", b"", "its header is not JSON"),
        ({"a": _ENTRY}, b"\0" * 9, "1 bytes too long"),
        ({"a": {**_ENTRY, "dtype": "I64"}}, b"\0" * 8, "'a' is stored as I64"),
        ({"a": {**_ENTRY, "dtype": "F8_E4M3"}}, b"\0" * 8, "'a' is stored as F8_E4M3"),
        ({"a": {**_ENTRY, "shape": [3]}}, b"\0" * 8, "'a' has 8 bytes for shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "the header entry of 'a' is malformed"),
        ({"a": "text"}, b"\0" * 8, "the header entry of 'a' is malformed"),
        ({"a": {**_ENTRY, "shape": [float("inf")]}}, b"\0" * 8, "the header entry of 'a' is malformed"),
        ({"a": {**_ENTRY, "data_offsets": [-8, 0]}}, b"", "the header entry of 'a'"),
    ],
)
def test_damaged_header_is_named(tmp_path, header, data, message):
    with pytest.raises(UserError, match=message) as error:
        read_header(_raw(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_key_that_the_header_repeats_is_listed_twice(tmp_path):
    entry = json.dumps(_ENTRY)
    path = _raw(tmp_path / "x.safetensors", f'{{"a":{entry},"a":{entry}}}'.encode(), b"\0" * 8)
    assert [tensor.key for tensor in read_header(path)] == ["a", "a"]


def test_git_lfs_pointer_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="git lfs pull"):
        read_header(path)


def test_link_to_nowhere_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(path)
