"""A bound on the steps of code that comes with a stranger's model, such as its chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

MAX_STEPS = 2_000_000
"""Lines of Python; a chat template takes hundreds, its first use tens of thousands. They pass in about a second."""


@contextmanager
def bounded_steps(what: str) -> Iterator[None]:
    """Context in which this thread runs at most MAX_STEPS lines; beyond them a ValueError names `what`.

    jinja's sandbox bounds one loop, and not loops in loops.
    """
    left = MAX_STEPS

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"{what} does not end within {MAX_STEPS:,} steps.")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)
