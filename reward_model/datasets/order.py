"""The order of records in training: a pure function of seed and epoch, so that nothing is stored or read to resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset

from reward_model.datasets.scratch import filled, rows_of, scratch, slices, taken

_WINDOW = 256
"""A window holds the blocks that start within so many records; its records are shuffled."""


def random_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the random order of `count` records that accelerate's sampler draws for a seed and an epoch."""
    order = scratch(count)
    torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch), out=torch.from_numpy(order))
    return order


def block_order(blocks: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return a random order of records, (N,), in which those of a block stay near one another.

    blocks: the block of each record; -1 is a record on its own. Blocks, such as row groups of a Parquet file, are put
    in random order and divided into windows, of the blocks that start within 256 records, which are shuffled. So a
    process that decodes a block for one of its images soon needs the others.
    """
    rng = np.random.default_rng((seed, epoch))
    block_of, sizes = _numbered(blocks)
    window_of_block = scratch(len(sizes))
    shuffled, before = _shuffled(len(sizes), rng), 0
    for part in slices(len(sizes)):
        ends = before + np.cumsum(sizes[shuffled[part]])
        window_of_block[shuffled[part]] = np.concatenate([[before], ends[:-1]]) // _WINDOW
        before = int(ends[-1])
    noise = scratch(len(blocks), np.float64)
    rng.random(out=noise)
    order, starts = _by_window(taken(window_of_block, block_of))
    for start, stop in pairwise(starts.tolist()):
        rows = order[start:stop]
        order[start:stop] = rows[np.argsort(noise[rows], kind="stable")]
    return order


def _numbered(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each record's block, (N,), and the sizes of all blocks; records on their own come first."""
    found = [np.unique(blocks[part], return_counts=True) for part in slices(len(blocks))]
    ids, inverse = np.unique(np.concatenate([np.zeros(0, np.int64), *(i for i, _ in found)]), return_inverse=True)
    counts = np.zeros(len(ids), np.int64)
    np.add.at(counts, inverse, np.concatenate([np.zeros(0, np.int64), *(count for _, count in found)]))
    num_lonely = int(counts[ids < 0].sum())
    ids, counts = ids[ids >= 0], counts[ids >= 0]
    sizes, block_of, before = scratch(num_lonely + len(ids)), scratch(len(blocks)), 0
    sizes[:num_lonely], sizes[num_lonely:] = 1, counts
    for part in slices(len(blocks)):
        is_lonely = blocks[part] < 0
        number = before + np.cumsum(is_lonely)  # counted from the last one
        block_of[part] = np.where(is_lonely, num_lonely - number, num_lonely + np.searchsorted(ids, blocks[part]))
        before = int(number[-1])
    return block_of, sizes


def _by_window(window_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the records in the order of their windows, (N,), and the first place of each window, with the end."""
    num_windows = len(window_of) // _WINDOW + 1
    counts = sum(np.bincount(window_of[part], minlength=num_windows) for part in slices(len(window_of)))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # of no record: an empty window
    order, free = scratch(len(window_of)), starts.copy()
    for part in slices(len(window_of)):
        windows = window_of[part]
        rows = np.argsort(windows, kind="stable")
        found, first, sizes = np.unique(windows[rows], return_index=True, return_counts=True)
        order[np.arange(len(rows)) + np.repeat(free[found] - first, sizes)] = part.start + rows
        free[found] += sizes
    return order, starts


def _shuffled(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return what `rng.permutation(size)` does."""
    array = filled((np.arange(part.start, part.stop) for part in slices(size)), size)
    rng.shuffle(array)
    return array


def mixed_order(
    blocks: np.ndarray, sources: np.ndarray, weights: Sequence[float], *, seed: int, epoch: int
) -> np.ndarray:
    """Return the records of an epoch, (N,), of several sources in proportion to their weights.

    blocks: as in `block_order`; sources: the number of each record's source, from 0.

        count[i] = N * weight[i] / sum of the weights            (rounded so that the counts add up to N)

    Each source goes on through its own random orders, one after the other, where the last epoch left off. So no record
    is repeated before all of its source were drawn. At which places of the epoch a source is drawn is random. Raises
    ValueError for a source without records.
    """
    counts = _shares(len(sources), weights)
    order, ends = scratch(len(sources)), np.cumsum(counts)
    turns = filled(
        (np.searchsorted(ends, np.arange(p.start, p.stop), "right") for p in slices(len(sources))), len(sources)
    )
    np.random.default_rng((seed, epoch)).shuffle(turns)
    for source, count in enumerate(counts.tolist()):
        rows = _of(sources, source)
        start, stop, size = epoch * count, (epoch + 1) * count, len(rows)
        if not size:
            raise ValueError(f"Data file {source + 1} of the mixture has no record to train on; leave it out.")
        places, own_blocks, at = _of(turns, source), taken(blocks, rows), 0
        for number in range(start // size, -(-stop // size)) if count else ():
            drawn = block_order(own_blocks, seed=seed, epoch=number)
            drawn = drawn[max(start - number * size, 0) : stop - number * size]
            for part in slices(len(drawn)):
                order[places[at + part.start : at + part.stop]] = rows[drawn[part]]
            at += len(drawn)
    return order


def _of(sources: np.ndarray, source: int) -> np.ndarray:
    """Return the places of a source's records."""
    mask = filled((sources[part] == source for part in slices(len(sources))), len(sources), bool)
    return rows_of(mask)


def _shares(total: int, weights: Sequence[float]) -> np.ndarray:
    """Return whole numbers in proportion to the weights that add up to `total`."""
    ends = np.round(np.cumsum(weights) / np.sum(weights) * total).astype(np.int64)
    return np.diff(ends, prepend=0)


class OrderSampler:
    """The rows of a data loader in the order of each epoch; accelerate calls `set_epoch`."""

    def __init__(self, order: Callable[..., np.ndarray], count: int) -> None:
        """`order` returns the `count` rows of an `epoch`."""
        self.order, self.count, self.epoch = order, count, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = self.order(epoch=self.epoch)
        for part in slices(len(order)):
            yield from order[part].tolist()


class Numbers(Dataset[dict[str, int]]):
    """The numbers of records from `start` up to `stop`, which a collator looks up."""

    def __init__(self, start: int, stop: int) -> None:
        self.numbers = range(start, stop)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"record": self.numbers[index]}
