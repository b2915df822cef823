"""Loading of preference data: each raw record is converted, refused, skipped, or counted as without preference."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from reward_model.datasets.containers import open_containers
from reward_model.datasets.fields import BadRecordError, NoPreferenceError, shortened
from reward_model.datasets.formats import Format, parse_source
from reward_model.datasets.images import FindImage, ImageFinder, parse_prefix
from reward_model.datasets.raw_records import RawRecord
from reward_model.image_files import MAX_PIXELS
from reward_model.types import PreferencePair, Record

UNPACK_FOLDER = Path("runs/images")
"""Default folder for images that lie within tables and archives."""


def load_records(
    source: str | Path,
    *,
    image_root: str | Path | None = None,
    image_prefix: str | None = None,
    unpack_to: str | Path = UNPACK_FOLDER,
    on_bad_record: Literal["error", "skip"] = "error",
    skipped: Path | None = None,
    without_preference: Counter[str] | None = None,
    max_pixels: int = MAX_PIXELS,
    with_references: bool = False,
) -> list[Record]:
    """Return the pairs and labelled images of FORMAT:PATH in the order of the file, with every image checked.

    `formats.FORMATS` lists the formats; PATH is a file, a folder of files with one suffix, or hf:ID@SPLIT. Without a
    format, .json files are in LLaVA-Reward's format and all others in the project's own.

    image_root: folder that relative image paths start from, by default the folder of the file. All images must lie
        within it.
    image_prefix: OLD=NEW; image paths that start with the folder OLD are looked up in the folder NEW.
    unpack_to: folder to which images within tables and archives are written.
    on_bad_record: "error" raises BadRecordError, with file and line, for the first invalid record; "skip" leaves it
        out and appends a line {"where", "reason", "record"} to the file `skipped`.
    without_preference: receives the number of valid records without a preference (such as unlabelled pairs) by reason.
    max_pixels: images with more pixels are invalid.
    with_references: pairs of edits, with the image that was edited, are valid.

    Raises ValueError if the source is invalid or gives no record, and FileNotFoundError if a file or folder is missing.
    """
    form, path = parse_source(str(source))
    skip_log = skipped if on_bad_record == "skip" else None
    if on_bad_record == "skip" and skip_log is None:
        raise ValueError("on_bad_record='skip' needs `skipped`: the file to which skipped records are written.")
    prefix, records, uninformative, num_bad = parse_prefix(image_prefix), list[Record](), Counter[str](), 0
    is_image_folder = form.name == "image_folder"
    for container in open_containers(path, is_image_folder=is_image_folder, skip_columns=form.skip_columns):
        root = container.root if image_root is None or is_image_folder else Path(image_root)
        _check_paths(path, root, skip_log=skip_log)
        find_image = ImageFinder(
            root, unpack_to=Path(unpack_to), prefix=prefix, read_member=container.read_member, max_pixels=max_pixels
        )
        for raw in form.group(container.records):
            try:
                records += _convert(raw, form, find_image, with_references=with_references)
            except NoPreferenceError as reason:
                uninformative[f"{form.name}: {reason}"] += 1
            except BadRecordError as error:
                if skip_log is None:
                    raise BadRecordError(f"{raw.where}: {error}") from error
                _write_skipped(raw, reason=str(error), skip_log=skip_log)
                num_bad += 1
    if without_preference is not None:
        without_preference.update(uninformative)
    if not records:
        bad = f"; all of its {num_bad} were invalid, see {skip_log}" if num_bad else ""
        rest = "".join(f"; for {count} rows {reason.partition(': ')[2]}" for reason, count in uninformative.items())
        raise ValueError(f"{path} contains no record{bad}{rest}.")
    return records


def _convert(raw: RawRecord, form: Format, find_image: FindImage, *, with_references: bool) -> list[Record]:
    records = form.convert(raw.fields(), find_image=find_image, where=raw.where)
    for record in records:
        _refuse_identical_sides(record)
        if isinstance(record, PreferencePair) and record.reference is not None and not with_references:
            raise BadRecordError(
                f"the pair has an 'image' that was edited, {record.reference}, which reward models and annotators do "
                f"not get; Diffusion-DPO takes such pairs."
            )
    return records


def _check_paths(path: str, root: Path, *, skip_log: Path | None) -> None:
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root} (image_root).")
    if skip_log is not None and skip_log.resolve() == Path(path).resolve():
        raise ValueError(f"`skipped` is the data file {path} itself; give another file for skipped records.")


def _refuse_identical_sides(record: Record) -> None:
    if not isinstance(record, PreferencePair):
        return
    if (record.winner, record.winner_prompt) == (record.loser, record.loser_prompt):
        raise BadRecordError(
            f"both sides are the image {record.winner} with the prompt {shortened(record.winner_prompt)}; "
            f"a pair must differ in the image or in the prompt."
        )


def _write_skipped(raw: RawRecord, *, reason: str, skip_log: Path) -> None:
    """Append one line and close the file, so that no line is lost if a later record stops the program."""
    skip_log.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(raw.source, bytes):
        record = raw.source.decode(errors="backslashreplace").strip()
    else:
        record = shortened(dict(raw.source))
    line = json.dumps({"where": raw.where, "reason": reason, "record": record}, ensure_ascii=False)
    with skip_log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{line}\n")
