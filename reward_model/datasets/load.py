"""Loading of preference data: each raw record is converted, refused, skipped, or counted as without preference.

Records of large sources are converted once, to an Arrow file in the cache of `datasets` (HF_DATASETS_CACHE), which
later runs and the other processes of a run map into memory. Images are found, but not opened.
"""

# pyarrow and datasets have no usable types.
# pyright: reportAttributeAccessIssue=false, reportUnknownMemberType=false
from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Literal

import pyarrow as pa
from filelock import FileLock

from reward_model.datasets.convert import Counts, convert, convert_in_parallel
from reward_model.datasets.fields import BadRecordError
from reward_model.datasets.formats import parse_source
from reward_model.datasets.images import parse_prefix
from reward_model.datasets.source import Source
from reward_model.datasets.stamp import DataFile, refuse_changes
from reward_model.datasets.table import RecordTable
from reward_model.locations import is_in_bucket, location

_RECORDS, _BAD, _COUNTS = "records.arrow", "bad.jsonl", "counts.json"


def load_records(
    source: str | Path,
    *,
    image_root: str | Path | None = None,
    image_prefix: str | None = None,
    on_bad_record: Literal["error", "skip"] = "error",
    skipped: Path | None = None,
    without_preference: Counter[str] | None = None,
    with_references: bool = False,
    streaming: bool = False,
) -> RecordTable:
    """Return the pairs and labelled images of FORMAT:PATH in the order of the file. Images are found, but not opened.

    `formats.FORMATS` lists the formats; PATH is a file, a folder of files with one suffix, or hf:ID@SPLIT. Without a
    format, .json files are in LLaVA-Reward's format and all others in the project's own. PATH and `image_root` may be
    in a bucket, such as s3://bucket/pairs.jsonl.

    image_root: folder that relative image paths start from, by default the folder of the file. All images must lie
        within it.
    image_prefix: OLD=NEW; image paths that start with the folder OLD are looked up in the folder NEW.
    on_bad_record: "error" raises BadRecordError, with file and line, for the first invalid record; "skip" leaves it
        out and appends a line {"where", "reason", "record"} to the file `skipped`.
    without_preference: receives the number of valid records without a preference (such as unlabelled pairs) by reason.
    with_references: pairs of edits, with the image that was edited, are valid.
    streaming: the data files of hf:ID@SPLIT are read where they lie, and not downloaded.

    Raises ValueError if the source is invalid, has changed since it was checked, gives no record, or if more than half
    of its records are invalid, and FileNotFoundError if a file or folder is missing.
    """
    form, path = parse_source(str(source))
    if on_bad_record == "skip" and skipped is None:
        raise ValueError("on_bad_record='skip' needs `skipped`: the file to which skipped records are written.")
    skip_log = skipped if on_bad_record == "skip" else None
    root = None if image_root is None or form.name == "image_folder" else location(image_root)
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root} (image_root).")
    if form.name == "image_folder" and is_in_bucket(path):
        raise ValueError(f"{path} is in a bucket; image_folder reads folders of this machine. Pack it into tar shards.")
    if skip_log is not None and skip_log.resolve() == Path(path).resolve():
        raise ValueError(f"`skipped` is the data file {path} itself; give another file for skipped records.")
    wanted = Source(
        form=form, path=path, image_root=root, prefix=parse_prefix(image_prefix), with_references=with_references,
        streaming=streaming,
    )  # fmt: skip
    refuse_changes(str(source), wanted.files())
    cache = wanted.cache()
    records, counts = _convert_in_memory(wanted, skip_log) if cache is None else _convert_once(wanted, cache, skip_log)
    if without_preference is not None:
        without_preference.update(counts.without_preference)
    _refuse_useless(path, len(records), counts, skip_log)
    return records


def data_files_of(source: str, *, streaming: bool = False) -> list[DataFile]:
    """Return the data files of FORMAT:PATH, as a stamp has them."""
    form, path = parse_source(source)
    return Source(form=form, path=path, streaming=streaming).files()


def _convert_in_memory(source: Source, skip_log: Path | None) -> tuple[RecordTable, Counts]:
    sink = pa.BufferOutputStream()
    counts = convert(source, source.parts(), sink, skip_log=skip_log)
    return RecordTable.from_buffer(sink), counts


def _convert_once(source: Source, cache: Path, skip_log: Path | None) -> tuple[RecordTable, Counts]:
    """Convert a source to the files of a folder, unless that was done; one process does, and others wait for it."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):
        if not (cache / _COUNTS).is_file():
            shutil.rmtree(cache, ignore_errors=True)  # of a process that was killed
            cache.mkdir()
            with pa.OSFile(str(cache / _RECORDS), "wb") as sink:
                bad = cache / _BAD if skip_log else None
                found = convert_in_parallel(source, sink, cache, skip_log=bad)
            (cache / "part").write_text(found.to_json(), encoding="utf-8")
            (cache / "part").replace(cache / _COUNTS)
    counts = Counts.from_json((cache / _COUNTS).read_text(encoding="utf-8"))
    if counts.num_bad:
        with (cache / _BAD).open(encoding="utf-8") as file:
            if skip_log is None:
                first = json.loads(file.readline())
                raise BadRecordError(f"{first['where']}: {first['reason']}")
            skip_log.parent.mkdir(parents=True, exist_ok=True)
            with skip_log.open("a", encoding="utf-8") as log:
                shutil.copyfileobj(file, log)
    return RecordTable.open(cache / _RECORDS), counts


def _refuse_useless(path: str, num_records: int, counts: Counts, skip_log: Path | None) -> None:
    """Raise ValueError without any record, or if most are invalid, as in a wrong format."""
    num_bad, uninformative = counts.num_bad, counts.without_preference
    if not num_records:
        bad = (
            f"; all of its {num_bad} were invalid, see {skip_log}; the first: {counts.first_bad.rstrip('.')}"
            if num_bad
            else ""
        )
        rest = "".join(f"; for {count} rows {reason.partition(': ')[2]}" for reason, count in uninformative.items())
        raise ValueError(f"{path} contains no record{bad}{rest}.")
    if 2 * num_bad > counts.num_read:
        raise ValueError(
            f"{num_bad:,} of the {counts.num_read:,} records of {path} are invalid, more than half; see {skip_log}. "
            f"Is it in another format? The first: {counts.first_bad}"
        )
