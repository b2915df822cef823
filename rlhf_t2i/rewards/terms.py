"""The text of several rewards, `oracle,jpeg_compressibility=0.1`, as names and weights."""

from __future__ import annotations

from collections.abc import Iterable


def parse_terms(text: str) -> list[tuple[str, str | None]]:
    """Return the name and the weight, as texts, of each comma-separated NAME or NAME=WEIGHT; a weight may be missing.

    A name with a comma or an equals sign is put in quotes, 'NAME' or "NAME"; within parentheses none are needed.
    Raises ValueError for a quote or parenthesis that is not closed.
    """
    parts: list[list[str]] = [["", ""]]  # the name, and what follows an equals sign
    marks = [0]  # equals signs of each part
    quote, depth = "", 0
    for character in text:
        outside = not quote and not depth
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
            parts[-1][marks[-1]] += character if depth else ""  # the quotes of an argument stay
        elif outside and character == ",":
            parts.append(["", ""])
            marks.append(0)
        elif outside and character == "=" and not marks[-1]:
            marks[-1] = 1
        else:
            depth += 0 if quote else (character == "(") - (character == ")")
            parts[-1][marks[-1]] += character
    if quote or depth > 0:
        raise ValueError(f"{text} has a {'quote' if quote else 'parenthesis'} that is not closed.")
    terms = zip(parts, marks, strict=True)
    return [(name.strip(), weight.strip() if mark else None) for (name, weight), mark in terms if name.strip() or mark]


def reward_names_of(text: str) -> list[str]:
    """Return the names of comma-separated NAME or NAME=WEIGHT, without quotes."""
    return [name for name, _ in parse_terms(text)]


def join_terms(names: Iterable[str]) -> str:
    """Return names as one text that `parse_terms` reads, with quotes where they are needed."""
    return ",".join(_quoted(name) for name in names)


def _quoted(name: str) -> str:
    try:
        if parse_terms(name) == [(name, None)]:
            return name
    except ValueError:
        pass
    return f'"{name}"' if '"' not in name else f"'{name}'"
