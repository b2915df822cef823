"""Preparation of training and validation records: test prompts removed, validation prompts held out, hard negatives."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from reward_model.datasets.hard_negatives import hard_negatives as make_hard_negatives
from reward_model.datasets.overlap import overlap_table, prompt_keys, without_prompts
from reward_model.datasets.split import split_by_prompt
from reward_model.datasets.summary import summarise
from reward_model.datasets.table import RecordTable
from reward_model.types import Record


def draw_records(records: Sequence[Record], most: int, *, seed: int) -> RecordTable:
    """Return at most so many records, drawn at random and in their order."""
    table = RecordTable.of(records)
    if len(table) <= most:
        return table
    return table.select(np.array(sorted(random.Random(seed).sample(range(len(table)), most))))


def prepare_records(
    training: Sequence[Record],
    validation: Sequence[Record],
    tests: Mapping[str, Sequence[Record]],
    *,
    exclude_test_prompts: bool,
    validation_fraction: float,
    hard_negatives: float,
    seed: int,
    log: Callable[[str], None],
) -> tuple[RecordTable, RecordTable]:
    """Return the training and the validation records.

    Prompts that the training data share with the sets in `tests` (by name) are counted, and removed from training if
    `exclude_test_prompts`. If `validation` is empty, `validation_fraction` of the training records, in (0, 1), are held
    out by prompt. Hard negatives are made for the fraction `hard_negatives`, in [0, 1], of the winners and added to the
    training records. Tables of overlap and content are passed to `log`, and warnings of records that teach no order.

    Raises ValueError if no training record is left.
    """
    records = RecordTable.of(training)
    if tests:
        log(overlap_table(records, tests))
    unseen = np.concatenate([np.zeros(0, np.uint64), *(prompt_keys(test) for test in tests.values())])
    if exclude_test_prompts:
        remaining = without_prompts(records, unseen)
        if not len(remaining):
            raise ValueError(f"All {len(records):,} training records have prompts of the test data; none is left.")
        log(f"{len(records) - len(remaining):,} training records with prompts of the test data are excluded")
        records = remaining
    if len(validation):
        held_out = RecordTable.of(validation)
        log(overlap_table(records, {"validation": held_out}))
    else:
        records, held_out = split_by_prompt(records, fraction=validation_fraction, seed=seed)
    if hard_negatives:
        unseen = np.concatenate([unseen, prompt_keys(held_out)])
        negatives = make_hard_negatives(records, fraction=hard_negatives, seed=seed, held_out=unseen)
        log(f"{len(negatives):,} hard negatives are added to {len(records):,} training records")
        records = RecordTable.concatenate([records, negatives])
    for name, some in (("training", records), ("validation", held_out)):
        summary = summarise(some)
        log(f"{name}\n{summary.table()}")
        for text in summary.warnings():
            log(f"WARNING: in the {name} data {text}.")
    return records, held_out
