"""Replacement of records that turn out to be unusable in training, so that a batch keeps its size on every process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.load import write_skipped

_ALWAYS_ALLOWED = 16
"""Unusable records of which no fraction is computed."""


class UnusableError(ValueError):
    """A record of a batch that cannot be used. The message states the reason."""

    def __init__(self, position: int, reason: str) -> None:
        """`position` is that of the record in the batch."""
        super().__init__(reason)
        self.position = position


class Refill:
    """Stands in for unusable records by the ones behind them, as a pure function of the records alone.

    So a resumed run, and any number of processes and workers, train on the same batches.
    """

    def __init__(self, *parts: int, skipped: Path | None) -> None:
        """`parts` are the numbers of records in consecutive parts, such as training and validation records.

        A record is replaced by one of its part. Without a file `skipped`, an unusable record raises BadRecordError.
        """
        self.parts, self.skipped = parts, skipped
        self._unusable, self._num_used = set[int](), 0

    def collate(self, indices: list[int], make: Callable[[list[int]], Any], *, where: Callable[[int], str]) -> Any:
        """Return make(indices), with other indices in place of those for which it raises UnusableError.

        `where` returns the place of a record, for the message and the file. Raises BadRecordError if more than half of
        the records that this process met cannot be used.
        """
        self._num_used += len(indices)
        while True:
            usable = [self._usable(index) for index in indices]
            try:
                return make(usable)
            except UnusableError as error:
                index = usable[error.position]
                if self.skipped is None:
                    raise BadRecordError(f"{where(index)}: {error}") from error
                write_skipped(self.skipped, where=where(index), reason=str(error))
                self._unusable.add(index)
                self._refuse_most()

    def _usable(self, index: int) -> int:
        start = 0
        for size in self.parts:
            if index < start + size:
                return next(
                    (
                        other
                        for offset in range(size)
                        if (other := start + (index - start + offset) % size) not in self._unusable
                    ),
                    index,
                )
            start += size
        raise IndexError(index)

    def _refuse_most(self) -> None:
        count = len(self._unusable)
        if count >= sum(self.parts) or (count > _ALWAYS_ALLOWED and 2 * count > self._num_used + count):
            raise BadRecordError(
                f"{count:,} of the {self._num_used + count:,} records that training met cannot be used, more than "
                f"half; see {self.skipped}. Check the data: python -m reward_model.datasets check PLACE."
            )
