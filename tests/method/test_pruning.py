"""Pruning after the reference layer: against transformers' layers run one by one on the rows that are left."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import adapttoken_jax as at
from adapttoken_jax import costs
from adapttoken_jax.parity import pytorch_method as oracle
from tests.method.test_device_scan import assert_same
from tests.method.test_oracle import OPTIONS, random_video, settings

VIDEO = random_video()  # 23 slots of 2 x 3 tokens; 6 groups of up to 4 slots, the last one padded
QUESTIONS, CHOICES = ["What is in the video?", "And what is at the end of it?"], [OPTIONS, None]
SHARE = 0.4


def ask(model, share, questions=QUESTIONS, options=CHOICES, loop="device", **given):
    config = settings(model, keep_after_reference=share, reference_layer=0, **given)
    return at.answer(model, VIDEO, questions, options, config, trace=True, loop=loop)


def run_layers(decoder, x, ids, layers):
    """Rows x[S, D] with M-RoPE ids [3, S] through some of the decoder's layers, causally."""
    ids = torch.as_tensor(ids)[:, None]
    mask = torch.full((len(x), len(x)), -math.inf).triu(1)[None, None]
    for layer in layers:
        turn = decoder.rotary_emb(x[None], ids)
        out = layer(x[None], attention_mask=mask, position_embeddings=turn)
        x = (out if isinstance(out, torch.Tensor) else out[0])[0]
    return x


def pruned_logits(torch_model, x, ids, dropped, reference):
    """Logits after the last row, where `dropped` rows end with the reference layer."""
    decoder = torch_model.model.language_model
    x = run_layers(decoder, x, ids, decoder.layers[: reference + 1])
    rows = np.setdiff1d(np.arange(len(x)), dropped)
    x = run_layers(decoder, x[rows], ids[:, rows], decoder.layers[reference + 1 :])
    return torch_model.lm_head(decoder.norm(x[-1])).numpy()


def answer_of_group(torch_model, trace, group, dropped, tokens, end_ids):
    """Logits of the tokens of one question's greedy answer from one group: [A, V], A at most `tokens`."""
    slots = [slot for slot in trace["groups"][group] if slot >= 0]
    visual = trace["visual_features"][slots].reshape(-1, trace["visual_features"].shape[-1])
    prefix, suffix = len(trace["prefix_ids"]), len(trace["suffix_ids"])
    ids = trace["group_position_ids"][group][:, : prefix + len(visual) + suffix]
    x = oracle.prompt_embeddings(torch_model, trace["prefix_ids"], visual, trace["suffix_ids"])
    logits = []
    for _ in range(tokens):
        logits.append(pruned_logits(torch_model, x, ids, prefix + dropped, 0))
        if int(logits[-1].argmax()) in end_ids:
            return np.stack(logits[: max(1, len(logits) - 1)])  # the end counts only where it comes first
        x = torch.cat([x, oracle.embed(torch_model, [int(logits[-1].argmax())])])
        ids = np.concatenate([ids, ids[:, -1:] + 1], 1)
    return np.stack(logits)


@torch.no_grad()
def test_pruned_groups_match_transformers_layers(load):
    """Two questions share what is kept: the tokens most relevant to either. One answers a letter, one five tokens."""
    model, torch_model = load("base")
    whole, pruned = ask(model, 1.0), ask(model, SHARE)
    for full, ours in zip(whole, pruned, strict=True):
        # The reference layer is below what is pruned.
        np.testing.assert_allclose(ours.trace["group_relevance"], full.trace["group_relevance"], atol=1e-6)
    for g in range(len(whole[0].groups)):
        relevance = np.stack([each.trace["group_relevance"][g] for each in whole]).max(0)
        real = int(np.isfinite(relevance).sum())
        kept = np.argsort(-relevance[:real], kind="stable")[: math.ceil(SHARE * real)]
        dropped = np.setdiff1d(np.arange(real), kept)
        assert len(dropped) == (14 if real == 24 else 10)  # of 24 tokens 10 are kept, of 18 in the last group 8
        for ours, tokens in zip(pruned, (1, 5), strict=True):
            logits = answer_of_group(torch_model, ours.trace, g, dropped, tokens, model.tokenizer.eos)
            first = ours.trace["group_first_logits"][g]
            assert np.abs(first - logits[0]).max() < 1e-4 * np.abs(logits[0]).max()
            assert ours.groups[g].entropy == pytest.approx(oracle.answer_entropy(logits, 0.1), abs=1e-4)
    assert any(
        np.abs(ours.trace["group_first_logits"] - full.trace["group_first_logits"]).max() > 1e-3
        for full, ours in zip(whole, pruned, strict=True)
    )


