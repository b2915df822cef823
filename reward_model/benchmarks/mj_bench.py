"""MJ-Bench: pairs for several perspectives, one file or folder of files for each.

    {"caption": "a red fox", "image0": "a.jpg", "image1": "b.jpg", "label": 0, "info": "existence"}

`label` is the index of the preferred image. The first release (arXiv:2407.04842) has the splits alignment, safety and
quality; 816 of 916 alignment labels in its repository are 0. The present data set of the same name has composition,
visualization and quality, and its labels are all 0. The split `bias` has no preferences and is not loaded.
"""

from __future__ import annotations

from pathlib import Path

from reward_model.benchmarks.read import Fields, image_taker, located_errors, read_records, require_keys
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

SPLITS = ("alignment", "safety", "quality", "composition", "visualization")
RULE = (
    'accuracy_ties_wrong ("w/ tie") and accuracy_ties_dropped ("w/o tie"), where |score0 - score1| <= tie_threshold '
    "is a tie; the default of the published script is 0, the thresholds of its tables are not stated."
)


def load_mj_bench(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load one benchmark for each split in a folder. Raises FileNotFoundError if there is none."""
    found = {split: files for split in SPLITS if (files := _files(path, split))}
    if not found:
        raise FileNotFoundError(
            f"mj_bench: {path} must be a folder with SPLIT.json, SPLIT.jsonl, SPLIT/*.json, SPLIT/*.parquet or "
            f"data/SPLIT-*.parquet, with SPLIT one of {', '.join(SPLITS)}."
        )
    return [_load(split, files, image_root or path) for split, files in found.items()]


def _files(path: Path, split: str) -> list[Path]:
    patterns = [f"{split}.{ending}" for ending in ("json", "jsonl", "parquet")]
    patterns += [f"{split}/**/*.{ending}" for ending in ("json", "jsonl", "parquet")]
    patterns.append(f"data/{split}-*.parquet")
    return [file for pattern in patterns for file in sorted(path.glob(pattern))]


def _load(split: str, files: list[Path], root: Path) -> Benchmark:
    take_image = image_taker(root)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    prompts: dict[str, str] = {}
    for folder, (where, fields) in ((file.parent.name, record) for file in files for record in read_records(file)):
        with located_errors(where):
            require_keys(fields, "caption", "image0", "image1", "label")
            prompt = take_text(fields, "caption")
            tags = {**_tags(fields), "folder": [folder]}
            group = prompts.setdefault(prompt, str(len(prompts)))
            comparisons.append(Comparison(len(items), len(items) + 1, 1 if _label(fields) == 0 else -1))
            items += [Item(take_image(fields[key], key), prompt, group, tags) for key in ("image0", "image1")]
    first = sum(comparison.outcome == 1 for comparison in comparisons)
    note = (
        f"{first} of {len(comparisons)} labels prefer the first image: a model that always prefers the first of a pair "
        f"would get {first / len(comparisons):.1%}. Scores of single images do not depend on the order."
    )
    return Benchmark(name=f"mj_bench-{split}", rule=RULE, items=items, comparisons=comparisons, notes=[note])


def _tags(fields: Fields) -> dict[str, list[str]]:
    """Return the domains in the fields of a record; the folder of its file (actions, ...) is another one."""
    return {key: [fields[key]] for key in ("category", "subcategory", "source", "model") if _is_text(fields.get(key))}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _label(fields: Fields) -> int:
    label = fields["label"]
    if type(label) is not int or label not in (0, 1):
        raise BadRecordError(f"'label' is {shortened(label)}; it must be 0 (image0 is better) or 1 (image1).")
    return label
