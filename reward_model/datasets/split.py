"""Split of records by prompt, so that no validation prompt occurs in training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from reward_model.datasets.table import RecordTable
from reward_model.types import Record


def split_by_prompt(records: Sequence[Record], *, fraction: float, seed: int) -> tuple[RecordTable, RecordTable]:
    """Return training and validation records without a common prompt; about `fraction` of them are for validation.

    Prompts of one record stay together, and so do prompts that are connected through other records. These groups are
    assigned to validation in an order that depends on `seed` and their prompts only, except those that would exceed
    `fraction`. The order of the records therefore does not matter, and most prompts keep their side when records are
    added. The empty prompt counts as a prompt: all images without a prompt are on one side.

    Prompts are told apart by 64 bits of their SHA-256, which takes 16 bytes of memory a record.

    Raises ValueError if `fraction` is not in (0, 1), or if one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and below 1, such as 0.1.")
    table = RecordTable.of(records)
    group_of, order = _groups(table, seed)
    sizes = np.bincount(group_of, minlength=len(order))
    room, held_out = round(fraction * len(table)), np.zeros(len(order), bool)
    for group in order:
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
    first, second = np.zeros(len(table), np.uint64), np.zeros(len(table), np.uint64)
    for row, (prompt, other) in enumerate(_pairs_of_prompts(table)):
        first[row] = _digest(prompt, seed)
        second[row] = first[row] if other is None else _digest(other, seed)
    digests, index = np.unique(np.concatenate([first, second]), return_inverse=True)
    both = index.reshape(2, -1)
    graph = coo_array((np.ones(len(table), bool), (both[0], both[1])), shape=(len(digests),) * 2)
    count, group_of_digest = connected_components(graph, directed=False)
    group_of = group_of_digest[both[0]]
    key = np.zeros(count, np.uint64)
    key[group_of_digest] = digests
    _use_first_prompts(key, table, group_of, is_joint=np.bincount(group_of_digest, minlength=count) > 1, seed=seed)
    return group_of, np.argsort(key, kind="stable")


def _use_first_prompts(
    key: np.ndarray, table: RecordTable, group_of: np.ndarray, *, is_joint: np.ndarray, seed: int
) -> None:
    """Set the key of each group of several prompts to the digest of the alphabetically first."""
    if not is_joint.any():
        return
    lowest: dict[int, str] = {}
    for group, (prompt, other) in zip(group_of, _pairs_of_prompts(table), strict=True):
        if is_joint[group]:
            here = prompt if other is None else min(prompt, other)
            lowest[group] = min(lowest.get(group, here), here)
    for group, prompt in lowest.items():
        key[group] = _digest(prompt, seed)


def _pairs_of_prompts(table: RecordTable) -> Iterator[tuple[str, str | None]]:
    for winners, losers in table.prompts():
        yield from zip(winners, losers, strict=True)


def _digest(prompt: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{prompt}".encode()).digest()[:8])
