"""Reading as far as is asked for: the order, what it costs, and the same results as reading everything first."""

import gc
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import costs, encoding, pipeline
from adapttoken_jax.config import SIZES, AdaptTokenConfig
from adapttoken_jax.encoding import encode_video, stream_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.geometry import window_layout
from adapttoken_jax.run import Plan
from adapttoken_jax.selection import group_slots
from adapttoken_jax.streaming import Part, decoding_frames, one_pass, reading_order
from adapttoken_jax.video import Frames, SlotPatches, VideoInfo, normalised, plan_clip, probe, read_patches
from tests import media
from tests.needle.study_model import settings, small_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
VISION = SIZES["qwen2.5-vl-7b"].vision
QUESTION, OPTIONS = "What colour is the star?", ["red", "green", "blue"]
pytestmark = pytest.mark.usefixtures("small_calls")


# The order


def film(frames, group_of_pictures, every, seekable=True):
    """(clip of every `every`-th frame, its groups of 8 slots) of a video that does not exist."""
    times, keys = np.arange(frames) / 25, np.arange(0, frames, group_of_pictures)
    info = VideoInfo("v.mp4", frames / 25, 25.0, times, keys, 56, 56, np.arange(frames), seekable=seekable)
    clip = plan_clip(info, VISION, fps=25 / every, max_frames=10**6, max_pixels=56 * 56)
    return clip, group_slots(clip.grid[0], 8)


def slots_of(parts):
    return np.concatenate([part.slots for part in parts])


def assert_one_pass(parts, clip):
    assert [part.ahead for part in parts] == [None]
    np.testing.assert_array_equal(slots_of(parts), np.arange(clip.grid[0]))


def test_a_scan_of_everything_takes_one_pass():
    clip, groups = film(12800, 250, 5)
    assert_one_pass(reading_order(clip, groups, None, 8), clip)


def test_sparse_slots_are_read_group_by_group_at_no_more_cost():
    clip, groups = film(64000, 50, 500)  # between two sampled frames lie ten key frames
    [part] = reading_order(clip, groups, None, 8)
    np.testing.assert_array_equal(part.slots, np.concatenate(groups))
    assert decoding_frames(clip, part.slots) <= 1.1 * decoding_frames(clip, np.arange(clip.grid[0]))


def test_lite_reads_groups_alone_until_that_costs_one_pass():
    clip, groups = film(64000, 50, 5)  # 6400 slots, 800 groups; slots of a group are 8000 frames apart
    visits = [groups[g] for g in np.random.default_rng(0).permutation(len(groups))]
    alone, rest = reading_order(clip, visits, 3, 8)
    read = np.split(alone.slots, range(8, len(alone.slots), 8))
    cost = [decoding_frames(clip, slots) for slots in read]
    # A group is 8 slots; each takes a jump and, on average, half of the 50 frames between two key frames.
    assert np.mean(cost) == pytest.approx(8 * (16 + 25 + 5), rel=0.1)
    assert sum(cost) <= 64000 < sum(cost) + decoding_frames(clip, visits[len(cost)])
    assert alone.ahead == 8 and rest.ahead is None
    assert alone.certain == 24 and rest.certain is None
    # Three groups, and what is encoded in one call with the last of them; of what is certain altogether, all.
    assert [len(alone.certain_slots(step)) for step in (8, 10, 32)] == [24, 30, 32]
    np.testing.assert_array_equal(alone.certain_slots(32), alone.slots[:32])
    np.testing.assert_array_equal(rest.certain_slots(32), rest.slots)
    assert (np.diff(rest.slots) > 0).all()
    np.testing.assert_array_equal(np.sort(slots_of([alone, rest])), np.arange(clip.grid[0]))
    np.testing.assert_array_equal(read, visits[: len(read)])


def test_lite_takes_one_pass_where_it_cannot_stop_before_that_pays():
    clip, groups = film(12800, 250, 5)
    affordable = len(reading_order(clip, groups, 1, 8)[0].slots) // 8
    assert 1 < affordable < len(groups)
    assert_one_pass(reading_order(clip, groups, affordable + 1, 8), clip)


