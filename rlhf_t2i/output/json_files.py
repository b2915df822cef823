"""JSON files of run folders, which strangers may have made: read within bounds and checked for their types."""

from __future__ import annotations

import reprlib
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from reward_model.text_files import read_json


def read_typed(path: Path, kind: Any, *, allow_nan: bool = False) -> Any:
    """Return the JSON value of a file if it is of the type `kind`, with all that it holds beyond it.

    Raises ValueError, naming the file and the place in it, for one of another type or beyond the bounds of `read_json`.
    """
    value = read_json(path, allow_nan=allow_nan)
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        where, shown = ".".join(map(str, fault["loc"])) or "the whole", reprlib.repr(fault["input"])
        raise ValueError(f"{path}: {where} is {shown}; {fault['msg']}.") from error
    return value


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)
