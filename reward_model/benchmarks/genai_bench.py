"""GenAI-Bench of CMU (BaiqiL/GenAI-Bench-1600 or zhiqiulin/GenAI-Bench-527): six models' images, rated from 1 to 5.

genai_image.json      {"00000": {"prompt": "a red fox", "models": {"SDXL_Base": [4, 5, 4], "Midjourney_6": [..]}}}
genai_skills.json     {"counting": [0, 7], "negation": [3]}         prompts by what they ask for; may be missing
SDXL_Base/00000.jpeg

TIGER-Lab's data set of the same name (votes on pairs) is another one.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_model.benchmarks.read import complaints_at, file_of, image_reader, object_of, require, take_list, take_ranks
from reward_model.benchmarks.types import Benchmark, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

RULE = (
    "pearson, kendall_tau_b and pairwise_accuracy_tie_optimised over all images, not grouped by prompt, against the "
    "mean of three ratings (VQAScore, arXiv:2404.01291; GenAI-Bench, arXiv:2406.13743)."
)


def load_genai_bench(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """The benchmark in a folder with the three things above; 527 or 1,600 prompts."""
    file = file_of(path, "genai_image.json", benchmark="genai_bench")
    known, skills = object_of(file), _skills(file.parent / "genai_skills.json")
    read = image_reader(image_root or file.parent)
    items: list[Item] = []
    ratings: list[float] = []
    for number, fields in known.items():
        with complaints_at(f"{file}:{number}"):
            require(fields, "prompt", "models")
            prompt, models = take_text(fields, "prompt"), fields["models"]
            if not isinstance(models, dict) or not models:
                raise BadRecordError(
                    f"'models' is {shortened(models)}; it must be an object of models and their ratings."
                )
            for model in models:
                scores = take_ranks(models, model, length=len(take_list(models, model)))
                tags = {"model": [model], "skill": skills.get(number, [])}
                items.append(Item(read(f"{model}/{number}.jpeg", model), prompt, number, tags))
                ratings.append(fmean(scores))
    notes = [] if skills else ["There is no genai_skills.json, so that nothing is said of single skills."]
    return [Benchmark(name="genai_bench", rule=RULE, items=items, ratings=ratings, notes=notes)]


def _skills(file: Path) -> dict[str, list[str]]:
    """The skills of each prompt, by its number as genai_image.json writes it."""
    skills: dict[str, list[str]] = defaultdict(list)
    stored: dict[str, Any] = object_of(file) if file.is_file() else {}
    for skill, numbers in stored.items():
        with complaints_at(f"{file}:{skill}"):
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                raise BadRecordError(f"{shortened(numbers)} must be a list of the numbers of prompts.")
            for number in numbers:
                skills[f"{number:05d}"].append(skill)
    return dict(skills)
