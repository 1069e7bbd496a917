"""The wordings under which the field reports its numbers, to the letter.

`PROMPTS[benchmark][name](item, subtitles)` gives the `Ask` of a question. `subtitles` is None for the setting without
subtitles; with them it is the text at the sampled frames' times, "" where there is none. The names: `official`, the
benchmark's authors; `lmms-eval` (0.7) and `flexselect`, the two evaluations around the paper; `qwen`, as for Qwen's own
models in VLMEvalKit and lmms-eval. docs/benchmarks.md has every text.
"""

from collections.abc import Callable

from adapttoken_jax.benchmarks.items import Item
from adapttoken_jax.prompt import OPTIONS_INSTRUCTION, Ask

Wording = Callable[[Item, str | None], Ask]

_SELECT = "Select the best answer to the following multiple-choice question based on the video"
_LETTER_ONLY = " Respond with only the letter (A, B, C, or D) of the correct option."
_MLVU_SYSTEM = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option "
    "that accurately addresses the question."
)


def _lines(item: Item, style: str = "{}. {}") -> str:
    return "\n".join(style.format(letter, text) for letter, text in zip(item.letters, item.options, strict=True))


def _ask(item: Item, before: str, after: str, **kwargs) -> Ask:
    return Ask(item.question, before, after, item.options, **kwargs)


def _listed(subtitles: str, space: str = "") -> str:
    return f"This video's subtitles are listed below:{space}\n{subtitles}\n"


def _listed_or_none(item: Item, subtitles: str) -> str:
    """As lmms-eval: a video whose frames see no line has an empty list, one without a file has this sentence."""
    return _listed(subtitles if item.subtitles else "No subtitles available", " ")


# ---------------------------------------------------------------------------------------------------------------------
# Video-MME: the options as they are published, which bring their letters
# ---------------------------------------------------------------------------------------------------------------------


def _published_options(item: Item) -> str:
    return "\n".join(["", *item.extra["options"], ""])


def _videomme_official(item: Item, subtitles: str | None) -> Ask:
    # The authors leave the whole of it out where a video has no subtitles.
    shown = _listed(subtitles) if subtitles else ""
    both = " and the subtitles" if subtitles else ""
    return _ask(item, f"{shown}{_SELECT}{both}.{_LETTER_ONLY}\n", f"{_published_options(item)}The best answer is:")


def _videomme_lmms_eval(item: Item, subtitles: str | None) -> Ask:
    # It speaks of subtitles in either setting, and ends differently.
    instruction = f"{_SELECT} and the subtitles.{_LETTER_ONLY}\n"
    if subtitles is None:
        return _ask(item, instruction, f"{_published_options(item)}\n{OPTIONS_INSTRUCTION}")
    return _ask(item, _listed_or_none(item, subtitles) + instruction, f"{_published_options(item)}The best answer is:")


# ---------------------------------------------------------------------------------------------------------------------
# LongVideoBench. Upstream puts subtitles between the frames; here the video is one block and they follow it.
# ---------------------------------------------------------------------------------------------------------------------


def _longvideobench_official(item: Item, subtitles: str | None) -> Ask:
    shown = f"{subtitles}\n" if subtitles else ""
    return _ask(item, f"{shown}Question: ", f"\n{_lines(item)}\n{OPTIONS_INSTRUCTION}")


def _longvideobench_lmms_eval(item: Item, subtitles: str | None) -> Ask:
    return _ask(item, f"{subtitles}\n" if subtitles else "", f"\n{_lines(item)}\n{OPTIONS_INSTRUCTION}\n")


# ---------------------------------------------------------------------------------------------------------------------
# LVBench: the question as it is published, with its options inside
# ---------------------------------------------------------------------------------------------------------------------


def _published_question(item: Item, before: str = "", after: str = "", change=lambda text: text) -> Ask:
    """The published text around the question, so that its own spaces and line breaks stay."""
    head, question, tail = item.extra["question"].partition(item.question)
    return Ask(change(question), before + change(head), change(tail) + after, item.options)


def _lvbench_official(item: Item, subtitles: str | None) -> Ask:
    return _published_question(item)


def _lvbench_lmms_eval(item: Item, subtitles: str | None) -> Ask:
    return _published_question(item, after="\nAnswer the question with the option letter")


def _lvbench_flexselect(item: Item, subtitles: str | None) -> Ask:
    def without_brackets(text: str) -> str:
        for letter in "ABCD":
            text = text.replace(f"({letter})", letter)
        return text

    return _published_question(item, f"{_SELECT}.{_LETTER_ONLY}\n", f"\n\n{OPTIONS_INSTRUCTION}", without_brackets)


# ---------------------------------------------------------------------------------------------------------------------
# MLVU
# ---------------------------------------------------------------------------------------------------------------------


def _mlvu_official(item: Item, subtitles: str | None) -> Ask:
    after = f"\nOptions:\n{_lines(item, '({}) {}')}".rstrip() + "\nOnly give the best option."
    return _ask(item, "Question: ", after, system=_MLVU_SYSTEM, begin="Best Option: (")


def _mlvu_with_options(item: Item, before: str, after: str) -> Ask:
    if "question" in item.extra:
        return _published_question(item, before, after)
    return _ask(item, before, f"\n{_lines(item, '({}) {}')}{after}")


def _mlvu_lmms_eval(item: Item, subtitles: str | None) -> Ask:
    # The answer's beginning stands in the user's turn.
    return _mlvu_with_options(item, "", "\nOnly give the best option.\nBest option: (")


def _mlvu_flexselect(item: Item, subtitles: str | None) -> Ask:
    instruction = "\nAnswer with the best option's letter from the given choices directly.\nBest option: ("
    return _mlvu_with_options(item, "\n", instruction)


# ---------------------------------------------------------------------------------------------------------------------


def _qwen(item: Item, subtitles: str | None) -> Ask:
    shown = "" if subtitles is None else _listed_or_none(item, subtitles)
    after = f"\nOptions:\n{_lines(item)}\nAnswer with the option letter only."
    return _ask(item, f"{shown}Question: ", after)


PROMPTS: dict[str, dict[str, Wording]] = {
    "videomme": {
        "official": _videomme_official,
        "lmms-eval": _videomme_lmms_eval,
        "flexselect": _videomme_lmms_eval,
        "qwen": _qwen,
    },
    "longvideobench": {
        "official": _longvideobench_official,
        "lmms-eval": _longvideobench_lmms_eval,
        "flexselect": _longvideobench_lmms_eval,
        "qwen": _qwen,
    },
    "lvbench": {
        "official": _lvbench_official,
        "lmms-eval": _lvbench_lmms_eval,
        "flexselect": _lvbench_flexselect,
        "qwen": _qwen,
    },
    "mlvu": {
        "official": _mlvu_official,
        "lmms-eval": _mlvu_lmms_eval,
        "flexselect": _mlvu_flexselect,
        "qwen": _qwen,
    },
}
