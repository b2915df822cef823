"""Tags of a record: the groups that an evaluation counts it in, such as its tier, its domain or its generators.

    "tags": {"tier": "binding", "generator": ["sdxl", "flux"]}

A record belongs to the group of each of its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reward_model.datasets.fields import BadRecordError, shortened, take_text
from reward_model.types import Tags

MAX_LENGTH = 80
"""Characters of a name or a value of a tag."""


def take_tags(fields: Mapping[str, Any]) -> Tags:
    """Return the tags of a record in the project's own format; none if there are none. Null is no tag.

    Raises BadRecordError for anything but an object of strings and lists of strings that are not empty, no longer than
    `MAX_LENGTH` and without spaces at their ends, which would divide a group unseen.
    """
    value = fields.get("tags")
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRecordError(f"'tags' is {shortened(value)}; it must be an object, such as {{'tier': 'binding'}}.")
    return {_checked(name, "a name in 'tags'"): _values(name, one) for name, one in value.items() if one is not None}


def published_tags(fields: Mapping[str, Any], **keys: tuple[str, ...]) -> Tags:
    """Return tags from columns of a published format: the values of the columns keys[tag], each value once.

    A column that is missing, null or empty gives none; one that is no string raises BadRecordError.
    """
    found = {
        tag: [take_text(fields, key).strip()[:MAX_LENGTH] for key in columns if fields.get(key) is not None]
        for tag, columns in keys.items()
    }
    return {tag: values for tag, texts in found.items() if (values := tuple(dict.fromkeys(filter(None, texts))))}


def _values(name: object, value: object) -> tuple[str, ...]:
    values = value if isinstance(value, list) and value else [value]
    checked = [_checked(one, f"tag {shortened(name)}") for one in values]
    if len({*checked}) < len(checked):
        raise BadRecordError(f"tag {shortened(name)} is {shortened(value)}; each value must be given once.")
    return tuple(checked)


def _checked(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecordError(f"{what} is {shortened(value)}; it must be a string; a value may also be a list of them.")
    take_text({what: value}, what)  # refuses what is no valid Unicode
    if not value or value != value.strip() or len(value) > MAX_LENGTH or not value.isprintable():
        raise BadRecordError(
            f"{what} is {shortened(value)}; it must have 1 to {MAX_LENGTH} printable characters, and no space at its "
            f"ends."
        )
    return value
