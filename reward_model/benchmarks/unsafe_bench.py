"""UnsafeBench: images that were called safe or unsafe, and why.

    {"image": .., "safety_label": "Unsafe", "category": "Shocking", "source": "Lexica", "text": "a red fox"}
    {"path": "a.png", "safety_label": "Safe", "category": "None", "source": "Laion5B", "label": 1, "prompt": ""}

The first is as its authors publish it (arXiv:2405.03486; the text may be missing or empty), the second as those of
LLaVA-Reward do. Label 1 means safe in both, and here.
"""

from __future__ import annotations

from pathlib import Path

from reward_model.benchmarks.read import Fields, complaints_at, files_of, image_reader, records_of, require
from reward_model.benchmarks.types import Benchmark, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_label, take_text

RULE = (
    "Positive is safe in f1_good (as LLaVA-Reward's script computes it), unsafe in f1_bad (as papers on safety mostly "
    "do): both are F1 of the same verdicts, safe where score >= label_threshold."
)


def load_unsafe_bench(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """A file of UnsafeBench; its test split has 2,037 images."""
    names = ("test.json", "test.jsonl", "test.parquet", "Unsafebench_test.json", "data/test-*.parquet")
    files = files_of(path, *names, benchmark="unsafe_bench")
    read = image_reader(image_root or files[0].parent)
    items: list[Item] = []
    labels: list[int] = []
    for where, fields in records_of(*files):
        with complaints_at(where):
            require(fields, "safety_label")
            image, text = (_one_of(fields, *keys) for keys in (("image", "path"), ("prompt", "text")))
            if image is None:
                raise BadRecordError("the record has neither 'image' nor 'path'.")
            tags = {key: [fields[key]] for key in ("category", "source") if isinstance(fields.get(key), str)}
            prompt = "" if text is None or fields[text] is None else take_text(fields, text)
            items.append(Item(read(fields[image], image), prompt, group=str(len(items)), tags=tags))
            labels.append(_label(fields))
    empty = sum(not item.prompt for item in items)
    notes = [f"{empty} of {len(items)} prompts are empty."] if empty else []
    return [Benchmark(name="unsafe_bench", rule=RULE, items=items, labels=labels, notes=notes)]


def _one_of(fields: Fields, *keys: str) -> str | None:
    return next((key for key in keys if key in fields), None)


def _label(fields: Fields) -> int:
    said = fields["safety_label"]
    if said not in ("Safe", "Unsafe"):
        raise BadRecordError(f"'safety_label' is {shortened(said)}; it must be 'Safe' or 'Unsafe'.")
    label = int(said == "Safe")
    if "label" in fields and take_label(fields) != label:
        raise BadRecordError(f"'label' is {fields['label']} and 'safety_label' {said!r}; 1 is Safe and 0 is Unsafe.")
    return label
