"""Pick-a-Pic's test set: pairs, including ties, labelled by the users of a web page.

    {"caption": "a red fox", "jpg_0": .., "jpg_1": .., "label_0": 0.5, "label_1": 0.5, "has_label": true,
     "model_0": .., "model_1": ..}

`label_0` is 1 where the first image won, 0 where the second did, and 0.5 for a tie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reward_model.benchmarks.read import Fields, find_files, image_taker, located_errors, read_records, require_keys
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

RULE = (
    "agreement_half_ties_tuned: 1 if model and annotators agree, ties included, 0.5 if just one of them ties, else 0; "
    "the tie threshold is the best one on validation_unique (PickScore, arXiv:2305.01569; its script tries 11 "
    "thresholds, here all are tried). Without a validation file: agreement_half_ties, with tie_threshold."
)


def load_pick_a_pic(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load `test_unique` (500 pairs of different prompts), with `validation_unique` if it is in the same folder."""
    files = find_files(path, *_names("test_unique"), benchmark="pick_a_pic")
    candidates = [sorted(path.glob(name)) for name in _names("validation_unique")] if path.is_dir() else []
    found = next(filter(None, candidates), None)
    validation = _load(found, image_root) if found else None
    return [_load(files, image_root, validation=validation)]


def _names(split: str) -> list[str]:
    return [f"{split}.json", f"{split}.jsonl", f"{split}.parquet", f"data/{split}-*.parquet", f"{split}-*.parquet"]


def _load(files: list[Path], image_root: Path | None, *, validation: Benchmark | None = None) -> Benchmark:
    take_image = image_taker(image_root or files[0].parent)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    prompts: dict[str, str] = {}
    unlabelled = 0
    for where, fields in read_records(*files):
        with located_errors(where):
            require_keys(fields, "caption", "jpg_0", "jpg_1", "label_0")
            if fields.get("has_label") is False:
                unlabelled += 1
                continue
            prompt = take_text(fields, "caption")
            group = prompts.setdefault(prompt, str(len(prompts)))
            comparisons.append(Comparison(len(items), len(items) + 1, _outcome(fields)))
            for side in ("0", "1"):
                model = fields.get(f"model_{side}")
                tags = {"model": [model]} if isinstance(model, str) else {}
                items.append(Item(take_image(fields[f"jpg_{side}"], f"jpg_{side}"), prompt, group, tags))
    if not comparisons:
        raise ValueError(f"pick_a_pic: {files[0]} contains no pair with a label, and {unlabelled} without.")
    notes = [f"{unlabelled} pairs without a label are left out."] if unlabelled else []
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
