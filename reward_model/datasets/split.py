"""Split of records by prompt, so that no validation prompt occurs in training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from reward_model.datasets.keys import text_key
from reward_model.datasets.table import RecordTable
from reward_model.types import Record


def split_by_prompt(records: Sequence[Record], *, fraction: float, seed: int) -> tuple[RecordTable, RecordTable]:
    """Return training and validation records without a common prompt; about `fraction` of them are for validation.

    Prompts of one record stay together, and so do prompts that are connected through other records. These groups are
    assigned to validation in an order that depends on `seed` and their prompts only, except those that would exceed
    `fraction`. The order of the records therefore does not matter, and most prompts keep their side when records are
    added. The empty prompt counts as a prompt: all images without a prompt are on one side.

    Prompts are told apart by 64 bits of their SHA-256, which the table holds.

    Raises ValueError if `fraction` is not in (0, 1), or if one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and below 1, such as 0.1.")
    table = RecordTable.of(records)
    group_of, order = _groups(table, seed)
    sizes = np.bincount(group_of, minlength=len(order))
    room, held_out = round(fraction * len(table)), np.zeros(len(order), bool)
    for group in order.tolist():
        if sizes[group] <= room:
            room -= sizes[group]
            held_out[group] = True
        if not room:
            break

    if not 0 < held_out.sum() < len(sizes):
        side = "training" if held_out.any() else "validation"
        raise ValueError(
            f"fraction {fraction} of {len(table)} records leaves none for {side}: they form {len(sizes)} groups "
            f"without a common prompt, of {min(sizes, default=0)} to {max(sizes, default=0)} "
            f"records, and no group can be split. Choose another fraction, or give separate validation data."
        )
    is_validation = held_out[group_of]
    return table.select(np.flatnonzero(~is_validation)), table.select(np.flatnonzero(is_validation))


def _groups(table: RecordTable, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each record, and the groups in the order of the SHA-256 of their alphabetically first prompt.

    A group is a set of prompts that records connect.
    """
    first, second = table.column("winner_prompt_key"), table.column("loser_prompt_key")
    if (first == second).all():
        _, rows, group_of = np.unique(first, return_index=True, return_inverse=True)
        return group_of, np.argsort(_digests(table, rows, seed), kind="stable")
    keys, index = np.unique(np.concatenate([first, second]), return_inverse=True)
    both = index.reshape(2, -1)
    graph = coo_array((np.ones(len(table), bool), (both[0], both[1])), shape=(len(keys),) * 2)
    count, group_of_key = connected_components(graph, directed=False)
    group_of = group_of_key[both[0]]
    _, rows = np.unique(group_of, return_index=True)
    digests = _digests(table, rows, seed)
    is_joint = np.bincount(group_of_key, minlength=count) > 1
    for group, prompt in _first_prompts(table, group_of, is_joint).items():
        digests[group] = _digest(prompt, seed)
    return group_of, np.argsort(digests, kind="stable")


def _digests(table: RecordTable, rows: np.ndarray, seed: int) -> np.ndarray:
    """Return the digests of the winner's prompts of some rows, (N,)."""
    order, digests = np.argsort(rows), np.empty(len(rows), np.uint64)
    prompts = table.texts("winner_prompt", rows[order])  # in the order of the file, whose parts are read one by one
    digests[order] = np.fromiter((_digest(prompt, seed) for prompt in prompts), np.uint64, len(rows))
    return digests


def _first_prompts(table: RecordTable, group_of: np.ndarray, is_joint: np.ndarray) -> dict[int, str]:
    """Return the alphabetically first prompt of each group of several prompts."""
    lowest, rows = dict[int, str](), np.flatnonzero(is_joint[group_of])
    pairs = (zip(*sides, strict=True) for sides in table.select(rows).prompts())
    for group, (prompt, other) in zip(group_of[rows].tolist(), chain.from_iterable(pairs), strict=True):
        here = prompt if other is None else min(prompt, other)
        lowest[group] = min(lowest.get(group, here), here)
    return lowest


def _digest(prompt: str, seed: int) -> int:
    return text_key(f"{seed}:{prompt}")
