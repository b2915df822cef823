"""Prompts that occur both in the training data and in a test set, on which test accuracy would be too high."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from reward_model.datasets.fields import shortened
from reward_model.datasets.table import RecordTable
from reward_model.types import Record


class _Spaces(dict[int, str]):
    """Letters, marks and digits as they are, and a space for every other character."""

    def __missing__(self, code: int) -> str:
        # Without the marks, words of Hindi or Thai would be split.
        character = chr(code)
        self[code] = character if unicodedata.category(character)[0] in "LMN" else " "
        return self[code]


_SPACES = _Spaces()


def normalise(prompt: str) -> str:
    """Return the words of a prompt without case, punctuation and different encodings of the same letters (NFKC).

    "A red  fox!" and "a red fox" give the same. A prompt without letters and digits is only stripped.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(text.translate(_SPACES).split()) or text.strip()


def prompt_key(prompt: str) -> int:
    """Return 64 bits that are equal for prompts with the same `normalise`; 0 for the empty prompt."""
    text = normalise(prompt)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) if text else 0


def prompt_keys(records: Iterable[Record]) -> np.ndarray:
    """Return the `prompt_key` of both sides of each record, (N, 2), which takes 16 bytes of memory a record."""
    table = RecordTable.of(records)
    keys, row = np.zeros((len(table), 2), np.uint64), 0
    for winners, losers in table.prompts():
        for prompt, other in zip(winners, losers, strict=True):
            keys[row, 0] = prompt_key(prompt)
            keys[row, 1] = keys[row, 0] if other is None else prompt_key(other)
            row += 1
    return keys


def shared_prompts(training: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the prompt keys that occur in both; the empty prompt, of images without one, is not counted."""
    shared = np.intersect1d(training, test)
    return shared[shared != 0]


def without_prompts(records: Sequence[Record], keys: np.ndarray) -> RecordTable:
    """Return the records with none of these prompt keys on either side; the empty prompt does not count."""
    table = RecordTable.of(records)
    return table.select(np.flatnonzero(~np.isin(prompt_keys(table), keys[keys != 0]).any(1)))


def overlap_table(training: Sequence[Record], tests: Mapping[str, Sequence[Record]]) -> str:
    """Return a line for each test set with the numbers of shared prompts and training records, and an example."""
    table, keys, lines = RecordTable.of(training), prompt_keys(training), list[str]()
    for name, test in tests.items():
        test_keys = prompt_keys(test)
        shared = shared_prompts(keys, test_keys)
        rows = np.flatnonzero(np.isin(keys, shared).any(1))
        num_prompts = int((np.unique(test_keys) != 0).sum())
        example = f", such as {shortened(_example(table, keys, rows, shared))}" if len(rows) else ""
        lines.append(
            f"{name}: {len(shared):,} of {num_prompts:,} prompts occur in the training data, "
            f"in {len(rows):,} of {len(table):,} records{example}"
        )
    return "\n".join(lines)


def _example(table: RecordTable, keys: np.ndarray, rows: np.ndarray, shared: np.ndarray) -> str:
    """Return the alphabetically first shared prompt of the first thousand records with one."""
    found = set[str]()
    for prompts in table.select(rows[:1000]).prompts():
        found |= {normalise(prompt) for side in prompts for prompt in side if prompt is not None}
    keys_of = {text: prompt_key(text) for text in found}
    return min(text for text, key in keys_of.items() if key in set(shared.tolist()))
