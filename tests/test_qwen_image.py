"""Qwen-Image: its latents of one frame, its template and masks, the norm of guidance, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_t2i.models.load import as_policy
from rlhf_t2i.models.qwen_image import CHUNK, MAX_TOKENS
from rlhf_t2i.types import Conditioning
from tests.policies import PROMPTS, pipeline_of, policy_of, sampler_of
from tests.toys import seeded


def test_images_are_encoded_and_decoded_as_one_frame_of_a_video(tiny_qwen_image: Path) -> None:
    pipeline = pipeline_of(tiny_qwen_image)
    vae, policy = pipeline.vae, as_policy(pipeline, resolution=16)
    vae.decoder.conv_out.weight.data.mul_(20)  # for images with saturated pixels
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    latents = policy.initial_noise(seeded(1), copies=2)
    with torch.no_grad():
        images = vae.decode((latents * std + mean).unsqueeze(2)).sample[:, :, 0] / 2 + 0.5
        decoded = policy.decode(latents)
        expected = (vae.encode(2 * images.unsqueeze(2) - 1).latent_dist.mean[:, :, 0] - mean) / std
    assert_close(decoded.clamp(0, 1), images, rtol=0, atol=1e-5)
    assert decoded.max() > 1.01  # not clamped, so that saturated pixels have a gradient
    assert_close(policy.encode_images(images), expected, rtol=0, atol=1e-5)


def test_the_conditioning_is_the_prompt_and_the_end_of_the_template_as_in_the_stock_pipeline(
    tiny_qwen_image: Path,
) -> None:
    expected, mask = pipeline_of(tiny_qwen_image).encode_prompt([*PROMPTS, "a fox"])
    found = policy_of(tiny_qwen_image).encode([*PROMPTS, "a fox"])
    length = mask.shape[1]
    assert found.states.shape[1] == MAX_TOKENS > length
    assert torch.equal(found.mask[:, :length], mask.bool())
    assert not found.mask[:, length:].any()
    assert_close(found.states[:, :length], expected, rtol=0, atol=1e-5)


def test_padding_and_a_longer_prompt_in_the_batch_change_nothing(tiny_qwen_image: Path) -> None:
    policy = policy_of(tiny_qwen_image)
    latents, level = policy.initial_noise(seeded(1), copies=2), sampler_of(policy).schedule.at(torch.tensor([1, 2]))
    prompts = policy.encode(["a fox", PROMPTS[0] + " and a red circle" * 30])
    longer = Conditioning(prompts.states, mask=torch.ones_like(prompts.mask))
    with torch.no_grad():
        together = policy.denoise(latents, level.model_time, prompts)
        alone = policy.denoise(latents[:1], level.model_time[:1], prompts[:1])
        other = policy.denoise(latents, level.model_time, Conditioning.cat([prompts[:1], longer[1:]]))
    counts = prompts.mask.sum(dim=1)
    assert counts[0] <= 2 * CHUNK < counts[1]
    assert_close(alone, together[:1], rtol=0, atol=1e-5)
    assert_close(other[:1], together[:1], rtol=0, atol=1e-5)
    assert (other[1] - together[1]).abs().max() > 1e-5


def test_a_transformer_or_a_text_encoder_of_another_kind_is_refused(tiny_qwen_image: Path) -> None:
    pipeline = pipeline_of(tiny_qwen_image)
    pipeline.text_encoder.config.get_text_config().hidden_size = 24
    with pytest.raises(ValueError, match=r"text encoder has width 24; its transformer takes one of 16"):
        as_policy(pipeline)
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="takes its guidance scale as an input"):
        as_policy(pipeline)