def test_a_share_that_keeps_all_is_the_unpruned_pass(load):
    """Just below one, ceil keeps every token: the two halves of the layers give what they give in one piece."""
    model = load("base")[0]
    for whole, halves in zip(ask(model, 1.0), ask(model, 1 - 1e-6), strict=True):
        assert_same(halves, whole)


def test_after_the_last_layer_there_is_nothing_to_prune(load):
    model = load("base")[0]
    last = model.config.text.layers - 1
    config = settings(model, reference_layer=last)
    whole, pruned = (
        at.answer(
            model, VIDEO, QUESTIONS[0], OPTIONS, dataclasses.replace(config, keep_after_reference=share), trace=True
        )
        for share in (1.0, 0.1)
    )
    assert_same(pruned, whole)
    assert pruned.cost.flops == whole.cost.flops


def test_both_loops_agree(load):
    model, given = load("base")[0], {"similarity": "reference_layer", "group_order": "bit_reversed"}
    for device, host in zip(ask(model, SHARE, **given), ask(model, SHARE, loop="host", **given), strict=True):
        assert_same(device, host)


@pytest.fixture(scope="module")
def of_one_device(load):
    return ask(load("base")[0], SHARE)


@pytest.mark.parametrize("mesh", ["fsdp=4,model=2", "data=2,context=2,model=2"])
def test_meshes_agree(load, of_one_device, mesh):
    for ours, alone in zip(ask(at.load(load("base")[0].path, mesh=mesh), SHARE), of_one_device, strict=True):
        assert ours.answer == alone.answer and ours.selected == alone.selected
        for key in ("group_entropy", "group_relevance"):  # sharded sums add in another order
            np.testing.assert_allclose(ours.trace[key], alone.trace[key], rtol=0, atol=1e-5, err_msg=key)


def test_what_is_kept_of_a_group_does_not_depend_on_its_padding(load):
    """The same groups of 12 and 11 slots, padded to 12 and 19."""
    model = load("base")[0]
    exact, padded = (ask(model, SHARE, slots_per_group=slots) for slots in (12, 19))
    for ours, alone in zip(padded, exact, strict=True):
        assert [len(g.slots) for g in ours.groups] == [12, 11] and ours.selected == alone.selected
        np.testing.assert_allclose(ours.trace["group_entropy"], alone.trace["group_entropy"], atol=1e-5)
        assert ours.cost.flops == alone.cost.flops


def test_operations_are_those_of_the_layers(load):
    """Literal sums over the layers of a tiny model: all of a context up to the reference layer, what is kept above."""
    config = load("base")[0].config
    layers, context, suffix, kept = config.text.layers, 50, 7, 20
    one = lambda new, past=0: costs.text_flops(config, new, past) / layers
    # The last layer makes keys and values alone.
    keys = 2 * kept * config.text.width * 2 * config.text.kv_heads * config.text.head_dim
    upper = (layers - 2) * one(kept) + keys + (layers - 1) * one(suffix, kept)
    expected = one(context) + one(suffix, context) + upper + costs.head_flops(config, 1)
    assert costs.prompt_flops(config, context, suffix, 0, costs.Pruned(0, kept)) == pytest.approx(expected, rel=1e-12)
    ours = {share: ask(load("base")[0], share)[0].cost.flops for share in (1.0, 0.5)}
    assert ours[0.5] < ours[1.0]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_share_that_cannot_be_names_its_flag(share):
    with pytest.raises(at.UserError, match="--keep_after_reference"):
        at.AdaptTokenConfig(keep_after_reference=share)
