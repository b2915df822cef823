"""Colours of text on a terminal; files, pipes and NO_COLOR get none."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

Colour = Literal["green", "red", "dim"]
_CODES: dict[Colour, int] = {"green": 32, "red": 31, "dim": 2}


def has_colours(stream: TextIO | None = None) -> bool:
    """Return True if a stream, by default standard output, is a terminal that shows colours (https://no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and (stream or sys.stdout).isatty()


def coloured(text: str, colour: Colour | None) -> str:
    """Return text with the codes that colour it; unchanged without a colour."""
    return text if colour is None else f"\033[{_CODES[colour]}m{text}\033[0m"