def test_what_may_stop_a_scan_first_decides_how_it_is_read():
    clip, groups = film(12800, 250, 5)
    model = types.SimpleNamespace(wave=1)
    affordable = len(reading_order(clip, groups, 1, 8)[0].slots) // 8
    read = lambda method, deadline=None, **given: pipeline.slot_order(
        model, Plan(clip, groups), AdaptTokenConfig(slots_per_group=8, **given), method, deadline
    )
    late = {"stop_groups": affordable + 1}
    assert_one_pass(read("lite", **late), clip)
    assert_one_pass(read("lite", give_up_groups=affordable, **late), clip)
    alone = read("lite", stop_groups=1)
    assert (alone[0].ahead, alone[0].certain) == (8, 8)
    model.wave = 2  # groups that a mesh runs at once: of three groups that it begins with it visits a fourth
    assert (read("lite", stop_groups=3)[0].ahead, read("lite", stop_groups=3)[0].certain) == (16, 32)
    model.wave = 1
    # Nothing can stop it between two checks: so many groups are decoded ahead.
    again = {"stop_rule": "rerun", "stop_groups": affordable}
    assert (read("lite", **again)[0].ahead, read("lite", 5.0, **again)[0].ahead) == (8 * affordable, 8)
    sooner = [read("lite", give_up_groups=1, **late), read("lite", 5.0, **late), read("adapttoken", 5.0, **late)]
    for parts in sooner:
        np.testing.assert_array_equal(parts[0].slots, alone[0].slots)


def test_what_cannot_be_sought_takes_one_pass():
    clip, groups = film(64000, 50, 5, seekable=False)
    assert_one_pass(reading_order(clip, groups, 3, 8), clip)


def test_images_in_memory_are_read_group_by_group():
    clip = plan_clip(probe(Frames(np.zeros((64, 56, 56, 3), np.uint8), 4.0)), VISION, max_pixels=56 * 56)
    groups = group_slots(32, 8)
    [part] = reading_order(clip, groups, 3, 8)
    np.testing.assert_array_equal(part.slots, np.concatenate(groups))


# The features


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def clip(model, tmp_path_factory):
    path = media.write(tmp_path_factory.mktemp("clip") / "a.mp4", 132, (56, 56), gop=8, bf="2")
    return plan_clip(probe(path), model.config.vision, fps=25.0, max_pixels=56 * 56)


@pytest.fixture(scope="module")
def everything(model, clip):
    return encode_video(model, clip).features


def by_group(clip):
    return [Part(np.concatenate(group_slots(clip.grid[0], 8)), 8)]


def partly_by_group(clip):
    groups = group_slots(clip.grid[0], 8)
    return [Part(np.concatenate(groups[5:]), 8), Part(np.sort(np.concatenate(groups[:5])))]


def test_pixels_are_normalised_on_the_device(model, clip, everything):
    read = list(read_patches(clip, chunk_slots=4))
    assert {patches.dtype for _, patches in read} == {np.dtype(np.uint8)}
    pixels = np.concatenate([patches for _, patches in read])
    layout = window_layout(model.config.vision, *clip.grid[1:])
    features = model.module.vision(jnp.asarray(normalised(pixels)), layout)["features"]
    # The last bit of a pixel's value (6e-8 of it) weighs no more than the rounding of a product that follows it.
    np.testing.assert_allclose(features, everything, atol=1e-5 * np.abs(everything).max())
    traced = encode_video(model, clip, keep_patches=True)
    np.testing.assert_array_equal(traced.patches, normalised(pixels).reshape(traced.patches.shape))


@pytest.mark.parametrize("order", [one_pass, by_group, partly_by_group])
def test_the_order_does_not_change_a_bit(model, clip, everything, order):
    with stream_video(model, clip, order(clip)) as tokens:
        for slots in (np.array([3]), np.array([60, 2]), np.arange(66)):
            expected = everything[slots].reshape(-1, 32)
            np.testing.assert_array_equal(tokens.gather(tokens.coordinates(slots)), expected)
            copied = np.zeros_like(expected)
            tokens.read_slots(slots, copied)
            np.testing.assert_array_equal(copied, expected)
    np.testing.assert_array_equal(tokens.features, everything)


@pytest.mark.parametrize("count", [0, 1, 3, 9, 17])
@pytest.mark.parametrize("order", [one_pass, by_group, partly_by_group])
def test_what_was_read_before_is_not_read_again(model, clip, everything, monkeypatch, order, count):
    """The last chunk is still on the device when reading goes on."""
    part, read = order(clip)[0], []
    before = list(read_patches(clip, part.slots[: 4 * count], 4))

    class Watched(SlotPatches):
        def __init__(self, clip, slots, *args):
            super().__init__(clip, slots, *args)
            read.extend(slots)

    monkeypatch.setattr("adapttoken_jax.encoding.SlotPatches", Watched)
    with stream_video(model, clip, order(clip), chunks=iter(before)) as tokens:
        for group in group_slots(clip.grid[0], 8):
            tokens.ensure(group)
    np.testing.assert_array_equal(tokens.features, everything)
    assert sorted([*part.slots[: 4 * count], *read]) == list(range(66))


