"""`read_patches`: the layout by literal loops, and the same numbers whatever subset, order or chunk is asked for."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from adapttoken_jax.config import SIZES, VisionConfig
from adapttoken_jax.video import (
    Frames,
    SlotPatches,
    cut_patches,
    normalised,
    plan_clip,
    probe,
    read_images,
    read_patches,
    resize_bicubic,
)
from adapttoken_jax.video import patches as patches_module
from adapttoken_jax.video.ahead import usable_cores
from adapttoken_jax.video.resize import RESIZERS
from tests import media

VISION = SIZES["qwen2.5-vl-7b"].vision
SMALL = {"max_pixels": 56 * 84, "fps": 12.5}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


def rows_by_loops(images, patch, merge):
    """One slot [t, H, W, 3] to [h*w, 3*t*patch*patch], every index written out, in float64."""
    frames, height, width, _ = images.shape
    rows = []
    for token_row in range(height // (patch * merge)):
        for token_col in range(width // (patch * merge)):
            for row in range(merge):
                for col in range(merge):
                    top, left = (token_row * merge + row) * patch, (token_col * merge + col) * patch
                    rows.append(
                        [
                            (images[t, top + y, left + x, c] / 255 - MEAN[c]) / STD[c]
                            for c in range(3)
                            for t in range(frames)
                            for y in range(patch)
                            for x in range(patch)
                        ]
                    )
    return np.asarray(rows)


def patch_rows(images, vision):
    """Slots uint8 [n, t, H, W, 3] as the vision tower's rows."""
    return np.stack([cut_patches(slot, vision) for slot in images])


def all_patches(clip, *args, **kwargs):
    return np.concatenate([patches for _, patches in read_patches(clip, *args, **kwargs)])


@pytest.mark.parametrize(("patch", "merge", "temporal"), [(14, 2, 2), (4, 2, 2), (4, 3, 1), (2, 1, 3)])
def test_layout_and_normalisation(patch, merge, temporal):
    vision = dataclasses.replace(VISION, patch=patch, merge=merge, temporal_patch=temporal)
    side = patch * merge
    images = np.random.default_rng(0).integers(0, 256, (2, temporal, side * 2, side * 3, 3), dtype=np.uint8)
    pixels = patch_rows(images, vision)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    rows = normalised(pixels)
    assert rows.dtype == np.float32
    assert rows.shape == (2, 6 * merge**2, 3 * temporal * patch**2)
    for slot in range(2):
        np.testing.assert_allclose(rows[slot], rows_by_loops(images[slot], patch, merge), atol=2e-6)


def test_normalisation_is_the_float32_formula():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, axis=-1)
    vision = dataclasses.replace(VISION, patch=16, merge=1, temporal_patch=1)
    pixels = patch_rows(levels, vision)
    rows = normalised(pixels).reshape(3, 256)
    for channel in range(3):
        mean = np.float32(MEAN[channel]) * np.float32(255)
        std = np.float32(STD[channel]) * np.float32(255)
        expected = [(np.float32(level) - mean) / std for level in range(256)]
        np.testing.assert_array_equal(rows[channel], expected)
    # An inverse and a product round once each where a division rounds once: two units in the last place.
    on_device = jax.jit(normalised)(pixels).reshape(3, 256)
    np.testing.assert_allclose(on_device, rows, rtol=2 * np.finfo(np.float32).eps)


def test_equals_the_processor_of_transformers():
    """The processor itself needs torchvision; the reshape that it documents is repeated here with torch."""
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(1).integers(0, 256, (3, 2, 56, 84, 3), dtype=np.uint8)
    video = torch.from_numpy(images).permute(0, 1, 4, 2, 3).float()  # slots, frames, channels, rows, columns
    mean, std = (torch.tensor(values).mul(255).view(3, 1, 1) for values in (MEAN, STD))
    blocks = ((video - mean) / std).unflatten(4, (3, 2, 14)).unflatten(3, (2, 2, 14))
    expected = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(3, 4 * 6, 1176)
    np.testing.assert_array_equal(normalised(patch_rows(images, VISION)), expected.numpy())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = media.write(tmp_path_factory.mktemp("clip") / "a.mp4", 81, (64, 96), gop=10)
    return plan_clip(probe(path), VISION, **SMALL)


