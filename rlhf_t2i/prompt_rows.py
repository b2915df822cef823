"""A prompt is a row: its text, and what its file or data set says about it besides."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any


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
        return Prompt(text.strip(), json.loads(json.dumps(dict(row))), where)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}, {text!r}, has fields that are no JSON: {error}.") from error
