"""Bounds on the time and memory of code that comes with a stranger's model, such as its chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2.utils import Namespace

MAX_STEPS = 2_000_000
"""Lines of Python, those of a template counted tenfold; a template has hundreds, and compiling it takes tens of
thousands. They pass in about a second."""
MAX_SIZE = 1_000_000
"""Characters of a text, or entries of a list, that a template may hold, and characters that it may write."""
_TEMPLATE_FILE = "<template>"
"""File name of jinja's compiled templates."""
_LINES_PER_CHECK = 4
"""A template may double a text in each line, so that it may have 16 * MAX_SIZE characters when that is seen."""
_COLLECTIONS = frozenset({str, list, tuple, dict})


@contextmanager
def bounded_steps(what: str) -> Iterator[None]:
    """Context in which this thread runs at most MAX_STEPS lines, and its templates keep to MAX_SIZE; else a ValueError.

    jinja's sandbox bounds one loop, and neither loops in loops nor a text that is doubled in each round.
    """
    left, written, lines = MAX_STEPS, 0, 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left, written, lines
        is_template = frame.f_code.co_filename == _TEMPLATE_FILE
        left -= 10 if is_template else 1
        if left < 0:
            raise ValueError(f"{what} does not end within {MAX_STEPS:,} steps.")
        if is_template:
            lines += 1
            if event == "return" and isinstance(argument, str):  # a yield too: what a template writes
                written += len(argument)
            grown = lines % _LINES_PER_CHECK == 0 and _is_large(frame.f_locals.values())
            if grown or written > MAX_SIZE:
                raise ValueError(f"{what} makes a text or list of more than {MAX_SIZE:,} characters or entries.")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _is_large(values: Iterable[Any]) -> bool:
    """Return True if a variable of a template, or of a `namespace` of it, is larger than MAX_SIZE."""
    for value in values:
        if type(value) in _COLLECTIONS:
            if len(value) > MAX_SIZE:
                return True
        elif issubclass(type(value), Namespace) and _is_large(value._Namespace__attrs.values()):
            return True
    return False
