"""Replacement of records that turn out to be unusable in training, so that a batch keeps its size on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reward_model.datasets.convert import write_skipped
from reward_model.datasets.fields import BadRecordError

_ALWAYS_ALLOWED = 16
"""Unusable records of which no fraction is computed."""
_MOST_TRIES = 32
"""Unusable records in a row, for each record of a batch."""


class UnusableError(ValueError):
    """A record of a batch that cannot be used. The message states the reason."""

    def __init__(self, position: int, reason: str) -> None:
        """`position` is that of the record in the batch."""
        super().__init__(reason)
        self.position = position


@contextmanager
def unusable(position: int) -> Iterator[None]:
    """Say which record of a batch has an image that cannot be read; a lost connection is no fault of a record."""
    try:
        yield
    except ConnectionError:
        raise
    except (OSError, ValueError) as error:
        raise UnusableError(position, str(error)) from error


class Refill:
    """Stands in for unusable records by the ones behind them, as a pure function of the records alone.

    So a resumed run, and any number of processes and workers, train on the same batches.
    """

    def __init__(self, *parts: int, skipped: Path | None) -> None:
        """`parts` are the numbers of records in consecutive parts, such as training and validation records.

        A record is replaced by one of its part. Without a file `skipped`, an unusable record raises BadRecordError.
        """
        self.parts, self.skipped = parts, skipped
        self._unusable, self._num_met, self._num_replaced = set[int](), 0, 0

    def collate(self, indices: list[int], make: Callable[[list[int]], Any], *, where: Callable[[int], str]) -> Any:
        """Return make(indices), with other indices in place of those for which it raises UnusableError.

        `where` returns the place of a record, for the message and the file. Raises BadRecordError if more than half of
        the records that this process met cannot be used.
        """
        for _ in range(_MOST_TRIES * len(indices)):
            usable = [self._usable(index) for index in indices]
            try:
                made = make(usable)
            except UnusableError as error:
                index = usable[error.position]
                if self.skipped is None:
                    raise BadRecordError(f"{where(index)}: {error}") from error
                write_skipped(self.skipped, where=where(index), reason=str(error))
                self._unusable.add(index)
                continue
            self._num_met += len(indices)
            self._num_replaced += sum(one != other for one, other in zip(usable, indices, strict=True))
            if self._num_replaced > _ALWAYS_ALLOWED and 2 * self._num_replaced > self._num_met:
                raise self._too_many(self._num_replaced, self._num_met)
            return made
        raise self._too_many(len(self._unusable), self._num_met + len(self._unusable))

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

    def _too_many(self, count: int, total: int) -> BadRecordError:
        return BadRecordError(
            f"{count:,} of the {total:,} records that training met cannot be used, more than half; see {self.skipped}. "
            f"Check the data: python -m reward_model.datasets check PLACE."
        )
