"""Multimodal RewardBench 2 (arXiv:2512.16899), the task text-to-image: pairs of recent generators, labelled by experts.

    {"pairs": [{"id": "..", "prompt_content": [["text", "a red fox"]], "chosen": "B", "prompt_source": "wise",
                "prompt_metadata": {"category": "Biology"},
                "response_a": {"model_name": "flux", "response_content": [["image", "images/a.jpg"]]},
                "response_b": {"model_name": "imagen4", "response_content": [["image", "images/b.jpg"]]}}]}

This is `t2i.json` in `benchmark/` of its repository, beside the folder `images/`, as its scripts build it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reward_model.benchmarks.read import (
    Fields,
    find_file,
    image_taker,
    located_errors,
    read_object,
    require_keys,
    take_values,
)
from reward_model.benchmarks.types import Benchmark, Comparison, Item
from reward_model.datasets.fields import BadRecordError, shortened

RULE = (
    "accuracy_ties_wrong: its script counts every pair in both orders with one weight (compute_accuracy.py); scores of "
    "single images do not depend on the order. An answer that is neither A nor B is wrong."
)


def load_mmrb2(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load `t2i.json`; images start from its folder."""
    file = find_file(path, "t2i.json", benchmark="mmrb2")
    with located_errors(str(file)):
        stored = read_object(file)
        require_keys(stored, "pairs")
        pairs = take_values(stored, "pairs")
    take_image = image_taker(image_root or file.parent)
    items: list[Item] = []
    comparisons: list[Comparison] = []
    prompts: dict[str, str] = {}
    for number, fields in enumerate(pairs):
        with located_errors(f"{file}:pairs[{number}]"):
            if not isinstance(fields, dict):
                raise BadRecordError(f"{shortened(fields)} must be an object.")
            require_keys(fields, "prompt_content", "response_a", "response_b", "chosen")
            prompt = _only(fields["prompt_content"], "text", "prompt_content")
            group = prompts.setdefault(prompt, str(len(prompts)))
            comparisons.append(Comparison(len(items), len(items) + 1, _outcome(fields)))
            for side in ("response_a", "response_b"):
                response = fields[side]
                if not isinstance(response, dict):
                    raise BadRecordError(f"{side!r} is {shortened(response)}; it must be an object.")
                image = take_image(_only(response.get("response_content"), "image", side), side)
                items.append(Item(image, prompt, group, _tags(fields, response)))
    return [Benchmark(name="mmrb2", rule=RULE, items=items, comparisons=comparisons)]


def _only(content: object, kind: str, key: str) -> str:
    """Return the one entry of a content list, [["text", "a red fox"]], which must be of this kind."""
    match content:
        case [[str() as found, str() as value]] if found == kind and value:
            return value
        case _:
            raise BadRecordError(f"{key!r} has {shortened(content)}; the task text-to-image has one {kind}.")


def _outcome(fields: Fields) -> Literal[1, -1]:
    match fields["chosen"]:
        case "A":
            return 1
        case "B":
            return -1
        case chosen:
            raise BadRecordError(f"'chosen' is {shortened(chosen)}; it must be A or B.")


def _tags(fields: Fields, response: Fields) -> dict[str, list[str]]:
    metadata = fields.get("prompt_metadata")
    category = metadata.get("category") if isinstance(metadata, dict) else None
    found = {"source": fields.get("prompt_source"), "category": category, "model": response.get("model_name")}
    return {name: [value] for name, value in found.items() if isinstance(value, str) and value}
