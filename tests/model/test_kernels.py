"""Every attention kernel against its reference twin. Splash runs in Pallas' interpreter, cuDNN on a GPU alone.

JAX_PLATFORMS=cuda,cpu python -m pytest -n0 tests/model/test_kernels.py -k cudnn_is      # where there is one
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import device_scan, scan, sharding
from adapttoken_jax.encoding import encode_video
from adapttoken_jax.model import attention, kernels
from adapttoken_jax.model.kernels import XLA, Kernel
from adapttoken_jax.passes import run_prompts
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.prompt import build_prompt
from tests import tiny
from tests.method.test_oracle import random_video, settings
from tests.model.test_attention import random

H = 128  # splash takes whole lanes only

# The twins as whole programs: operation by operation, compiling them would be most of the time.
CAUSAL, OVER_CONTEXT, CONTEXT_ATTENTION = map(jax.jit, (XLA.causal, XLA.over_context, attention.context_attention))


def case(B=2, T=130, S=130, N=4, K=2, dtype=jnp.float32):
    """q, scaled, k, v and a mask with padding at the end of the second entry."""
    q, k, v = random(B, T, N, H) / H**0.5, random(B, S, K, H, seed=1), random(B, S, K, H, seed=2)
    valid = np.arange(S) < np.asarray([[S], [S - 9]])
    return *(x.astype(dtype) for x in (q, k, v)), valid


def assert_valid_rows_agree(ours, theirs, valid):
    # Both are float32; the kernel adds up in other blocks.
    np.testing.assert_allclose(np.asarray(ours)[valid], np.asarray(theirs)[valid], atol=5e-6)


def test_splash_is_the_causal_reference():
    q, k, v, valid = case()
    ours = jax.jit(Kernel("splash").causal)(q, k, v, valid)
    assert_valid_rows_agree(ours, CAUSAL(q, k, v, valid), valid)
    assert not np.allclose(ours, jax.jit(Kernel("splash").causal)(q, k, v, np.ones_like(valid)), atol=1e-3)


@pytest.mark.parametrize("T", [1, 8, 9, 20])  # up to eight rows are XLA's
def test_splash_over_a_context_gives_values_and_log_sum_exp(T):
    q, k, v, _ = case(T=T, S=130)
    valid = np.random.default_rng(0).random((2, 130)) < 0.7  # padding anywhere
    ours, lse = jax.jit(Kernel("splash").over_context)(q, k, v, valid)
    values, expected = CONTEXT_ATTENTION(q, k, v, valid)
    np.testing.assert_allclose(ours, values, atol=5e-6)
    np.testing.assert_allclose(lse, expected, atol=5e-6)
    exported = jax.export.export(jax.jit(Kernel("splash").over_context), platforms=["tpu"])(q, k, v, valid)
    assert ("tpu_custom_call" in exported.mlir_module()) == (T > 8)


def test_splash_and_relevance_see_the_same_queries():
    """In bfloat16, with keys as large as Qwen2.5's biases make them: rounded once more, queries would be others."""
    q, k, v, valid = case(T=20, S=300)
    q, k, v = ((scale * x).astype(jnp.bfloat16) for scale, x in ((3.5, q), (27, k), (1, v)))
    _, lse = jax.jit(Kernel("splash").over_context)(q, k, v, valid)
    _, expected = CONTEXT_ATTENTION(q, k, v, valid)
    assert np.abs(expected).max() > 100
    np.testing.assert_allclose(lse, expected, rtol=1e-5)  # of sums in float32
    shares = attention.probabilities_from_lse(q[:, None], k, valid, lse[:, None]).sum(-1)
    np.testing.assert_allclose(shares, 1, atol=2e-3)


