"""Prompts that occur both in the training data and in a test set, on which test accuracy would be too high."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from reward_model.datasets.fields import shortened
from reward_model.datasets.keys import normalise, prompt_key
from reward_model.datasets.table import RecordTable
from reward_model.types import Record


def prompt_keys(records: Iterable[Record]) -> np.ndarray:
    """Return the `prompt_key` of both sides of each record, (N, 2), which takes 16 bytes of memory a record."""
    table = RecordTable.of(records)
    return np.stack([table.column("winner_words"), table.column("loser_words")], axis=1)


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
