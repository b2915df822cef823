"""Preparation of training and validation records: test prompts removed, validation prompts held out, hard negatives."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from reward_model.datasets.hard_negatives import hard_negatives as make_hard_negatives
from reward_model.datasets.overlap import overlap_table, shared_prompts, without_prompts
from reward_model.datasets.split import split_by_prompt
from reward_model.datasets.summary import describe, useless_records
from reward_model.types import Record


def draw_records(records: Sequence[Record], most: int, *, seed: int) -> Sequence[Record]:
    """Return at most so many records, drawn at random and in their order."""
    if len(records) <= most:
        return records
    return [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), most))]


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
) -> tuple[list[Record], list[Record]]:
    """Return the training and the validation records.

    Prompts that the training data share with the sets in `tests` (by name) are counted, and removed from training if
    `exclude_test_prompts`. If `validation` is empty, `validation_fraction` of the training records, in (0, 1), are held
    out by prompt. Hard negatives are made for the fraction `hard_negatives`, in [0, 1], of the winners and added to the
    training records. Tables of overlap and content are passed to `log`, and warnings of records that teach no order.

    Raises ValueError if no training record is left.
    """
    records = list(training)
    if tests:
        log(overlap_table(records, tests))
    if exclude_test_prompts:
        records = _without_test_prompts(records, tests, log=log)
    if validation:
        held_out = list(validation)
        log(overlap_table(records, {"validation": held_out}))
    else:
        records, held_out = split_by_prompt(records, fraction=validation_fraction, seed=seed)
    if hard_negatives:
        unseen = [*held_out, *chain(*tests.values())]
        negatives = make_hard_negatives(records, fraction=hard_negatives, seed=seed, held_out=unseen)
        log(f"{len(negatives):,} hard negatives are added to {len(records):,} training records")
        records += negatives
    log(f"training\n{describe(records)}\nvalidation\n{describe(held_out)}")
    for name, some in (("training", records), ("validation", held_out)):
        for text in useless_records(some):
            log(f"WARNING: in the {name} data {text}.")
    return records, held_out


def _without_test_prompts(
    records: Sequence[Record], tests: Mapping[str, Sequence[Record]], *, log: Callable[[str], None]
) -> list[Record]:
    shared = {prompt for test in tests.values() for prompt in shared_prompts(records, test)}
    remaining = without_prompts(records, shared)
    if not remaining:
        raise ValueError(f"All {len(records):,} training records have prompts of the test data; none is left.")
    log(f"{len(records) - len(remaining):,} training records with prompts of the test data are excluded")
    return remaining
