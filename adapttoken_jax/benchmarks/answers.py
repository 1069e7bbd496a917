"""Which letter a response names, under each reading that the field's scripts use.

A reader maps (response, item) to the letters that it accepts as the response's choice: none where it finds nothing, one
as a rule, two where a script tries a second reading after a wrong first one. The rules are kept as they are, oddities
included, because published numbers were made with them.
"""

import re
from collections.abc import Sequence

from adapttoken_jax.benchmarks.items import Item

Letters = tuple[str, ...]

_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip
# Video-MME's list lacks two commas, so that Python joins two pairs; VLMEvalKit took the list over and added two more.
_JOINED_PREFIXES = (
    *_PREFIXES[:4], "The best option isThe correct option is", "Best answer:Best option:",
)  # fmt: skip
_VLMEVALKIT_PREFIXES = (*_JOINED_PREFIXES, "Answer:", "Option:")


def _first_letter(response: str, prefixes: Sequence[str], letters: str) -> Letters:
    for prefix in prefixes:
        response = response.replace(prefix, "")
    found = re.search(f"[{letters}]", response)
    return (found[0],) if found else ()


def videomme_official(response: str, item: Item) -> Letters:
    """The first of A to D after the known beginnings are taken out."""
    return _first_letter(response, _JOINED_PREFIXES, "ABCD")


def longvideobench_official(response: str, item: Item) -> Letters:
    """The first of A to E after the known beginnings, here with all their commas, are taken out."""
    return _first_letter(response, _PREFIXES, "ABCDE")


def lvbench_official(response: str, item: Item) -> Letters:
    """The first character of what stands in the first brackets, or before the first closing one."""
    said = response.strip().split(")")[0].strip()
    said = said.split("(")[1].strip() if "(" in said else said
    return (said[0],) if said and said[0] in item.letters else ()


def mlvu_official(response: str, item: Item) -> Letters:
    """The character before the first closing bracket, or the whole response where there is none."""
    said, bracket, _ = response.strip().partition(")")
    said = said[-1:] if bracket else said
    return (said,) if said in item.letters else ()


# ---------------------------------------------------------------------------------------------------------------------
# lmms-eval 0.7
# ---------------------------------------------------------------------------------------------------------------------

# How a letter may be marked, from weak to strong; the last place counts among equally strong ones.
_MARKS = (("{} ", 2), ("{})", 3), ("{}:", 4), ("{}.", 5), ("({})", 6))
_CHOICES = (
    "answer is", "correct answer is", "best answer is", "correct option is", "best option is", "choice is",
    "correct choice is",
)  # fmt: skip
_PHRASES = (
    *_CHOICES, *(f"the {phrase}" for phrase in _CHOICES), "i choose", "i select", "i pick", "my answer is",
    "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip


def lmms_eval_ranked(response: str, item: Item) -> Letters:
    """The best marked of A to D: alone at the start, at the end, after a phrase such as "the answer is", then by marks.

    lmms-eval 0.7 reads Video-MME, LVBench and MLVU in this way; earlier versions read as the benchmarks' authors.
    """
    text = response.strip()
    for character in ",.!?;:'\"":
        text = text.strip(character)
    text = f" {text} "
    found = _after_phrases(text) + _at_the_ends(text)
    for mark, strength in _MARKS:
        found += [(strength, text.rfind(mark.format(x)), x) for x in "ABCD" if mark.format(x) in text]
    found = found or [(0, text.rfind(x), x) for x in "ABCD" if x in text]
    return (max(found)[2],) if found else ()


def _after_phrases(text: str) -> list[tuple[int, int, str]]:
    lower, found = text.lower(), []
    for phrase in _PHRASES:
        begin = lower.find(phrase)
        places = [(text.find(letter, begin + len(phrase)), letter) for letter in "ABCD"] if begin >= 0 else []
        found += [(7, place, letter) for place, letter in places if place >= 0]
    return found


def _at_the_ends(text: str) -> list[tuple[int, int, str]]:
    said = text.strip()
    found = [(10, 0, said[0])] if re.match(r"[ABCD](?![^\W\d_])", said) else []
    return found + ([(9, len(text) - 1, said[-1])] if re.search(r"(?<![^\W\d_])[ABCD]$", said) else [])


# ---------------------------------------------------------------------------------------------------------------------
# VLMEvalKit under its `exact_matching` policy, which asks no judge model
# ---------------------------------------------------------------------------------------------------------------------


# Where one of these is said nothing is inferred from what stands beside it.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer",
)  # fmt: skip


def vlmevalkit(response: str, item: Item) -> Letters:
    """The first of A to D after the known beginnings, else the option whose text is said."""
    return _first_letter(response, _VLMEVALKIT_PREFIXES, "ABCD") or _inferred(response, item)


def vlmevalkit_longvideobench(response: str, item: Item) -> Letters:
    """The same with A to E, whether the question has five options or four."""
    return _first_letter(response, _VLMEVALKIT_PREFIXES, "ABCDE") or _inferred(response, item)


def vlmevalkit_mlvu(response: str, item: Item) -> Letters:
    """The character before the first closing bracket; where that is wrong, what is inferred counts as well."""
    return mlvu_official(response, item) + _inferred(response, item)


def _inferred(response: str, item: Item) -> Letters:
    """The only letter among the words if it is one of the last four, else the only option whose text is said."""
    if any(refusal in response for refusal in _REFUSALS):
        return ()
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", response).split()
    named = [letter for letter in item.letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return (named[0],)
    if not named and "Z" in words:  # Z is how a judge says "none of them"
        return ()
    if len(response) > 2 * sum(len(option) for option in item.options):
        return ()
    said = response.lower()
    hits = [x for x, option in zip(item.letters, item.options, strict=True) if option.strip(". \n").lower() in said]
    return (hits[0],) if len(hits) == 1 else ()
