"""Pairs of two images of one prompt: the preference data that a diffusion model can be tuned on (Diffusion-DPO)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from reward_model.datasets.fields import BadRecordError, shortened
from reward_model.datasets.load import UNPACK_FOLDER, load_records
from reward_model.types import PreferencePair, Record


def load_same_prompt_pairs(
    sources: Sequence[str | Path],
    *,
    image_root: str | Path | None,
    skipped: Path | None,
    image_prefix: str | None = None,
    unpack_to: str | Path = UNPACK_FOLDER,
    log: Callable[[str], None] | None = None,
    keep_ties: bool = False,
    with_references: bool = False,
) -> list[PreferencePair]:
    """Return the pairs of two images of one prompt in several FORMAT:PATH, and in the .jsonl files of folders.

    With a file `skipped`, invalid records, labels and pairs of two prompts are left out and written to it; without,
    the first one raises BadRecordError. Ties are left out unless `keep_ties`. `log` receives the number of records
    without a preference. The other arguments are those of `load_records`.

    Raises ValueError if there is no pair.
    """
    pairs: list[PreferencePair] = []
    without_preference = Counter[str]()
    for source in sources:
        folder = Path(source)
        for file in sorted(folder.glob("*.jsonl")) if folder.is_dir() else [source]:
            records = load_records(
                file,
                image_root=image_root,
                image_prefix=image_prefix,
                unpack_to=unpack_to,
                on_bad_record="error" if skipped is None else "skip",
                skipped=skipped,
                without_preference=without_preference,
                with_references=with_references,
            )
            pairs += same_prompt_pairs(records, skipped=skipped, keep_ties=keep_ties)
    if log is not None:
        for reason, count in without_preference.items():
            log(f"{count:,} rows state no preference: {reason}")
    if not pairs:
        given = ", ".join(map(str, sources))
        raise ValueError(f"There is no pair of two images of one prompt with a preference in {given}.")
    return pairs


def same_prompt_pairs(
    records: Iterable[Record], *, skipped: Path | None, keep_ties: bool = False
) -> list[PreferencePair]:
    """Return the records that are pairs of two images of one prompt; ties only if `keep_ties`.

    Labels and pairs of two prompts raise BadRecordError, or are written to the file `skipped` if there is one.
    """
    pairs: list[PreferencePair] = []
    for record in records:
        flaw = _flaw_of(record)
        if flaw is None:
            assert isinstance(record, PreferencePair)
            pairs += [] if record.tie and not keep_ties else [record]
        elif skipped is None:
            raise BadRecordError(f"{record.where}: {flaw}")
        else:
            skipped.parent.mkdir(parents=True, exist_ok=True)
            with skipped.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"where": record.where, "reason": flaw}, ensure_ascii=False) + "\n")
    return pairs


def _flaw_of(record: Record) -> str | None:
    needed = "diffusion models are tuned on two images of one prompt."
    if not isinstance(record, PreferencePair):
        return f"this is a label of one image; {needed}"
    if record.winner_prompt != record.loser_prompt:
        prompts = f"{shortened(record.winner_prompt)} and {shortened(record.loser_prompt)}"
        return f"the two sides have different prompts, {prompts}; {needed}"
    if record.winner == record.loser:
        return f"both sides are the image {record.winner}; {needed}"
    return None
