"""The two resizers, against torch, a dense matrix product and a literal loop over the kernel's formula."""

import numpy as np
import pytest
from PIL import Image

from adapttoken_jax.video import resize_bicubic, resize_pillow
from adapttoken_jax.video.resize import bicubic_weights

SIZES = [
    ((72, 128), (28, 56)),
    ((101, 67), (56, 84)),
    ((40, 20), (84, 56)),
    ((30, 300), (28, 28)),
    ((56, 56), (56, 84)),
]


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def dense(image, height, width):
    """The reference twin: two full matrices, in float64."""
    rows, cols = bicubic_weights(image.shape[0], height), bicubic_weights(image.shape[1], width)
    return np.einsum("ij,jkc,lk->ilc", rows.astype(float), image.astype(float), cols.astype(float))


def weight_by_formula(size, new_size, out):
    """One output pixel's weights, straight from the definition of the stretched Keys kernel."""
    stretch = max(size / new_size, 1.0)
    centre = size / new_size * (out + 0.5)
    weights = np.zeros(size)
    for i in range(size):
        x = abs(i + 0.5 - centre) / stretch
        if x < 1:
            weights[i] = 1.5 * x**3 - 2.5 * x**2 + 1
        elif x < 2:
            weights[i] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum()


@pytest.mark.parametrize(("size", "new_size"), [(72, 28), (28, 72), (30, 30), (5, 28), (720, 308)])
def test_weights_follow_the_formula(size, new_size):
    weights = bicubic_weights(size, new_size)
    for out in {0, 1, new_size // 2, new_size - 1}:
        np.testing.assert_allclose(weights[out], weight_by_formula(size, new_size, out), atol=2e-5)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_equals_torch(before, after):
    torch = pytest.importorskip("torch")
    image = noise(*before)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(tensor, after, mode="bicubic", antialias=True, align_corners=False)
    expected = resized[0].permute(1, 2, 0).clamp(0, 255).round().numpy().astype(int)
    different = np.abs(resize_bicubic(image, *after) - expected)
    assert different.max() <= 1  # where the sum lies half-way between two levels
    assert different.sum() <= 2


def test_equals_torch_at_full_size():
    torch = pytest.importorskip("torch")
    image = noise(720, 1280)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(tensor, (308, 532), mode="bicubic", antialias=True, align_corners=False)
    expected = resized[0].permute(1, 2, 0).clamp(0, 255).round().numpy().astype(int)
    different = np.abs(resize_bicubic(image, 308, 532) - expected)
    assert different.max() <= 1
    assert different.mean() < 5e-5


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_bands_equal_the_dense_product(before, after, channels):
    image = noise(*before, channels)
    exact = np.clip(dense(image, *after), 0, 255)
    assert np.abs(resize_bicubic(image, *after) - exact).max() < 0.501


def test_a_turned_view_resizes_like_its_copy():
    image = np.rot90(noise(64, 96))
    assert not image.flags.c_contiguous
    for resize in (resize_bicubic, resize_pillow):
        np.testing.assert_array_equal(resize(image, 84, 56), resize(image.copy(), 84, 56))


@pytest.mark.parametrize("resize", [resize_bicubic, resize_pillow])
def test_simple_pictures(resize):
    flat = np.full((50, 70, 3), (7, 130, 255), np.uint8)
    np.testing.assert_array_equal(resize(flat, 28, 56), np.broadcast_to([7, 130, 255], (28, 56, 3)))
    image = noise(28, 56)
    np.testing.assert_array_equal(resize(image, 28, 56), image)
    edge = np.zeros((40, 40, 3), np.uint8)
    edge[:, 20:] = 255  # overshoots on both sides and is clamped
    assert resize(edge, 56, 56).min() == 0 and resize(edge, 56, 56).max() == 255


def test_symmetry():
    image = noise(60, 90)
    np.testing.assert_allclose(resize_bicubic(image, 28, 56)[:, ::-1], resize_bicubic(image[:, ::-1], 28, 56), atol=1)
    np.testing.assert_array_equal(
        resize_bicubic(image.swapaxes(0, 1), 56, 28), resize_bicubic(image, 28, 56).swapaxes(0, 1)
    )


def test_pillow_is_pillow():
    image = noise(100, 60)
    expected = np.asarray(Image.fromarray(image).resize((56, 84), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_pillow(image, 84, 56), expected)


def test_the_two_resizers_are_close_but_not_the_same():
    different = np.abs(resize_bicubic(noise(72, 128), 28, 56).astype(int) - resize_pillow(noise(72, 128), 28, 56))
    assert 0 < different.max() <= 23
