"""TFDS: what comes back from array_record is what loading the directory gives, and TensorFlow is never asked for."""

import subprocess
import sys

import pytest

from adapttoken_jax.benchmarks import BENCHMARKS, tfds_builders
from adapttoken_jax.errors import UserError
from tests.benchmarks import layouts

WRITERS = {
    "videomme": lambda directory: layouts.videomme(directory, suffixes=(".mp4", None, ".mkv")),
    "longvideobench": layouts.longvideobench,
    "lvbench": layouts.lvbench,
    "mlvu": lambda directory: layouts.mlvu(directory, missing=("ego",)),
}


@pytest.mark.parametrize("benchmark", WRITERS)
def test_the_same_items_through_tfds_and_directly(tmp_path, benchmark, capsys):
    source = WRITERS[benchmark](tmp_path / "source")
    builder = tfds_builders.prepare(benchmark, source, tmp_path / "tfds")
    direct, _ = BENCHMARKS[benchmark].load(source)
    assert tfds_builders.read_items(builder) == direct
    assert list((tmp_path / "tfds").rglob("*.array_record-*"))
    assert capsys.readouterr().out == ""


def test_a_record_can_be_asked_for_by_its_number(tmp_path):
    builder = tfds_builders.prepare("lvbench", layouts.lvbench(tmp_path / "source"), tmp_path / "tfds")
    source = builder.as_data_source("test")
    assert len(source) == 3
    assert source[2]["id"] == b"3" and list(source[2]["labels"]["question_type"]) == [b"Sum", b"EU", b"Rea"]


def test_a_flaw_in_the_files_is_the_same_user_error(tmp_path):
    with pytest.raises(UserError, match=r"video_info\.meta\.jsonl"):
        tfds_builders.prepare("lvbench", tmp_path, tmp_path / "tfds")


def test_what_was_prepared_from_elsewhere_is_not_taken_for_it(tmp_path):
    here, there = layouts.lvbench(tmp_path / "here"), layouts.lvbench(tmp_path / "there")
    for _ in range(2):
        assert len(tfds_builders.read_items(tfds_builders.prepare("lvbench", here, tmp_path / "tfds"))) == 3
    with pytest.raises(UserError, match=r"was prepared from .*/here; remove it, or name another$"):
        tfds_builders.prepare("lvbench", there, tmp_path / "tfds")
    with pytest.raises(UserError, match=r"^benchmark=foo: choose one of videomme, "):
        tfds_builders.prepare("foo", here, tmp_path / "tfds")


def test_it_works_where_tensorflow_is_not_installed(tmp_path):
    layouts.lvbench(tmp_path / "source")
    program = f"""
import sys

class NotTensorFlow:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name == "tensorflow" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(NotTensorFlow, sys.meta_path)
from adapttoken_jax.benchmarks import tfds_builders
builder = tfds_builders.prepare("lvbench", {str(tmp_path / "source")!r}, {str(tmp_path / "tfds")!r})
print(len(tfds_builders.read_items(builder)), "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "3 False\n", done.stderr
