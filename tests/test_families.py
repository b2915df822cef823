"""Parts of model families: conditioning, text encoders, family-specific inputs, and models that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recipes import ddpo
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.load import as_policy, family_of, load_policy
from rlhf_t2i.models.table import FAMILIES
from rlhf_t2i.models.text_encoders import PromptCache
from rlhf_t2i.sampling.rollout import transition_at
from rlhf_t2i.types import Conditioning, Resolution, Sampler
from tests.policies import PROMPTS, edit_json, images_of, pipeline_of, policy_of, stock_images
from tests.toys import CPU, seeded

# --- conditioning -------------------------------------------------------------------------------------


def test_conditioning_is_indexed_repeated_concatenated_and_moved_as_one() -> None:
    states, pooled, mask = torch.randn(3, 4, 5), torch.randn(3, 2), torch.rand(3, 4) > 0.5
    conditioning, rows = Conditioning(states, pooled, mask), torch.tensor([2, 0])
    assert len(conditioning) == 3
    assert_close(conditioning[rows].parts, {"states": states[rows], "pooled": pooled[rows], "mask": mask[rows]})
    assert_close(Conditioning.cat([conditioning[:1], conditioning[1:]]).parts, conditioning.parts)
    assert_close(conditioning.repeat(2).parts, Conditioning.cat([conditioning] * 2).parts)
    coarse = conditioning.to(torch.bfloat16)
    assert_close(coarse.parts, {"states": states.bfloat16(), "pooled": pooled.bfloat16(), "mask": mask})
    assert Conditioning(states).to(torch.device("meta")).parts.keys() == {"states"}


def test_the_cache_of_prompts_is_bounded_and_drops_the_oldest() -> None:
    encoded: list[str] = []

    def encode(prompts: Any) -> Conditioning:
        encoded.extend(prompts)
        return Conditioning(torch.full((1, 2, 3), float(len(prompts[0]))))

    cache = PromptCache(max_bytes=2 * 6 * 4)
    cache.encode(["a", "bb"], encode)
    cache.encode(["a", "ccc"], encode)
    assert encoded == ["a", "bb", "ccc"]
    assert cache.encode(["a", "bb"], encode).states[1, 0, 0] == 2
    assert encoded == ["a", "bb", "ccc", "bb"]


def test_text_encoders_are_on_the_device_only_while_they_encode(tiny_sd3: Path) -> None:
    policy = policy_of(tiny_sd3)
    expected, policy = policy.encode(PROMPTS), policy_of(tiny_sd3, offload_text_encoders=True)
    events: list[str] = []
    for encoder in policy.text_encoders:
        encoder.model.to = lambda device: events.append(str(device))
        encoder.model.register_forward_pre_hook(lambda *_: events.append("encodes"))
    policy.device = torch.device("meta")  # stands in for a GPU: only its name is recorded
    policy.encode(PROMPTS)
    assert events == ["meta"] * 3 + ["encodes"] * 6 + ["cpu"] * 3
    policy.device = torch.device("cpu")
    assert_close(policy.encode(PROMPTS).parts, expected.parts, rtol=0, atol=0)
    assert len(events) == 12


def test_a_truncated_prompt_is_reported_once(tiny_sd: Path) -> None:
    policy = policy_of(tiny_sd)
    long = "a red circle " * 20
    with pytest.warns(UserWarning, match="takes 24 tokens and this prompt has 62") as caught:
        _ = policy.encode([long, PROMPTS[0]]), policy.encode([long])
    assert len(caught) == 1
    assert long in str(caught[0].message)


# --- families -----------------------------------------------------------------------------------------


def test_the_table_of_families_names_a_class_for_each_pipeline() -> None:
    assert all(family_of(name).pipeline_class.__name__ == name for name in FAMILIES)


def test_sdxls_autoencoder_does_not_overflow_in_half_precision(tiny_sdxl: Path, tmp_path: Path) -> None:
    assert policy_of(tiny_sdxl, torch.float16).autoencoder.vae.dtype == torch.float32
    assert policy_of(tiny_sdxl, torch.bfloat16).autoencoder.vae.dtype == torch.bfloat16
    fixed = shutil.copytree(tiny_sdxl, tmp_path / "model")
    edit_json(fixed / "vae" / "config.json", force_upcast=False)
    assert policy_of(fixed, torch.float16).autoencoder.vae.dtype == torch.float16


def test_sdxls_unconditional_input_is_zeros_or_the_empty_prompt_as_its_index_says(
    tiny_sdxl: Path, tmp_path: Path
) -> None:
    """SDXL base uses zeros; other models encode the empty prompt."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    images = stock_images(pipeline_of(folder), guidance_scale=4.0)
    assert_close(images_of(policy_of(folder), guidance_scale=4.0), images, rtol=0, atol=2e-5)
    assert (images_of(policy_of(tiny_sdxl), guidance_scale=4.0) - images).abs().max() > 1e-4