@pytest.mark.parametrize("mesh", ["data=2,model=4", "data=4,model=2", "fsdp=2,model=4", "fsdp=4,model=1"])
def test_splash_on_a_mesh_hands_each_device_its_heads(mesh):
    """Two key heads for up to four devices; two entries, which four devices cannot split: over `fsdp` the heads are."""
    kernel = Kernel("splash", sharding.make_mesh(sharding.MeshShape.parse(mesh)))
    q, k, v, valid = case(T=20, S=20)
    ours = jax.jit(kernel.causal)(q, k, v, valid)
    assert_valid_rows_agree(ours, CAUSAL(q, k, v, valid), valid)
    for rows in (q, q[:, :1]):
        ours, lse = jax.jit(kernel.over_context)(rows, k, v, valid)
        values, expected = OVER_CONTEXT(rows, k, v, valid)
        np.testing.assert_allclose(ours, values, atol=5e-6)
        np.testing.assert_allclose(lse, expected, atol=5e-6)


@pytest.mark.parametrize("name", ["xla", "splash"])
@pytest.mark.parametrize(("mesh", "contexts"), [("data=2,context=2,model=2", 2), ("data=4,model=2", 1)])
def test_pieces_of_a_context_are_the_context(name, mesh, contexts, monkeypatch):
    """Each place has its own rows, and of a kernel its own mask; a run of 280 rows is several blocks of splash."""
    monkeypatch.setattr(kernels, "_LONGEST_BLOCK", 256)
    kernel = Kernel(name, sharding.make_mesh(sharding.MeshShape.parse(mesh)))
    pieces = kernel.pieces(contexts, 1120)
    T = pieces.runs * kernel.run(1120 // pieces.runs)
    assert (pieces.count == 4 // contexts and T > 1120) or name == "xla"
    q, k, v, valid = case(T=T, S=T)
    q, k, v, valid = q[:contexts], k[:contexts], v[:contexts], np.arange(T) < 1120 - 9 * np.arange(contexts)[:, None]

    def run(q, k, v, valid):
        rest = jnp.ones((contexts * pieces.count, 3, *q.shape[2:]))
        own = jnp.concatenate([pieces.cut(q, 1), rest], 1)
        past = [pieces.spread(pieces.in_order(x, 1)) for x in (k, v, valid)]
        mixed = kernel.causal(own, *past, rest=rest, pieces=pieces)
        values, lse = kernel.over_context(own[:, :20], *past, pieces=pieces)
        return pieces.join(mixed[:, :-3], 1), mixed[:, -3:], pieces.join(values, 1), pieces.join(lse, 2)

    causal, rest, values, lse = jax.device_get(jax.jit(run)(q, k, v, valid))
    assert_valid_rows_agree(causal, CAUSAL(q, k, v, valid), valid)
    np.testing.assert_array_equal(rest, 1)
    first = pieces.order(T).reshape(pieces.count, -1)[:, :20]  # of each piece
    expected, expected_lse = jax.device_get(OVER_CONTEXT(q[:, np.sort(first.ravel())], k, v, valid))
    in_order = np.argsort(np.argsort(first.ravel()))
    order = pieces.order(len(in_order))  # of `join`, which takes the pieces for whole runs
    np.testing.assert_allclose(values[:, order], expected[:, in_order], atol=5e-6)
    np.testing.assert_allclose(lse[..., order], expected_lse[..., in_order], atol=5e-6)


def test_small_contexts_are_not_cut_and_cudnn_cuts_only_where_it_is_asked_to():
    mesh = sharding.make_mesh(sharding.MeshShape.parse("data=8,model=1"))
    asked = sharding.make_mesh(sharding.MeshShape.parse("data=2,context=4,model=1"))
    count = lambda name, mesh, contexts, rows: Kernel(name, mesh).pieces(contexts, rows).count
    assert (
        count("splash", mesh, 1, 7040) == 8 and count("splash", mesh, 1, 1000) == 1 and count("xla", mesh, 1, 100) == 8
    )
    assert count("cudnn", mesh, 1, 7040) == 1 and count("cudnn", asked, 2, 7040) == 4 == count("cudnn", asked, 1, 7040)
    fsdp = sharding.make_mesh(sharding.MeshShape.parse("fsdp=2,context=4,model=1"))
    assert count("splash", fsdp, 2, 7040) == 4 and count("splash", fsdp, 1, 7040) == 1
    sharers = lambda name, mesh, contexts: Kernel(name, mesh).sharers(contexts)
    assert sharers("splash", mesh, 1) == ("data",) and sharers("splash", mesh, 8) == sharers("cudnn", mesh, 1) == ()
    assert sharers("xla", asked, 1) == sharers("cudnn", asked, 2) == ("context",) and sharers("xla", None, 1) == ()
    assert count("xla", mesh, 1, 8) == 8 and count("xla", mesh, 1, 7) == 1  # 16 runs: twice the rows, and more
    cut = Kernel("splash", sharding.make_mesh(sharding.MeshShape.parse("data=2,context=2,model=2")))
    # Two runs of each question are whole tiles of 32 rows together.
    assert [cut.suffix_run(*given) for given in ((33, 1), (17, 4), (5, 16), (5, 3))] == [48, 20, 5, 16]
    runs = {441: 512, 1024: 1024, 1762: 1792, 1800: 2048, 2048: 2048, 2049: 2304}  # blocks of equal length, up to 1024
    assert {rows: Kernel("splash", mesh).run(rows) for rows in runs} == runs


def test_rows_are_padded_to_what_their_kernel_works_on():
    """Whole blocks of splash, of which the one that pads least; eight rows for others, and for pieces, cut later."""
    splash, mesh = Kernel("splash"), sharding.make_mesh(sharding.MeshShape.parse("data=8,model=1"))
    lengths = {20: 128, 200: 256, 384: 384, 400: 512, 513: 768, 1000: 1024, 7216: 7296, 14248: 14336}
    assert {length: splash.rows(2, length) for length in lengths} == lengths
    for length, rows in lengths.items():
        assert rows % kernels._block(length) == 0 and kernels._block(rows) == kernels._block(length)
    assert kernels._block(1536) == 512  # three of these or four of 384: the longer
    assert Kernel("cudnn").rows(2, 7217) == XLA.rows(2, 7217) == Kernel("splash", mesh).rows(1, 7217) == 7224


def test_the_arguments_for_cudnn_mean_the_reference():
    """The same call through jax.nn's own XLA implementation: cuDNN itself needs a GPU."""
    q, k, v, valid = case()
    ours = kernels._cudnn_causal(q, k, v, valid, implementation="xla")
    assert_valid_rows_agree(ours, CAUSAL(q, k, v, valid), valid)


def test_the_arguments_for_cudnn_mean_the_windows():
    q, k, v = (random(2, 3, 4, 10, 16, seed=seed) for seed in range(3))  # 2 slots, 3 heads, 4 windows of 10 rows
    ours = kernels._cudnn_within(q, k, v, implementation="xla")
    np.testing.assert_allclose(ours, XLA.within(q, k, v), atol=2e-6)
    assert not np.allclose(ours, XLA.within(q, k, v, np.arange(40).reshape(4, 10) % 10 < 9), atol=1e-3)


def test_only_cudnn_on_one_device_takes_windows_of_several_sizes():
    mesh = sharding.make_mesh(sharding.MeshShape.parse("data=2,model=1"))
    assert XLA.pads_windows and Kernel("splash").pads_windows and Kernel("cudnn", mesh).pads_windows
    assert not Kernel("cudnn").pads_windows


on_a_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")


def reference(function, *arrays):
    """In float32 on a CPU."""
    cpu = [
        jax.device_put(np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else None), jax.devices("cpu")[0])
        for x in arrays
    ]
    return np.asarray(jax.jit(function)(*cpu))


# bfloat16 keeps eight bits of the weights, which add up to 1, and of the values, which are at most 5.
HALF = {"atol": 3e-2, "rtol": 0}


@on_a_gpu
@pytest.mark.parametrize("U", [4, 48, 64, 880])
def test_cudnn_is_the_reference_within_windows(U):
    q, k, v = (random(2, 3, 4, U, 80, seed=seed).astype(jnp.bfloat16) for seed in range(3))
    ours = jax.jit(Kernel("cudnn").within)(q, k, v)
    np.testing.assert_allclose(np.asarray(ours, np.float32), reference(XLA.within, q, k, v), **HALF)


@on_a_gpu
@pytest.mark.parametrize("T", [130, 1024])
def test_cudnn_is_the_causal_reference(T):
    """Two key heads for four; padding; rows of a question put in the place of the last ones."""
    q, k, v, valid = case(T=T, S=T, dtype=jnp.bfloat16)
    expected = reference(XLA.causal, q, k, v, valid)
    ours = np.asarray(jax.jit(Kernel("cudnn").causal)(q, k, v, valid), np.float32)
    np.testing.assert_allclose(ours[valid], expected[valid], **HALF)
    rest = jnp.ones_like(q[:, :9])
    ours = np.asarray(jax.jit(Kernel("cudnn").causal)(q, k, v, valid, rest=rest), np.float32)
    np.testing.assert_array_equal(ours[:, -9:], 1)
    np.testing.assert_allclose(ours[0, :-9], expected[0, :-9], **HALF)


@pytest.mark.parametrize("method", ["causal", "over_context"])
def test_splash_lowers_for_a_tpu(method):
    q, k, v, valid = case(T=1000, S=1000, dtype=jnp.bfloat16)
    exported = jax.export.export(jax.jit(getattr(Kernel("splash"), method)), platforms=["tpu"])(q, k, v, valid)
    assert "tpu_custom_call" in exported.mlir_module()


def test_the_resolver_takes_kernels_only_where_they_run_exactly_enough():
    chosen = lambda *args, **kwargs: kernels.resolve(*args, **kwargs).name
    assert chosen(jnp.bfloat16, 128, platform="tpu") == "splash"
    assert chosen(jnp.bfloat16, 128, platform="gpu") == "cudnn"
    assert chosen(jnp.bfloat16, 128, platform="cpu") == "xla"
    assert {chosen(jnp.float32, 128, platform=platform) for platform in ("tpu", "gpu", "cpu")} == {"xla"}
    assert chosen(jnp.bfloat16, 100, platform="gpu") == "xla" and chosen(jnp.bfloat16, 80, platform="gpu") == "cudnn"
    assert chosen(jnp.bfloat16, 80, platform="tpu") == "xla" and chosen(jnp.float16, 256, platform="gpu") == "xla"
    assert chosen(jnp.float32, 128) == "xla"  # any machine


def test_attention_xla_leaves_the_kernels_out(tmp_path, monkeypatch):
    shape = tiny.TinyShape(width=256, heads=2, kv_heads=1, sections=(16, 24, 24), layers=2)
    path = tiny.write_checkpoint(tmp_path, shape, dtype="bfloat16")
    auto, without = (at.load(path, dtype="bfloat16", attention=name) for name in ("auto", "xla"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert (auto.kernel.name, auto.vision_kernel.name) == ("splash", "windows")
    assert without.kernel == without.vision_kernel == XLA
    with pytest.raises(at.UserError, match="--attention=flash: choose one of auto, xla"):
        at.load(path, attention="flash")


def test_a_group_pass_with_splash_is_the_pass_with_xla(tmp_path):
    shape = tiny.TinyShape(width=256, heads=2, kv_heads=1, sections=(16, 24, 24), layers=2, seed=12)
    model = at.load(tiny.write_checkpoint(tmp_path, shape))
    config = settings(model, slots_per_group=8)
    video = encode_video(model, plan_run(model.config, random_video(20), config, "adapttoken").clip)
    prompts = [build_prompt(model.tokenizer, "Why?", None), build_prompt(model.tokenizer, "What?", ["this", "that"])]
    log = scan.ScanLog.start(video, prompts, config, None)
    [chunk] = device_scan._chunks(model, video, log.groups, prompts, config, width=1)
    spec = scan.group_spec(model, prompts, config)
    run = lambda kernel: run_prompts(
        model.module.text, device_scan._wave_of(chunk.batch, 0), dataclasses.replace(spec, kernel=kernel)
    )
    ours, theirs = run(Kernel("splash")), run(XLA)
    for name in ("relevance", "entropy", "first_logits"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4 if name != "relevance" else 1e-6)
    np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
