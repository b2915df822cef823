"""Latents of existing images, the forward process and denoising errors: equal to those of diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.diffusion.forward import noise_to
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.sampling.denoising_errors import denoising_errors
from rlhf_t2i.shapes.names import TOY_MODEL
from rlhf_t2i.shapes.scenes import all_scenes, render
from rlhf_t2i.types import Prediction
from tests.policies import policy_of
from tests.toys import CPU, seeded


def test_encoded_images_equal_the_mean_or_a_sample_of_diffusers_autoencoder(tiny_sd: Path) -> None:
    from diffusers import AutoencoderKL

    policy, images = policy_of(tiny_sd), torch.rand(2, 3, 16, 16, generator=seeded(0)[0])
    vae = AutoencoderKL.from_pretrained(tiny_sd / "vae")
    with torch.no_grad():
        latent_dist = vae.encode(images * 2 - 1).latent_dist
    scale = vae.config.scaling_factor
    assert_close(policy.encode_images(images), latent_dist.mean * scale)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5)[0])
    drawn = policy.encode_images(images, generators=seeded(5, 5))
    assert_close(drawn, (latent_dist.mean + latent_dist.std * noise) * scale)


def test_encoding_inverts_decoding_for_the_built_in_model() -> None:
    """A rendered image is reconstructed from its latents, and its latents from the image."""
    policy = load_policy(TOY_MODEL, device=CPU)
    images = render(all_scenes("one", "training")[:8], rng=np.random.default_rng(0))
    assert policy.image_size == images.shape[-2:]
    latents = policy.encode_images(images)
    with torch.no_grad():
        restored = policy.decode(latents)
    assert (restored - images).abs().mean() < 0.02
    assert (policy.encode_images(restored) - latents).square().mean() < 0.05 * latents.var()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_noised_latents_and_targets_equal_those_of_diffusers(model: str, request: pytest.FixtureRequest) -> None:
    """`add_noise` and, for a v model, `get_velocity`, at all levels of its training."""
    from diffusers import DDIMScheduler

    folder = request.getfixturevalue(model)
    policy, times = policy_of(folder), torch.arange(1000)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    clean, noise = torch.randn(2, 1000, 1, 2, 2, generator=seeded(0)[0])
    level = policy.levels_at(times)
    assert_close(noise_to(clean, level, noise), scheduler.add_noise(clean, noise, times))
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, times) if is_v else noise
    assert_close(policy.to_output(Prediction(clean, noise), level), target)
    assert torch.equal(level.model_time, times.float())


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd_v"])
def test_the_denoising_error_is_that_of_the_networks_own_output(model: str, request: pytest.FixtureRequest) -> None:
    """As diffusers' training scripts compute it."""
    from diffusers import DDIMScheduler

    folder = request.getfixturevalue(model)
    policy, times = policy_of(folder), torch.tensor([999, 500, 1])
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=seeded(0)[0])
    text = policy.encode(["a fox", "a cat", "a dog"])
    with torch.no_grad():
        found = denoising_errors(policy, clean, noise, policy.levels_at(times), text)
        output = policy.network(scheduler.add_noise(clean, noise, times), times, text.states).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, times) if is_v else noise
    assert_close(found, (output - target).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("times", [[0, 1000], [-1, 5]])
def test_times_outside_the_models_training_are_refused(tiny_sd: Path, times: list[int]) -> None:
    with pytest.raises(
        ValueError, match=rf"times range from {times[0]} to {times[1]}; the model was trained at 0 to 999"
    ):
        policy_of(tiny_sd).levels_at(torch.tensor(times))
