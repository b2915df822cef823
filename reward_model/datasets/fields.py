"""Typed access to the fields of a record, shared by all formats. A wrong value raises BadRecordError."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from reward_model.stored_images import StoredImage

ImageField = str | StoredImage
"""An image in a record: the path of a file, or its place within the data file."""


class BadRecordError(ValueError):
    """An invalid record. The message states the invalid value and what would be valid."""


class NoPreferenceError(Exception):
    """A valid record without a preference, such as a pair without a label. The message states the reason."""


def shortened(value: object) -> str:
    """Return the repr of a value for a message: at most 80 characters, however long or deeply nested the value is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlist = short.maxdict = 12
    text = short.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_unknown_keys(fields: Collection[str], known: Collection[str]) -> None:
    """Raise BadRecordError for the first key that is not among `known`, so that a misspelt key is not ignored."""
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
    """Check the keys of a record in a published format; raises BadRecordError for a missing or misspelt key.

    Other keys are accepted, because published data sets gain columns, unless one is nearly the name of a missing key.
    """
    foreign = [key for key in fields if key not in {*needed, *optional, *ignored}]
    for key in sorted({*needed, *optional} - {*fields}):
        close = difflib.get_close_matches(key, foreign, n=1, cutoff=0.85)
        if close:
            raise BadRecordError(f"the key {shortened(close[0])} is unknown. Did you mean {key!r}?")
    if missing := sorted({*needed} - {*fields}):
        raise BadRecordError(f"{', '.join(missing)} missing; the keys are {shortened(sorted(map(str, fields)))}.")


def take_text(fields: Mapping[str, Any], key: str) -> str:
    """Return the string under a key; it may be empty."""
    return _checked_text(fields[key], key)


def take_two_texts(fields: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return the two strings of the list under a key."""
    match fields[key]:
        case [first, second]:
            return _checked_text(first, key), _checked_text(second, key)
        case value:
            raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a list of two strings.")


def take_image(fields: Mapping[str, Any], key: str) -> ImageField:
    """Return the image under a key: a path, a place in the data file, or the {"path": ...} of `datasets`."""
    return as_image(fields[key], key)


def as_image(value: object, key: str) -> ImageField:
    """Return a value as an image; `key` names it in messages."""
    match value:
        case StoredImage():
            return value
        case {"bytes": None, "path": str() as path}:
            return _checked_text(path, key)
        case _:
            return _checked_text(value, key)


def take_list(fields: Mapping[str, Any], key: str) -> list[Any]:
    """Return the list under a key."""
    value = fields[key]
    if not isinstance(value, list):
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a list.")
    return value


def take_choice(fields: Mapping[str, Any], key: str, choices: Collection[str]) -> str:
    """Return the string under a key, which must be one of `choices`."""
    value = fields[key]
    if not isinstance(value, str) or value not in choices:
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be one of {', '.join(map(repr, choices))}.")
    return value


def take_number(fields: Mapping[str, Any], key: str) -> float:
    """Return the finite number under a key."""
    return as_number(fields[key], key)


def as_number(value: object, key: str) -> float:
    """Return a value as a finite float; `key` names it in messages."""
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a finite number.")
    return number


def take_label(fields: Mapping[str, Any]) -> int:
    """Return the label: 1 for good or safe, 0 for bad or unsafe. `true` is refused, as it could mean either."""
    value = fields["label"]
    if type(value) is not int or value not in (0, 1):
        raise BadRecordError(f"'label' is {shortened(value)}; it must be the number 1 (good, safe) or 0 (bad, unsafe).")
    return value


def _checked_text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"{key!r} is {shortened(value)}; it must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can contain half of a surrogate pair ("\ud83d"), on which tokenizers and file systems fail much later.
        raise BadRecordError(f"{key!r} is {shortened(value)}, which is not valid Unicode: {error.reason}.") from error
    return value
