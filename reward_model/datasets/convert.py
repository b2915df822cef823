"""Conversion of raw records to the rows of a table; the parts of a large source are converted by all cores."""

# pyarrow has no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false
from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa

from reward_model.datasets.containers import Part
from reward_model.datasets.fields import BadRecordError, NoPreferenceError, shortened
from reward_model.datasets.formats import Format
from reward_model.datasets.images import FindImage, ImageFinder
from reward_model.datasets.raw_records import RawRecord
from reward_model.datasets.source import Source
from reward_model.datasets.table import TableWriter
from reward_model.types import PreferencePair, Record

_BLOCKS_OF_FILE = 2**32
"""Numbers of blocks of one file, so that those of two files differ."""


@dataclass(slots=True)
class Counts:
    """What became of the raw records of a source."""

    without_preference: Counter[str] = field(default_factory=Counter)
    num_bad: int = 0
    num_read: int = 0
    first_bad: str = ""
    """Place and reason of the first invalid one."""

    def add(self, other: Counts) -> None:
        """Add the counts of another part."""
        self.without_preference.update(other.without_preference)
        self.num_bad += other.num_bad
        self.num_read += other.num_read
        self.first_bad = self.first_bad or other.first_bad

    def to_json(self) -> str:
        """Return the counts as JSON."""
        return json.dumps([self.without_preference, self.num_bad, self.num_read, self.first_bad])

    @classmethod
    def from_json(cls, text: str) -> Counts:
        """Parse the output of `to_json`."""
        without_preference, *rest = json.loads(text)
        return cls(Counter(without_preference), *rest)


def convert(source: Source, parts: Iterable[Part], sink: Any, *, skip_log: Path | None) -> Counts:
    """Write the records of some parts to a sink, one part after the other, and return their counts.

    Invalid records are written to the file `skip_log`; without, the first one raises BadRecordError.
    """
    writer, counts, refuse = TableWriter(sink), Counts(), _refusal(skip_log)
    for part in parts:
        _convert_part(source, part, writer, counts, refuse=refuse)
    writer.close()
    return counts


def convert_in_parallel(source: Source, sink: Any, folder: Path, *, skip_log: Path | None) -> Counts:
    """Do what `convert` does, in as many processes as there are cores, with files of the parts in a folder.

    Records, counts, the file `skip_log` and the error of the first invalid record do not depend on their number.
    """
    parts, num_processes = list(source.parts()), len(os.sched_getaffinity(0))
    if min(len(parts), num_processes) < 2:
        return convert(source, parts, sink, skip_log=skip_log)
    writer, counts = TableWriter(sink), Counts()
    work = partial(_convert_to_file, source, folder, is_skipping=skip_log is not None)
    # Forked processes import nothing again.
    with ProcessPoolExecutor(min(len(parts), num_processes), get_context("fork")) as pool:
        try:
            for number, found in enumerate(pool.map(work, range(len(parts)), parts)):
                counts.add(found)
                _take(writer, *_files(folder, number), skip_log)
        except BrokenProcessPool as error:
            raise ValueError(
                f"A process that reads {source.path} ended: it was killed, mostly for want of memory. Free some and "
                f"start again."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    writer.close()
    return counts


def _convert_to_file(source: Source, folder: Path, number: int, part: Part, *, is_skipping: bool) -> Counts:
    records, bad = _files(folder, number)
    with pa.OSFile(str(records), "wb") as sink:
        return convert(source, [part], sink, skip_log=bad if is_skipping else None)


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    """Return the files of a part: its records, and its invalid ones."""
    return folder / f"part_{number}.arrow", folder / f"part_{number}.jsonl"


def _take(writer: TableWriter, records: Path, bad: Path, skip_log: Path | None) -> None:
    """Append what a part has written, and remove its files."""
    writer.append(pa.ipc.open_stream(pa.memory_map(str(records))))
    records.unlink()
    if skip_log is not None and bad.is_file():
        with skip_log.open("ab") as log:
            log.write(bad.read_bytes())
        bad.unlink()


def _convert_part(
    source: Source,
    part: Part,
    writer: TableWriter,
    counts: Counts,
    *,
    refuse: Callable[[RawRecord, BadRecordError], None],
) -> None:
    container, form = source.open(part), source.form
    root = source.image_root or container.root
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root} (image_root).")
    find_image = ImageFinder(root, prefix=source.prefix, find_member=container.find_member)
    for raw in form.group(container.records):
        counts.num_read += 1
        try:
            for record in _convert(raw, form, find_image, with_references=source.with_references):
                writer.add(record, block=part.number * _BLOCKS_OF_FILE + raw.block if raw.block >= 0 else -1)
        except NoPreferenceError as reason:
            counts.without_preference[f"{form.name}: {reason}"] += 1
        except BadRecordError as error:
            refuse(raw, error)
            counts.num_bad += 1
            counts.first_bad = counts.first_bad or f"{raw.where}: {error}"


def _convert(raw: RawRecord, form: Format, find_image: FindImage, *, with_references: bool) -> list[Record]:
    records = form.convert(raw.fields(), find_image=find_image, where=raw.where)
    for record in records:
        if isinstance(record, PreferencePair) and record.winner_prompt == record.loser_prompt:
            _refuse_identical_sides(record)
        if isinstance(record, PreferencePair) and record.reference is not None and not with_references:
            raise BadRecordError(
                f"the pair has an 'image' that was edited, {record.reference}, which reward models and annotators do "
                f"not get; Diffusion-DPO takes such pairs."
            )
    return records


def _refuse_identical_sides(record: PreferencePair) -> None:
    one, other = record.winner, record.loser
    # Of paths, the texts are compared: they are kept, and written next.
    if str(one) == str(other) if isinstance(one, Path) and isinstance(other, Path) else one == other:
        raise BadRecordError(
            f"both sides are the image {record.winner} with the prompt {shortened(record.winner_prompt)}; "
            f"a pair must differ in the image or in the prompt."
        )


def _refusal(skip_log: Path | None) -> Callable[[RawRecord, BadRecordError], None]:
    """Return a function that raises the error of an invalid record with its place, or writes it to a file."""

    def refuse(raw: RawRecord, error: BadRecordError) -> None:
        if skip_log is None:
            raise BadRecordError(f"{raw.where}: {error}") from error
        if isinstance(raw.source, bytes):
            record = raw.source.decode(errors="backslashreplace").strip()
        else:
            record = shortened(dict(raw.source))
        write_skipped(skip_log, where=raw.where, reason=str(error), record=record)

    return refuse


def write_skipped(skip_log: Path, **line: str) -> None:
    """Append one line and close the file, so that no line is lost if a later record stops the program."""
    skip_log.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, ensure_ascii=False) + "\n"
    with skip_log.open("ab") as file:
        file.write(text.encode(errors="backslashreplace"))
