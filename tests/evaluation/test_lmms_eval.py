"""The model that lmms-eval sees, between its requests and answers; lmms-eval's own classes are stood in for."""

import dataclasses
import importlib
import sys
import types

import pytest

import adapttoken_jax as at
from adapttoken_jax.errors import UserError
from adapttoken_jax.evaluation.lmms_eval_plugin import manifest
from adapttoken_jax.needle import scene, write_mp4
from adapttoken_jax.prompt import Ask

MODEL = "adapttoken_jax.evaluation.lmms_eval_model"
SETTINGS = {"max_frames": 48, "fps": 4.0, "slots_per_group": 12, "budget": 16}


class Part(types.SimpleNamespace):
    """A message, or a part of its content."""


class ChatMessages:
    """Messages of text and video, as lmms-eval's protocol hands them on."""

    def __init__(self, messages):
        parts = lambda message: [Part(**part) for part in message["content"]]
        self.messages = [Part(role=message["role"], content=parts(message)) for message in messages]

    def extract_media(self):
        found = [part for message in self.messages for part in message.content]
        return [], [part.url for part in found if part.type == "video"], []


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


class Lmms:
    """The base class: the evaluator gives a model the documents of its tasks."""

    def __init__(self):
        self.task_dict = {}


@dataclasses.dataclass
class ModelManifest:
    model_id: str
    chat_class_path: str


@pytest.fixture
def model_class(monkeypatch):
    """The class that the plug-in names."""
    contents = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }  # fmt: skip
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODEL, raising=False)
    path, _, name = manifest().chat_class_path.rpartition(".")
    assert (manifest().model_id, path) == ("adapttoken", MODEL)
    yield getattr(importlib.import_module(path), name)
    sys.modules.pop(MODEL, None)  # its classes are the stand-ins'


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    for seed in range(2):
        write_mp4(scene(seed, "test", 48, "pair"), directory / f"{seed}.mp4", 4.0)
    return [str(directory / f"{seed}.mp4") for seed in range(2)]


def requests(model, asked, **settings):
    """One request per (video, question, system or None), as lmms-eval makes them from a task's documents."""

    def messages(doc):
        video, question, system = doc
        said = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        content = [{"type": "video", "url": video}, {"type": "text", "text": question}]
        return [*said, {"role": "user", "content": content}]

    model.task_dict["task"] = {"test": asked}
    return [types.SimpleNamespace(args=("", messages, settings, i, "task", "test")) for i in range(len(asked))]


def test_requests_are_answered_in_order_as_if_asked_here(model_class, clips):
    model = model_class(pretrained="needle", method="lite", mesh="data=1:model=1", **SETTINGS)
    questions = ["Which colour is the ring?\nA. green\nB. red", "Which colour is the star?\nA. blue\nB. white"]
    asked = [(clips[0], questions[0], None), (clips[0], questions[1], "Be brief."), (clips[1], questions[0], None)]
    found = model.generate_until(requests(model, asked, max_new_tokens=3, until=["\n"]))
    loaded = at.load("needle", mesh="data=1,model=1")
    config = at.AdaptTokenConfig.for_model(loaded.config, **SETTINGS, max_answer_tokens=3)
    for (video, question, system), result in zip(asked, found, strict=True):
        alone = at.answer(loaded, video, Ask(question, system=system), config=config, method="lite")
        assert (result.text, result.token_counts.input_tokens) == (alone.answer, alone.selected.count)


def test_parts_of_a_chat_and_sampling(model_class, clips):
    """Parts of a message follow one another as they are, and an assistant's turn begins the answer."""
    model = model_class(pretrained="needle", **SETTINGS)
    (request,) = requests(model, [(clips[0], "Which colour", None)], temperature=0.5, top_p=0.9, max_new_tokens=2)
    name, messages, *others = request.args
    more = lambda doc: [
        {"role": "user", "content": [*messages(doc)[0]["content"], {"type": "text", "text": " is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is"}]},
    ]
    (found,) = model.generate_until([types.SimpleNamespace(args=(name, more, *others))])
    loaded = at.load("needle")
    own = {"sampling_temperature": 0.5, "top_p": 0.9, "max_answer_tokens": 2}
    config = at.AdaptTokenConfig.for_model(loaded.config, **SETTINGS, **own)
    assert found.text == at.answer(loaded, clips[0], Ask("Which colour is it?", begin="It is"), config=config).answer


def test_what_it_cannot_do_is_refused(model_class, clips):
    with pytest.raises(UserError, match=r"^method=best: choose one of adapttoken, "):
        model_class(pretrained="needle", method="best")
    model = model_class(pretrained="needle", **SETTINGS)
    (request,) = requests(model, [(clips[0], "Which?", None)])
    two = lambda doc: [{"role": "user", "content": [{"type": "video", "url": doc[0]}] * 2}]
    with pytest.raises(UserError, match=r"^task: a request with 2 videos; this model takes exactly one$"):
        model.generate_until([types.SimpleNamespace(args=(request.args[0], two, *request.args[2:]))])
    tool = lambda doc: [*request.args[1](doc), {"role": "tool", "content": [{"type": "text", "text": "4"}]}]
    with pytest.raises(
        UserError, match=r"^task: a message of the role tool; this model takes system, user, assistant$"
    ):
        model.generate_until([types.SimpleNamespace(args=(request.args[0], tool, *request.args[2:]))])
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match=r"^adapttoken answers "):
            refused([request])
