"""Removal of records whose prompts a backbone cannot process, before training starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.split import record_prompts
from reward_model.types import Record


def with_valid_prompts(
    records: Sequence[Record], check_prompt: Callable[[str], object], *, skipped: Path | None
) -> list[Record]:
    """Return the records for whose prompts `check_prompt` does not raise ValueError.

    Other records are written to the file `skipped` if there is one; without, the first one raises BadRecordError.
    """

    @cache
    def flaw_of(prompt: str) -> str | None:
        try:
            check_prompt(prompt)
        except ValueError as error:
            return str(error)
        return None

    valid: list[Record] = []
    for record in records:
        flaw = next(filter(None, map(flaw_of, record_prompts(record))), None)
        if flaw is None:
            valid.append(record)
        elif skipped is None:
            raise BadRecordError(f"{record.where}: {flaw}")
        else:
            with skipped.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"where": record.where, "reason": flaw}) + "\n")
    return valid
