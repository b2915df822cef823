"""How every page of this package begins: its colours and shapes, and what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
STYLES = (HERE / "styles.css").read_text(encoding="utf-8")
"""The colours and shapes of every page, light and dark."""


def head(*, script: str = "") -> str:
    """The beginning of a template, up to styles of its own, for a page that fetches nothing.

    It runs nothing but `script`, which the browser knows by its SHA-256 as it stands between the tags.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{{ run.recipe }}, {{ started }}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{STYLES}'
    )


HEAD = head()
"""How a page without a script begins."""
