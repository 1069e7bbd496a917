"""Features on disk: found again bit for bit, told apart by content, computed again where damaged."""

import concurrent.futures
import dataclasses
import os
import shutil
import time
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from adapttoken_jax import encoding, loading, pipeline, sharding
from adapttoken_jax.encoding import stream_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.feature_cache import Entry, FeatureCache
from adapttoken_jax.model.kernels import Kernel
from adapttoken_jax.streaming import one_pass
from adapttoken_jax.video import Frames, plan_clip, probe
from tests import media
from tests.needle.study_model import settings, small_model

SLOTS = 20
pytestmark = pytest.mark.usefixtures("small_calls")


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return media.write(tmp_path_factory.mktemp("film") / "a.mp4", 2 * SLOTS, (56, 56))


def clip_of(path, model, **changes):
    return plan_clip(probe(path), model.config.vision, **{"fps": 25.0, "max_pixels": 56 * 56, **changes})


def features_of(model, path, cache, slots=range(SLOTS)):
    """(features, slots encoded for them)."""
    clip = clip_of(path, model)
    with stream_video(model, clip, one_pass(clip), entry=cache and cache.entry(clip)) as tokens:
        tokens.ensure(slots)
        return tokens.features[slots], tokens.encoded


@pytest.fixture
def cache(tmp_path, model):
    return FeatureCache(tmp_path / "cache", model)


def test_a_second_run_reads_nothing(model, path, cache, monkeypatch):
    plain, _ = features_of(model, path, None)
    first, encoded = features_of(model, path, cache)
    assert encoded == SLOTS
    monkeypatch.setattr(encoding, "encode_slots", None)
    monkeypatch.setattr("adapttoken_jax.video.ahead.FrameReader", None)
    again, encoded = features_of(model, path, cache)
    assert encoded == 0
    np.testing.assert_array_equal(first, plain)
    np.testing.assert_array_equal(again, plain)


def test_an_entry_grows(model, path, cache):
    plain, _ = features_of(model, path, None)
    assert features_of(model, path, cache, range(6))[1] == 8  # two calls of four slots
    assert features_of(model, path, cache, range(8))[1] == 0
    rest, encoded = features_of(model, path, cache)
    assert encoded == SLOTS - 8
    np.testing.assert_array_equal(rest, plain)
    assert features_of(model, path, cache)[1] == 0


def change_at(content, mark, offset, byte):
    """The content with another byte so far after the last `mark`."""
    at = content.rindex(mark) + offset
    return content[:at] + bytes([byte]) + content[at + 1 :]


_DIRECTORY = b"PK\x01\x02"  # begins an entry of the zip file's directory

DAMAGES = {
    "changed byte": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "cut off": lambda content: content[: len(content) // 3],
    "empty": lambda content: b"",
    "another file": lambda content: b"not an archive at all",
    "encrypted": lambda content: change_at(content, _DIRECTORY, 8, 1),
    "unknown compression": lambda content: change_at(content, _DIRECTORY, 10, 99),
    "without features": lambda content: change_at(content, b"features", 7, ord("z")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_computed_again_with_a_note(model, path, cache, capsys, damage):
    plain, _ = features_of(model, path, cache)
    entry = cache.entry(clip_of(path, model)).path
    entry.write_bytes(damage(entry.read_bytes()))
    again, encoded = features_of(model, path, cache)
    assert encoded == SLOTS
    np.testing.assert_array_equal(again, plain)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"{entry}: damaged (")
    assert features_of(model, path, cache)[1] == 0 and capsys.readouterr().err == ""


def test_an_entry_of_another_clip_is_damaged_too(tmp_path, capsys):
    features, entry = np.ones((4, 3, 2), np.float32), Entry(tmp_path / "a.zip")
    entry.write(features, np.ones(4, bool))
    assert not entry.read(np.zeros((3, 3, 2), np.float32)).any()
    assert "damaged" in capsys.readouterr().err


def test_bfloat16(tmp_path):
    features = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(jnp.bfloat16)
    there, found = np.array([1, 0, 1, 1, 0], bool), np.zeros_like(features)
    Entry(tmp_path / "a.zip").write(features, there)
    np.testing.assert_array_equal(Entry(tmp_path / "a.zip").read(found), there)
    np.testing.assert_array_equal(found, np.where(there[:, None, None], features, 0))


def test_another_content_of_the_same_size_and_time_is_another_entry(model, path, cache, tmp_path):
    copy = tmp_path / "copy.mp4"
    shutil.copy2(path, copy)
    assert cache.entry(clip_of(copy, model)).path == cache.entry(clip_of(path, model)).path
    content, stat = bytearray(copy.read_bytes()), copy.stat()
    content[-1] ^= 1
    copy.write_bytes(content)
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.entry(clip_of(copy, model)).path != cache.entry(clip_of(path, model)).path


def test_whatever_features_depend_on_is_in_the_name(model, path, cache, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 56, 56, 3), np.uint8)
    changed = images.copy()
    changed[7, 3, 3, 1] ^= 1
    other = small_model()
    other.module.vision.merger_out_bias[...] += 1e-6
    names = [
        cache.entry(clip_of(path, model)),
        cache.entry(clip_of(path, model, max_frames=20)),
        cache.entry(clip_of(path, model, max_pixels=28 * 28)),
        cache.entry(clip_of(path, model, preset="hf")),
        cache.entry(clip_of(path, model), scanned=True),
        FeatureCache(tmp_path / "cache", other).entry(clip_of(path, model)),
        cache.entry(clip_of(Frames(images, 25.0), model)),
        cache.entry(clip_of(Frames(changed, 25.0), model)),
        cache.entry(clip_of(Frames(images.reshape(40, 64, 49, 3), 25.0), model)),  # becomes 56 x 56, too
    ]
    assert len({entry.path for entry in names}) == len(names)
    assert FeatureCache(tmp_path / "cache", small_model()).entry(clip_of(path, model)).path == names[0].path


def test_features_of_a_kernel_are_not_taken_for_those_without(model, path, cache, tmp_path, monkeypatch):
    entry = lambda model: FeatureCache(tmp_path / "cache", model).entry(clip_of(path, model)).path
    monkeypatch.setattr(loading, "resolve_vision", lambda *_: Kernel("windows"))
    assert entry(model) != cache.entry(clip_of(path, model)).path
    assert entry(dataclasses.replace(model, attention="xla")) == cache.entry(clip_of(path, model)).path


def test_writers_and_readers_at_once(tmp_path, capsys):
    entry, features = Entry(tmp_path / "a.zip"), np.arange(4000.0).reshape(1000, 2, 2)
    entry.write(features, np.ones(1000, bool))

    def work(number):
        for turn in range(10):
            if number % 2:
                entry.write(features, np.arange(1000) % (number + turn + 1) == 0)
            found = np.zeros_like(features)
            there = entry.read(found)
            np.testing.assert_array_equal(found[there], features[there])
            assert there.any()

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))  # raises what a thread has raised
    assert capsys.readouterr().err == ""
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_broken_run_leaves_nothing(model, path, cache, tmp_path):
    clip = clip_of(path, model)
    with pytest.raises(KeyboardInterrupt), stream_video(model, clip, one_pass(clip), entry=cache.entry(clip)) as tokens:
        tokens.ensure(range(8))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "cache") == []


