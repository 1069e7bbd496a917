"""Final prompts of many questions, answered as one batch.

An arm is a generator: it yields a `Prompted` whenever it needs an answer and is sent the `Reply`. `run_together` drives
all arms of all questions at once, so that even stop rules that ask again and again fill a batch.
"""

import dataclasses
import functools
from collections.abc import Generator, Sequence

import jax
import numpy as np

from adapttoken_jax import scan
from adapttoken_jax.config import AdaptTokenConfig
from adapttoken_jax.encoding import VisualTokens
from adapttoken_jax.loading import Model
from adapttoken_jax.passes import PassSpec, PromptBatch, prompts_pass
from adapttoken_jax.prompt import Prompt

_BATCHES = (8, 64)  # sizes that a batch is padded to


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A final prompt: a question over some visual tokens, int64[B, 3] (slot, row, column) of `video`."""

    video: VisualTokens
    prompt: Prompt
    tokens: np.ndarray
    config: AdaptTokenConfig
    renumber: bool

    @property
    def key(self):
        """Equal for prompts that get the same answer."""
        return id(self.video), self.prompt.suffix_ids, self.tokens.tobytes(), self.renumber, self.config.mrope

    def batch(self, model: Model) -> PromptBatch:
        """One context and one question, as `scan.final_reply` makes them."""
        ids = self.video.position_ids(self.tokens, len(self.prompt.prefix_ids), self.renumber)
        context = scan.ContextTokens(self.video.gather(self.tokens), ids)
        limit = self.config.max_answer_tokens
        return scan.prompt_batch(model, self.video, [context], [self.prompt], self.config, limit=limit)


Asking = Generator[Prompted, scan.Reply, object]


def run_together(model: Model, arms: Sequence[Asking]) -> list:
    """Runs generators to their end and returns what each returned. Equal prompts are answered once."""
    results, known = [None] * len(arms), {}
    waiting = [(place, None) for place in range(len(arms))]
    while waiting:
        asked = []
        for place, reply in waiting:
            try:
                asked.append((place, arms[place].send(reply)))
            except StopIteration as end:
                results[place] = end.value
        new = {each.key: each for _, each in asked if each.key not in known}
        # Prompts are kept beside their replies: a key holds the id of a video, which must not be given to another one.
        known |= {
            key: (each, reply)
            for (key, each), reply in zip(new.items(), reply_to(model, list(new.values())), strict=True)
        }
        waiting = [(place, known[each.key][1]) for place, each in asked]
    return results


def reply_to(model: Model, prompts: Sequence[Prompted]) -> list[scan.Reply]:
    """Answers final prompts, batched by their padded shapes."""
    batches = [each.batch(model) for each in prompts]
    shapes: dict[tuple, list[int]] = {}
    for place, batch in enumerate(batches):
        shapes.setdefault((batch.visual.shape, batch.suffix_ids.shape, batch.option_ids.shape), []).append(place)
    replies: list = [None] * len(prompts)
    for places in shapes.values():
        for start in range(0, len(places), _BATCHES[-1]):
            part = places[start : start + _BATCHES[-1]]
            config = prompts[part[0]].config
            for place, out in zip(part, _answer(model, [batches[p] for p in part], config), strict=True):
                replies[place] = scan.reply(out, 0, 0, config)
    return replies


def _answer(model: Model, batches: list[PromptBatch], config: AdaptTokenConfig) -> list[dict[str, np.ndarray]]:
    size = next(size for size in _BATCHES if size >= len(batches))
    padded = batches + [batches[-1]] * (size - len(batches))
    stacked = PromptBatch(
        **{
            field.name: padded[0].key if field.name == "key" else np.stack([getattr(b, field.name) for b in padded])
            for field in dataclasses.fields(PromptBatch)
        }
    )
    spec = PassSpec(
        relevance=None,
        certainty="neg_entropy",
        keep_layer=None,
        answer_tokens=config.max_answer_tokens,
        end_ids=model.tokenizer.eos,
    )
    out = jax.device_get(_run_many(model.module.text, stacked, spec))
    return [{name: value[i] for name, value in out.items()} for i in range(len(batches))]


_SPLIT = PromptBatch(**{field.name: None if field.name == "key" else 0 for field in dataclasses.fields(PromptBatch)})


@functools.partial(jax.jit, static_argnames="spec")
def _run_many(text, batch, spec):
    """`prompts_pass` for batches with a leading axis, one after the other as far as numbers are concerned."""
    return jax.vmap(lambda one: prompts_pass(text, one, spec), in_axes=(_SPLIT,))(batch)
