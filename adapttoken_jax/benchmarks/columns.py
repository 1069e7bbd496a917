"""What the cells of a published table must hold, so that another layout is one clear error before any work."""

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapttoken_jax.errors import UserError


def _is_number(cell: Any) -> bool:
    try:
        return not isinstance(cell, bool) and math.isfinite(float(cell))
    except (TypeError, ValueError, OverflowError):
        return False


def _list_of(*kinds: type) -> Callable[[Any], bool]:
    return lambda cell: isinstance(cell, list) and all(isinstance(each, kinds) for each in cell)


# What a cell may hold: how an error calls it, and whether a value is such. A number may be written as a text.
Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = ("a text", lambda cell: isinstance(cell, str))
NUMBER: Kind = ("a number", _is_number)
WHOLE_NUMBER: Kind = ("a whole number", lambda cell: isinstance(cell, int) and not isinstance(cell, bool))
TEXT_OR_NUMBER: Kind = ("a text or a number", lambda cell: isinstance(cell, str) or _is_number(cell))
TEXTS: Kind = ("a list of texts", _list_of(str))
TEXTS_OR_NUMBERS: Kind = ("a list of texts or numbers", _list_of(str, int, float))
TEXT_OR_TEXTS: Kind = ("a text or a list of texts", lambda cell: isinstance(cell, str) or _list_of(str)(cell))
MAPPING: Kind = ("named columns", lambda cell: isinstance(cell, dict))
ROWS: Kind = ("a list of rows with named columns", _list_of(dict))


# Half a character, which JSON can write and no file can: the rest of a text that was cut in the wrong place.
_HALF = re.compile("[\ud800-\udfff]")


def require(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Kind], where, nullable: Sequence[str] = ()
) -> None:
    """Checks that every row has every column and that it holds what it should.

    Args:
      where: what an error begins with, the file.
      nullable: columns that may hold nothing, but must be there.

    Raises:
      UserError: names the row and the column.
    """
    for number, row in enumerate(rows):
        for name, (kind, holds) in columns.items():
            cell = row.get(name)
            if cell is None and not (name in nullable and name in row):
                raise UserError(f"{where}: row {number} has no {name}; this is not the published layout")
            if cell is not None and not holds(cell):
                raise UserError(
                    f"{where}: row {number} has {reprlib.repr(cell)} as its {name}, not {kind}; download it again"
                )
            for text in cell if isinstance(cell, list) else [cell]:
                if isinstance(text, str) and (half := _HALF.search(text)):
                    raise UserError(
                        f"{where}: row {number} has half a character ({half[0]!a}) in its {name}; download it again"
                    )
