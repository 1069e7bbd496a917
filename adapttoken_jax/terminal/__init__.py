"""What the commands and the experiments share at a terminal: flags, text, files asked for, and how a program ends."""

from adapttoken_jax.terminal.ending import DIFFERENT, OK, exit_status, fail, failed
from adapttoken_jax.terminal.flag import (
    PROGRAM,
    Command,
    Flag,
    check_required,
    given_settings,
    parse,
    read_flags,
    setting_flags,
)
from adapttoken_jax.terminal.output import check_outputs, write_json
from adapttoken_jax.terminal.text import aligned, help_text, overview, table

__all__ = [
    "DIFFERENT",
    "OK",
    "PROGRAM",
    "Command",
    "Flag",
    "aligned",
    "check_outputs",
    "check_required",
    "exit_status",
    "fail",
    "failed",
    "given_settings",
    "help_text",
    "overview",
    "parse",
    "read_flags",
    "setting_flags",
    "table",
    "write_json",
]
