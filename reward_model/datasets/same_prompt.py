"""What a painter can learn from: pairs of two images of one prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.load import UNPACKED, load_records
from reward_model.types import PreferencePair, Record


def load_same_prompt_pairs(
    sources: Sequence[str | Path],
    *,
    image_root: str | Path | None,
    skipped: Path | None,
    image_prefix: str | None = None,
    unpack_to: str | Path = UNPACKED,
    log: Callable[[str], None] | None = None,
    keep_ties: bool = False,
) -> list[PreferencePair]:
    """The pairs of FORMAT:PLACEs, and of the .jsonl files of folders, without ties unless they are to be kept.

    With a file `skipped`, whatever is no pair of one prompt is left out and written down there; else it raises
    BadRecordError. Raises ValueError if no pair is left. The rest is `load_records`'; `log` is told of rows that log
    nothing.
    """
    pairs: list[PreferencePair] = []
    without_preference = Counter[str]()
    for source in sources:
        folder = Path(source)
        for file in sorted(folder.glob("*.jsonl")) if folder.is_dir() else [source]:
            records = load_records(
                file, image_root=image_root, image_prefix=image_prefix, unpack_to=unpack_to, without_preference=without_preference,
                on_bad_record="error" if skipped is None else "skip", skipped=skipped,
            )  # fmt: skip
            pairs += same_prompt_pairs(records, skipped=skipped, keep_ties=keep_ties)
    for reason, count in without_preference.items():
        if log is not None:
            log(f"{count:,} rows log nothing: {reason}")
    if not pairs:
        given = ", ".join(map(str, sources))
        raise ValueError(f"In {given} no image is preferred to another of the same prompt: nothing can be learnt.")
    return pairs


def same_prompt_pairs(
    records: Iterable[Record], *, skipped: Path | None, keep_ties: bool = False
) -> list[PreferencePair]:
    """The pairs among the records; ties are no fault, and left out unless they are to be kept.

    Labels, and pairs of two prompts, raise BadRecordError, or, if there is a file `skipped`, are left out and written
    down there.
    """
    kept: list[PreferencePair] = []
    for record in records:
        flaw = _flaw_of(record)
        if flaw is None:
            assert isinstance(record, PreferencePair)
            kept += [] if record.tie and not keep_ties else [record]
        elif skipped is None:
            raise BadRecordError(f"{record.where}: {flaw}")
        else:
            skipped.parent.mkdir(parents=True, exist_ok=True)
            with skipped.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"where": record.where, "reason": flaw}, ensure_ascii=False) + "\n")
    return kept


def _flaw_of(record: Record) -> str | None:
    if not isinstance(record, PreferencePair):
        return "this is a label of one image; a painter learns from pairs of images."
    if record.winner_prompt != record.loser_prompt:
        prompts = f"{shortened(record.winner_prompt)} and {shortened(record.loser_prompt)}"
        return f"the two sides have different prompts, {prompts}; a painter learns from two images of one prompt."
    if record.winner == record.loser:
        return f"both sides are the image {record.winner}; a painter learns from two images of one prompt."
    return None
