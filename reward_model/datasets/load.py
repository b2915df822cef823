"""Loading of preference data: each raw record is converted, refused, skipped, or counted as without preference.

Records of large sources are converted once, to an Arrow file in the cache of `datasets` (HF_DATASETS_CACHE), which
later runs and the other processes of a run map into memory. Images are found, but not opened.
"""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from filelock import FileLock

from reward_model.datasets.containers import data_files, open_containers
from reward_model.datasets.fields import BadRecordError, NoPreferenceError, shortened
from reward_model.datasets.formats import Format, parse_source
from reward_model.datasets.images import FindImage, ImageFinder, parse_prefix
from reward_model.datasets.raw_records import RawRecord
from reward_model.datasets.stamp import DataFile, refuse_changes
from reward_model.datasets.table import RecordTable, TableWriter
from reward_model.stored_images import open_hub_dataset
from reward_model.types import PreferencePair, Record

_CACHED_FROM = 2**18
"""Bytes of data files from which their records are kept in the cache."""
_VERSION = 1
"""Part of the key of cached records; to be raised when their conversion changes."""
_RECORDS, _BAD, _COUNTS = "records.arrow", "bad.jsonl", "counts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A source and how it is read."""

    form: Format
    path: str
    image_root: Path | None
    prefix: tuple[str, str] | None
    with_references: bool = False

    @property
    def is_folder(self) -> bool:
        return self.form.name == "image_folder"

    def files(self) -> list[DataFile]:
        """Return path, size and times of change of each data file."""
        if self.path.startswith("hf:") or self.is_folder:
            return []
        stats = [(path, path.stat()) for path in data_files(self.path) if path.is_file()]
        return [(str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]

    def cache(self) -> Path | None:
        """Return the folder of the converted records; None for sources that are so small that they are read anew."""
        files: list[Any] = self.files()
        if self.path.startswith("hf:"):
            table = open_hub_dataset(self.path)
            if table.info.dataset_size is None or table.info.dataset_size < _CACHED_FROM:
                return None
            files = [table._fingerprint]
        elif sum(size for _, size, *_ in files) < _CACHED_FROM:
            return None
        # repr of a partial would name an address
        convert = getattr(self.form.convert, "keywords", {})
        options = convert, self.image_root, self.prefix, self.with_references
        key = repr((_VERSION, self.form.name, options, self.path, os.getcwd(), files))
        return Path(datasets.config.HF_DATASETS_CACHE) / "preferences" / hashlib.sha256(key.encode()).hexdigest()[:32]


def load_records(
    source: str | Path,
    *,
    image_root: str | Path | None = None,
    image_prefix: str | None = None,
    on_bad_record: Literal["error", "skip"] = "error",
    skipped: Path | None = None,
    without_preference: Counter[str] | None = None,
    with_references: bool = False,
) -> RecordTable:
    """Return the pairs and labelled images of FORMAT:PATH in the order of the file. Images are found, but not opened.

    `formats.FORMATS` lists the formats; PATH is a file, a folder of files with one suffix, or hf:ID@SPLIT. Without a
    format, .json files are in LLaVA-Reward's format and all others in the project's own.

    image_root: folder that relative image paths start from, by default the folder of the file. All images must lie
        within it.
    image_prefix: OLD=NEW; image paths that start with the folder OLD are looked up in the folder NEW.
    on_bad_record: "error" raises BadRecordError, with file and line, for the first invalid record; "skip" leaves it
        out and appends a line {"where", "reason", "record"} to the file `skipped`.
    without_preference: receives the number of valid records without a preference (such as unlabelled pairs) by reason.
    with_references: pairs of edits, with the image that was edited, are valid.

    Raises ValueError if the source is invalid, has changed since it was checked, gives no record, or if more than half
    of its records are invalid, and FileNotFoundError if a file or folder is missing.
    """
    form, path = parse_source(str(source))
    if on_bad_record == "skip" and skipped is None:
        raise ValueError("on_bad_record='skip' needs `skipped`: the file to which skipped records are written.")
    skip_log = skipped if on_bad_record == "skip" else None
    root = None if image_root is None or form.name == "image_folder" else Path(image_root)
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root} (image_root).")
    if skip_log is not None and skip_log.resolve() == Path(path).resolve():
        raise ValueError(f"`skipped` is the data file {path} itself; give another file for skipped records.")
    prefix = parse_prefix(image_prefix)
    wanted = _Source(form=form, path=path, image_root=root, prefix=prefix, with_references=with_references)
    refuse_changes(str(source), wanted.files())
    cache = wanted.cache()
    converted = _convert_in_memory(wanted, skip_log) if cache is None else _convert_once(wanted, cache, skip_log)
    if without_preference is not None:
        without_preference.update(converted.without_preference)
    _refuse_useless(path, converted, skip_log)
    return converted.records


