"""Distribution of the pairs of an optimiser step over processes and forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PairShard(NamedTuple):
    """The pairs of an optimiser step that one process computes."""

    groups: list[Sequence[int]]
    """Rows of this process among the pairs of the step; those of a group, of one image size, share forward passes."""
    weight: float
    """Weight of this process's mean loss, so that the mean over processes is the mean over all pairs; 0 if all of its
    rows are duplicates."""
    sizes: list[list[int]]
    """Number of rows in each group, of every process."""

    def microbatches(self, size: int) -> list[tuple[int, Tensor, float]]:
        """Return group, indices into its rows and gradient weight of each forward pass; equally many on every process.

        A process with fewer repeats its first row with weight 0: with sharded weights every process must issue the
        same number of forward passes.
        """
        count = sum(map(len, self.groups))
        own = [
            (group, part, self.weight * len(part) / count)
            for group, rows in enumerate(self.groups)
            for part in torch.arange(len(rows)).split(size)
        ]
        most = max(sum(-(-rows // size) for rows in sizes) for sizes in self.sizes)
        return own + [(0, torch.arange(1), 0.0)] * (most - len(own))


def shard_pairs(groups: Sequence[Sequence[int]], *, rank: int, num_processes: int) -> PairShard:
    """Return the rows that one process computes, of pairs in groups; numbers of rows differ by at most one.

    Every process must take part in the exchange of gradients, so one without a pair computes the first with weight 0.
    """
    shards: list[list[Sequence[int]]] = []
    count = 0
    for other in range(num_processes):
        first, own = 0, list[Sequence[int]]()
        for rows in groups:
            own.append(rows[(other - first) % num_processes :: num_processes])
            first += len(rows)
        shards.append([rows for rows in own if len(rows)])
        count = first
    weight = num_processes * sum(map(len, shards[rank])) / count
    shards = [own or [groups[0][:1]] for own in shards]
    return PairShard(shards[rank], weight, [[len(rows) for rows in own] for own in shards])