def test_latents_with_their_own_mean_and_std_are_scaled_as_in_diffusers(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Playground v2.5, of SDXL's family."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    edit_json(folder / "vae" / "config.json", latents_mean=[-1.6, 1.1, 3.3, -1.8], latents_std=[8.4, 5.9, 6.8, 5.5])
    policy = policy_of(folder)
    images = stock_images(pipeline_of(folder))
    assert_close(images_of(policy), images, rtol=0, atol=2e-5)
    vae, (mean, std) = policy.autoencoder.vae, torch.tensor([[-1.6, 1.1, 3.3, -1.8], [8.4, 5.9, 6.8, 5.5]])
    encoded = vae.encode(2 * images - 1).latent_dist.mean
    expected = (encoded - mean[:, None, None]) * vae.config.scaling_factor / std[:, None, None]
    assert_close(policy.encode_images(images), expected, rtol=1e-4, atol=1e-5)


def test_flux_packs_latents_as_the_stock_pipeline_does(tiny_flux: Path) -> None:
    from rlhf_t2i.models.flux import packed, unpacked

    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline_of(tiny_flux)._pack_latents(latents, 2, 4, 6, 8)
    assert_close(packed(latents), expected, rtol=0, atol=0)
    assert_close(unpacked(expected, 6, 8), latents, rtol=0, atol=0)


def test_fluxs_default_image_size_is_that_of_the_stock_pipeline(tiny_flux: Path) -> None:
    pipeline = pipeline_of(tiny_flux)
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    assert load_policy(str(tiny_flux), device=CPU).image_size == (size, size)


def test_a_distilled_sana_is_refused(tiny_sana: Path) -> None:
    pipeline = pipeline_of(tiny_sana)
    pipeline.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="takes its guidance scale as an input, as that of SANA-Sprint; give the base"):
        as_policy(pipeline)


def test_without_its_instruction_sana_gives_the_images_of_the_stock_pipeline_without_it(
    tiny_sana: Path, tmp_path: Path
) -> None:
    policy = policy_of(tiny_sana, complex_human_instruction=False)
    expected = stock_images(pipeline_of(tiny_sana), guidance_scale=4.0, complex_human_instruction=None)
    assert_close(images_of(policy, guidance_scale=4.0), expected, rtol=0, atol=2e-5)
    with_it = policy_of(tiny_sana)
    assert (images_of(with_it, guidance_scale=4.0) - expected).abs().max() > 1e-3
    assert with_it.fingerprint("text encoder") != policy.fingerprint("text encoder")
    with pytest.raises(ValueError, match="complex_human_instruction is False; it must be true for a model without one"):
        ddpo.Config(model="shapes", complex_human_instruction=False, run_folder=str(tmp_path))


def test_a_text_encoder_of_another_width_is_refused_by_sana(tiny_sana: Path) -> None:
    pipeline = pipeline_of(tiny_sana)
    pipeline.text_encoder.config.hidden_size = 24
    with pytest.raises(ValueError, match=r"text encoder has width 24; its transformer takes one of 16"):
        as_policy(pipeline)