def data_files_of(source: str) -> list[DataFile]:
    """Return the data files of FORMAT:PATH, as a stamp has them."""
    form, path = parse_source(source)
    return _Source(form=form, path=path, image_root=None, prefix=None).files()


@dataclass(slots=True)
class _Converted:
    """What became of the records of a source."""

    records: RecordTable = field(default_factory=lambda: RecordTable([]))
    without_preference: Counter[str] = field(default_factory=Counter)
    num_bad: int = 0
    num_read: int = 0


def _convert_in_memory(source: _Source, skip_log: Path | None) -> _Converted:
    sink = pa.BufferOutputStream()
    converted = _convert_all(source, sink, refuse=_refusal(skip_log))
    converted.records = RecordTable.from_buffer(sink)
    return converted


def _convert_once(source: _Source, cache: Path, skip_log: Path | None) -> _Converted:
    """Convert a source to the files of a folder, unless that was done; one process does, and others wait for it."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):
        if not (cache / _COUNTS).is_file():
            shutil.rmtree(cache, ignore_errors=True)  # of a process that was killed
            cache.mkdir()
            with pa.OSFile(str(cache / _RECORDS), "wb") as sink:
                converted = _convert_all(source, sink, refuse=_refusal(cache / _BAD if skip_log else None))
            counts = {
                "without_preference": converted.without_preference,
                "num_bad": converted.num_bad,
                "num_read": converted.num_read,
            }
            (cache / "part").write_text(json.dumps(counts), encoding="utf-8")
            (cache / "part").replace(cache / _COUNTS)
    counts = json.loads((cache / _COUNTS).read_text(encoding="utf-8"))
    if counts["num_bad"]:
        with (cache / _BAD).open(encoding="utf-8") as file:
            if skip_log is None:
                first = json.loads(file.readline())
                raise BadRecordError(f"{first['where']}: {first['reason']}")
            skip_log.parent.mkdir(parents=True, exist_ok=True)
            with skip_log.open("a", encoding="utf-8") as log:
                shutil.copyfileobj(file, log)
    return _Converted(
        RecordTable.open(cache / _RECORDS),
        Counter(counts["without_preference"]),
        counts["num_bad"],
        counts["num_read"],
    )


def _convert_all(source: _Source, sink: Any, *, refuse: Callable[[RawRecord, BadRecordError], None]) -> _Converted:
    """Write the records of all containers to a sink, and return the counts."""
    writer, found, form = TableWriter(sink), _Converted(), source.form
    for container in open_containers(source.path, is_image_folder=source.is_folder, skip_columns=form.skip_columns):
        root = source.image_root or container.root
        if not root.is_dir():
            raise FileNotFoundError(f"There is no folder {root} (image_root).")
        find_image = ImageFinder(root, prefix=source.prefix, find_member=container.find_member)
        first, last = writer.count, -1
        for raw in form.group(container.records):
            found.num_read += 1
            if raw.block != last:
                first, last = writer.count, raw.block
            try:
                for record in _convert(raw, form, find_image, with_references=source.with_references):
                    writer.add(record, block=first if raw.block >= 0 else -1)
            except NoPreferenceError as reason:
                found.without_preference[f"{form.name}: {reason}"] += 1
            except BadRecordError as error:
                refuse(raw, error)
                found.num_bad += 1
    writer.close()
    return found


def _convert(raw: RawRecord, form: Format, find_image: FindImage, *, with_references: bool) -> list[Record]:
    records = form.convert(raw.fields(), find_image=find_image, where=raw.where)
    for record in records:
        if isinstance(record, PreferencePair) and record.winner == record.loser:
            _refuse_identical_sides(record)
        if isinstance(record, PreferencePair) and record.reference is not None and not with_references:
            raise BadRecordError(
                f"the pair has an 'image' that was edited, {record.reference}, which reward models and annotators do "
                f"not get; Diffusion-DPO takes such pairs."
            )
    return records


def _refuse_identical_sides(record: PreferencePair) -> None:
    if record.winner_prompt == record.loser_prompt:
        raise BadRecordError(
            f"both sides are the image {record.winner} with the prompt {shortened(record.winner_prompt)}; "
            f"a pair must differ in the image or in the prompt."
        )


def _refuse_useless(path: str, converted: _Converted, skip_log: Path | None) -> None:
    """Raise ValueError without any record, or if most are invalid, as in a wrong format."""
    num_bad, uninformative = converted.num_bad, converted.without_preference
    if not len(converted.records):
        bad = f"; all of its {num_bad} were invalid, see {skip_log}" if num_bad else ""
        rest = "".join(f"; for {count} rows {reason.partition(': ')[2]}" for reason, count in uninformative.items())
        raise ValueError(f"{path} contains no record{bad}{rest}.")
    if 2 * num_bad > converted.num_read:
        raise ValueError(
            f"{num_bad:,} of the {converted.num_read:,} records of {path} are invalid, more than half; see {skip_log}. "
            f"Is it in another format?"
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
