"""Sampling and size rules, against torch, transformers and hand-computed cases."""

import math

import numpy as np
import pytest

from adapttoken_jax import pipeline
from adapttoken_jax.config import SIZES, AdaptTokenConfig, VisionConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.video import PRESETS, Frames, VideoInfo, frame_count, plan_clip, probe, smart_resize
from adapttoken_jax.video.sampling import end_to_end_indices, frames_at, left_indices, pixel_bounds
from tests import media

VISION = SIZES["qwen2.5-vl-7b"].vision
TOKEN = 28 * 28


def video(total, fps=25.0, height=360, width=640):
    """A constant-rate video that exists only as numbers."""
    return VideoInfo("clip.mp4", total / fps, fps, np.arange(total) / fps, np.zeros(1, np.int64), width, height)


def pairs(count, seed, most=200_000):
    """(total, n) with n even, as sampling produces them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        total = int(rng.integers(2, most))
        yield total, max(2, int(rng.integers(2, min(total, 4096) + 1)) // 2 * 2)


# --- which frames --------------------------------------------------------------------------------------------------


def test_end_to_end_indices_equal_torch():
    torch = pytest.importorskip("torch")
    for total, n in pairs(3000, 0):
        expected = torch.linspace(0, total - 1, n).round().long().numpy()
        np.testing.assert_array_equal(end_to_end_indices(total, n), expected, err_msg=f"{total}, {n}")


def test_end_to_end_indices_are_not_the_float64_rule():
    different = sum((end_to_end_indices(t, n) != np.rint(np.linspace(0, t - 1, n))).any() for t, n in pairs(300, 1))
    assert different > 0


def test_left_indices_equal_torch():
    torch = pytest.importorskip("torch")
    for total, n in pairs(3000, 2):
        expected = torch.arange(0, total, total / n).int().numpy()
        assert len(expected) == n or expected[n:].tolist() == [total]  # no such frame
        np.testing.assert_array_equal(left_indices(total, n), expected[:n], err_msg=f"{total}, {n}")


def test_small_cases_by_hand():
    assert end_to_end_indices(10, 4).tolist() == [0, 3, 6, 9]
    assert end_to_end_indices(6, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert end_to_end_indices(4, 3).tolist() == [0, 2, 3]  # 1.5 rounds to the even 2
    assert end_to_end_indices(7, 1).tolist() == [0]
    assert left_indices(10, 4).tolist() == [0, 2, 5, 7]
    assert left_indices(7, 1).tolist() == [0]


def reference_count(total, source_fps, fps, max_frames):
    """The rule as literal steps."""
    n = total / source_fps * fps
    if n < 4:
        n = 4
    if n > 2 * (max_frames // 2):
        n = 2 * (max_frames // 2)
    if n > total:
        n = total
    return int(n // 2 * 2)


def test_frame_count():
    for total in (2, 3, 4, 5, 17, 1500, 90_000):
        for source_fps in (24, 25.0, 30000 / 1001):
            for fps in (0.5, 2.0, 4.0, 60.0):
                for most in (2, 7, 768, 4096):
                    assert frame_count(total, source_fps, fps, most) == reference_count(total, source_fps, fps, most)


@pytest.mark.parametrize(("total", "count"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (100, 16)])
def test_short_videos(total, count):
    assert frame_count(total, 25.0, 4.0, 4096) == count


def test_one_frame_at_most():
    assert plan_clip(video(100), VISION, max_frames=1).frame_indices.tolist() == [0]


def test_rate_above_the_source_takes_every_frame():
    clip = plan_clip(video(50, fps=2.0), VISION, fps=60.0)
    assert clip.frame_indices.tolist() == list(range(50))
    assert clip.seconds_per_slot == pytest.approx(1.0)  # two frames at 2 frames per second


def test_slots_of_other_sizes():
    assert frame_count(1000, 25.0, 1.0, 4096, factor=4) == 40
    assert frame_count(1000, 25.0, 1.05, 4096, factor=4) == 40
    assert frame_count(1000, 25.0, 0.1, 4096, factor=3) == 6  # 4 rounded up to whole slots


def test_first_and_last_frame_are_included():
    assert plan_clip(video(1500), VISION).frame_indices[[0, -1]].tolist() == [0, 1499]


def test_hf_starts_at_the_left():
    clip = plan_clip(video(1500), VISION, preset="hf")
    assert clip.frame_indices[:4].tolist() == [0, 6, 12, 18]
    assert len(clip.frame_indices) == 240


def test_at_a_constant_rate_frames_are_the_indices():
    for total, n in pairs(200, 3, 20_000):
        indices = end_to_end_indices(total, n)
        for fps in (25.0, 30000 / 1001, 59.94):
            times = np.arange(total) / fps
            np.testing.assert_array_equal(frames_at(indices, times), indices)
            np.testing.assert_array_equal(frames_at(indices, np.round(times, 3)), indices)  # Matroska


def test_at_a_varying_rate_frames_are_the_nearest_in_time():
    rng = np.random.default_rng(4)
    for _ in range(50):
        times = np.cumsum(rng.exponential(size=40))
        indices = end_to_end_indices(40, 20)
        ideal = times[0] + indices / 39 * (times[-1] - times[0])
        expected = [min(range(40), key=lambda i, t=t: abs(times[i] - t)) for t in ideal]
        assert frames_at(indices, times).tolist() == expected


def test_half_way_between_two_frames_the_earlier_is_taken():
    assert frames_at(np.arange(4), np.asarray([0.0, 1, 2, 6])).tolist() == [0, 2, 2, 3]


def test_a_frame_that_stays_on_screen_is_taken_again(tmp_path):
    info = probe(media.write(tmp_path / "a.mkv", 6, milliseconds=[0, 40, 80, 120, 160, 3000]))
    clip = plan_clip(info, VISION, fps=4.0)
    assert clip.frame_indices.tolist() == [0, 4, 4, 5, 5, 5]  # nearest to 0, .6, 1.2, 1.8, 2.4 and 3 s
    np.testing.assert_allclose(clip.frame_times, [0, 0.16, 0.16, 3, 3, 3])


# --- time ------------------------------------------------------------------------------------------------------------


def test_seconds_per_slot():
    rates = {"qwen-vl-utils": 2 / (160 / 1001 * 25), "hf": 2 / (160 / 1001 * 25), "flexselect": 1.0}
    for preset, expected in rates.items():
        assert plan_clip(video(1001), VISION, preset=preset).seconds_per_slot == pytest.approx(expected)


def test_slots():
    clip = plan_clip(video(100), VISION, fps=4.0)
    assert clip.grid[0] == 8
    assert clip.slot_frames.tolist() == clip.frame_indices.reshape(8, 2).tolist()
    np.testing.assert_allclose(clip.slot_times, clip.frame_indices[::2] / 25)


def test_a_slot_that_is_not_full_repeats_the_last_frame():
    clip = plan_clip(video(1), VISION)
    assert clip.grid[0] == 1
    assert clip.slot_frames.tolist() == [[0, 0]]
    assert clip.seconds_per_slot == pytest.approx(2 / 25)


# --- how large -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (720, 1280, (308, 532)),  # 16:9, shrunk below 172480 pixels
        (1280, 720, (532, 308)),  # 9:16
        (480, 640, (336, 476)),  # 4:3
        (500, 500, (392, 392)),  # 1:1
        (360, 400, (364, 392)),  # small enough: rounded only
        (120, 160, (280, 392)),  # enlarged to 128 tokens or more
        (40, 20, (448, 224)),  # a side below 28
        (4, 800, (28, 4480)),  # aspect ratio 200
    ],
)
def test_sizes(height, width, expected):
    clip = plan_clip(video(100, height=height, width=width), VISION)
    assert (clip.height, clip.width) == expected
    assert clip.grid == (8, expected[0] // 14, expected[1] // 14)
    assert clip.tokens == 8 * expected[0] * expected[1] // TOKEN


@pytest.mark.parametrize(("height", "width"), [(4, 804), (2010, 10)])
def test_aspect_ratio_over_200(height, width):
    with pytest.raises(UserError, match=r"clip\.mp4: .*aspect ratio over 200"):
        plan_clip(video(10, height=height, width=width), VISION)


def test_smart_resize_equals_transformers():
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = np.random.default_rng(5)
    for _ in range(3000):
        # From 15 pixels: a shorter side rounds to 0 there, which is mended only on the enlarging branch.
        height, width = (int(side) for side in np.exp(rng.uniform(np.log(15), np.log(4000), 2)))
        if max(height, width) > 200 * min(height, width):
            continue
        low, high = int(rng.integers(1, 200)) * TOKEN, int(rng.integers(200, 1000)) * TOKEN
        expected = module.smart_resize(height, width, 28, low, high)
        assert smart_resize(height, width, 28, low, high) == expected


def test_smart_resize_properties():
    rng = np.random.default_rng(6)
    for _ in range(2000):
        height, width = (int(side) for side in rng.integers(1, 3000, 2))
        low, high = 128 * TOKEN, int(rng.integers(200, 1000)) * TOKEN
        rows, cols = smart_resize(height, width, 28, low, high)
        assert rows % 28 == cols % 28 == 0 and rows >= 28 and cols >= 28
        if max(height, width) < 20 * min(height, width):
            assert low * 0.9 <= rows * cols <= max(high, low * 1.6)


def reference_most(frames, user):
    """qwen-vl-utils 0.0.14, step by step."""
    least = 128 * TOKEN
    share = 128000 * TOKEN * 0.9 / frames * 2
    bound = max(min(768 * TOKEN, share), int(least * 1.05))
    return min(user, bound)


@pytest.mark.parametrize("frames", [2, 128, 299, 300, 301, 768, 1047, 1048, 1714, 1715, 4096])
@pytest.mark.parametrize("user", [308 * 560, 10**9])
def test_context_cap(frames, user):
    low, high = pixel_bounds(PRESETS["qwen-vl-utils"], VISION, frames, user)
    assert (low, high) == (128 * TOKEN, reference_most(frames, user))


def test_only_frames_that_share_a_context_share_its_pixels():
    hour = video(90_000, height=720, width=1280)
    whole = plan_clip(hour, VISION)
    grouped = plan_clip(hour, VISION, context_frames=128)
    assert len(whole.frame_indices) == 4096
    assert (grouped.height, grouped.width) == (308, 532)
    assert whole.height * whole.width <= 105369 < grouped.height * grouped.width
    assert plan_clip(video(100), VISION, context_frames=10**6).tokens == plan_clip(video(100), VISION).tokens


def test_bounds_of_the_presets():
    assert pixel_bounds(PRESETS["flexselect"], VISION, 128, 10**9)[1] == 308 * 560
    assert pixel_bounds(PRESETS["hf"], VISION, 4096, 10**9) == (128 * TOKEN, 768 * TOKEN)
    assert pixel_bounds(PRESETS["qwen-vl-utils"], VISION, 128, 56 * 56) == (TOKEN, 56 * 56)
    assert pixel_bounds(PRESETS["qwen-vl-utils"], VISION, 128, 128 * TOKEN) == (128 * TOKEN, 128 * TOKEN)


def test_small_frames_on_request():
    clip = plan_clip(video(64, height=56, width=56), VISION, max_pixels=56 * 56)
    assert (clip.height, clip.width) == (56, 56)


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        ({}, 33),  # 209 tokens each
        ({"max_pixels": 1000 * TOKEN}, 9),  # 720 each
        # 512 frames share a context: slots of at most 450 tokens, of which 16 fit; of 16 slots each has 720.
        ({"max_pixels": 1000 * TOKEN, "slots_per_group": 256}, 9),
        ({"slots_per_group": 1024}, 33),  # at most 134, then 209
    ],
)
def test_uniform_keeps_within_the_budget_however_large_fewer_frames_become(monkeypatch, given, slots):
    monkeypatch.setattr(pipeline, "probe", lambda info: info)
    config = AdaptTokenConfig.for_model(SIZES["qwen2.5-vl-7b"], **given)
    plan = pipeline.plan_run(SIZES["qwen2.5-vl-7b"], video(8000, 4.0, 720, 1280), config, "uniform")
    assert plan.clip.grid[0] == slots and plan.clip.tokens <= config.budget == 7040


def test_other_patch_sizes():
    vision = VisionConfig(2, 32, 2, 64, 32, (1,), patch=16, merge=2, temporal_patch=4)
    clip = plan_clip(video(1000, height=720, width=1280), vision, fps=1.0)
    assert clip.height % 32 == clip.width % 32 == 0
    assert clip.grid == (10, clip.height // 16, clip.width // 16)
    assert clip.slot_frames.shape == (10, 4)
    assert clip.seconds_per_slot == pytest.approx(4.0)


def test_unknown_preset():
    with pytest.raises(UserError, match="--preset=best"):
        plan_clip(video(10), VISION, preset="best")


def test_frames_in_memory_are_planned_alike():
    in_memory = plan_clip(probe(Frames(np.zeros((100, 36, 64, 3), np.uint8), 25.0)), VISION)
    as_numbers = plan_clip(video(100, height=36, width=64), VISION)
    assert in_memory.grid == as_numbers.grid
    np.testing.assert_array_equal(in_memory.frame_indices, as_numbers.frame_indices)
    assert math.isclose(in_memory.seconds_per_slot, as_numbers.seconds_per_slot)
