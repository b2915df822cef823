"""Pairs of two images of one prompt: the preference data that a diffusion model can be tuned on (Diffusion-DPO)."""

# pyarrow has no usable types.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.compute as pc

from reward_model.datasets.convert import write_skipped
from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.load import load_records
from reward_model.datasets.table import RecordTable
from reward_model.types import PreferencePair, Record


def load_same_prompt_pairs(
    sources: Sequence[str | Path],
    *,
    image_root: str | Path | None,
    skipped: Path | None,
    image_prefix: str | None = None,
    log: Callable[[str], None] | None = None,
    keep_ties: bool = False,
    with_references: bool = False,
    streaming: bool = False,
) -> Sequence[PreferencePair]:
    """Return the pairs of two images of one prompt in several FORMAT:PATH, and in the .jsonl files of folders.

    With a file `skipped`, invalid records, labels and pairs of two prompts are left out and written to it; without,
    the first one raises BadRecordError. Ties are left out unless `keep_ties`. `log` receives the number of records
    without a preference. The other arguments are those of `load_records`.

    Raises ValueError if there is no pair.
    """
    tables, without_preference = list[RecordTable](), Counter[str]()
    for source in sources:
        folder, parts = Path(source), list[RecordTable]()
        for file in sorted(folder.glob("*.jsonl")) if folder.is_dir() else [source]:
            records = load_records(
                file,
                image_root=image_root,
                image_prefix=image_prefix,
                on_bad_record="error" if skipped is None else "skip",
                skipped=skipped,
                without_preference=without_preference,
                with_references=with_references,
                streaming=streaming,
            )
            parts.append(same_prompt_pairs(records, skipped=skipped, keep_ties=keep_ties))
        tables.append(RecordTable.concatenate(parts))
    if log is not None:
        for reason, count in without_preference.items():
            log(f"{count:,} rows state no preference: {reason}")
    pairs = RecordTable.concatenate(tables)
    if not len(pairs):
        given = ", ".join(map(str, sources))
        raise ValueError(f"There is no pair of two images of one prompt with a preference in {given}.")
    return cast("Sequence[PreferencePair]", pairs)


def same_prompt_pairs(records: Iterable[Record], *, skipped: Path | None, keep_ties: bool = False) -> RecordTable:
    """Return the records that are pairs of two images of one prompt; ties only if `keep_ties`.

    Labels and pairs of two prompts raise BadRecordError, or are written to the file `skipped` if there is one.
    """
    table, is_pair, start = RecordTable.of(records), list[np.ndarray](), 0
    for batch in table.batches("winner", "loser", "loser_prompt", "label"):
        usable = batch["loser_prompt"].is_null().to_numpy(False) & batch["label"].is_null().to_numpy(False)
        winner, loser = (batch[side] for side in ("winner", "loser"))
        same = np.ones(len(batch), bool)
        for name in ("file", "start", "size", "column"):
            one, other = winner.field(name), loser.field(name)
            same &= pc.equal(one, other).fill_null(False).to_numpy(False) | (one.is_null().to_numpy(False))
        is_pair.append(usable & ~same)
        for row in start + np.flatnonzero(~is_pair[-1]):
            _refuse(table[int(row)], skipped)
        start += len(batch)
    keep = np.concatenate([np.zeros(0, bool), *is_pair])
    if not keep_ties:
        keep &= ~table.column("tie")
    return table if keep.all() else table.select(np.flatnonzero(keep))


def _refuse(record: Record, skipped: Path | None) -> None:
    flaw = _flaw_of(record)
    if skipped is None:
        raise BadRecordError(f"{record.where}: {flaw}")
    write_skipped(skipped, where=record.where, reason=flaw)


def _flaw_of(record: Record) -> str:
    needed = "diffusion models are tuned on two images of one prompt."
    if not isinstance(record, PreferencePair):
        return f"this is a label of one image; {needed}"
    if record.winner_prompt != record.loser_prompt:
        prompts = f"{shortened(record.winner_prompt)} and {shortened(record.loser_prompt)}"
        return f"the two sides have different prompts, {prompts}; {needed}"
    return f"both sides are the image {record.winner}; {needed}"
