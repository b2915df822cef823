"""Jinja2 templates of pages that stand alone: images are embedded, and the browser may not load anything.

A template extends `base.html`, which has the styles of all pages and the blocks `styles` and `body`.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

TEMPLATES = Path(__file__).parent / "templates"
STYLES = (TEMPLATES / "styles.css").read_text(encoding="utf-8")
"""Colours and shapes of all pages, light and dark."""
VIEWER = (TEMPLATES / "viewer.js").read_text(encoding="utf-8")
"""Script of all reports: enlarged images, and values of charts."""


def load_template(path: Path, functions: Sequence[Callable[..., Any]] = (), **filters: Callable[..., Any]) -> Template:
    """Load a template that may call `functions` by their names."""
    environment = Environment(
        loader=FileSystemLoader([path.parent, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(path.name, globals={f.__name__: f for f in functions})


def script_digest(script: str) -> str:
    """Return the SHA-256 of a script as in `script-src`: with it, the browser runs this script and no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def places_for(values: Iterable[float]) -> int:
    """Return the number of decimals that shows three digits of the largest of some values."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return max(0, 2 - math.floor(math.log10(largest))) if largest > 0 else 2


def score_text(value: float, places: int) -> str:
    """Return a score with a number of decimals, and a minus sign."""
    return typeset(f"{value:z,.{places}f}")


def typeset(text: str) -> str:
    """Return text with minus signs for hyphens before numbers, and no line break around ±."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "\N{MINUS SIGN}", text).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
