"""Windows and M-RoPE ids against transformers' own functions, independent formulas and literals."""

import dataclasses

import numpy as np
import pytest

from adapttoken_jax import geometry
from adapttoken_jax.config import SIZES
from tests import tiny

VISION = SIZES["qwen2.5-vl-7b"].vision


@pytest.mark.parametrize("window", [28, 56, 84, 112])
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (10, 14), (2, 30), (22, 40), (18, 6)])
@pytest.mark.parametrize("padded", [True, False])
def test_windows_are_those_of_transformers(grid, window, padded):
    torch = pytest.importorskip("torch")
    from transformers.vision_utils import get_vision_window_index

    layout = geometry.window_layout(dataclasses.replace(VISION, window=window), *grid, padded)
    order, bounds = get_vision_window_index(torch.tensor([[1, *grid]]), 2, window, 14)
    theirs = [set(part.tolist()) for part in np.split(order.numpy(), np.unique(bounds.numpy())[1:-1] // 4)]
    sizes = [tokens for count, tokens in layout.windows for _ in range(count)]
    cut = lambda array: np.split(array, np.cumsum(sizes)[:-1])
    ours = [set(own[real].tolist()) for own, real in zip(cut(layout.token), cut(layout.valid), strict=True)]
    # Ours come by size, theirs in raster order.
    assert sum(sizes) == len(layout.token) and ours == sorted(theirs, key=len, reverse=True)
    assert layout.valid.all() or padded
    assert len(layout.windows) == 1 or not padded


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (10, 14), (2, 30), (22, 40)])
def test_every_token_has_one_place_and_its_patches_their_coordinates(grid, padded):
    layout = geometry.window_layout(VISION, *grid, padded)
    tokens = grid[0] * grid[1] // 4
    assert layout.token[layout.place].tolist() == list(range(tokens))
    assert layout.valid[layout.place].all() and layout.valid.sum() == tokens
    rows, cols = (x.reshape(-1, 4)[layout.place] for x in (layout.rows, layout.cols))
    for token in range(tokens):
        row, col = divmod(token, grid[1] // 2)
        assert rows[token].tolist() == [2 * row, 2 * row, 2 * row + 1, 2 * row + 1]
        assert cols[token].tolist() == [2 * col, 2 * col + 1, 2 * col, 2 * col + 1]


def test_a_frame_smaller_than_a_window_is_not_padded():
    assert geometry.window_layout(VISION, 4, 6).windows == ((1, 6),)
    layout = geometry.window_layout(VISION, 4, 20)
    assert layout.windows == ((3, 8),) and layout.valid.reshape(3, 8).sum(1).tolist() == [8, 8, 4]


def test_without_padding_windows_of_equal_size_are_neighbours():
    assert geometry.window_layout(VISION, 4, 20, padded=False).windows == ((2, 8), (1, 4))
    layout = geometry.window_layout(VISION, 10, 10, padded=False)  # 5 x 5 tokens: 16, twice 4, and the corner
    assert layout.windows == ((1, 16), (2, 4), (1, 1))
    assert layout.token[16:].tolist() == [4, 9, 14, 19, 20, 21, 22, 23, 24]


def test_time_ids_are_float32_products():
    assert geometry.time_ids(np.arange(6), 0.26, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert geometry.time_ids([100], 0.29, 1).tolist() == [29]  # 28.999999999999996 in float64
    assert geometry.time_ids([90], 0.7, 3).tolist() == [189]  # 90 x 2.1 is below it, in float32 and in float64


def test_position_ids_of_a_small_prompt_literally():
    ids = geometry.token_position_ids(2, np.array([0, 0, 2, 2]), np.zeros(4), np.array([0, 1, 0, 1]))
    assert ids.tolist() == [[2, 2, 4, 4], [2, 2, 2, 2], [2, 3, 2, 3]] and ids.dtype == np.int32
    assert geometry.text_start("legacy", 2, ids, 2, 4, 2) == 5
    assert geometry.text_start("hf5", 2, ids, 2, 4, 2) == 4
    assert geometry.text_start("legacy", 2, ids[:, :0], 2, 4, 2) == 2
    # The columns of a wide frame reach further than its time.
    wide = geometry.token_position_ids(2, np.zeros(4), np.zeros(4), np.arange(4))
    assert geometry.text_start("legacy", 2, wide, 2, 8, 2) == 6


def test_the_rules_on_32_slots_as_published():
    starts = [tiny.position_ids((32, 4, 6), 4, 1, rule, seconds_per_slot=1.0)[:, -1] for rule in ("legacy", "hf5")]
    assert [start.tolist() for start in starts] == [[67] * 3, [7] * 3]


@pytest.mark.parametrize("grid", [(3, 4, 6), (5, 10, 4), (1, 2, 18)])
def test_hf5_ids_are_those_of_transformers(grid):
    torch = pytest.importorskip("torch")
    import transformers

    with torch.device("meta"):
        model = transformers.Qwen2_5_VLModel(transformers.Qwen2_5_VLConfig(vision_config={"tokens_per_second": 2}))
    visual = int(np.prod(grid)) // 4
    kinds = torch.tensor([[0] * 4 + [2] * visual + [0] * 5])
    theirs, _ = model.get_rope_index(
        torch.zeros_like(kinds), kinds, video_grid_thw=torch.tensor([grid]), second_per_grid_ts=torch.tensor([1.5])
    )
    ours = tiny.position_ids(grid, 4, 5, "hf5")
    np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


def test_buckets_pad_little_and_are_few():
    assert [geometry.bucket(n, 64) for n in (1, 64, 65, 1024, 1025, 2048, 2049, 4096, 4097)] == [
        64, 64, 128, 1024, 1088, 2048, 2176, 4096, 4352,
    ]  # fmt: skip
    sizes = {n: geometry.bucket(n, 64) for n in range(1, 20_000)}
    assert all(0 <= size - n < max(64, n / 16) for n, size in sizes.items())
    assert len(set(sizes.values())) == 16 + 4 * 16 + 4  # up to 1024, four doublings of it, and up to 20 480
    assert sorted({geometry.bucket(n, 1, 2) for n in range(1, 33)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert sorted({geometry.bucket(n, 16, 4) for n in range(1, 257)}) == [
        16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256
    ]  # fmt: skip


def test_round_up():
    assert [geometry.round_up(n, 32) for n in (1, 32, 33, 0)] == [32, 32, 64, 0]
