"""Stable Diffusion as a policy: its densities, its images, what of it learns, what leaves it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.training.evaluation import evaluate
from rlhf_t2i.types import Sampler

CPU = torch.device("cpu")
PROMPTS = ["a red circle on a blue background", "a blue square on a red background"]


def sampler_of(policy: DiffusionPolicy, *, eta: float, guidance_scale: float = 1.0, num_steps: int = 5) -> Sampler:
    return Sampler(policy.schedule(num_steps), partial(ddim, eta=eta), guidance_scale)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_replaying_a_fresh_rollout_gives_ratio_one(
    model: str, lora_rank: int | None, dtype: torch.dtype, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    """An unchanged policy assigns its own strokes the very density it recorded, even where a batch mixes steps."""
    policy = load_policy(str(request.getfixturevalue(model)), device=CPU, dtype=dtype)
    policy.set_trainable(lora_rank, lora_alpha=None, keep_reference=False, seed=0)
    sampler = sampler_of(policy, eta=1.0, guidance_scale=guidance_scale)
    _, trajectory = rollout(policy, PROMPTS * 2, sampler=sampler, generators=seeded(1, 2), microbatch_size=4)

    image, step = (grid.flatten() for grid in torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij"))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for rows in order.split(4):
        i, t = image[rows], step[rows]
        transition = transition_at(policy, trajectory.latents[i, t], t, trajectory.conditioning[i], sampler=sampler)
        replayed = mean_log_prob(transition, trajectory.latents[i, t + 1])
        assert_close(replayed, trajectory.log_probs[i, t], rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_images_are_those_of_the_stock_pipeline(
    model: str, guidance_scale: float, eta: float, request: pytest.FixtureRequest
) -> None:
    """One seed is one image, here and in plain diffusers, step noise included."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = request.getfixturevalue(model)
    policy = load_policy(str(folder), device=CPU)
    evaluation = evaluate(
        policy, PROMPTS, [7, 8], [],
        sampler=sampler_of(policy, eta=eta, guidance_scale=guidance_scale), microbatch_size=2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS, num_inference_steps=5, eta=eta, guidance_scale=guidance_scale, generator=seeded(7, 8), output_type="pt"
    ).images
    assert_close(evaluation.images, images, rtol=0, atol=2e-5)


def test_images_do_not_depend_on_their_neighbours_or_on_the_batch_size(tiny_sd: Path) -> None:
    policy = load_policy(str(tiny_sd), device=CPU)
    look = partial(evaluate, policy, rewards=[], sampler=sampler_of(policy, eta=1.0))
    together = look(PROMPTS * 2, [1, 2, 3, 4], batch_size=4).images
    assert_close(look(PROMPTS * 2, [1, 2, 3, 4], batch_size=1).images, together, rtol=0, atol=1e-5)
    assert_close(look(PROMPTS[1:], [4], batch_size=1).images[0], together[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_reference_is_the_model_before_training(tiny_sd: Path, lora_rank: int | None) -> None:
    policy = load_policy(str(tiny_sd), device=CPU)
    sampler = sampler_of(policy, eta=1.0)
    noise = policy.initial_noise(seeded(0), copies=2)
    asked = noise, torch.tensor([0, 3]), policy.encode(PROMPTS)
    with torch.no_grad():
        before = transition_at(policy, *asked, sampler=sampler).mean
        policy.set_trainable(lora_rank, lora_alpha=None, keep_reference=True, seed=0)
        for weight in policy.trainable.values():
            weight.add_(0.05)
        moved = transition_at(policy, *asked, sampler=sampler).mean
        with policy.as_reference():
            reference = transition_at(policy, *asked, sampler=sampler).mean
        again = transition_at(policy, *asked, sampler=sampler).mean
    assert_close(reference, before, rtol=0, atol=0)
    assert (moved - before).abs().max() > 1e-3
    assert_close(again, moved, rtol=0, atol=0)


def test_a_long_prompt_is_reported_once_and_not_silently_cut(tiny_sd: Path) -> None:
    policy = load_policy(str(tiny_sd), device=CPU)
    long = "a red circle " * 20
    with pytest.warns(UserWarning, match="takes 24 tokens and this prompt has 62") as caught:
        _ = policy.encode([long, PROMPTS[0]]), policy.encode([long])
    assert len(caught) == 1
    assert long in str(caught[0].message)


# --- models that cannot be trained ------------------------------------------------------------------


def test_a_missing_model_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no model folder './nowhere'"):
        load_policy("./nowhere", device=CPU)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a diffusers pipeline: it has no model_index\.json"):
        load_policy(str(tmp_path), device=CPU)


def test_a_pipeline_of_another_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="is a KandinskyPipeline"):
        load_policy(str(tmp_path), device=CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "predicts 'sample'"),
        ({"thresholding": True}, "sets thresholding"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_schedulers_without_an_exact_density_are_refused(
    tiny_sd_v: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(tiny_sd_v, tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_policy(str(folder), device=CPU)


def test_a_scheduler_without_betas_is_refused(tiny_sd_v: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = shutil.copytree(tiny_sd_v, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, has no beta schedule"):
        load_policy(str(folder), device=CPU)


def test_a_number_of_steps_that_the_schedule_cannot_be_cut_into_is_refused(tiny_sd: Path) -> None:
    policy = load_policy(str(tiny_sd), device=CPU)
    with pytest.raises(ValueError, match="num_denoising_steps is 1001; it must be between 1 and 1000"):
        policy.schedule(1001)


def test_weights_that_are_none_are_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no trained weights"):
        load_policy(str(tiny_sd), device=CPU, weights=tmp_path)
