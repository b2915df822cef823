"""GenAI-Bench of CMU (BaiqiL/GenAI-Bench-1600 or zhiqiulin/GenAI-Bench-527): images of six models, rated from 1 to 5.

genai_image.json      {"00000": {"prompt": "a red fox", "models": {"SDXL_Base": [4, 5, 4], "Midjourney_6": [..]}}}
genai_skills.json     {"counting": [0, 7], "negation": [3]}         prompts by skill; optional
SDXL_Base/00000.jpeg

TIGER-Lab's data set of the same name (votes on pairs) is a different one.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from reward_model.benchmarks.read import (
    find_file,
    image_taker,
    located_errors,
    read_object,
    require_keys,
    take_numbers,
    take_values,
)
from reward_model.benchmarks.types import Benchmark, Item
from reward_model.datasets.fields import BadRecordError, shortened, take_text

RULE = (
    "pearson, kendall_tau_b and pairwise_accuracy_tie_optimised over all images, not grouped by prompt, against the "
    "mean of three ratings (VQAScore, arXiv:2404.01291; GenAI-Bench, arXiv:2406.13743)."
)


def load_genai_bench(path: Path, *, image_root: Path | None) -> list[Benchmark]:
    """Load the benchmark of a folder with the files above; 527 or 1,600 prompts."""
    file = find_file(path, "genai_image.json", benchmark="genai_bench")
    prompts, skills = read_object(file), _skills(file.parent / "genai_skills.json")
    take_image = image_taker(image_root or file.parent)
    items: list[Item] = []
    ratings: list[float] = []
    for number, fields in prompts.items():
        with located_errors(f"{file}:{number}"):
            require_keys(fields, "prompt", "models")
            prompt, models = take_text(fields, "prompt"), fields["models"]
            if not isinstance(models, dict) or not models:
                raise BadRecordError(f"'models' is {shortened(models)}; it must be an object of ratings by model.")
            for model in models:
                scores = take_numbers(models, model, length=len(take_values(models, model)))
                tags = {"model": [model], "skill": skills.get(number, [])}
                items.append(Item(take_image(f"{model}/{number}.jpeg", model), prompt, number, tags))
                ratings.append(fmean(scores))
    notes = [] if skills else ["There is no genai_skills.json, and so no accuracy by skill."]
    return [Benchmark(name="genai_bench", rule=RULE, items=items, ratings=ratings, notes=notes)]


def _skills(file: Path) -> dict[str, list[str]]:
    """Return the skills of each prompt, by its key in genai_image.json."""
    skills: dict[str, list[str]] = defaultdict(list)
    stored: dict[str, Any] = read_object(file) if file.is_file() else {}
    for skill, numbers in stored.items():
        with located_errors(f"{file}:{skill}"):
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                raise BadRecordError(f"{shortened(numbers)} must be a list of prompt numbers.")
            for number in numbers:
                skills[f"{number:05d}"].append(skill)
    return dict(skills)
