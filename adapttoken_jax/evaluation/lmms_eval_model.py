"""This library as a model of lmms-eval (0.7), through the entry-point group `lmms_eval.models`.

lmms-eval is an extra and is imported only when it asks for the model. Requests about one video that come together are
answered in one scan.

    lmms-eval --model adapttoken --model_args pretrained=DIR,method=lite,budget=4096 --tasks videomme
"""

import dataclasses
import itertools
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from adapttoken_jax.config import METHODS, AdaptTokenConfig
from adapttoken_jax.errors import UserError
from adapttoken_jax.loading import load
from adapttoken_jax.pipeline import answer
from adapttoken_jax.prompt import Ask


class AdaptToken(lmms):
    """A checkpoint and a method. `settings` are fields of `AdaptTokenConfig`.

    lmms-eval ends an argument at a comma: the axes of a `mesh` are divided by colons, as in `mesh=data=4:model=2`.

    Raises:
      UserError: a checkpoint, method or setting that cannot be used.
    """

    is_simple = False

    def __init__(self, pretrained: str, method: str = "adapttoken", mesh=None, dtype=None, attention="auto",
                 batch_size=1, device=None, **settings):  # fmt: skip
        super().__init__()
        if method not in METHODS:
            raise UserError(f"method={method}: choose one of {', '.join(METHODS)}")
        self._model, self._method = load(pretrained, mesh and mesh.replace(":", ","), dtype, attention), method
        self._config = AdaptTokenConfig.for_model(self._model.config, **settings)

    def generate_until(self, requests) -> list[GenerationResult]:
        """Answers chat requests, in their order; neighbours about one video are asked together."""
        asked = [self._asked(request) for request in requests]
        found: list[GenerationResult] = []
        for (video, settings), group in itertools.groupby(asked, key=lambda each: each[:2]):
            config = dataclasses.replace(self._config, **settings)
            results = answer(self._model, video, [ask for _, _, ask in group], config=config, method=self._method)
            counts = (TokenCounts(input_tokens=result.selected.count) for result in results)
            found += [GenerationResult(result.answer, count) for result, count in zip(results, counts, strict=True)]
        return found

    def _asked(self, request) -> tuple[str, dict[str, Any], Ask]:
        """The video, the settings that it asks for, and what to say, of one request."""
        _, doc_to_messages, settings, doc_id, task, split = request.args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        _, videos, _ = chat.extract_media()
        if len(videos) != 1:
            raise UserError(f"{task}: a request with {len(videos)} videos; this model takes exactly one")
        texts = dict.fromkeys(("system", "user", "assistant"), "")
        for message in chat.messages:
            if message.role not in texts:
                raise UserError(f"{task}: a message of the role {message.role}; this model takes {', '.join(texts)}")
            texts[message.role] += "".join(part.text for part in message.content if part.type == "text")
        ask = Ask(texts["user"], system=texts["system"] or None, begin=texts["assistant"])
        wanted = {"max_answer_tokens": settings.get("max_new_tokens")}
        if settings.get("temperature"):  # a greedy task may have any top_p
            wanted |= {"sampling_temperature": settings["temperature"], "top_p": settings.get("top_p")}
        return str(videos[0]), {name: value for name, value in wanted.items() if value is not None}, ask

    def loglikelihood(self, requests) -> Any:
        """Refused: the final prompt differs with the question, so that options are generated, not scored."""
        raise UserError("adapttoken answers generate_until tasks only; choose a task that generates")

    def generate_until_multi_round(self, requests) -> Any:
        """Refused: one question, one answer."""
        raise UserError("adapttoken answers one round only; choose a task of one round")
