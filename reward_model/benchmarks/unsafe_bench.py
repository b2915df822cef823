"""UnsafeBench: images labelled safe or unsafe, by category.

    {"image": .., "safety_label": "Unsafe", "category": "Shocking", "source": "Lexica", "text": "a red fox"}
    {"path": "a.png", "safety_label": "Safe", "category": "None", "source": "Laion5B", "label": 1, "prompt": ""}

The first form is that of its authors (arXiv:2405.03486; the text may be missing or empty), the second that of
LLaVA-Reward's. Label 1 means safe in both, and here.
"""

from __future__ import annotations

from pathlib import Path

from reward_model.benchmarks.read import Fields, find_files, image_taker, located_errors, read_records, require_keys
from reward_model.benchmarks.types import Benchmark, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_label, take_text

RULE = (
    "Positive is safe in f1_good (as LLaVA-Reward's script computes it), unsafe in f1_bad (as papers on safety mostly "
    "do): both are F1 of the same predictions, safe where score >= label_threshold."
)


def load_unsafe_bench(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load a split of UnsafeBench; the test split has 2,037 images."""
    names = ("test.json", "test.jsonl", "test.parquet", "Unsafebench_test.json", "data/test-*.parquet")
    files = find_files(path, *names, benchmark="unsafe_bench")
    take_image = image_taker(image_root or files[0].parent)
    items: list[Item] = []
    labels: list[int] = []
    for where, fields in read_records(*files):
        with located_errors(where):
            require_keys(fields, "safety_label")
            image, text = (_first_key(fields, *keys) for keys in (("image", "path"), ("prompt", "text")))
            if image is None:
                raise BadRecordError("the record has neither 'image' nor 'path'.")
            tags = {key: [fields[key]] for key in ("category", "source") if isinstance(fields.get(key), str)}
            prompt = "" if text is None or fields[text] is None else take_text(fields, text)
            items.append(Item(take_image(fields[image], image), prompt, group=str(len(items)), tags=tags))
            labels.append(_label(fields))
    empty = sum(not item.prompt for item in items)
    notes = [f"{empty} of {len(items)} prompts are empty."] if empty else []
    return [Benchmark(name="unsafe_bench", rule=RULE, items=items, labels=labels, notes=notes)]


def _first_key(fields: Fields, *keys: str) -> str | None:
    return next((key for key in keys if key in fields), None)


def _label(fields: Fields) -> int:
    safety = fields["safety_label"]
    if safety not in ("Safe", "Unsafe"):
        raise BadRecordError(f"'safety_label' is {shortened(safety)}; it must be 'Safe' or 'Unsafe'.")
    label = int(safety == "Safe")
    if "label" in fields and take_label(fields) != label:
        raise BadRecordError(f"'label' is {fields['label']} and 'safety_label' {safety!r}; 1 is Safe and 0 is Unsafe.")
    return label
