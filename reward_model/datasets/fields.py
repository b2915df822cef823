"""What the readers of all formats share: how a field is taken from a record, and how it is refused."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

ImageField = str | bytes
"""What a record gives for an image: the path of a file, or the file's content."""


class BadRecordError(ValueError):
    """A record that nothing can be learnt from: what is wrong with it and what would be right."""


class NoPreferenceError(Exception):
    """A sound record from which nothing can be learnt, such as a pair that nobody judged; the message says why."""


def shortened(value: object) -> str:
    """A value as it stands in a message: at most 80 characters of its repr, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlist = short.maxdict = 12
    text = short.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_unknown_keys(fields: Collection[str], known: Collection[str]) -> None:
    """Let no misspelt key pass as if it were not there."""
    for key in fields:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise BadRecordError(f"the key {shortened(key)} is unknown.{hint} Known are: {', '.join(sorted(known))}.")


def check_keys(
    fields: Collection[str],
    *,
    needed: Collection[str],
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> None:
    """Ask for the keys of a published format; foreign ones pass, for formats grow, unless one looks like a typo."""
    foreign = [key for key in fields if key not in {*needed, *optional, *ignored}]
    for key in sorted({*needed, *optional} - {*fields}):
        close = difflib.get_close_matches(key, foreign, n=1, cutoff=0.85)
        if close:
            raise BadRecordError(f"the key {shortened(close[0])} is unknown. Did you mean {key!r}?")
    if missing := sorted({*needed} - {*fields}):
        raise BadRecordError(f"{', '.join(missing)} missing; the keys are {shortened(sorted(map(str, fields)))}.")


def take_text(fields: Mapping[str, Any], key: str) -> str:
    """The string under a key; it may be empty."""
    return _text(fields[key], key)


def take_two_texts(fields: Mapping[str, Any], key: str) -> tuple[str, str]:
    """The two strings that stand as a list under a key."""
    match fields[key]:
        case [first, second]:
            return _text(first, key), _text(second, key)
        case value:
            raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a list of two strings.")


def take_image(fields: Mapping[str, Any], key: str) -> ImageField:
    """The image under a key: a path, bytes, or what `datasets` makes of either, {"bytes": ..., "path": ...}."""
    return image_of(fields[key], key)


def image_of(value: object, key: str) -> ImageField:
    """The image that a value is; `key` is where it stood, for messages."""
    match value:
        case bytes() as content:
            return content
        case {"bytes": bytes() as content}:
            return content
        case {"bytes": None, "path": str() as path}:
            return _text(path, key)
        case _:
            return _text(value, key)


def take_list(fields: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key."""
    value = fields[key]
    if not isinstance(value, list):
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a list.")
    return value


def take_choice(fields: Mapping[str, Any], key: str, choices: Collection[str]) -> str:
    """One of a few words under a key."""
    value = fields[key]
    if not isinstance(value, str) or value not in choices:
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be one of {', '.join(map(repr, choices))}.")
    return value


def take_number(fields: Mapping[str, Any], key: str) -> float:
    """The finite number under a key."""
    return number_of(fields[key], key)


def number_of(value: object, key: str) -> float:
    """The finite number that a value is; `key` is where it stood, for messages."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a finite number.")
    return number


def take_label(fields: Mapping[str, Any]) -> int:
    """1 for good (safe, sound) or 0 for bad. `true` is refused: whether it means good or unsafe is anyone's guess."""
    value = fields["label"]
    if type(value) is not int or value not in (0, 1):
        raise BadRecordError(f"'label' is {shortened(value)}; it must be the number 1 (good, safe) or 0 (bad, unsafe).")
    return value


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"{key!r} has {shortened(value)}, where a string must stand.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud83d"); tokenizers and file systems choke on it much later.
        raise BadRecordError(f"{key!r} has {shortened(value)}, which is no valid Unicode: {error.reason}.") from error
    return value
