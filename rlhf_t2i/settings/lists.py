"""Options that hold several values in one text."""

from __future__ import annotations


def names(text: str) -> list[str]:
    """Return the parts of a comma-separated list, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str) -> list[int]:
    """Return the numbers of a range such as 0-999, ends included, or of a list such as 249,499; [] for other text."""
    first, dash, last = text.partition("-")
    parts = [first.strip(), last.strip()] if dash else names(text)
    if not all(part.isdecimal() for part in parts):
        return []
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in parts]
