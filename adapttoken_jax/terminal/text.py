"""Help, names with values, and tables, as a terminal shows them."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapttoken_jax.terminal.flag import PROGRAM, SECTIONS, Command, Flag


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` letters; a name is not broken at its hyphens."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False) or [""]


def _paragraph(text: str, indent: str = "") -> str:
    """Lines as wide as the terminal, the later ones behind `indent`."""
    first, *rest = _wrapped(text, _width() - len(indent))
    return "".join(f"{line}\n" for line in [first, *(f"{indent}{line}" for line in rest)])


def _columns(rows: Iterable[tuple[str, str]], left: int) -> str:
    """Two columns; a left cell that is too wide gets a line of its own."""
    lines = []
    for label, text in rows:
        wrapped = _wrapped(text, _width() - left - 4)
        if len(label) > left:
            lines.append(f"  {label}")
            label = ""
        lines += [f"  {label:<{left}}  {wrapped[0]}".rstrip(), *(f"{'':{left + 4}}{line}" for line in wrapped[1:])]
    return "".join(f"{line}\n" for line in lines)


def overview(commands: Sequence[Command]) -> str:
    """What `adapttoken --help` prints."""
    rows = [(command.name, command.summary) for command in commands]
    return (
        f"usage: {PROGRAM} COMMAND --flags\n\n"
        f"{_paragraph('Answers questions about long videos with the tokens that matter.')}\n"
        f"Commands\n{_columns(rows, 10)}\n"
        + _paragraph(f"{PROGRAM} COMMAND --help shows a command's flags; {PROGRAM} --version the version.")
    )


def help_text(command: Command) -> str:
    """What `adapttoken COMMAND --help` prints: its flags, by section."""
    required = [flag.usage() for flag in command.flags if flag.required]
    usage = _paragraph(" ".join(["usage:", PROGRAM, command.name, *required, "[--flags]"]), indent=" " * 7)
    flagfile = Flag("flagfile", str, "read flags from a file", "General", "FILE")
    sections: dict[str, list[tuple[str, str]]] = {}
    for flag in [*command.flags, flagfile]:
        sections.setdefault(flag.section, []).append((flag.usage(), flag.description()))
    # The command's own sections in the order of its flags, then the settings, then what every command has.
    settings = [name for name in SECTIONS if name in sections]
    order = [*(name for name in sections if name not in (*settings, "General")), *settings, "General"]
    blocks = [f"\n{section}\n{_columns(sections[section], 27)}" for section in order]
    return f"{usage}\n{_paragraph(f'This command {command.summary}.')}{''.join(blocks)}"


def aligned(content: Mapping[str, Any]) -> str:
    """Names and values as lines; the values stand under each other."""
    width = max(map(len, content))
    return "".join(f"{key:<{width}}  {_cell(value)}\n" for key, value in content.items())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table; numbers stand on the right."""
    if not rows:
        return ""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(value, int | float) and not isinstance(value, bool) for value in rows[0].values()]
    lines = []
    for line in cells:
        padded = [f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, right, strict=True)]
        lines.append("  ".join(padded).rstrip() + "\n")
    return "".join(lines)


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)
