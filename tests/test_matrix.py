"""Every recipe with every family of models: one step each, on tiny random models.

`python -m tests.test_matrix` prints the table of what works.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recipes import best_of_n, ddpo, diffusion_dpo, diffusion_nft, draft, fk_steering, flow_grpo
from tests.runs import REDNESS, rows

ROOT = Path(__file__).parent.parent
MODELS = {
    "Stable Diffusion 1.x, 2.x": "tiny_sd",
    "Stable Diffusion XL": "tiny_sdxl",
    "Stable Diffusion 3, 3.5": "tiny_sd3",
    "FLUX.1": "tiny_flux",
    "Z-Image": "tiny_zimage",
}
TEACHING = {
    "ddpo": ddpo, "flow_grpo": flow_grpo, "diffusion_nft": diffusion_nft, "draft": draft, "diffusion_dpo": diffusion_dpo
}  # fmt: skip
SEARCHING = {"best_of_n": best_of_n, "fk_steering": fk_steering}
REFUSED = {(name, model): "recipes/ddpo.py" for name in ("flow_grpo",) for model in ("tiny_sd", "tiny_sdxl")}
"""Pairs that make no sense, and the recipe that the refusal names."""
SIZES = {
    "ddpo": {"prompts_per_step": 2, "images_per_prompt": 4},
    "flow_grpo": {"prompts_per_step": 2, "images_per_prompt": 4, "num_evaluation_steps": 4},
    "diffusion_nft": {"prompts_per_step": 2, "images_per_prompt": 4},
    "draft": {"prompts_per_step": 2},
    "diffusion_dpo": {"prompts_per_step": 2, "images_per_prompt": 2},
}


def small(recipe: str, model: Path, folder: Path) -> Any:
    return TEACHING[recipe].Config(
        model=str(model), resolution=16, lora_rank=2, num_denoising_steps=4, rewards=REDNESS, num_steps=1,
        evaluation_rewards=REDNESS, num_evaluation_images=2, checkpoint_every=1, evaluate_every=0, microbatch_size=8,
        run_folder=str(folder), num_cpu_threads=1, **SIZES[recipe],
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize("recipe", TEACHING)
def test_a_step_is_learnt_resumed_and_taken_to_plain_diffusers(
    recipe: str, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The run goes on after a stop, and the LoRA that it leaves paints in diffusers what its last evaluation saw."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    from rlhf_t2i.models.load import family_of, load_policy

    folder = request.getfixturevalue(model)
    config, main = small(recipe, folder, tmp_path / "run"), TEACHING[recipe].main
    if named := REFUSED.get((recipe, model)):
        with pytest.raises(ValueError, match=named):
            main(config)
        return
    main(config)
    run = main(replace(config, num_steps=2, resume=True))
    first, second = rows(run.folder, "train")
    assert first["gradient_norm"] > 0
    assert second["gradient_norm"] > 0
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    if "beta_schedule" in pipeline.scheduler.config:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.folder / "lora")
    unguided = family_of(type(pipeline).__name__).guidance_when_off
    images = pipeline(
        ["a red circle"], num_inference_steps=4, guidance_scale=unguided, height=16, width=16, output_type="pt",
        generator=[torch.Generator().manual_seed(3)],
    ).images  # fmt: skip
    base, tuned = (
        painted(load_policy(str(folder), device=torch.device("cpu"), weights=weights, resolution=16))
        for weights in (None, run.folder)
    )
    assert_close(tuned, images, rtol=0, atol=2e-5)
    assert (base - images).abs().max() > 1e-7


def painted(policy: Any) -> torch.Tensor:
    from rlhf_t2i.diffusion.transitions import stochastic
    from rlhf_t2i.training.evaluation import evaluate
    from rlhf_t2i.types import Sampler

    schedule = policy.schedule(4)
    sampler = Sampler(schedule, stochastic(schedule, eta=0.0))
    return evaluate(policy, ["a red circle"], [3], [], sampler=sampler, microbatch_size=1).images


@pytest.mark.parametrize("model", MODELS.values())
@pytest.mark.parametrize("recipe", SEARCHING)
def test_a_image_is_searched(recipe: str, model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    size = {"num_candidates": 2} if recipe == "best_of_n" else {"num_particles": 2, "resample_after": "2"}
    config = SEARCHING[recipe].Config(
        model=str(request.getfixturevalue(model)), resolution=16, prompts=str(tmp_path / "prompts.txt"),
        images_per_prompt=1, num_denoising_steps=4, rewards=REDNESS, evaluation_rewards="",
        run_folder=str(tmp_path / "run"), num_cpu_threads=1, **size,
    )  # fmt: skip
    (found,) = SEARCHING[recipe].main(config)
    scores = found.row["searched"]["scores"]["reward"]
    assert len(scores) == 2
    assert scores[found.row["searched"]["selected"]] == max(scores)


def test_the_readme_shows_what_is_tested_here() -> None:
    assert table() in (ROOT / "README.md").read_text()


def table() -> str:
    """The README's, of what this file tests."""
    names = [*TEACHING, *SEARCHING]
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, model in MODELS.items():
        cells = [f"use `{Path(REFUSED[name, model]).stem}`" if (name, model) in REFUSED else "yes" for name in names]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
