"""Every model family as a policy: its images are those of plain diffusers, before training and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.models.load import as_policy
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.models.sana import Sana
from rlhf_t2i.models.sdxl import StableDiffusionXL
from rlhf_t2i.models.stable_diffusion import StableDiffusion
from rlhf_t2i.sampling.rollout import generate, rollout, transition_at
from tests.policies import (
    DIFFUSION,
    FLOW,
    GUIDED,
    GUIDED_QUICK,
    MODELS,
    PROMPTS,
    images_of,
    perturb,
    pipeline_of,
    policy_of,
    sampler_of,
    stock_images,
)
from tests.toys import seeded

REPLAYED = [
    pytest.param(*case.values, lora_rank, dtype, marks=case.marks)
    for number, case in enumerate(case if hasattr(case, "marks") else pytest.param(*case) for case in GUIDED)
    for lora_rank, dtype in zip((None, 2), (torch.float32, torch.bfloat16)[:: 1 - number % 2 * 2], strict=True)
]
"""Each model, with and without guidance, in each dtype and with and without a LoRA: any two of these together."""


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# --- sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "guidance_scale"), GUIDED, indirect=["model"])
def test_images_equal_those_of_the_stock_pipeline(model: Path, guidance_scale: float) -> None:
    images = stock_images(pipeline_of(model), guidance_scale=guidance_scale)
    assert images.std() > 0.01
    assert_close(images_of(policy_of(model), guidance_scale=guidance_scale), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("guidance_scale", "eta"), [(1.0, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize("model", DIFFUSION, indirect=True)
def test_images_of_stochastic_ddim_equal_those_of_the_stock_pipeline(
    model: Path, guidance_scale: float, eta: float
) -> None:
    images = stock_images(pipeline_of(model), guidance_scale=guidance_scale, eta=eta)
    assert_close(images_of(policy_of(model), guidance_scale=guidance_scale, eta=eta), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("model", "guidance_scale"), GUIDED_QUICK, indirect=["model"])
def test_images_that_are_not_square_equal_those_of_the_stock_pipeline(model: Path, guidance_scale: float) -> None:
    policy = policy_of(model, resolution=(8, 24))
    assert policy.image_size == (8, 24)
    images = stock_images(pipeline_of(model), guidance_scale=guidance_scale, height=8, width=24)
    assert_close(images_of(policy, guidance_scale=guidance_scale), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_prediction_depends_on_the_size_of_its_latents_and_not_on_that_of_the_policy(model: Path) -> None:
    policy, other = policy_of(model, resolution=(8, 24)), policy_of(model)
    latents, level = policy.initial_noise(seeded(0), copies=2), policy.levels_at(torch.tensor([300, 800]))
    with torch.no_grad():
        found, expected = (
            each.predict(latents, level, each.encode(PROMPTS), guidance_scale=1.0).noise for each in (other, policy)
        )
    assert_close(found, expected, rtol=0, atol=0)
    assert policy.size_unit == 2 * (1 if isinstance(policy, StableDiffusion | StableDiffusionXL | Sana) else 2)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_a_loaded_pipeline_gives_the_same_images(model: Path) -> None:
    pipeline = pipeline_of(model)
    policy = as_policy(pipeline, resolution=16)
    assert policy.network is getattr(pipeline, policy.component)
    assert_close(images_of(policy), images_of(policy_of(model)), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch: just slower
@pytest.mark.parametrize(("model", "guidance_scale", "lora_rank", "dtype"), REPLAYED, indirect=["model"])
def test_replaying_a_fresh_rollout_gives_ratio_one(
    model: Path, lora_rank: int | None, dtype: torch.dtype, guidance_scale: float
) -> None:
    """An unchanged policy reproduces the log-probabilities it recorded, even where a batch mixes denoising steps."""
    policy = policy_of(model, dtype)
    policy.set_trainable(LoraConfiguration(lora_rank) if lora_rank else None, keep_reference=False, seed=0)
    sampler = sampler_of(policy, eta=1.0, guidance_scale=guidance_scale)
    _, trajectory = rollout(policy, PROMPTS * 2, sampler=sampler, generators=seeded(1, 2), microbatch_size=4)
    image, step = (grid.flatten() for grid in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for rows in order.split(4):
        i, t = image[rows], step[rows]
        transition = transition_at(policy, trajectory.latents[i, t], t, trajectory.conditioning[i], sampler=sampler)
        replayed = mean_log_prob(transition, trajectory.latents[i, t + 1])
        assert_close(replayed, trajectory.log_probs[i, t], rtol=0, atol=0)


def test_images_do_not_depend_on_their_batch_or_on_the_microbatch_size(tiny_sd: Path) -> None:
    policy = policy_of(tiny_sd)
    sampler = sampler_of(policy, eta=1.0)

    def images(prompts: list[str], *seeds: int, microbatch_size: int) -> torch.Tensor:
        generators = seeded(*seeds)
        return generate(policy, prompts, sampler=sampler, generators=generators, microbatch_size=microbatch_size)[0]

    together = images(PROMPTS * 2, 1, 2, 3, 4, microbatch_size=4)
    assert_close(images(PROMPTS * 2, 1, 2, 3, 4, microbatch_size=1), together, rtol=0, atol=1e-5)
    assert_close(images(PROMPTS[1:], 4, microbatch_size=1)[0], together[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_denoiser_calls_are_counted_twice_with_classifier_free_guidance_only(model: Path) -> None:
    policy, rows = policy_of(model), list[int]()
    policy.network.register_forward_pre_hook(
        lambda _, inputs, named: rows.append(len(named.get("hidden_states", inputs[0] if inputs else None))),
        with_kwargs=True,
    )
    latents, steps = policy.initial_noise(seeded(0), copies=2), torch.tensor([0, 1])
    for guidance_scale in (1.0,) if "schnell" in str(model) else (1.0, 4.0):
        rows.clear()
        sampler = sampler_of(policy, guidance_scale=guidance_scale)
        with torch.no_grad():
            transition_at(policy, latents, steps, policy.encode(PROMPTS), sampler=sampler)
        assert sum(rows) == 2 * policy.num_calls(guidance_scale)


# --- latents and prompts ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*DIFFUSION, *FLOW, "tiny_sana"], indirect=True)
def test_decoding_and_encoding_images_equal_those_of_diffusers(model: Path) -> None:
    policy = policy_of(model)
    latents = policy.initial_noise(seeded(1), copies=2)
    vae = pipeline_of(model).vae
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    with torch.no_grad():
        images = vae.decode(latents / scale + shift).sample / 2 + 0.5
        encoded = vae.encode(2 * images - 1, return_dict=False)[0]
        mean = ((encoded if isinstance(encoded, torch.Tensor) else encoded.mean) - shift) * scale
        assert_close(policy.decode(latents), images, rtol=0, atol=1e-5)
    assert policy.image_size == images.shape[-2:]
    assert_close(policy.encode_images(images), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_each_distinct_prompt_is_encoded_once(model: Path) -> None:
    policy = policy_of(model)
    counts = [0 for _ in policy.text_encoders]

    def counted(index: int) -> Any:
        def count(*_: object) -> None:
            counts[index] += 1

        return count

    for index, encoder in enumerate(policy.text_encoders):
        encoder.model.register_forward_pre_hook(counted(index))
    first = policy.encode([*PROMPTS, PROMPTS[0]])
    assert counts == [2] * len(counts)
    assert_close(policy.encode(PROMPTS[1:]).parts, first[1:2].parts, rtol=0, atol=0)
    assert_close(first[2:].parts, first[:1].parts, rtol=0, atol=0)
    assert counts == [2] * len(counts)


# --- training and export ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_the_reference_is_the_model_before_training(model: Path) -> None:
    for lora_rank in (None, 2):
        policy = policy_of(model)
        before = images_of(policy)
        policy.set_trainable(LoraConfiguration(lora_rank) if lora_rank else None, keep_reference=True, seed=0)
        perturb(policy)
        after = images_of(policy)
        with policy.as_reference():
            assert_close(images_of(policy), before, rtol=0, atol=0)
        assert (after - before).abs().max() > 1e-3
        assert_close(images_of(policy), after, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_an_exported_lora_gives_the_same_images_in_diffusers_and_when_loaded(model: Path, tmp_path: Path) -> None:
    policy = policy_of(model)
    policy.set_trainable(LoraConfiguration(2, 6.0), keep_reference=False, seed=0)
    assert all(
        any(name.endswith(f"{target}.lora_A.default.weight") for name in policy.trainable)
        for target in policy.lora_targets
    )
    perturb(policy)
    policy.export(tmp_path, policy.trainable)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert_close(stock_images(pipeline), images_of(policy), rtol=0, atol=2e-5)
    assert_close(images_of(policy_of(model, weights=tmp_path)), images_of(policy), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_an_exported_denoiser_gives_the_same_images_in_diffusers_and_when_loaded(model: Path, tmp_path: Path) -> None:
    policy = policy_of(model)
    policy.set_trainable(None, keep_reference=False, seed=0)
    perturb(policy)
    component = policy.export(tmp_path, policy.trainable).name
    pipeline = pipeline_of(model)
    trained = type(policy.network).from_pretrained(tmp_path / component)
    pipeline.register_modules(**{component: trained})
    assert_close(stock_images(pipeline), images_of(policy), rtol=0, atol=2e-5)
    assert_close(images_of(policy_of(model, weights=tmp_path)), images_of(policy), rtol=0, atol=0)
