"""Removal of records that a backbone cannot process, before training or evaluation starts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from reward_model.datasets.fields import BadRecordError
from reward_model.image_files import upright_size
from reward_model.types import Backbone, PreferencePair, Record


def with_valid_inputs(records: Sequence[Record], backbone: Backbone, *, skipped: Path | None) -> list[Record]:
    """Return the records whose images and prompts the backbone takes: their sizes, lengths and characters.

    Other records are written to the file `skipped` if there is one; without, the first one raises BadRecordError.
    """
    size_of = cache(upright_size)

    @cache
    def flaw_of(size: tuple[int, int], prompt: str) -> str | None:
        try:
            num_tokens = backbone.num_visual_tokens(*size)
        except ValueError as error:
            return f"an image of {size[1]} x {size[0]} pixels: {error}"
        try:
            backbone.prompt_tokenizer.ids(prompt, num_tokens)
        except ValueError as error:
            return str(error)
        return None

    valid: list[Record] = []
    for record in records:
        flaw = next(filter(None, (flaw_of(size_of(image), prompt) for image, prompt in _inputs(record))), None)
        if flaw is None:
            valid.append(record)
        elif skipped is None:
            raise BadRecordError(f"{record.where}: {flaw}")
        else:
            with skipped.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"where": record.where, "reason": flaw}) + "\n")
    return valid


def _inputs(record: Record) -> Iterator[tuple[Path, str]]:
    """Yield each image of a record with its prompt."""
    if isinstance(record, PreferencePair):
        yield record.winner, record.winner_prompt
        yield record.loser, record.loser_prompt
    else:
        yield record.image, record.prompt
