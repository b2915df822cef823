"""HPDv3's test set and that of HPDv3++: pairs whose first image is preferred.

    {"prompt": "a red fox", "path1": "a.jpg", "path2": "b.jpg", "choice_dist": [9, 1], "confidence": 0.99,
     "model1": "flux", "model2": "sdxl"}

An unknown confidence is null, or the string "null". HPDv3++ (arXiv:2606.14657) has path1, path2 and prompt alone, and
a file for each of its two questions: aesthetics (`test_aes.json`) and text fidelity (`test_tf.json`).
"""

from __future__ import annotations

from pathlib import Path

from reward_model.benchmarks.read import Fields, find_file, image_taker, located_errors, read_records, require_keys
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_number, take_text

RULE = (
    "accuracy_ties_wrong: every pair has the same weight (HPSv3, arXiv:2508.03789). How its tables count tied scores "
    "is not stated."
)
PLUS_PLUS_RULE = (
    "accuracy_ties_wrong: a pair is right if path1 has the higher reward (README of HPSv3++). Its training files have "
    "the same generator and questions: a model trained on them is tested within its domain."
)
NOTE = "The preferred image is always the first: a model that compares pairs must be given both orders."


def load_hpdv3(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load a file of HPDv3: `test.json`, or the file of one category."""
    file = find_file(path, "test.json", benchmark="hpdv3")
    return [_load(file, image_root or file.parent, name="hpdv3", rule=RULE)]


def load_hpdv3_plus_plus(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load the two test files of a folder in the published layout: `test/test_aes.json` and `test/test_tf.json`.

    Images start from that folder.
    """
    files = [*path.glob("test/test_aes.json"), *path.glob("test/test_tf.json")]
    if not files:
        raise FileNotFoundError(
            f"hpdv3_plus_plus: {path} must be a folder with test/test_aes.json or test/test_tf.json."
        )
    questions = {"test_aes": "aesthetics", "test_tf": "text_fidelity"}
    return [
        _load(file, image_root or path, name=f"hpdv3_plus_plus-{questions[file.stem]}", rule=PLUS_PLUS_RULE)
        for file in files
    ]


def _load(file: Path, root: Path, *, name: str, rule: str) -> Benchmark:
    take_image = image_taker(root)
    items: list[Item] = []
    prompts: dict[str, str] = {}
    for where, fields in read_records(file):
        with located_errors(where):
            require_keys(fields, "prompt", "path1", "path2")
            prompt = take_text(fields, "prompt")
            group = prompts.setdefault(prompt, str(len(prompts)))
            confidence = _confidence_class(fields)
            for side in ("1", "2"):
                tags = {"confidence": [confidence]}
                if fields.get(f"model{side}") is not None:
                    tags["model"] = [take_text(fields, f"model{side}")]
                items.append(Item(take_image(fields[f"path{side}"], f"path{side}"), prompt, group, tags))
    comparisons = [Comparison(i, i + 1, 1) for i in range(0, len(items), 2)]
    return Benchmark(name=name, rule=rule, items=items, comparisons=comparisons, notes=[NOTE])


def _confidence_class(fields: Fields) -> str:
    """Return the confidence of the annotators as a domain: "not known", "below 0.95" or "0.95 and more"."""
    value = fields.get("confidence")
    if value is None or value == "null":
        return "not known"
    number = take_number(fields, "confidence")
    if not 0 <= number <= 1:
        raise BadRecordError(f"'confidence' is {shortened(value)}; it must be in [0, 1], or null.")
    return "0.95 and more" if number >= 0.95 else "below 0.95"
