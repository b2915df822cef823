"""Prompts that occur both in the training data and in a test set, on which test accuracy would be too high."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from reward_model.datasets.fields import shortened
from reward_model.datasets.split import record_prompts
from reward_model.types import Record


def normalise(prompt: str) -> str:
    """Return the words of a prompt without case, punctuation and different encodings of the same letters (NFKC).

    "A red  fox!" and "a red fox" give the same. A prompt without letters and digits is only stripped.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    # Letters, marks and digits: without the marks, words of Hindi or Thai would be split.
    words = "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in text).split()
    return " ".join(words) or text.strip()


def shared_prompts(training: Sequence[Record], test: Sequence[Record]) -> set[str]:
    """Return the normalised prompts that occur in both; the empty prompt, of images without one, is not counted."""
    return (normalised_prompts(training) & normalised_prompts(test)) - {""}


def without_prompts(records: Sequence[Record], prompts: set[str]) -> list[Record]:
    """Return the records with none of these normalised prompts on either side."""
    return [record for record in records if not prompts & {*map(normalise, record_prompts(record))}]


def overlap_table(training: Sequence[Record], tests: Mapping[str, Sequence[Record]]) -> str:
    """Return a line for each test set with the numbers of shared prompts and training records, and an example."""
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
    """Return the normalised prompts of both sides of all records."""
    return {normalise(prompt) for record in records for prompt in record_prompts(record)}