def test_a_full_disk_costs_the_entry_only(tmp_path, capsys):
    Entry(tmp_path / "missing" / "a.zip").write(np.ones((2, 2, 2)), np.ones(2, bool))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not written" in err


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(model, tmp_path):
    dead, alive, foreign = (f".{'d' * 32}.part", 2), (f".{'a' * 32}.part", 0), (".film.part", 2)
    for name, age in (dead, alive, foreign):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age * 3600,) * 2)
    FeatureCache(tmp_path, model)
    assert sorted(os.listdir(tmp_path)) == [alive[0], foreign[0]]


def test_too_little_memory_costs_the_entry_only(tmp_path, capsys, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(zipfile.ZipFile, "writestr", no_memory)
    Entry(tmp_path / "a.zip").write(np.ones((2, 2, 2)), np.ones(2, bool))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not written (too little memory)" in err and os.listdir(tmp_path) == []


def test_a_mesh_has_entries_of_its_own(model, path, cache, tmp_path):
    """Its calls of the vision tower hold other numbers of slots, which round otherwise in the last bits."""
    mesh = sharding.make_mesh(sharding.MeshShape(2, 1))
    placed = FeatureCache(tmp_path / "cache", dataclasses.replace(model, mesh=mesh))
    assert placed.entry(clip_of(path, model)).path != cache.entry(clip_of(path, model)).path


def test_progress_counts_what_was_there(model, path, cache):
    features_of(model, path, cache, range(8))
    clip, told = clip_of(path, model), []
    report = lambda stage, done, total: told.append((stage, done, total))
    with stream_video(model, clip, one_pass(clip), report, cache.entry(clip)) as tokens:
        tokens.ensure(range(SLOTS))
    assert [done for _, done, _ in told] == [12, 16, 20] and told[-1] == ("encode", SLOTS, SLOTS)


def test_a_directory_that_cannot_be_used_is_refused(model, path):
    with pytest.raises(UserError, match=r"^--feature_cache=.*a\.mp4: is no directory; name another$"):
        FeatureCache(path, model)
    with pytest.raises(UserError, match=r"^--feature_cache: the name is empty; give a directory$"):
        FeatureCache("", model)


def test_answers_are_the_same_from_disk(model, path, tmp_path):
    config = settings(model, fps=25.0)

    def ask(**given):
        options = ["red", "green", "blue"]
        return pipeline.answer(model, str(path), "What colour is the star?", options, config, **given)

    first, second = ask(feature_cache=tmp_path / "c"), ask(feature_cache=FeatureCache(tmp_path / "c", model))
    plain = ask()
    for result in (first, second):
        assert (result.answer, result.entropy, result.selected) == (plain.answer, plain.entropy, plain.selected)
    assert second.cost.seconds.vision == 0 and second.cost.flops < first.cost.flops == plain.cost.flops
    with pytest.raises(UserError, match="--feature_cache: a trace needs"):
        ask(feature_cache=tmp_path / "c", trace=True)
    with pytest.raises(UserError, match="feature_cache: was made for another model"):
        ask(feature_cache=FeatureCache(tmp_path / "c", small_model()))
