"""Every recipe with every model family, on tiny random models: a step, resuming, and the LoRA in plain diffusers.

`python -m tests.test_matrix` prints the table of the README.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recipes import best_of_n, ddpo, diffusion_dpo, diffusion_nft, draft, fk_steering, flow_grpo
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import family_of
from rlhf_t2i.sampling.rollout import generate
from tests.policies import LATEST, pipeline_of, policy_of, sampler_of
from tests.runs import REDNESS_OF_ROWS, as_for_toy_models, rows, write_rows
from tests.toys import seeded

ROOT = Path(__file__).parent.parent
MODELS = {
    "Stable Diffusion 1.x, 2.x": "tiny_sd",
    "Stable Diffusion XL": "tiny_sdxl",
    "Stable Diffusion 3, 3.5": "tiny_sd3",
    "FLUX.1": "tiny_flux",
    "Z-Image": "tiny_zimage",
    "FLUX.2 klein": "tiny_flux2",
    "SANA": "tiny_sana",
    "Qwen-Image": "tiny_qwen_image",
}
"""Title and fixture of each family."""
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in LATEST else name for name in MODELS.values()]
TRAINING = {
    "ddpo": ddpo, "flow_grpo": flow_grpo, "diffusion_nft": diffusion_nft, "draft": draft, "diffusion_dpo": diffusion_dpo
}  # fmt: skip
SEARCH = {"best_of_n": best_of_n, "fk_steering": fk_steering}
REFUSED = {(name, model): "recipes/ddpo.py" for name in ("flow_grpo",) for model in ("tiny_sd", "tiny_sdxl")}
"""Combinations that are refused, and the recipe that the error message recommends."""
SIZES = {
    "ddpo": {"prompts_per_step": 2, "images_per_prompt": 4},
    "flow_grpo": {"prompts_per_step": 2, "images_per_prompt": 4, "num_evaluation_steps": 4},
    "diffusion_nft": {"prompts_per_step": 2, "images_per_prompt": 4},
    "draft": {"prompts_per_step": 2},
    "diffusion_dpo": {"prompts_per_step": 2, "images_per_prompt": 2},
    "best_of_n": {"num_candidates": 2},
    "fk_steering": {"num_particles": 2, "resample_after": "2"},
}


def training_config(recipe: str, model: Path, folder: Path) -> Any:
    prompts = write_rows(folder.with_name("prompts.jsonl"), ["a fox", "a red circle", "a blue square"])
    options = as_for_toy_models(
        model=str(model), height=8, width=16, lora_rank=2, num_denoising_steps=4, rewards=REDNESS_OF_ROWS, num_steps=1,
        evaluation_rewards=REDNESS_OF_ROWS, num_evaluation_images=2, checkpoint_every=1, evaluate_every=0,
        microbatch_size=8, run_folder=str(folder), num_cpu_threads=1, prompts=str(prompts), **SIZES[recipe],
    ) | {"evaluation_prompts": None}  # fmt: skip
    return TRAINING[recipe].Config(**options)


def search_config(recipe: str, model: Path, prompts: Path, folder: Path) -> Any:
    return SEARCH[recipe].Config(
        model=str(model), height=8, width=16, prompts=str(prompts), images_per_prompt=1, num_denoising_steps=4,
        rewards=REDNESS_OF_ROWS, guidance_scale=1.0, run_folder=str(folder), num_cpu_threads=1, **SIZES[recipe],
    )  # fmt: skip


@pytest.mark.parametrize("model", CASES)
@pytest.mark.parametrize("recipe", TRAINING)
def test_a_run_trains_resumes_and_exports_to_plain_diffusers(
    recipe: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Rows of prompts reach the reward; with the exported LoRA plain diffusers generates the images of the policy."""
    folder = request.getfixturevalue(model)
    config, main = training_config(recipe, folder, tmp_path / "run"), TRAINING[recipe].main
    if recommended := REFUSED.get((recipe, model)):
        with pytest.raises(ValueError, match=recommended):
            main(config)
        return
    main(config)
    run_folder = main(replace(config, num_steps=2, resume=True))
    first, second = rows(run_folder, "train")
    assert first["gradient_norm"] > 0
    assert second["gradient_norm"] > 0
    pipeline = pipeline_of(folder)
    pipeline.load_lora_weights(run_folder / "lora")
    family = family_of(type(pipeline).__name__)
    images = pipeline(
        prompt=["a red circle"], num_inference_steps=4, height=8, width=16, output_type="pt", generator=seeded(3),
        **family.stock_arguments(1.0),
    ).images  # fmt: skip
    before, after = (image_of(policy_of(folder, weights=weights, resolution=(8, 16))) for weights in (None, run_folder))
    assert_close(after, images, rtol=0, atol=2e-5)
    assert (before - images).abs().max() > 1e-7


def image_of(policy: DiffusionPolicy) -> torch.Tensor:
    sampler = sampler_of(policy)
    return generate(policy, ["a red circle"], sampler=sampler, generators=seeded(3), microbatch_size=1)[0]


@pytest.mark.parametrize("model", CASES)
@pytest.mark.parametrize("recipe", SEARCH)
def test_a_search_selects_the_image_with_the_highest_reward(
    recipe: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", ["a red circle"])
    config = search_config(recipe, request.getfixturevalue(model), prompts, tmp_path / "run")
    (found,) = SEARCH[recipe].main(config)
    scores = found.row["searched"]["scores"]["reward"]
    assert len(scores) == 2
    assert scores[found.row["searched"]["selected"]] == max(scores)


def test_the_readme_shows_the_table_of_what_is_tested_here() -> None:
    assert table() in (ROOT / "README.md").read_text()


def table() -> str:
    """Return the table of the README in Markdown."""
    names = [*TRAINING, *SEARCH]
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, model in MODELS.items():
        cells = [f"use `{Path(REFUSED[name, model]).stem}`" if (name, model) in REFUSED else "yes" for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