def test_from_file_to_rows(clip):
    assert clip.grid == (20, 4, 6)
    rows = all_patches(clip)
    assert rows.shape == (20, 24, 1176)
    images = np.stack([read_images(clip, [slot])[0, 0] for slot in range(20)])
    assert [media.read_stamp(image) for image in images] == clip.frame_indices[::2].tolist()
    first_frame = rows_by_loops(images[7:8], 14, 2)
    np.testing.assert_allclose(
        normalised(rows)[7].reshape(24, 3, 2, 196)[:, :, 0], first_frame.reshape(24, 3, 196), atol=2e-6
    )


def test_second_frame_of_a_slot_is_the_next_sampled_frame(clip):
    [(_, rows)] = read_patches(clip, [3])
    pixels = rows[0].reshape(2, 3, 2, 2, 3, 2, 14, 14).transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, 56, 84, 3)
    assert [media.read_stamp(image) for image in pixels] == clip.frame_indices[6:8].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_do_not_matter(clip, chunk):
    parts = list(read_patches(clip, chunk_slots=chunk))
    assert [len(slots) for slots, _ in parts[:-1]] == [chunk] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate([slots for slots, _ in parts]), np.arange(20))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), all_patches(clip))


def test_nothing_is_decoded_before_the_first_chunk_is_asked_for(clip, monkeypatch):
    monkeypatch.setattr(patches_module, "SlotPatches", lambda *_: pytest.fail("opened too early"))
    read_patches(clip, chunk_slots=3)


def test_slots_ahead_are_bounded_by_count_and_by_bytes(clip, monkeypatch):
    prepared = []
    monkeypatch.setattr(patches_module, "_BYTES_AHEAD", 5 * clip.vision.temporal_patch * 3 * clip.height * clip.width)

    def slow_consumer(ahead, least):
        prepared.clear()
        with SlotPatches(clip, range(20), ahead) as reader:
            reader.take_slots(2)
            end = time.monotonic() + 60
            while len(prepared) < least and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(0.3)  # in which there would be more
            return len(prepared)

    monkeypatch.setitem(RESIZERS, "float32", lambda *args: (prepared.append(1), resize_bicubic(*args))[1])
    per_slot = clip.vision.temporal_patch
    waiting = per_slot * usable_cores()  # each thread may hold one more slot, which waits to be handed in
    for ahead, kept in ((3, 3), (None, 5), (20, 5)):
        least = per_slot * (2 + kept)
        assert least <= slow_consumer(ahead, least) <= least + waiting


@pytest.mark.parametrize("slots", [[0, 5, 10, 15], [19, 3, 11, 0], [4, 4, 5, 4], [17], [], list(range(19, -1, -1))])
def test_any_subset_in_the_order_asked(clip, slots):
    everything = all_patches(clip)
    parts = list(read_patches(clip, slots, chunk_slots=3))
    assert [slot for part, _ in parts for slot in part] == slots
    for part, rows in parts:
        np.testing.assert_array_equal(rows, everything[part])


def test_interleaved_groups_add_up_to_the_whole(clip):
    everything = all_patches(clip)
    for group in range(4):
        np.testing.assert_array_equal(all_patches(clip, range(group, 20, 4)), everything[group::4])


@pytest.mark.parametrize("slots", [[20], [-1], [0, 25]])
def test_slots_that_do_not_exist(clip, slots):
    with pytest.raises(ValueError, match="the clip has 0 to 19"):
        read_patches(clip, slots)
    with pytest.raises(ValueError, match="the clip has 0 to 19"):
        read_images(clip, slots)


def test_a_chunk_holds_a_slot():
    with pytest.raises(ValueError, match="chunk_slots"):
        read_patches(plan_clip(probe(Frames(np.zeros((2, 28, 28, 3), np.uint8), 1.0)), VISION), chunk_slots=0)


