"""Numbers and results in words, for the templates."""

import math

from adapttoken_jax.report.entries import ReportEntry
from adapttoken_jax.result import NOT_FOUND

METHOD_NAMES = {
    "adapttoken": "AdaptToken",
    "lite": "AdaptToken-Lite",
    "flexselect": "Equal budgets",
    "uniform": "Uniform sampling",
    "full": "Whole video",
}
METHOD_NOTES = {
    "adapttoken": "certain groups of frames get a larger share of the tokens",
    "lite": "as AdaptToken, but the scan stops as soon as the model is certain enough",
    "flexselect": "every group of frames gets the same budget of tokens, to within one",
    "uniform": "evenly spaced frames, as many as the budget holds",
    "full": "all sampled frames, nothing left out",
}

# Entropies of the paper's needle test: up to 0.4 nats where the needle was seen, from 1.0 on where it was not.
_CERTAIN, _UNCERTAIN = 0.4, 1.0

_THIN = "\u202f"  # narrow no-break space


def count(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{round(number):,}".replace(",", _THIN)


def decimals(number: float | None, digits: int = 2) -> str:
    """A number with fixed decimals; a dash for None."""
    return "–" if number is None or not math.isfinite(number) else f"{number:.{digits}f}"


def rate(number: float) -> str:
    """A number per second: whole from ten on, two digits below one."""
    return count(number) if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2g}"


def percent(share: float) -> str:
    """A share in percent, with a decimal below ten."""
    value = 100 * share
    if 0 < value < 0.05:
        return f"<{_THIN}0.1{_THIN}%"
    digits = 0 if value >= 9.95 or value == 0 else 1
    return f"{value:.{digits}f}{_THIN}%"


def clock(seconds: float) -> str:
    """A place in the video: 0:07, 1:02:03; with tenths where they matter (first ten minutes, no whole second)."""
    tenths = round(seconds * 10)
    fine = f".{tenths % 10}" if tenths % 10 and tenths < 6000 else ""
    whole = tenths // 10 if fine else round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    head = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{head}:{whole % 60:02}{fine}"


def span(seconds: float) -> str:
    """How long something took or lasts: 0.45 s, 12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 1 else 1}f}{_THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_THIN}min {rest:02}{_THIN}s"
    return f"{minutes // 60}{_THIN}h {minutes % 60:02}{_THIN}min"


def operations(flops: float) -> str:
    """Floating-point operations with a prefix: 3.2 TFLOP."""
    power = max(0, min(6, int(math.log10(flops) // 3))) if flops > 0 else 0
    return f"{flops / 1000**power:.3g}{_THIN}{['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"


def certainty(entropy: float | None) -> str:
    """An entropy as an adjective."""
    if entropy is None:
        return "certainty unknown"
    return "certain" if entropy <= _CERTAIN else "unsure" if entropy < _UNCERTAIN else "close to guessing"


def withheld(entry: ReportEntry) -> bool:
    """Whether the answer was too uncertain for `--abstain_above`."""
    return entry.result.answer == NOT_FOUND and entry.result.option is None


def choices(entropy: float) -> str:
    """An entropy as the number of equally likely words that it is like choosing from."""
    number = math.exp(entropy)
    return f"{number:.1f}" if number < 10 else count(number)


def summary(entry: ReportEntry) -> str:
    """What the method did, in one sentence or two."""
    result = entry.result
    share = f"{count(result.selected.count)} of {count(result.video.tokens)} visual tokens"
    if not result.groups:
        return f"The model saw all {count(result.video.tokens)} visual tokens of {slots(result.video.slots)} at once."
    kept = f"{share} ({percent(result.selected.count / result.video.tokens)}) went into the final prompt."
    scanned, total = result.stop.groups_visited, result.stop.groups_total
    if result.stop.early:
        return f"The scan stopped after {scanned} of {groups(total)}: {result.stop.reason}. {kept}"
    return f"The scan visited all {groups(total)}. {kept}"


def consensus(entry: ReportEntry) -> str:
    """What the groups say together, and whether that is the answer too; empty where they were not asked."""
    shares = entry.result.consensus
    if not shares:
        return ""
    letter = max(shares, key=shares.get)
    said = f"The groups’ own answers taken together say {letter} ({percent(shares[letter])})"
    return f"{said}." if entry.result.option in (letter, None) else f"{said}: not what the final pass answered."


def slots(number: int) -> str:
    """1 slot, 2 slots."""
    return f"{count(number)} slot{'s' * (number != 1)}"


def groups(number: int) -> str:
    """1 group, 2 groups."""
    return f"{count(number)} group{'s' * (number != 1)}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{count(number)}{ending}"


FILTERS = (
    certainty, choices, clock, consensus, count, decimals, groups, operations, ordinal, percent, rate, slots, span,
    summary, withheld,
)  # fmt: skip