def test_no_more_is_encoded_than_calls_that_hold_what_was_asked_for(model, clip):
    groups, seen = group_slots(clip.grid[0], 8), []  # 9 groups, of 8 slots and 7
    report = lambda *progress: seen.append(progress)
    with stream_video(model, clip, by_group(clip), report) as tokens:
        assert tokens.encoded == 0
        tokens.ensure(groups[0])
        assert tokens.encoded == 8
        tokens.ensure(groups[3])  # the slots up to here, 31 or 32, and no call more
        tokens.ensure(groups[1])
        assert tokens.encoded == 32
    assert seen == [("encode", done, 66) for done in range(4, 33, 4)]


@pytest.mark.parametrize(("platform", "slots"), [("tpu", 16), ("gpu", 32)])
def test_a_gpu_takes_twice_as_many_patches_per_call(model, monkeypatch, platform, slots):
    monkeypatch.setattr(encoding.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(encoding, "_SLOTS_PER_CHUNK", 64)
    large = types.SimpleNamespace(grid=(2048, 22, 40))
    assert encoding.chunk_slots(model, large) == slots


@pytest.mark.parametrize(
    ("devices", "grid", "slots"),
    [(8, (22, 40), 8 * 16), (8, (4, 6), 8 * 64), (96, (22, 40), 96 * 16), (256, (22, 40), 2048), (4096, (4, 6), 4096)],
)
def test_a_scanned_videos_calls_depend_on_the_devices_alone(monkeypatch, devices, grid, slots):
    monkeypatch.setattr(encoding, "_SLOTS_PER_CHUNK", 64)
    mesh = types.SimpleNamespace(mesh=types.SimpleNamespace(size=devices, is_multi_process=False))
    for length in (3, 2048, 5000):
        assert encoding.chunk_slots(mesh, types.SimpleNamespace(grid=(length, *grid)), scanned=True) == slots


@pytest.mark.parametrize(
    ("size", "devices", "slots"),
    [("3b", 16, 16 * 16), ("3b", 256, 256 * 4), ("7b", 256, 256 * 2), ("72b", 16, 16 * 16), ("72b", 256, 256)],
)
def test_features_that_processes_gather_are_bounded(monkeypatch, size, devices, slots):
    """A slot of 220 tokens has 1.4 MiB of features of the 7B model, 3.4 MiB of the 72B one, on every device."""
    monkeypatch.setattr(encoding, "_SLOTS_PER_CHUNK", 64)
    mesh = types.SimpleNamespace(size=devices, is_multi_process=True)
    pod = types.SimpleNamespace(mesh=mesh, config=SIZES[f"qwen2.5-vl-{size}"], dtype=np.dtype("float16"))
    assert encoding.chunk_slots(pod, types.SimpleNamespace(grid=(5000, 22, 40)), scanned=True) == slots


def test_a_call_is_on_its_way_while_the_one_before_is_collected(model, clip, everything, monkeypatch):
    groups, seen = group_slots(clip.grid[0], 16), []  # of 13 or 14 slots: a group ends within its last call

    class Watched(encoding.SlotEncoder):
        def _start(self, slots, patches):
            seen.append("start")
            return super()._start(slots, patches)

        def _collect(self, slots, encoded):
            seen.append("collect")
            super()._collect(slots, encoded)

    def read():
        seen.clear()
        with stream_video(model, clip, by_group(clip)) as tokens:
            for group in groups:
                tokens.ensure(group, soon=np.concatenate(groups))
        np.testing.assert_array_equal(tokens.features, everything)
        return seen

    monkeypatch.setattr(encoding, "SlotEncoder", Watched)
    assert read() == ["start", *["start", "collect"] * 16, "collect"]
    monkeypatch.setattr(encoding, "most_gathered", lambda *_: 7)  # the features of two calls are of 8 slots
    assert read() == ["start", "collect"] * 17


def test_no_more_is_decoded_than_one_group_ahead(model, clip, monkeypatch):
    groups, opened = group_slots(clip.grid[0], 8), []

    class Watched(SlotPatches):
        def __init__(self, *args):
            super().__init__(*args)
            opened.append(self)

    monkeypatch.setattr("adapttoken_jax.encoding.SlotPatches", Watched)
    with stream_video(model, clip, partly_by_group(clip)) as tokens:
        tokens.ensure(groups[5])
    assert len(opened) == 1  # the part that follows was not opened
    assert len(opened[0]._ready) <= 2 * 8 + len(opened[0]._threads)


def test_seconds_are_counted_where_they_are_spent(model, clip):
    with stream_video(model, clip, one_pass(clip)) as tokens:
        tokens.ensure(range(66))
        spent = dict(tokens.seconds)
        tokens.ensure(range(66))
    assert spent["waiting"] >= spent["vision"] > 0 and spent["decode"] > 0
    assert (tokens.seconds["vision"], tokens.seconds["decode"]) == (spent["vision"], spent["decode"])


def test_the_scans_seconds_are_without_those_of_the_slots_it_waits_for(model, monkeypatch):
    start = encoding.SlotEncoder._start
    monkeypatch.setattr(encoding.SlotEncoder, "_start", lambda *args: time.sleep(0.1) or start(*args))
    frames = Frames(np.random.default_rng(0).integers(0, 256, (64, 56, 56, 3), np.uint8), 4.0)
    config = AdaptTokenConfig.for_model(model.config, slots_per_group=4, budget=16, max_pixels=56 * 56)
    seconds = at.answer(model, frames, "What is it?", config=config).cost.seconds
    assert seconds.vision > 0.1 * 32 / 4
    assert seconds.groups + seconds.vision + seconds.final <= seconds.total  # one thread spends them all


def test_damage_ends_the_stream_with_one_line_and_without_threads(model, tmp_path):
    info = media.damaged_since(tmp_path / "a.mkv", 60, range(20, 50), (56, 56))
    clip = plan_clip(info, model.config.vision, fps=25.0, max_pixels=56 * 56)
    before = set(threading.enumerate())
    broken = pytest.raises(UserError, match=r"a\.mkv: the frame at 0\.80 s cannot be decoded")
    with broken, stream_video(model, clip, one_pass(clip)) as tokens:
        tokens.ensure(range(30))
    assert not set(threading.enumerate()) - before


def test_an_encoder_that_read_nothing_itself_does_not_stay(model, clip):
    """Nothing but the collector of cycles would free it, which does not know how large its features are."""
    chunks = list(read_patches(clip, chunk_slots=4))
    gc.collect()
    gc.disable()
    try:
        with encoding.SlotEncoder(model, clip, one_pass(clip), chunks=chunks) as encoder:
            encoder.encode(range(8))
        left = weakref.ref(encoder)
        del encoder
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("sent", "word", "status"), [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)])
def test_a_signal_stops_the_decoders_and_leaves_one_line(tmp_path, sent, word, status):
    path = media.long_clip(tmp_path / "a.mp4", minutes=10)
    code = f"""
import sys
from adapttoken_jax import cli, terminal, video
from adapttoken_jax.config import SIZES, AdaptTokenConfig
def run(values):
    info, vision = video.probe({str(path)!r}), SIZES["qwen2.5-vl-7b"].vision
    clip = video.plan_clip(info, vision, fps=5.0, max_frames=3000, max_pixels=28 * 28)
    while True:
        with video.SlotPatches(clip, range(clip.grid[0])) as reader:
            while len(reader.take_slots(10)):
                print("ready", flush=True)
sys.exit(cli.main(["try"], [terminal.Command("try", "", (terminal.Flag("debug", bool, "", "General"),), run)]))
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, sent))
        assert process.communicate(timeout=60)[1] == f"adapttoken try: {word}\n"
    assert process.returncode == status


# The whole method


def test_lite_answers_the_same_and_encodes_less(model, tmp_path, monkeypatch):
    path = media.write(tmp_path / "a.mp4", 400, (56, 56), gop=5, sc_threshold="0")
    config = settings(model, fps=25.0, max_frames=400, stop_groups=2, stop_entropy=9.0, stop_agreement=False)
    orders = []

    def ask(order):
        monkeypatch.setattr(pipeline, "reading_order", lambda *args: orders.append(order(*args)) or orders[-1])
        return pipeline.answer(model, str(path), QUESTION, OPTIONS, config, "lite")

    streamed, at_once = ask(reading_order), ask(lambda clip, *_: one_pass(clip))
    assert len(orders[0][0].slots) >= 2 * 4 and streamed.stop == at_once.stop and streamed.stop.groups_visited == 2
    for part in ("answer", "entropy", "option_probabilities", "selected", "groups"):
        assert getattr(streamed, part) == getattr(at_once, part)
    # Two of 50 groups: 8 slots by themselves; in one pass all slots up to the last of these, 151.
    unseen = at_once.cost.flops - streamed.cost.flops
    assert unseen == pytest.approx((152 - 8) * costs.vision_flops(model.config, 1, 4, 4))
