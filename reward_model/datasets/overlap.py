"""Prompts that occur both in the training data and in a test set, on which test accuracy would be too high."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from reward_model.datasets.fields import shortened
from reward_model.datasets.keys import normalise, prompt_key
from reward_model.datasets.scratch import filled, rows_of, starts_of_runs, taken
from reward_model.datasets.table import RecordTable
from reward_model.types import Record


def prompt_keys(records: Iterable[Record]) -> np.ndarray:
    """Return the `prompt_key` of all prompts of the records, each once and in order."""
    table = RecordTable.of(records)
    keys = filled((part.ravel() for part in _keys_of(table)), 2 * len(table), np.uint64)
    keys.sort()
    return taken(keys, starts_of_runs(keys)[:-1])


def _keys_of(table: RecordTable) -> Iterator[np.ndarray]:
    """Yield the keys of both sides of the records, (n, 2), in parts."""
    sides = (table.column_parts("winner_words"), table.column_parts("loser_words"))
    yield from (np.stack(keys, axis=1) for keys in zip(*sides, strict=True))


def _with_prompts(table: RecordTable, keys: np.ndarray) -> np.ndarray:
    """Return whether each record has one of these prompts, (N,); the empty prompt does not count."""
    wanted = keys[keys != 0]
    found = (np.isin(part, wanted) for part in _keys_of(table))
    return filled((sides[:, 0] | sides[:, 1] for sides in found), len(table), bool)


def shared_prompts(training: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the prompt keys, as `prompt_keys` gives them, that occur in both; the empty prompt is not counted."""
    places = np.searchsorted(training, test)
    is_shared = (places < len(training)) & (test != 0)
    is_shared[is_shared] = training[places[is_shared]] == test[is_shared]
    return test[is_shared]


def without_prompts(records: Sequence[Record], keys: np.ndarray) -> RecordTable:
    """Return the records with none of these prompt keys on either side; the empty prompt does not count."""
    table = RecordTable.of(records)
    return table.select(rows_of(~_with_prompts(table, keys)))


def overlap_table(training: Sequence[Record], tests: Mapping[str, Sequence[Record]]) -> str:
    """Return a line for each test set with the numbers of shared prompts and training records, and an example."""
    table, lines = RecordTable.of(training), list[str]()
    keys = prompt_keys(table)
    for name, test in tests.items():
        test_keys = prompt_keys(test)
        shared = shared_prompts(keys, test_keys)
        rows = rows_of(_with_prompts(table, shared))
        num_prompts = int((test_keys != 0).sum())
        example = f", such as {shortened(_example(table, rows, shared))}" if len(rows) else ""
        lines.append(
            f"{name}: {len(shared):,} of {num_prompts:,} prompts occur in the training data, "
            f"in {len(rows):,} of {len(table):,} records{example}"
        )
    return "\n".join(lines)


def _example(table: RecordTable, rows: np.ndarray, shared: np.ndarray) -> str:
    """Return the alphabetically first shared prompt of the first thousand records with one."""
    found = set[str]()
    for prompts in table.select(rows[:1000]).prompts():
        found |= {normalise(prompt) for side in prompts for prompt in side if prompt is not None}
    wanted = set(shared.tolist())
    return min(text for text in found if prompt_key(text) in wanted)
