"""Arrays of a number for each record, in files without a name: the system writes their pages out when memory is short.

They keep the memory of a process flat, whatever the number of records: only what is being read is in memory.
"""

# datasets has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import DTypeLike

_MAPPED_FROM = 2**18
"""Bytes of an array from which it lies in a file."""
_CHUNK = 2**16
"""Numbers that a computation has in memory at once."""


def scratch(size: int, kind: DTypeLike = np.int64) -> np.ndarray:
    """Return zeros, (size,), in the cache folder of `datasets` from 256 kB on; their file is gone with the array.

    Raises OSError if the disk has no room.
    """
    kind = np.dtype(kind)
    if not size or size * kind.itemsize < _MAPPED_FROM:
        return np.zeros(size, kind)
    with tempfile.TemporaryFile(dir=cache_folder()) as file:
        if hasattr(os, "posix_fallocate"):  # a file with holes would end the process where the disk is full
            os.posix_fallocate(file.fileno(), 0, size * kind.itemsize)
        else:  # macOS
            file.truncate(size * kind.itemsize)
        # A memmap is an array of the same kind in all but its name, which selections of it would inherit.
        return np.asarray(np.memmap(file, kind, "r+", shape=(size,)))


def cache_folder() -> Path:
    """Return the cache folder of `datasets`, which exists then."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def filled(parts: Iterable[np.ndarray], size: int, kind: DTypeLike = np.int64) -> np.ndarray:
    """Return an array, (size,), of the parts one after the other."""
    array, start = scratch(size, kind), 0
    for part in parts:
        array[start : start + len(part)] = part
        start += len(part)
    assert start == size
    return array


def slices(size: int) -> Iterator[slice]:
    """Yield parts of the numbers below `size`, in order, for computations on parts of an array."""
    for start in range(0, size, _CHUNK):
        yield slice(start, min(start + _CHUNK, size))


def rows_of(mask: np.ndarray) -> np.ndarray:
    """Return where a mask is true, as `np.flatnonzero`."""
    parts = (part.start + np.flatnonzero(mask[part]) for part in slices(len(mask)))
    return filled(parts, sum(int(np.count_nonzero(mask[part])) for part in slices(len(mask))))


def taken(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return array[rows]."""
    return filled((array[rows[part]] for part in slices(len(rows))), len(rows), array.dtype)


def starts_of_runs(ordered: np.ndarray) -> np.ndarray:
    """Return the first places of each value of an ordered array, (V + 1,), with its end."""
    is_first = scratch(len(ordered), bool)
    for part in slices(len(ordered)):
        before = ordered[max(part.start - 1, 0) : part.stop - 1]
        is_first[max(part.start, 1) : part.stop] = ordered[max(part.start, 1) : part.stop] != before
    is_first[:1] = True
    starts = rows_of(is_first)
    return filled([starts, np.array([len(ordered)])], len(starts) + 1)
