"""What `adapttoken plan` prints."""

import dataclasses
import re
from collections.abc import Mapping

from adapttoken_jax.errors import UserError
from adapttoken_jax.planning.estimate import Plan, ProgramEstimate

_GIB = 2**30


def parse_size(text: str) -> tuple[int, int]:
    """Reads "1280x720": width and height.

    Raises:
      UserError: anything else.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise UserError(f"--video_size={text}: write WIDTHxHEIGHT, as 1280x720")
    return int(found[1]), int(found[2])


def as_json(plan: Plan) -> dict:
    """Every figure of a plan, in bytes and seconds."""
    return dataclasses.asdict(plan) | {"fits": plan.fits}


def summary(plan: Plan) -> dict[str, object]:
    """The lines above the table."""
    video = plan.video
    lines = {
        "model": plan.model,
        "topology": f"{plan.topology}, {plan.chips} chips, mesh {plan.mesh}",
        "video": f"{video['frames']} frames, {video['slots']} slots of {video['tokens_per_slot']} tokens, "
        f"{video['groups']} groups; final prompt of {video['final_tokens']} tokens",
        "fits": plan.fits,
    }
    if plan.fits:
        seconds = {name: f"{value:.3g}" for name, value in plan.seconds.items()}
        lines |= {"seconds per group": seconds["group"]} if "group" in seconds else {}
        bound = f"{seconds['roofline_question']} by the roofline"
        lines |= {
            "seconds per question": f"{seconds['question']} by the compiler, {bound}",
            "chip-hours": f"{plan.chip_hours(1000):.3g} per 1000 questions",
        }
    lines |= {f"mesh {mesh}": outcome for mesh, outcome in plan.tried.items()}
    return lines | {"versions": ", ".join(f"{name} {version}" for name, version in plan.versions.items())}


def rows(plan: Plan) -> list[dict[str, object]]:
    """The table: one row per program; GiB, TFLOP and seconds per chip and run."""
    return [_row(program) for program in plan.programs]


def _row(program: ProgramEstimate) -> dict[str, object]:
    compiled = bool(program.seconds)
    gib = lambda name: f"{program.memory[name] / _GIB:.2f}"
    number = lambda value: f"{value:.3g}"
    return {
        "program": program.name,
        "runs": program.runs,
        "inputs GiB": gib("arguments") if compiled else None,
        "temporary GiB": gib("temporaries") if compiled else None,
        "beside GiB": gib("beside"),
        "peak GiB": gib("peak"),
        "TFLOP": number(program.flops / 1e12) if compiled else None,
        "seconds": number(program.seconds["compiler"]) if compiled else None,
        "roofline": number(program.seconds["roofline"]) if compiled else None,
        "of peak": f"{program.share_of_peak:.0%}" if compiled else None,
        "limit": program.limit or None,
    }


def details(program: ProgramEstimate) -> Mapping[str, str]:
    """What a program says to the other chips, and where its time goes."""
    if not program.seconds:
        return {}
    said = [f"{kind} {of['times']:g} times, {of['bytes'] / _GIB:.3g} GiB" for kind, of in program.collectives.items()]
    spent = [f"{part} {share:.0%}" for part, share in program.longest.items()]
    return {f"{program.name} collectives": "; ".join(said) or "none", f"{program.name} longest": "; ".join(spent)}
