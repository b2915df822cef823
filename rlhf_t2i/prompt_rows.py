"""A prompt is a row: its text, and what its file or data set says about it besides."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMAGE = "image"
"""Field of a row with the path of its reference image, which the prompt says how to edit."""


class Prompt(str):
    """A prompt: its text, and the row of a file, a data set or a caller's list that it is from.

    It is used as a text and equal to it; `metadata_of` returns the row, which a reward may need.
    """

    __slots__ = ("metadata", "where")
    metadata: Mapping[str, Any]
    """All fields of the row, a JSON object; `prompt` is the text."""
    where: str
    """FILE:LINE, FILE:RECORD n, FILE:ROW n or `prompt n`, for messages."""

    def __new__(cls, text: str, metadata: Mapping[str, Any] | None = None, where: str = "") -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = {"prompt": str(text)} if metadata is None else metadata
        prompt.where = where
        return prompt


class EditPrompt(Prompt):
    """An instruction to edit an image: a row with a reference image, the condition of sampling besides the text.

    It equals only an instruction with the same text and image, so that "make it red" of two images are two prompts.
    The row has the image's absolute path under "image", where rewards find it.
    """

    __slots__ = ("image",)
    image: Path
    """Absolute path of the reference image."""

    def __new__(cls, text: str, image: Path, metadata: Mapping[str, Any] | None = None, where: str = "") -> EditPrompt:
        image = image.expanduser().absolute()
        prompt: Any = super().__new__(cls, text, {"prompt": text, **(metadata or {}), IMAGE: str(image)}, where)
        prompt.image = image
        return prompt

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EditPrompt) and key_of(self) == key_of(other)

    def __ne__(self, other: object) -> bool:  # that of str would compare texts
        return not self == other

    def __hash__(self) -> int:
        return hash(key_of(self))

    def __getnewargs__(self) -> tuple[Any, ...]:  # so that copies and pickles have all parts
        return str(self), self.image, self.metadata, self.where


def key_of(prompt: str) -> str:
    """Return a plain text that is equal for equal prompts only: the prompt, with the path of its reference image."""
    return f"{prompt!s}\0{prompt.image}" if isinstance(prompt, EditPrompt) else str(prompt)


def emptied(prompt: str) -> str:
    """Return the empty prompt; that of an instruction keeps the reference image."""
    return EditPrompt("", prompt.image) if isinstance(prompt, EditPrompt) else ""


def as_row(text: str, fields: Mapping[str, Any], *, folder: Path, where: str) -> Prompt:
    """Return the prompt of a row: an instruction if it has an image, whose path is relative to `folder`.

    Raises ValueError, with its place, for an image that is no path.
    """
    if fields.get(IMAGE) is None:
        return Prompt(text, fields, where)
    if not (isinstance(fields[IMAGE], str) and fields[IMAGE].strip()):
        raise ValueError(
            f"{where} has the {IMAGE!r} {fields[IMAGE]!r}; it must be the path of one image, the reference that the "
            f"prompt says how to edit."
        )
    return EditPrompt(text, folder / Path(fields[IMAGE]).expanduser(), fields, where)


def metadata_of(prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return a copy of the row of each prompt; that of a plain text is {"prompt": text}."""
    return [
        copy.deepcopy(dict(prompt.metadata)) if isinstance(prompt, Prompt) else {"prompt": str(prompt)}
        for prompt in prompts
    ]


def as_prompts(prompts: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """Return prompts that a caller in Python gave, each a text or a row with the text under "prompt".

    Raises ValueError, with the number of the prompt, for anything else and for a row that is no JSON object.
    """
    if isinstance(prompts, str | Mapping) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}; it must be a list of texts or rows, such as ['a fox'].")
    return [_as_prompt(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]


def _as_prompt(row: Any, where: str) -> str:
    if isinstance(row, str) and row.strip():
        return row if isinstance(row, Prompt) else row.strip()
    if not (isinstance(row, Mapping) and isinstance(text := row.get("prompt"), str) and text.strip()):
        raise ValueError(f"{where} is {row!r}; it must be a text, or a row with a text under 'prompt'.")
    try:
        fields = json.loads(json.dumps(dict(row)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}, {text!r}, has fields that are no JSON: {error}.") from error
    return as_row(text.strip(), fields, folder=Path(), where=where)
