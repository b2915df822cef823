"""Pick-a-Pic's test set: pairs that users of a web page judged, ties among them.

    {"caption": "a red fox", "jpg_0": .., "jpg_1": .., "label_0": 0.5, "label_1": 0.5, "has_label": true,
     "model_0": .., "model_1": ..}

`label_0` is 1 where the first image won, 0 where the second did, and 0.5 for a tie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reward_model.benchmarks.read import Fields, complaints_at, files_of, image_reader, records_of, require
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

RULE = (
    "agreement_half_ties_tuned: 1 if judge and people agree, ties included, 0.5 if just one of them ties, else 0; the "
    "judge ties within a band that does best on validation_unique (PickScore, arXiv:2305.01569; its script tries 11 "
    "widths, here every one is tried). Without a validation file: agreement_half_ties, with tie_threshold as the band."
)


def load_pick_a_pic(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """`test_unique` (500 pairs of different prompts), and `validation_unique` if it lies beside it."""
    files = files_of(path, *_names("test_unique"), benchmark="pick_a_pic")
    beside = [sorted(path.glob(name)) for name in _names("validation_unique")] if path.is_dir() else []
    known = next(filter(None, beside), None)
    validation = _load(known, image_root) if known else None
    return [_load(files, image_root, validation=validation)]


def _names(split: str) -> list[str]:
    return [f"{split}.json", f"{split}.jsonl", f"{split}.parquet", f"data/{split}-*.parquet", f"{split}-*.parquet"]


def _load(files: list[Path], image_root: Path | None, *, validation: Benchmark | None = None) -> Benchmark:
    read = image_reader(image_root or files[0].parent)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    prompts: dict[str, str] = {}
    unlabelled = 0
    for where, fields in records_of(*files):
        with complaints_at(where):
            require(fields, "caption", "jpg_0", "jpg_1", "label_0")
            if fields.get("has_label") is False:
                unlabelled += 1
                continue
            prompt = take_text(fields, "caption")
            group = prompts.setdefault(prompt, str(len(prompts)))
            comparisons.append(Comparison(len(items), len(items) + 1, _outcome(fields)))
            for side in ("0", "1"):
                model = fields.get(f"model_{side}")
                tags = {"model": [model]} if isinstance(model, str) else {}
                items.append(Item(read(fields[f"jpg_{side}"], f"jpg_{side}"), prompt, group, tags))
    if not comparisons:
        raise ValueError(f"pick_a_pic: {files[0]} holds no pair with a label; {unlabelled} have none.")
    notes = [f"{unlabelled} pairs have no label and are left out."] if unlabelled else []
    return Benchmark(
        name="pick_a_pic", rule=RULE, items=items, comparisons=comparisons, validation=validation, notes=notes
    )


def _outcome(fields: Fields) -> Literal[1, 0, -1]:
    first = fields["label_0"]
    if type(first) not in (int, float) or first not in (0, 0.5, 1):
        raise BadRecordError(f"'label_0' is {shortened(first)}; it must be 1, 0 or 0.5 (a tie).")
    if fields.get("label_1") is not None and fields["label_1"] != 1 - first:
        raise BadRecordError(
            f"'label_0' is {first:g} and 'label_1' {shortened(fields['label_1'])}; they must sum to 1."
        )
    return 1 if first == 1 else -1 if first == 0 else 0