def test_read_images(clip):
    images = read_images(clip, [12, 2])
    assert images.dtype == np.uint8 and images.shape == (2, 2, 56, 84, 3)
    stamps = [media.read_stamp(image) for image in images.reshape(4, 56, 84, 3)]
    assert stamps == clip.frame_indices[[24, 25, 4, 5]].tolist()
    assert read_images(clip, []).shape == (0, 2, 56, 84, 3)


@pytest.mark.parametrize("preset", ["qwen-vl-utils", "flexselect", "hf"])
def test_memory_and_file_give_the_same_numbers(tmp_path, preset):
    path = media.write(tmp_path / "a.mkv", 33, (64, 96), codec="ffv1", pix_fmt="bgr0")  # lossless
    images = np.stack([media.stamped(index) for index in range(33)])
    from_file = plan_clip(probe(path), VISION, preset=preset, **SMALL)
    from_memory = plan_clip(probe(Frames(images, 25.0)), VISION, preset=preset, **SMALL)
    np.testing.assert_array_equal(from_file.frame_indices, from_memory.frame_indices)
    assert from_file.seconds_per_slot == pytest.approx(from_memory.seconds_per_slot)
    np.testing.assert_array_equal(all_patches(from_file), all_patches(from_memory))


def test_presets_resize_differently(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    clips = {
        p: plan_clip(probe(Frames(images, 1.0)), VISION, preset=p, max_pixels=56 * 84) for p in ("hf", "flexselect")
    }
    assert np.abs(all_patches(clips["hf"]) - all_patches(clips["flexselect"])).max() > 0


@pytest.mark.parametrize("total", [1, 2, 3])
def test_short_files(tmp_path, total):
    clip = plan_clip(probe(media.write(tmp_path / "a.mp4", total)), VISION, **SMALL)
    rows = all_patches(clip)
    assert rows.shape[0] == clip.grid[0] == 1
    first, second = rows[0].reshape(24, 3, 2, 196).swapaxes(0, 2).swapaxes(1, 2)
    assert (first == second).all() == (total == 1)


def test_repeated_frames_cross_chunks(tmp_path):
    path = media.write(tmp_path / "a.mkv", 6, milliseconds=[0, 40, 80, 120, 160, 3000])
    clip = plan_clip(probe(path), VISION, **SMALL)
    assert clip.frame_indices.tolist() == [0, 4, 4, 5, 5, 5]
    np.testing.assert_array_equal(all_patches(clip, chunk_slots=1), all_patches(clip))
    assert [media.read_stamp(image) for image in read_images(clip, [1, 2])[:, 0]] == [4, 5]


def test_upright_video(tmp_path):
    path = media.turned(media.write(tmp_path / "a.mp4", 4, (64, 96)), tmp_path / "b.mp4", (0, 1, -1, 0))
    clip = plan_clip(probe(path), VISION, max_pixels=56 * 84)
    assert (clip.height, clip.width) == (84, 56)
    turned_back = np.rot90(read_images(clip, [1])[0, 0])
    assert media.read_stamp(turned_back) == clip.frame_indices[2]


def test_odd_sizes(tmp_path):
    path = media.write(tmp_path / "a.mkv", 4, (40, 20), codec="ffv1", pix_fmt="bgr0")
    clip = plan_clip(probe(path), VISION, max_pixels=84 * 56)
    assert (clip.height, clip.width) == (28, 28)
    assert all_patches(clip).shape == (2, 4, 1176)


def test_other_vision_sizes(tmp_path):
    vision = VisionConfig(2, 32, 2, 64, 32, (1,), patch=4, merge=2, temporal_patch=4)
    path = media.write(tmp_path / "a.mp4", 40, (64, 96))
    clip = plan_clip(probe(path), vision, fps=12.5, max_pixels=64 * 96)
    assert (clip.height, clip.width, clip.grid) == (64, 96, (5, 16, 24))
    rows = all_patches(clip)
    assert rows.shape == (5, 16 * 24, vision.patch_features)
    images = read_images(clip, [2])[:, 0]
    np.testing.assert_allclose(
        normalised(rows)[2].reshape(-1, 3, 4, 16)[:, :, 0], rows_by_loops(images, 4, 2).reshape(-1, 3, 16), atol=2e-6
    )
