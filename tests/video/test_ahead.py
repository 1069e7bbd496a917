"""`ReadAhead`: the same items in the same order whatever the file, the order and the number of threads."""

import contextlib
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from adapttoken_jax.errors import UserError
from adapttoken_jax.video import FrameReader, Frames, ahead, probe
from adapttoken_jax.video.ahead import ReadAhead, cut_runs
from adapttoken_jax.video.decode import SEEK_FRAMES, Cancelled, decoding_cost
from tests import media
from tests.video.test_decode import CountingReader, decode_everything

FRAMES = 96
UNEVEN = np.cumsum(np.random.default_rng(0).integers(20, 200, FRAMES)).tolist()
FILES = {
    "b_frames.mp4": lambda path: media.write(path, FRAMES, bf="3", **{"b-pyramid": "normal"}),
    "open_gop.mp4": lambda path: media.open_gop(path, FRAMES),
    "open_gop.mkv": lambda path: media.open_gop(path, FRAMES),
    "variable.mkv": lambda path: media.write(path, FRAMES, milliseconds=UNEVEN, bf="2"),
    "refresh.mp4": lambda path: media.intra_refresh(path, FRAMES),
    "one_group.mp4": lambda path: media.write(path, FRAMES, gop=1000, sc_threshold="0"),
    "stream.ts": lambda path: media.write(path, FRAMES),
    "counted.avi": lambda path: media.write(path, FRAMES, codec="mpeg4", bf="2"),
}
ORDERS = {
    "all": np.arange(FRAMES),
    "groups": np.concatenate([np.arange(start, FRAMES, 24) for start in (0, 12, 5)]),
    "repeats and returns": np.array([3, 3, 90, 91, 2, 2, 50, 95, 95]),
    "one": np.array([41]),
    "none": np.array([], int),
}


def singly(order):
    """Items of one frame each."""
    return np.reshape(order, (-1, 1))


def copied(images):
    return np.array(next(images))


def stamp(images):
    return media.read_stamp(next(images))


@pytest.fixture
def short_runs(monkeypatch):
    """Runs so short that a small video has several."""
    monkeypatch.setattr(ahead, "_RUN_FRAMES", 8)


@pytest.fixture(scope="module", params=FILES)
def film(request, tmp_path_factory):
    path = FILES[request.param](tmp_path_factory.mktemp("film") / request.param)
    return probe(path), decode_everything(path)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("threads", [1, 5])
def test_equals_the_straight_pass(film, order, threads, short_runs):
    info, expected = film
    with ReadAhead(info, singly(order), copied, 4, threads) as images:
        parts = [images.take(count) for count in (2, 1, 1000)]
    got = [image for part in parts for image in part]
    assert len(got) == len(order)
    for index, image in zip(order, got, strict=True):
        np.testing.assert_array_equal(image, expected[index])


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("per_item", [2, 3])
def test_items_of_several_frames(film, per_item, threads, short_runs):
    info, _ = film
    order = np.concatenate([np.arange(1, 91), np.arange(0, 90, 5), [3, 3, 90, 2, 2, 95]]).reshape(-1, per_item)
    runs = cut_runs(info, order)
    assert [place for run in runs for place in run] == list(range(len(order)))
    assert (len(runs) > 4) == (info.seekable and len(info.keyframes) > 1)
    with ReadAhead(info, order, lambda images: [media.read_stamp(image) for image in images], 4, threads) as reader:
        assert reader.take(1000) == order.tolist()


def test_a_frame_that_is_not_there_fails_at_once():
    info = probe(Frames(np.zeros((3, 56, 56, 3), np.uint8), 25.0))
    with pytest.raises(IndexError):
        ReadAhead(info, [[3]], copied, 4)


def test_images_in_memory_are_shared_out_too():
    images = np.stack([media.stamped(index) for index in range(100)])
    info = probe(Frames(images, 25.0))
    assert len(cut_runs(info, singly(range(100)))) > 1
    order = np.random.default_rng(1).permutation(100)
    with ReadAhead(info, singly(order), copied, 7, 3) as reader:
        np.testing.assert_array_equal(reader.take(100), images[order])


def test_runs_begin_where_another_group_of_pictures_does(film, monkeypatch):
    monkeypatch.setattr(ahead, "_RUN_FRAMES", 20)
    info, _ = film
    runs = cut_runs(info, singly(range(FRAMES)))
    assert [place for run in runs for place in run] == list(range(FRAMES))
    assert {run.start for run in runs[1:]} <= set(info.keyframes.tolist())
    assert (len(runs) > 1) == (info.seekable and len(info.keyframes) > 1)
    assert min(len(run) for run in runs[:-1] or [range(20)]) >= 20


