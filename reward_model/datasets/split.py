"""Split of records by prompt, so that no validation prompt occurs in training."""

# pyarrow has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from reward_model.datasets.keys import text_key
from reward_model.datasets.scratch import filled, rows_of, scratch, slices, starts_of_runs, taken
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
    group_of, digests = _groups(table, seed)
    sizes, held_out = scratch(len(digests)), scratch(len(digests), bool)
    for part in slices(len(group_of)):
        np.add.at(sizes, group_of[part], 1)
    room, smallest = round(fraction * len(table)), int(sizes.min(initial=len(table)))
    for group in _in_order(digests):
        if room < smallest:
            break
        if sizes[group] <= room:
            room -= int(sizes[group])
            held_out[group] = True
    if not 0 < np.count_nonzero(held_out) < len(sizes):
        side = "training" if held_out.any() else "validation"
        raise ValueError(
            f"fraction {fraction} of {len(table)} records leaves none for {side}: they form {len(sizes)} groups "
            f"without a common prompt, of {min(sizes, default=0)} to {max(sizes, default=0)} "
            f"records, and no group can be split. Choose another fraction, or give separate validation data."
        )
    is_validation = taken(held_out, group_of)
    validation = rows_of(is_validation)
    np.logical_not(is_validation, out=is_validation)
    return table.select(rows_of(is_validation)), table.select(validation)


def _in_order(digests: np.ndarray) -> Iterator[int]:
    """Yield the numbers of groups in the order of their digests, which are spread evenly over 64 bits."""
    num_parts = len(digests) // 2**16 + 1
    ends = np.array([2**64 * number // num_parts for number in range(1, num_parts)], np.uint64)
    parts = (np.searchsorted(ends, digests[part], side="right") for part in slices(len(digests)))
    part_of = filled(parts, len(digests), np.int32)
    for number in range(num_parts if len(digests) else 0):
        rows = np.concatenate([part.start + np.flatnonzero(part_of[part] == number) for part in slices(len(digests))])
        yield from rows[np.argsort(digests[rows], kind="stable")].tolist()


def _groups(table: RecordTable, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each record, and the SHA-256 of the alphabetically first prompt of each group.

    A group is a set of prompts that records connect.
    """
    keys, others = (table.column(f"{side}_prompt_key") for side in ("winner", "loser"))
    if all((keys[part] == others[part]).all() for part in slices(len(keys))):
        del others
        ordered = filled([keys], len(keys), keys.dtype)
        ordered.sort()
        distinct = taken(ordered, starts_of_runs(ordered)[:-1])
        group_of = filled((np.searchsorted(distinct, keys[part]) for part in slices(len(keys))), len(keys))
        return group_of, _digests(table, group_of, len(distinct), seed)
    distinct, index = np.unique(np.concatenate([keys, others]), return_inverse=True)
    both = index.reshape(2, -1)
    graph = coo_array((np.ones(len(table), bool), (both[0], both[1])), shape=(len(distinct),) * 2)
    count, group_of_key = connected_components(graph, directed=False)
    group_of = group_of_key[both[0]]
    digests = _digests(table, group_of, count, seed)
    is_joint = np.bincount(group_of_key, minlength=count) > 1
    for group, prompt in _first_prompts(table, group_of, is_joint).items():
        digests[group] = _digest(prompt, seed)
    return group_of, digests


def _digests(table: RecordTable, group_of: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the digest of the winner's prompt of the first record of each group, (count,)."""
    digests, is_known, start = scratch(count, np.uint64), scratch(count, bool), 0
    for batch in table.batches("winner_prompt"):
        groups, rows = np.unique(group_of[start : start + len(batch)], return_index=True)
        start += len(batch)
        is_new = ~is_known[groups]
        prompts = batch.column(0).take(pa.array(rows[is_new])).to_pylist()
        digests[groups[is_new]] = np.array([_digest(prompt, seed) for prompt in prompts], np.uint64)
        is_known[groups] = True
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
