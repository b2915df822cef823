"""The order of records in training: a pure function of seed and epoch, so that nothing is stored or read to resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

_WINDOW = 256
"""Records, at least, among which the records of blocks are shuffled; a larger block is one window."""


def block_order(blocks: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return a random order of records, (N,), in which those of a block stay near one another.

    blocks: the block of each record; -1 is a record on its own. Blocks, such as row groups of a Parquet file, are put
    in random order and divided into windows of at least 256 records, which are shuffled. So a process that decodes a
    block for one of its images soon needs the others.
    """
    rng = np.random.default_rng((seed, epoch))
    lonely = np.flatnonzero(blocks < 0)
    blocks = blocks.copy()
    blocks[lonely] = -1 - lonely
    _, block_of, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(len(sizes))
    before = np.concatenate([[0], np.cumsum(sizes[shuffled])[:-1]])
    window_of_block = np.empty(len(sizes), np.int64)
    window_of_block[shuffled] = before // _WINDOW
    return np.lexsort((rng.random(len(blocks)), window_of_block[block_of]))


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
    order = np.empty(len(sources), np.int64)
    turns = np.random.default_rng((seed, epoch)).permutation(np.repeat(np.arange(len(counts)), counts))
    for source, count in enumerate(counts.tolist()):
        rows = np.flatnonzero(sources == source)
        start, stop, size = epoch * count, (epoch + 1) * count, len(rows)
        if not size:
            raise ValueError(f"Data file {source + 1} of the mixture has no record to train on; leave it out.")
        passes = range(start // size, -(-stop // size)) if count else range(0)
        drawn = [rows[block_order(blocks[rows], seed=seed, epoch=number)] for number in passes]
        if drawn:
            first = start - passes[0] * size
            order[turns == source] = np.concatenate(drawn)[first : first + count]
    return order


def _shares(total: int, weights: Sequence[float]) -> np.ndarray:
    """Return whole numbers in proportion to the weights that add up to `total`."""
    ends = np.round(np.cumsum(weights) / np.sum(weights) * total).astype(np.int64)
    return np.diff(ends, prepend=0)


class OrderSampler:
    """The rows of a data loader in the order of each epoch; accelerate calls `set_epoch`."""

    def __init__(self, order: Callable[[int], np.ndarray], count: int) -> None:
        """`order` returns the `count` rows of an epoch."""
        self.order, self.count, self.epoch = order, count, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self.epoch).tolist()
