"""Flags as data: what a command knows, the method's settings, and how both are read."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from adapttoken_jax import config as configs
from adapttoken_jax.errors import UserError

PROGRAM = "adapttoken"


class _Number(flags.ArgumentParser):
    """A finite number between two bounds, either of which may be None."""

    def __init__(self, kind: type, low=None, high=None):
        self._kind, self._low, self._high = kind, low, high

    def parse(self, argument):
        try:
            value = self._kind(argument)
        except ValueError:
            raise ValueError(f"must be a {'whole ' if self._kind is int else ''}number") from None
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        if self._low is not None and value < self._low:
            raise ValueError(f"must be at least {self._low}")
        if self._high is not None and value > self._high:
            raise ValueError(f"must be at most {self._high}")
        return value


class _Choice(flags.ArgumentParser):
    """One of a few words."""

    def __init__(self, choices: Sequence[str]):
        self._choices = tuple(choices)

    def parse(self, argument):
        if argument not in self._choices:
            raise ValueError(_choose_one(self._choices))
        return argument


def _choose_one(choices: Sequence[str]) -> str:
    return f"choose one of {', '.join(choices)}"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag. `kind` is str, int, float, bool or list (a text that may be repeated); not given means `default`.

    `metavar` stands for the value in the help text, and `shown_default` for a default that is not a value. A flag
    that is given again overrides itself, as after a flag file, unless it may be given `once`.
    """

    name: str
    kind: type
    help: str
    section: str
    metavar: str = ""
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    shown_default: str = ""
    once: bool = False

    def define(self, values: flags.FlagValues) -> None:
        """Adds the flag to a command's flags."""
        if self.kind is bool:
            flags.DEFINE_boolean(self.name, self.default, self.help, flag_values=values)
        elif self.kind is list:
            flags.DEFINE_multi_string(self.name, self.default, self.help, flag_values=values)
        elif self.choices:
            flags.DEFINE(_Choice(self.choices), self.name, self.default, self.help, flag_values=values)
        elif self.kind in (int, float):
            parser = _Number(self.kind, self.low, self.high)
            flags.DEFINE(parser, self.name, self.default, self.help, flag_values=values)
        else:
            flags.DEFINE_string(self.name, self.default, self.help, flag_values=values)

    def usage(self) -> str:
        """The flag as the help text's left column shows it."""
        if self.kind is bool:
            return f"--[no]{self.name}" if self.shown_default == "true" else f"--{self.name}"
        return f"--{self.name} {self.metavar or self.kind.__name__.upper()}"

    def description(self) -> str:
        """The flag as the help text's right column shows it."""
        if self.required:
            return f"{self._meaning()} (required)"
        default = self.shown_default or ("" if self.default is None or self.default is False else _shown(self.default))
        return f"{self._meaning()}{f' (default {default})' if default else ''}"

    def _meaning(self) -> str:
        return f"{self.help}: {', '.join(self.choices)}" if self.choices else self.help

    def wanted(self) -> str:
        """What to give, where the flag is missing."""
        return _choose_one(self.choices) if self.choices else self.help


def _shown(default) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


# The sections of the help text for the method's settings.
SECTIONS = {
    "Sampling the video": ("preset", "fps", "max_frames", "max_pixels", "mrope"),
    "Groups": ("slots_per_group", "group_order", "group_positions", "keep_after_reference"),
    "Relevance of a token": ("reference_layer", "relevance_heads", "relevance_text", "relevance_queries", "debias"),
    "Certainty of a group and its budget": (
        "certainty",
        "bottom_fraction",
        "temperature",
        "temperature_target",
        "min_tokens_per_group",
        "budget",
        "over_selection",
        "coverage",
    ),
    "Redundancy": ("similarity", "proximity", "proximity_scale"),
    "Stopping early (lite)": (
        "stop_rule",
        "stop_groups",
        "stop_entropy",
        "stop_agreement",
        "stop_gain",
        "give_up_groups",
    ),
    "Final answer": ("final_positions", "max_answer_tokens", "sampling_temperature", "top_p", "seed"),
}


