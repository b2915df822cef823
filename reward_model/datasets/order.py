"""The order of records in training: a pure function of seed and epoch, so that nothing is stored or read to resume."""

from __future__ import annotations

from collections.abc import Iterator

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


class BlockSampler:
    """The rows of a data loader in `block_order`; accelerate calls `set_epoch`."""

    def __init__(self, blocks: np.ndarray, *, seed: int) -> None:
        self.blocks, self.seed, self.epoch = blocks, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[int]:
        yield from block_order(self.blocks, seed=self.seed, epoch=self.epoch).tolist()