def test_guidance_is_refused_by_a_model_without_it(tiny_schnell: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0; this model \(FLUX.1 schnell\) has no guidance"):
        images_of(policy_of(tiny_schnell), guidance_scale=4.0)


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("tiny_sdxl", 9, "resolution is 9; .* must be a multiple of 2, such as 8"),
        ("tiny_sd3", (16, 22), "height x width is 16 x 22; .* must be a multiple of 4, at most 48, such as 16 x 24"),
        ("tiny_sd3", (52, 16), "height x width is 52 x 16; .* must be a multiple of 4, at most 48, such as 48 x 16"),
        ("tiny_flux", (18, 1), "height x width is 18 x 1; .* must be a multiple of 4, such as 16 x 4"),
        ("tiny_zimage", 260, "resolution is 260; .* must be a multiple of 4, at most 256, such as 256"),
        ("tiny_flux2", 18, "resolution is 18; .* must be a multiple of 4, such as 16"),
        ("tiny_sana", (16, 9), "height x width is 16 x 9; .* must be a multiple of 2, such as 16 x 8"),
        ("tiny_qwen_image", 18, "resolution is 18; .* must be a multiple of 4, such as 16"),
    ],
)
def test_a_size_that_the_model_cannot_cut_is_refused_with_one_that_it_can(
    name: str, resolution: Resolution, message: str, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(request.getfixturevalue(name), resolution=resolution)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_schedule_with_a_terminal_snr_of_zero_is_sampled_as_in_diffusers(
    spacing: str, tiny_sd_v: Path, tmp_path: Path
) -> None:
    """Common Diffusion Noise Schedules and Sample Steps are Flawed (arXiv:2305.08891), with v-prediction."""
    folder = shutil.copytree(tiny_sd_v, tmp_path / "model")
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    edit_json(folder / "scheduler" / "scheduler_config.json", **changes)
    policy = policy_of(folder)
    assert (policy.schedule(4).alpha[0] == 0) == (spacing == "trailing")
    assert_close(images_of(policy), stock_images(pipeline_of(folder)), rtol=0, atol=2e-5)
    stock = pipeline_of(folder)
    assert_close(images_of(policy, guidance_scale=4.0), stock_images(stock, guidance_scale=4.0), rtol=0, atol=2e-5)
    schedule = policy.schedule(4)
    for eta in (0.0, 1.0):
        transition = transition_at(
            policy, policy.initial_noise(seeded(1), copies=2), torch.tensor([0, 1]), policy.encode(PROMPTS),
            sampler=Sampler(schedule, stochastic(schedule, eta=eta), 1.0),
        )  # fmt: skip
        assert transition.mean.isfinite().all()
        assert (transition.std > 0).all() == (eta > 0)


# --- models that cannot be trained --------------------------------------------------------------------


def test_a_missing_model_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no model folder './nowhere'"):
        load_policy("./nowhere", device=CPU)


def test_a_folder_that_is_not_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a diffusers pipeline: it has no model_index\.json"):
        load_policy(str(tmp_path), device=CPU)


def test_a_pipeline_of_an_unsupported_family_is_refused_with_those_that_are_supported(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(
        ValueError, match="is a KandinskyPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline"
    ):
        policy_of(tmp_path)


def test_an_sdxl_refiner_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    edit_json(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ValueError, match="SDXL refiner"):
        policy_of(folder)


def test_a_distilled_unet_is_refused(tiny_sdxl: Path) -> None:
    pipeline = pipeline_of(tiny_sdxl)
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="takes its guidance scale as an input"):
        as_policy(pipeline)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "predicts 'sample'"),
        ({"thresholding": True}, "sets thresholding"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            "there 'epsilon' says nothing about the image",
        ),
    ],
)
def test_schedulers_without_an_exact_log_probability_are_refused(
    tiny_sd_v: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(tiny_sd_v, tmp_path / "model")
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(ValueError, match=message):
        policy_of(folder)


def test_a_scheduler_without_betas_is_refused(tiny_sd_v: Path, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = shutil.copytree(tiny_sd_v, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler, has no beta schedule"):
        policy_of(folder)


def test_a_number_of_steps_that_the_schedule_does_not_allow_is_refused(tiny_sd: Path) -> None:
    with pytest.raises(ValueError, match="num_denoising_steps is 1001; it must be between 1 and 1000"):
        policy_of(tiny_sd).schedule(1001)


def test_a_folder_without_trained_weights_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no trained weights"):
        policy_of(tiny_sd, weights=tmp_path)
