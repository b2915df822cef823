"""Read human preferences: every row is returned as records, refused, counted as without preference, or written down as skipped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from reward_model.datasets.containers import open_containers
from reward_model.datasets.fields import BadRecordError, NoPreferenceError, shortened
from reward_model.datasets.formats import Format, parse_source
from reward_model.datasets.images import MAX_PIXELS, FindImage, image_finder, parse_prefix
from reward_model.datasets.raw_records import RawRecord
from reward_model.types import PreferencePair, Record

UNPACKED = Path("runs/images")
"""Where images go that lie within tables and archives."""


def load_records(
    source: str | Path,
    *,
    image_root: str | Path | None = None,
    image_prefix: str | None = None,
    unpack_to: str | Path = UNPACKED,
    on_bad_record: Literal["error", "skip"] = "error",
    skipped: Path | None = None,
    without_preference: Counter[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Record]:
    """The pairs and labels of FORMAT:PLACE, in the order of their rows, with every image checked.

    `formats.py` lists the formats, `containers.py` the places. Without a format, `.json` is the one published with
    LLaVA-Reward, everything else our own. Relative image paths start at `image_root`, by default the folder of the
    file; no image may lie outside of it. An `image_prefix` OLD=NEW leads paths from the folder OLD to NEW. Images
    within tables and archives are written to files in the folder `unpack_to`.

    With on_bad_record="skip" a bad row is left out, and a line {"where", "reason", "record"} is appended to the file
    `skipped`. Otherwise the first one raises BadRecordError. Sound rows that say nothing, such as pairs without a
    label, are counted in `without_preference`, by reason. A source without any good record is a ValueError.
    """
    form, place = parse_source(str(source))
    skip_log = skipped if on_bad_record == "skip" else None
    if on_bad_record == "skip" and skip_log is None:
        raise ValueError("on_bad_record='skip' needs `skipped`: the file in which left-out records are written down.")
    prefix, records, silent, num_bad = parse_prefix(image_prefix), list[Record](), Counter[str](), 0
    is_image_folder = form.name == "image_folder"
    for container in open_containers(place, is_image_folder=is_image_folder, skip_columns=form.skip_columns):
        root = container.root if image_root is None or is_image_folder else Path(image_root)
        _check_files(place, root, skip_log=skip_log)
        find_image = image_finder(
            root, unpack_to=Path(unpack_to), prefix=prefix, member=container.member, max_pixels=max_pixels
        )
        for raw in form.gather(container.rows):
            try:
                records += _understand(raw, form, find_image)
            except NoPreferenceError as reason:
                silent[f"{form.name}: {reason}"] += 1
            except BadRecordError as error:
                if skip_log is None:
                    raise BadRecordError(f"{raw.where}: {error}") from error
                _write_down(raw, reason=str(error), skip_log=skip_log)
                num_bad += 1
    if without_preference is not None:
        without_preference.update(silent)
    if not records:
        bad = f"; all of its {num_bad} were bad, see {skip_log}" if num_bad else ""
        rest = "".join(f"; of {count} rows {reason.partition(': ')[2]}" for reason, count in silent.items())
        raise ValueError(f"{place} holds no record{bad}{rest}.")
    return records


def _understand(raw: RawRecord, form: Format, find_image: FindImage) -> list[Record]:
    found = form.read(raw.fields(), find_image=find_image, where=raw.where)
    for record in found:
        _refuse_identical_sides(record)
    return found


def _check_files(place: str, root: Path, *, skip_log: Path | None) -> None:
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}, which image_root names.")
    if skip_log is not None and skip_log.resolve() == Path(place).resolve():
        raise ValueError(f"`skipped` is the data file {place} itself; left-out records need a file of their own.")


def _refuse_identical_sides(record: Record) -> None:
    if not isinstance(record, PreferencePair):
        return
    if (record.winner, record.winner_prompt) == (record.loser, record.loser_prompt):
        raise BadRecordError(
            f"both sides are the image {record.winner} under the prompt {shortened(record.winner_prompt)}; "
            f"a pair must differ in the image or in the prompt."
        )


def _write_down(raw: RawRecord, *, reason: str, skip_log: Path) -> None:
    """Append one line and close the file again, so that nothing is lost if a later record stops the program."""
    skip_log.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(raw.source, bytes):
        record = raw.source.decode(errors="backslashreplace").strip()
    else:
        record = shortened(dict(raw.source))
    line = json.dumps({"where": raw.where, "reason": reason, "record": record}, ensure_ascii=False)
    with skip_log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{line}\n")
