"""What a judge is taught by and what it is chosen by: prompts are kept apart, hard negatives added, and all is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from reward_model.datasets.hard_negatives import hard_negatives as make_hard_negatives
from reward_model.datasets.overlap import overlap_table, shared_prompts, without_prompts
from reward_model.datasets.split import split_by_prompt
from reward_model.datasets.summary import describe
from reward_model.types import Record


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
    """The records to train on and those to choose by.

    Prompts that training shares with test sets are counted, and left out if they are to be. Without validation records
    a share of the prompts becomes these. Then so many hard negatives are added as `hard_negatives` is of the records.
    Raises ValueError if nothing is left to train on.
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
        records, held_out = split_by_prompt(records, share=validation_fraction, seed=seed)
    if hard_negatives:
        held_back = [*held_out, *chain(*tests.values())]
        negatives = make_hard_negatives(records, share=hard_negatives, seed=seed, held_back=held_back)
        log(f"{len(negatives):,} hard negatives are added to {len(records):,} training records")
        records += negatives
    log(f"training\n{describe(records)}\nvalidation\n{describe(held_out)}")
    return records, held_out


def _without_test_prompts(
    records: Sequence[Record], tests: Mapping[str, Sequence[Record]], *, log: Callable[[str], None]
) -> list[Record]:
    kept = without_prompts(records, {prompt for test in tests.values() for prompt in shared_prompts(records, test)})
    if not kept:
        raise ValueError(f"All {len(records):,} training records have prompts of the test data; nothing is left.")
    log(f"{len(records) - len(kept):,} training records are left out for prompts that occur in test")
    return kept
