"""Which prompts of the training data stand in a test set as well: a judge is not to be measured on what it has read."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from reward_model.datasets.fields import shortened
from reward_model.datasets.split import record_prompts
from reward_model.types import Record


def normalise(prompt: str) -> str:
    """The words of a prompt: without case, punctuation, and other ways of writing the same letters (NFKC).

    "A red  fox!" and "a red fox" are one prompt. A prompt without any letter or digit stays as it is.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    # Letters, marks and digits: without the marks, words of Hindi or Thai would run into one.
    words = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text).split()
    return " ".join(words) or text.strip()


def shared_prompts(training: Sequence[Record], test: Sequence[Record]) -> set[str]:
    """The normalised prompts of both. The empty one, of images without a prompt, is not counted."""
    return (normalised_prompts(training) & normalised_prompts(test)) - {""}


def without_prompts(records: Sequence[Record], prompts: set[str]) -> list[Record]:
    """The records of which neither side has one of these normalised prompts."""
    return [record for record in records if not prompts & {*map(normalise, record_prompts(record))}]


def overlap_table(training: Sequence[Record], tests: Mapping[str, Sequence[Record]]) -> str:
    """For each test set a line: how many of its prompts, and of the training records, are shared; and one of them."""
    lines: list[str] = []
    for name, test in tests.items():
        shared = shared_prompts(training, test)
        num_records = len(training) - len(without_prompts(training, shared))
        num_prompts = len(normalised_prompts(test) - {""})
        example = f", such as {shortened(min(shared))}" if shared else ""
        lines.append(
            f"{name}: {len(shared):,} of {num_prompts:,} prompts occur in the training data, "
            f"in {num_records:,} of {len(training):,} records{example}"
        )
    return "\n".join(lines)


def normalised_prompts(records: Iterable[Record]) -> set[str]:
    """Those of both sides of all records."""
    return {normalise(prompt) for record in records for prompt in record_prompts(record)}