def _setting_flag(field: dataclasses.Field) -> Flag:
    """The flag of one field of `AdaptTokenConfig`."""
    section = next(name for name, fields in SECTIONS.items() if field.name in fields)
    shown = _shown(field.default)
    if field.name in set().union(*configs.MODEL_PRESETS.values()) and field.default != -1:
        shown = f"the model's preset, else {shown}"
    bounds = {key: field.metadata.get(key) for key in ("low", "high")}
    return Flag(
        field.name,
        type(field.default),
        field.metadata["help"],
        section,
        metavar={int: "N", float: "X", str: "NAME"}.get(type(field.default), ""),
        choices=field.metadata.get("choices", ()),
        shown_default=shown,
        **bounds,
    )


_PAPER = Flag("paper", bool, "the paper's values where the model's preset has others", "Method")


def setting_flags() -> tuple[Flag, ...]:
    """One flag per field of `AdaptTokenConfig`, not given by default, and `--paper`."""
    return (*(_setting_flag(field) for field in dataclasses.fields(configs.AdaptTokenConfig)), _PAPER)


def given_settings(values: flags.FlagValues) -> dict[str, Any]:
    """The settings that the user wrote."""
    names = [*(field.name for field in dataclasses.fields(configs.AdaptTokenConfig)), _PAPER.name]
    return {name: values[name].value for name in names if values[name].value is not None}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its name, what it does in a line, its flags, and the function that runs it and gives a status."""

    name: str
    summary: str
    flags: tuple[Flag, ...]
    run: Callable[[flags.FlagValues], int]


def parse(command: Command, argv: Sequence[str]) -> flags.FlagValues:
    """The command's flags, read from the arguments after its name and from the files that `--flagfile` names.

    Raises:
      UserError: an unknown flag, a bad or missing value, a flag file that cannot be read, or a word that is no flag.
    """
    values = flags.FlagValues()
    for flag in command.flags:
        flag.define(values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    words = read_flags(f"{PROGRAM} {command.name}", values, argv)
    if words:
        raise UserError(f"{words[0]!r} belongs to no flag; put quotes around values with spaces")
    for flag in command.flags:
        if flag.once and values[flag.name].present > 1:
            raise UserError(f"--{flag.name}: given {values[flag.name].present} times; give one")
    return values


def read_flags(program: str, values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Reads a program's flags from its arguments; the words among these that belong to no flag.

    Raises:
      UserError: an unknown flag, a bad or missing value, or a flag file that cannot be read.
    """
    values.set_gnu_getopt(True)
    try:
        words = values([program, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), 1)
        meant = f"did you mean --{near[0]}?" if near else f"see {program} --help"
        raise UserError(f"--{error.flagname}: unknown flag; {meant}") from None
    except flags.Error as error:
        raise UserError(_flag_error(error)) from None
    except UnicodeDecodeError:
        raise UserError("--flagfile: the file is not UTF-8 text; save it as UTF-8") from None
    for name in values:
        value = values[name].value
        if isinstance(value, str) and "\0" in value:  # a flag file can hold what no name of a file can
            raise UserError(f"--{name}={value}: holds a zero byte")
    return words


def _flag_error(error: flags.Error) -> str:
    """absl's message in our words."""
    text = str(error)
    if isinstance(error, flags.CantOpenFlagFileError):
        reason, _, path = text.partition("] ")[2].partition(": ")
        return f"--flagfile={path.strip(chr(39))}: {reason}"
    if text.startswith("Missing value for flag "):
        return f"{text.removeprefix('Missing value for flag ')}: a value must follow"
    if "Non-boolean argument" in text:
        return f"{text.removeprefix('flag ').partition(':')[0]}: must be true or false"
    if text.endswith(" must have a value other than None."):
        return f"{text.removeprefix('flag ').partition('=')[0]} is required"
    return text.removeprefix("flag ")


def check_required(command: Command, values: flags.FlagValues) -> None:
    """Raises `UserError` for a flag that the command requires and that has no value."""
    for flag in command.flags:
        if flag.required and not values[flag.name].value:
            raise UserError(f"--{flag.name} is required: {flag.wanted()}")
