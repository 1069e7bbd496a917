"""What a group says depends neither on padding, nor on the groups beside it, nor on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import parameters, scan, sharding
from adapttoken_jax.config import SIZES
from adapttoken_jax.encoding import encode_video
from adapttoken_jax.errors import UserError
from adapttoken_jax.model import Qwen25VL
from adapttoken_jax.passes import run_prompts
from adapttoken_jax.pipeline import plan_run
from adapttoken_jax.prompt import build_prompt
from adapttoken_jax.selection import group_slots
from tests import tiny
from tests.method.test_oracle import OPTIONS, random_video, settings

QUESTION = "What is in the video?"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("needle"), tiny.SHAPES["needle"])


def answered(model):
    return at.answer(model, random_video(), QUESTION, OPTIONS, settings(model), trace=True)


@pytest.fixture(scope="module")
def single(directory):
    model = at.load(directory)
    return model, answered(model)


@pytest.mark.parametrize(
    "mesh",
    ["data=2,model=4", "data=4,model=2", "data=8,model=1", "fsdp=4,model=2", "data=1,context=8,model=1",
     "data=2,context=2,model=2", "fsdp=2,context=4,model=1"],
)  # fmt: skip
def test_every_mesh_agrees_with_one_device(directory, single, mesh):
    agrees_with_one_device(directory, single[1], mesh)


def test_heads_split_over_all_devices_agree_with_one_device(tmp_path):
    """Eight heads on four keys and values, split eight ways in every pass or only in the final one."""
    directory = tiny.write_checkpoint(tmp_path, tiny.SHAPES["four_kv"])
    alone = answered(at.load(directory))
    for mesh in ("data=1,model=8", "fsdp=8,model=1"):
        agrees_with_one_device(directory, alone, mesh)


def agrees_with_one_device(directory, alone, mesh):
    model = at.load(directory, mesh=mesh)
    split = [p for p in jax.tree.leaves(model.module) if not p.sharding.is_fully_replicated]
    assert bool(split) == ("fsdp" in mesh or "model=1" not in mesh)
    ours = answered(model)
    assert ours.model.mesh == {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    for key in ("budget", "candidates", "selected", "answer_ids"):
        np.testing.assert_array_equal(ours.trace[key], alone.trace[key], err_msg=key)
    # Sharded sums add in another order; logits of some tens then move the exponentials by a share of 1e-5, and of
    # somewhat more where attention is cut into pieces, whose rounding goes through the layers.
    within = 2e-5 if "context" in mesh else 1e-5
    np.testing.assert_allclose(ours.trace["group_entropy"], alone.trace["group_entropy"], rtol=0, atol=within)
    np.testing.assert_allclose(ours.trace["group_relevance"], alone.trace["group_relevance"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "mesh", ["data=2,model=4", "data=4,model=2", "data=8,model=1", "fsdp=2,model=4", "data=2,context=4"]
)
def test_lite_visits_the_same_groups_on_a_mesh(directory, single, mesh):
    """The compiled loop over waves, the last one padded, against one group at a time on the host."""
    model, full = single
    entropies = [g.entropy for g in full.groups]
    config = settings(model, stop_groups=2, stop_agreement=False, stop_entropy=sorted(entropies)[3] + 1e-4)
    alone = at.answer(model, random_video(), QUESTION, OPTIONS, config, "lite", loop="host")
    waves = at.answer(at.load(directory, mesh=mesh), random_video(), QUESTION, OPTIONS, config, "lite")
    assert alone.stop.early and alone.stop == waves.stop and alone.selected == waves.selected


@pytest.fixture(scope="module")
def passes(single):
    """Runs groups through one pass: (groups, padded size, padded suffix) -> outputs."""
    model, _ = single
    config = settings(model)
    video = encode_video(model, plan_run(model.config, random_video(), config, "adapttoken").clip)
    prompt = build_prompt(model.tokenizer, QUESTION, OPTIONS)
    groups = group_slots(video.clip.grid[0], config.slots_per_group)

    def run(indices, size):
        contexts = [
            scan.ContextTokens(
                video.gather(video.coordinates(groups[g])), scan.group_position_ids(video, groups[g], prompt, config)
            )
            for g in indices
        ]
        batch = scan.prompt_batch(model, video, contexts, [prompt], config, size)
        return jax.device_get(run_prompts(model.module.text, batch, scan.group_spec(model, [prompt], config)))

    return run, video.per_slot, [len(g) for g in groups]


def test_padding_changes_nothing(passes):
    run, per_slot, lengths = passes
    group = lengths.index(min(lengths))  # a group that is a slot shorter than the others
    real = lengths[group] * per_slot
    tight, padded = run([group], real), run([group], real + 37)
    np.testing.assert_allclose(padded["relevance"][..., :real], tight["relevance"], atol=1e-7)
    assert not padded["relevance"][..., real:].any()
    np.testing.assert_allclose(padded["entropy"], tight["entropy"], atol=1e-5)


def test_groups_side_by_side_equal_groups_one_by_one(passes):
    run, per_slot, lengths = passes
    size = max(lengths) * per_slot
    together = run(range(len(lengths)), size)
    for g in range(len(lengths)):
        alone = run([g], size)
        np.testing.assert_allclose(together["relevance"][g], alone["relevance"][0], atol=1e-7)
        np.testing.assert_allclose(together["entropy"][g], alone["entropy"][0], atol=1e-5)
        np.testing.assert_array_equal(together["tokens"][g], alone["tokens"][0])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "shape",
    ["data=8", "data=4,model=2", "data=2,model=4", "model=8", "fsdp=8", "fsdp=4,model=2", "fsdp=2,context=2,model=2"],
)
def test_real_sizes_have_shapes_and_shardings(name, shape):
    shape = sharding.MeshShape.parse(shape)
    config, mesh = SIZES[name], sharding.make_mesh(shape)
    if config.text.heads % shape.model:
        with pytest.raises(UserError, match=f"model={shape.model} does not divide the {config.text.heads} attention"):
            sharding.parameter_shardings(config, mesh)
        return
    placed = sharding.parameter_shardings(config, mesh)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(placed["vision"]))
    for parameter, place in parameters.leaves(config, placed):
        local = place.shard_shape(parameter.shape)  # raises where the mesh does not divide
        if parameter.path[0] == "text" and parameter.path[-1] in ("q_kernel", "down_kernel", "embedding"):
            ways = shape.model * (shape.data if shape.fsdp else 1)
            assert np.prod(local) * ways == np.prod(parameter.shape)


def test_weights_are_gathered_and_rows_shared_within_a_program(directory):
    model = at.load(directory, mesh="fsdp=4,model=2")
    specs = lambda layer: {path[0].name: str(x.sharding.spec) for path, x in jax.tree.leaves_with_path(layer)}
    kernels = {name: spec for name, spec in specs(model.module.text.layers).items() if name.endswith("kernel")}
    whole = specs(jax.jit(lambda text: sharding.gathered(text.layer(0), model.mesh, contexts=8))(model.module.text))
    assert len(kernels) == 7 and all("fsdp" in spec and "model" in spec for spec in kernels.values())
    assert all("fsdp" not in whole[name] and "model" in whole[name] for name in kernels)

    rows = np.arange(24.0).reshape(8, 3)
    apart = jax.jit(lambda x: sharding.split_rows(x, model.mesh))(rows)
    assert apart.sharding.shard_shape(rows.shape) == (2, 3)
    assert jax.jit(lambda x: sharding.shared_rows(x, model.mesh))(apart).sharding.is_fully_replicated
    one = rows[:1]  # a context that cannot be split, as in the final pass
    assert (
        sharding.split_rows(one, model.mesh) is one and sharding.gathered(model.module, model.mesh, 1) is model.module
    )


@pytest.mark.parametrize(("mesh", "place"), [("data=4,model=2", "data"), ("data=2,context=2,model=2", "context")])
def test_each_place_of_a_context_takes_a_part_of_the_weights(directory, mesh, place):
    model = at.load(directory, mesh=mesh)
    part = jax.jit(lambda text: sharding.parted(text.layer(0), model.mesh, (place,)))(model.module.text)
    kernels = {path[0].name: x for path, x in jax.tree.leaves_with_path(part) if path[0].name.endswith("kernel")}
    ways = {name: x.size // np.prod(x.sharding.shard_shape(x.shape)) for name, x in kernels.items()}
    assert len(ways) == 7 and {*ways.values()} == {2 * model.mesh.shape[place]}
    assert sharding.parted(part, model.mesh, ()) is part


@pytest.mark.parametrize(
    ("split", "count"), [((), 1), (("data",), 4), (("data", "model"), 8), ((None, "model"), 2), (("model", "data"), 8)]
)
def test_parts_make_up_the_array_once(split, count):
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    array = np.arange(8 * 4 * 3).reshape(8, 4, 3)
    placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*split)))
    found, times = np.zeros_like(array), np.zeros(array.shape, int)
    pieces = list(sharding.parts(placed))
    for index, part in pieces:
        found[index] = part
        times[index] += 1
    np.testing.assert_array_equal(found, array)
    assert len(pieces) == count and (times == 1).all()


def test_contexts_lie_only_where_axes_divide_them():
    mesh = sharding.make_mesh(sharding.MeshShape.parse("fsdp=4,context=2,model=1"))
    lie = {8: ("fsdp", "context"), 4: ("fsdp",), 12: ("fsdp",), 6: (), 1: ()}
    assert {contexts: sharding.batch_axes(mesh, contexts) for contexts in lie} == lie
    assert [contexts for contexts in range(1, 13) if sharding.gathers(mesh, contexts)] == [4, 8, 12]


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((2, 4), ("model", "data"))
    with pytest.raises(UserError, match=r"--mesh: its axes are \('model', 'data'\)"):
        sharding.check_mesh(SIZES["qwen2.5-vl-7b"], mesh)


@pytest.mark.parametrize("name", SIZES)
def test_real_sizes_evaluate_abstractly(name):
    config = SIZES[name]
    model = Qwen25VL(config, parameters.abstract(config, jnp.bfloat16))

    def run(model, embeddings, positions):
        context, _ = model.text.prefill(embeddings, positions, jnp.ones((1, 256), bool))
        return context, model.text.logits(embeddings)

    context, logits = jax.eval_shape(
        run, model, jax.ShapeDtypeStruct((1, 256, config.text.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 3, 256), jnp.int32),
    )  # fmt: skip
    assert context.k.shape == (config.text.layers, 1, 256, config.text.kv_heads, config.text.head_dim)
    assert logits.shape == (1, 256, config.text.vocab) and logits.dtype == jnp.float32
