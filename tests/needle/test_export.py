"""The exported directory: what this library reads back, and what transformers reads."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import adapttoken_jax as at
from adapttoken_jax import needle, parameters, prompt
from adapttoken_jax.errors import UserError
from adapttoken_jax.needle import training
from adapttoken_jax.needle.export import export
from adapttoken_jax.needle.tokenizer import chat_tokenizer
from adapttoken_jax.video import PIXEL_MEAN, PIXEL_STD


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A micro model of random values: (directory, config, values)."""
    config = training.needle_config(chat_tokenizer(), width=32, layers=2, ff=32, vision_width=16)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=2, ff=16))
    rng = np.random.default_rng(0)
    values = parameters.tree(config, lambda p: jax.numpy.asarray(rng.normal(size=p.shape) * 0.2, np.float32))
    directory = tmp_path_factory.mktemp("export") / "model"
    export(directory, config, values)
    return directory, config, values


def test_this_library_reads_back_what_was_written(exported):
    directory, config, values = exported
    model = at.load(directory)
    assert model.config == config
    for (row, ours), (_, theirs) in zip(
        parameters.leaves(config, values), parameters.leaves(config, _values(model)), strict=True
    ):
        own = tuple(map(slice, row.shape))  # the model widens the vision tower's feed-forward blocks
        assert np.array_equal(ours, theirs[own]) and np.abs(theirs).sum() == np.abs(theirs[own]).sum(), row.path
    assert model.tokenizer.eos[0] == chat_tokenizer().eos[0]
    question = needle.scene(0, "test", 32, "pair").question
    ours, theirs = (
        prompt.build_prompt(t, question.text, question.options) for t in (chat_tokenizer(), model.tokenizer)
    )
    assert ours == theirs  # training and answering see the same prompt


def _values(model) -> dict:
    """The model's parameters as the table's nested dictionary."""

    def leaf(parameter):
        node = model.module
        for name in parameter.path:
            node = getattr(node, name)
        return node[...]

    return parameters.tree(model.config, leaf)


def test_transformers_reads_the_tokenizer_and_the_template(exported):
    transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported[0])
    ours = chat_tokenizer()
    assert tokenizer.eos_token_id == ours.eos[0]
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Describe the star."}]}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    built = prompt.build_prompt(ours, "Describe the star.")
    assert tokenizer(text).input_ids == [*built.prefix_ids, ours.video_pad, *built.suffix_ids]


def test_transformers_computes_the_same_logits(exported):
    """A text prompt and the vision tower, float32: the weights, their names and the sizes in config.json agree."""
    torch = pytest.importorskip("torch", reason="the test extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
    directory, config, values = exported
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    ours = training.Qwen25VL(config, values)
    ids = np.asarray(prompt.build_prompt(chat_tokenizer(), "What colour is the star?").prefix_ids[:-1])
    positions = np.broadcast_to(np.arange(len(ids)), (1, 3, len(ids)))
    found = ours.text.prefill(ours.text.embed(ids)[None], positions, np.ones((1, len(ids)), bool), return_layers=True)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)[None]).logits[0].numpy()
    assert np.allclose(ours.text.logits(found[1]["layers"][-1])[0], expected, rtol=1e-4, atol=1e-4)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    assert np.allclose(settings["image_mean"], PIXEL_MEAN / 255) and np.allclose(settings["image_std"], PIXEL_STD / 255)
    assert settings["min_pixels"] == 28 * 28  # a needle frame is not enlarged


def test_an_existing_directory_is_not_written_over(exported):
    with pytest.raises(UserError, match="already exists"):
        export(*exported)
