"""The check of all records and images of a data set beforehand, in several processes, and its stamp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from reward_model.datasets.convert import write_skipped
from reward_model.datasets.load import data_files_of, load_records
from reward_model.datasets.stamp import forget_stamp, write_stamp
from reward_model.datasets.table import RecordTable
from reward_model.datasets.usable import flaw_finder
from reward_model.types import Record

_CHUNK = 256
"""Records that a process checks at a time: neighbours, which often share images and row groups."""


_checked: list[tuple[RecordTable, Callable[[Record], str | None]]] = []
"""The records of this process's check, and what finds their flaws."""


class Checked(NamedTuple):
    """The result of a check."""

    num_records: int
    num_images: int
    """Images of all records; one that several records name counts for each."""
    num_bad: int
    """Records that cannot be used, those with an unusable image included."""
    stamp: Path | None
    """File of the stamp; None if a record is bad."""


def check_data(
    source: str,
    *,
    image_root: str | None,
    image_prefix: str | None,
    bad: Path,
    num_workers: int,
    streaming: bool = False,
) -> Checked:
    """Read every record of FORMAT:PATH and decode each image, and write bad records to the file `bad`.

    Without a bad record, a stamp is written: later runs refuse data files that have changed since.
    """
    forget_stamp(source)
    bad.unlink(missing_ok=True)
    files = data_files_of(source, streaming=streaming)
    records = load_records(
        source, image_root=image_root, image_prefix=image_prefix, on_bad_record="skip", skipped=bad, streaming=streaming
    )
    num_bad = len(bad.read_bytes().splitlines()) if bad.is_file() else 0
    for where, reason in tqdm(_flaws(records, num_workers), total=len(records), desc="check", unit=" records"):
        if reason:
            num_bad += 1
            write_skipped(bad, where=where, reason=reason)
    num_images = 2 * len(records) - int((records.column("label", null=-1) >= 0).sum())
    stamp = None if num_bad else write_stamp(source, files, num_records=len(records), num_images=num_images)
    return Checked(len(records), num_images, num_bad, stamp)


def _flaws(records: RecordTable, num_workers: int) -> Iterator[tuple[str, str | None]]:
    """Yield the place of each record, and why it cannot be used or None, in the order of the records."""
    starts = range(0, len(records), _CHUNK)
    if num_workers < 2:
        _start(records)
        yield from chain.from_iterable(map(_flaws_from, starts))
        return
    # Forked processes share the mapped table, and import nothing again.
    with ProcessPoolExecutor(num_workers, get_context("fork"), initializer=_start, initargs=(records,)) as pool:
        try:
            yield from chain.from_iterable(pool.map(_flaws_from, starts))
        except BrokenProcessPool as error:
            raise ValueError(
                f"A process of the check ended: it was killed, mostly for want of memory. Give fewer num_workers "
                f"(now {num_workers}), or 1."
            ) from error


def _start(records: RecordTable) -> None:
    """Take the records that this process checks parts of."""
    _checked[:] = [(records, flaw_finder(None))]


def _flaws_from(start: int) -> list[tuple[str, str | None]]:
    ((records, flaw_of),) = _checked
    return [(record.where, flaw_of(record)) for record in records[start : start + _CHUNK]]
