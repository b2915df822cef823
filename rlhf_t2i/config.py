"""From the command line and YAML files to a recipe's config, with every typo an error."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

ConfigT = TypeVar("ConfigT")
Rule = tuple[str, bool, str]
"""A field, whether its value can work, and what it must be."""


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keep the line breaks of the recipe's own description."""


def parse_config(config_class: type[ConfigT], *, description: str, arguments: Sequence[str] | None = None) -> ConfigT:
    """Read a dataclass from `--config FILE.yaml` and `--field value`, the later ones winning; `--flag` alone is true.

    Exits with status 2 and a message that names the field for an unknown field, a value of the wrong type, or values
    that the dataclass refuses with a ValueError.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description,
        usage="%(prog)s [--config FILE.yaml] [--FIELD VALUE ...]",
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,  # or a field cut short would be taken for the whole
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the fields below.")
    parser.add_class_arguments(config_class)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        values: dict[str, Any] = parser.parse_args(_with_flags(given, config_class)).as_dict()
        values.pop("config")
        return config_class(**values)
    except (ArgumentError, ValueError) as error:
        known = [field.name for field in fields(config_class)]  # pyright: ignore[reportArgumentType]
        sys.stderr.write(f"error: {error}{_suggestion(str(error), known)}\n")
        raise SystemExit(2) from error


def _with_flags(arguments: Sequence[str], config_class: Any) -> list[str]:
    """Let `--resume` stand for `--resume true`."""
    flags = {f"--{field.name}" for field in fields(config_class) if field.type in (bool, "bool")}
    full: list[str] = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue="--"):
        full.append(argument)
        if argument in flags and following.startswith("--"):
            full.append("true")
    return full


def _suggestion(message: str, known: Sequence[str]) -> str:
    """The field that a mistyped one was probably meant to be."""
    for word in re.findall(r"[A-Za-z_]{3,}", message):
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.8)
        if close and word not in known:
            return f"\nDid you mean {close[0]}?"
    return ""


def check(config: Any, rules: Sequence[Rule]) -> None:
    """Refuse values that cannot work: ValueError, naming the first of them."""
    for name, works, rule in rules:
        if not works:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {rule}.")


def names(text: str) -> list[str]:
    """The parts of a comma-separated list, without blanks around them."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str) -> list[int]:
    """The numbers of a range such as 0-999, ends included, or of a list such as 249,499; none if it is neither."""
    first, dash, last = text.partition("-")
    parts = [first.strip(), last.strip()] if dash else names(text)
    if not all(part.isdecimal() for part in parts):
        return []
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in parts]