def test_several_threads_decode_at_once(tmp_path, short_runs):
    """Two runs meet at a barrier, which one thread alone would never pass."""
    info, both = probe(media.write(tmp_path / "a.mp4", FRAMES)), threading.Barrier(2, timeout=20)

    def prepare(images):
        if (index := stamp(images)) in (0, 12):
            both.wait()
        return index

    with ReadAhead(info, singly(range(FRAMES)), prepare, FRAMES, 2) as reader:
        assert reader.take(FRAMES) == list(range(FRAMES))
    assert reader.busy_s > 0


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_wait_for_a_slow_consumer(tmp_path, threads, short_runs):
    info, prepared, largest = probe(media.write(tmp_path / "a.mp4", FRAMES)), [], 0
    with ReadAhead(info, singly(range(FRAMES)), lambda images: prepared.append(1), 6, threads) as reader:
        for taken in range(40):
            largest = max(largest, len(prepared) - taken)
            time.sleep(0.005)
            reader.take(1)
    assert 1 < largest <= 6 + threads  # each thread may have one ready that waits to be handed in


def test_leaving_early_ends_all_threads(tmp_path, short_runs):
    before, info = set(threading.enumerate()), probe(media.write(tmp_path / "a.mp4", FRAMES))
    with ReadAhead(info, singly(range(FRAMES)), copied, 3, 4) as reader:
        reader.take(5)
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before


@pytest.fixture
def no_collector():
    """Without it only what nothing refers to any more is freed, at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_nothing_read_outlives_the_block(tmp_path, no_collector):
    info = probe(media.write(tmp_path / "a.mp4", FRAMES, gop=1000, sc_threshold="0"))
    with ReadAhead(info, singly(range(FRAMES)), copied, 30, 2) as reader:
        reader.take(5)
    left = weakref.ref(reader)
    del reader
    assert left() is None


def test_nothing_read_outlives_an_error(tmp_path, no_collector):
    info = media.damaged_since(tmp_path / "a.mkv", FRAMES, range(40, 80))
    left = []

    def fail():
        with ReadAhead(info, singly(range(FRAMES)), copied, 30, 2) as reader:
            left.append(weakref.ref(reader))
            reader.take(60)

    with contextlib.suppress(UserError):
        fail()
    assert left[0]() is None


def test_no_thread_stays_where_one_cannot_start(tmp_path, short_runs, monkeypatch):
    info, before, start = probe(media.write(tmp_path / "a.mp4", FRAMES)), set(threading.enumerate()), []

    def refuse_the_third(thread, begin=threading.Thread.start):
        start.append(thread)
        if len(start) == 3:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with pytest.raises(RuntimeError, match="can't start"), ReadAhead(info, singly(range(FRAMES)), copied, 3, 4):
        pass
    assert len(start) == 3 and not set(threading.enumerate()) - before


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_cancelled_ends_where_it_is_awaited(tmp_path, threads, short_runs):
    info, cancelled = probe(media.write(tmp_path / "a.mp4", FRAMES)), threading.Event()
    with ReadAhead(info, singly(range(FRAMES)), copied, 10, threads, cancelled.is_set) as reader:
        reader.take(20)
        cancelled.set()
        with pytest.raises(Cancelled):
            reader.take(FRAMES - 20)


def test_a_reader_that_is_told_to_stop_gives_up_between_frames(tmp_path):
    info, decoded = probe(media.write(tmp_path / "a.mp4", FRAMES, gop=1000, sc_threshold="0")), []
    stop = lambda: len(decoded) > 10 or decoded.append(1)
    with FrameReader(info, [95], 1, stop) as reader, pytest.raises(Cancelled):
        list(reader.read([95]))
    assert len(decoded) == 11


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("pause_s", [0, 0.5], ids=["while it is awaited", "before anybody asks"])
def test_damage_is_reported_in_its_place(tmp_path, threads, pause_s, short_runs):
    info = media.damaged_since(tmp_path / "a.mkv", FRAMES, range(40, 80))
    before = set(threading.enumerate())
    with ReadAhead(info, singly(range(FRAMES)), stamp, 10, threads) as reader:
        assert reader.take(40) == list(range(40))
        time.sleep(pause_s)
        with pytest.raises(UserError, match=r"a\.mkv: the frame at 1\.60 s cannot be decoded"):
            reader.take(50)
    assert not set(threading.enumerate()) - before


def test_decoding_cost_is_what_a_reader_does(tmp_path):
    """Frames counted as they leave the decoder; without B-frames nothing is skipped and nothing delayed."""
    path = media.long_clip(tmp_path / "a.mp4", minutes=5)  # a key frame every 50 frames
    info = probe(path)
    for order in (range(1500), range(0, 1500, 7), range(20, 1500, 130), [5, 1001, 1002, 300, 299, 49, 50, 60, 70]):
        jumps = 0

        class Counting(CountingReader):
            def _seek(self, start):
                nonlocal jumps
                jumps += 1
                super()._seek(start)

        with Counting(info, order, threads=1) as reader:
            for index in order:
                list(reader.read([index]))
        assert decoding_cost(info, order).sum() == reader.decoded + SEEK_FRAMES * jumps


def test_frames_in_memory_cost_nothing():
    info = probe(Frames(np.zeros((9, 28, 28, 3), np.uint8), 1.0))
    assert decoding_cost(info, np.arange(9)).tolist() == [0] * 9
