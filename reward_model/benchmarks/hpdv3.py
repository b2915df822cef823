"""HPDv3's test set: pairs of which the first is the one that people preferred.

    {"prompt": "a red fox", "path1": "a.jpg", "path2": "b.jpg", "choice_dist": [9, 1], "confidence": 0.99,
     "model1": "flux", "model2": "sdxl"}

A confidence that is not known is null, or the text "null".
"""

from __future__ import annotations

from pathlib import Path

from reward_model.benchmarks.read import Fields, complaints_at, file_of, image_reader, records_of, require
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_number, take_text

RULE = (
    "accuracy_ties_wrong: every pair counts alike (HPSv3, arXiv:2508.03789). What its tables make of a judge's ties is "
    "not known here."
)
NOTE = "The preferred image is always the first: a judge that is shown pairs must be asked in both orders."


def load_hpdv3(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """A file of HPDv3 (`test.json`, or one category's of its benchmark)."""
    file = file_of(path, "test.json", benchmark="hpdv3")
    read = image_reader(image_root or file.parent)
    items: list[Item] = []
    prompts: dict[str, str] = {}
    for where, fields in records_of(file):
        with complaints_at(where):
            require(fields, "prompt", "path1", "path2")
            prompt = take_text(fields, "prompt")
            group = prompts.setdefault(prompt, str(len(prompts)))
            certainty = _certainty(fields)
            for side in ("1", "2"):
                tags = {"confidence": [certainty]}
                if fields.get(f"model{side}") is not None:
                    tags["model"] = [take_text(fields, f"model{side}")]
                items.append(Item(read(fields[f"path{side}"], f"path{side}"), prompt, group, tags))
    comparisons = [Comparison(i, i + 1, 1) for i in range(0, len(items), 2)]
    return [Benchmark(name="hpdv3", rule=RULE, items=items, comparisons=comparisons, notes=[NOTE])]


def _certainty(fields: Fields) -> str:
    """How sure people were, in words that pairs can be sorted by."""
    value = fields.get("confidence")
    if value is None or value == "null":
        return "not known"
    number = take_number(fields, "confidence")
    if not 0 <= number <= 1:
        raise BadRecordError(f"'confidence' is {shortened(value)}; it must lie in [0, 1], or be null.")
    return "0.95 and more" if number >= 0.95 else "below 0.95"
