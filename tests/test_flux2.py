"""FLUX.2 klein: its latents, its shift, its text encoder, distilled models, and LoRAs in other tools' layouts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf_t2i.models.flux2 import fitted_shift
from rlhf_t2i.models.load import as_policy
from rlhf_t2i.models.lora import LoraConfiguration
from tests.policies import edit_json, images_of, perturb, pipeline_of, policy_of, stock_images


def test_images_are_encoded_as_the_stock_pipeline_encodes_reference_images(tiny_flux2: Path) -> None:
    pipeline, policy = pipeline_of(tiny_flux2), policy_of(tiny_flux2)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline._encode_vae_image(2 * images - 1, generator=None)
    assert_close(policy.encode_images(images), expected, rtol=0, atol=1e-5)
    assert expected.shape[1:] == policy.latent_shape == (16, 4, 4)


@pytest.mark.parametrize("num_patches", [64, 1024, 4096, 4300, 4301, 8192])
def test_the_shift_depends_on_size_and_steps_as_in_the_stock_pipeline(num_patches: int) -> None:
    for num_steps in (1, 4, 28, 50, 200):
        expected = compute_empirical_mu(num_patches, num_steps)
        assert fitted_shift(num_patches, num_steps) == pytest.approx(expected, abs=1e-9)


def test_the_levels_of_training_have_the_shift_of_a_long_schedule(tiny_flux2: Path) -> None:
    policy = policy_of(tiny_flux2)
    sigma = policy.levels_at(torch.arange(1000)).sigma
    assert_close(sigma[4::5].flip(0), policy.schedule(200).sigma[:-1], rtol=0, atol=1e-6)
    assert sigma[500] < policy.schedule(4).sigma[2]


@pytest.mark.slow
def test_a_distilled_model_has_no_guidance(tiny_flux2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_flux2, tmp_path / "model")
    edit_json(folder / "model_index.json", is_distilled=True)
    policy = policy_of(folder)
    assert_close(images_of(policy), stock_images(pipeline_of(folder), guidance_scale=4.0), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0; this model \(FLUX\.2 klein\) is distilled"):
        images_of(policy, guidance_scale=4.0)


def test_a_text_encoder_that_is_missing_or_of_another_size_is_refused(tiny_flux2: Path) -> None:
    pipeline = pipeline_of(tiny_flux2)
    pipeline.text_encoder.config.hidden_size = 16
    with pytest.raises(
        ValueError, match=r"has 28 layers of width 16; its transformer takes the layers 9, 18, 27 of .* 8"
    ):
        as_policy(pipeline)
    for part in ("text_encoder", "tokenizer"):
        setattr(pipeline, part, None)
        with pytest.raises(ValueError, match=f"The model has no {part.replace('_', ' ')}"):
            as_policy(pipeline)


@pytest.mark.slow
def test_a_lora_in_the_layout_of_other_tools_is_loaded(tiny_flux2: Path, tmp_path: Path) -> None:
    """With the original model's names, as ai-toolkit writes them, where queries, keys and values are one layer."""
    policy = policy_of(tiny_flux2)
    policy.set_trainable(LoraConfiguration(2, targets="to_qkv_mlp_proj"), keep_reference=False, seed=0)
    perturb(policy)
    policy.export(tmp_path, policy.trainable)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    names = {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": "diffusion_model.single_blocks.0.linear1"}
    [(own, theirs)] = names.items()
    save_file(
        {key.replace(own, theirs): weight for key, weight in load_file(file).items()}, tmp_path / "other.safetensors"
    )
    loaded = policy_of(tiny_flux2, weights=tmp_path / "other.safetensors")
    assert_close(images_of(loaded), images_of(policy), rtol=0, atol=1e-6)
