"""Read a file of human preferences: every record is either returned, refused, or written down as skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.images import image_finder
from reward_model.datasets.jsonl import own_record
from reward_model.datasets.published import published_record
from reward_model.datasets.source import RawRecord, elements_of, lines_of, parse_object
from reward_model.types import PreferencePair, Record


def load_records(
    path: Path,
    *,
    image_root: Path | None = None,
    on_bad_record: Literal["error", "skip"] = "error",
    skipped: Path | None = None,
    max_pixels: int = 64_000_000,
) -> list[Record]:
    """The pairs and labels of a data file, in its order, with every picture checked.

    `.jsonl` is our own format (see `jsonl.py`), `.json` the one published with the paper (see `published.py`). Relative
    image paths start at `image_root`, by default the folder of the file; no picture may lie outside of it.

    With on_bad_record="skip" a bad record is left out, and a line {"where", "reason", "record"} is appended to the file
    `skipped`. Otherwise the first one raises BadRecordError. A file without any good record is a ValueError.
    """
    root = path.parent if image_root is None else image_root
    skip_log = skipped if on_bad_record == "skip" else None
    if on_bad_record == "skip" and skip_log is None:
        raise ValueError("on_bad_record='skip' needs `skipped`: the file in which left-out records are written down.")
    _check_files(path, root, skip_log=skip_log)
    match path.suffix:
        case ".jsonl":
            raw_records, understand = lines_of(path), own_record
        case ".json":
            raw_records, understand = elements_of(path), published_record
        case other:
            raise ValueError(
                f"{path} ends in {other!r}; possible are .jsonl (one record a line, our own format) and .json "
                f"(a list, as published with LLaVA-Reward)."
            )
    find_image = image_finder(root, max_pixels=max_pixels)
    records: list[Record] = []
    for raw in raw_records:
        try:
            record = understand(parse_object(raw.source), find_image=find_image, where=raw.where)
            _refuse_identical_sides(record)
        except BadRecordError as error:
            if skip_log is None:
                raise BadRecordError(f"{raw.where}: {error}") from error
            _write_down(raw, reason=str(error), skip_log=skip_log)
        else:
            records.append(record)
    if not records:
        bad = f"; all of its {len(raw_records)} were bad, see {skip_log}" if raw_records else ""
        raise ValueError(f"{path} holds no record{bad}.")
    return records


def _check_files(path: Path, root: Path, *, skip_log: Path | None) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}, which image_root names.")
    if skip_log is not None and skip_log.resolve() == path.resolve():
        raise ValueError(f"`skipped` is the data file {path} itself; left-out records need a file of their own.")


def _refuse_identical_sides(record: Record) -> None:
    if not isinstance(record, PreferencePair):
        return
    if (record.winner, record.winner_prompt) == (record.loser, record.loser_prompt):
        raise BadRecordError(
            f"both sides are the picture {record.winner} under the prompt {shortened(record.winner_prompt)}; "
            f"a pair must differ in the picture or in the prompt."
        )


def _write_down(raw: RawRecord, *, reason: str, skip_log: Path) -> None:
    """Append one line and close the file again, so that nothing is lost if a later record stops the program."""
    skip_log.parent.mkdir(parents=True, exist_ok=True)
    record = raw.source.decode(errors="backslashreplace").strip()
    line = json.dumps({"where": raw.where, "reason": reason, "record": record}, ensure_ascii=False)
    with skip_log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{line}\n")
