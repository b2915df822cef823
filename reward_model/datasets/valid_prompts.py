"""Leave out, or refuse, what a backbone cannot be shown, before any time is spent on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.split import record_prompts
from reward_model.types import Record


def with_valid_prompts(
    records: Sequence[Record], try_prompt: Callable[[str], object], *, skipped: Path | None
) -> list[Record]:
    """The records whose prompts `try_prompt` does not answer with a ValueError.

    Another record raises BadRecordError, or, if there is a file `skipped`, is left out and written down there.
    """

    @cache
    def flaw_of(prompt: str) -> str | None:
        try:
            try_prompt(prompt)
        except ValueError as error:
            return str(error)
        return None

    kept: list[Record] = []
    for record in records:
        flaw = next(filter(None, map(flaw_of, record_prompts(record))), None)
        if flaw is None:
            kept.append(record)
        elif skipped is None:
            raise BadRecordError(f"{record.where}: {flaw}")
        else:
            with skipped.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"where": record.where, "reason": flaw}) + "\n")
    return kept
