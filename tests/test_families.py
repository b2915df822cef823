"""Each family of models as a policy: it paints what the stock pipeline paints, and what it learnt leaves it whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import as_policy, family_of, load_policy
from rlhf_t2i.models.text_encoders import PromptCache
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.training.evaluation import evaluate
from rlhf_t2i.types import Conditioning, Sampler

CPU = torch.device("cpu")
PROMPTS = ["a red circle on a blue background", "a blue square on a red background"]
DIFFUSION = ["tiny_sdxl", "tiny_sdxl_v"]
FLOW = ["tiny_sd3", "tiny_sd3_lean", "tiny_flux", "tiny_schnell", "tiny_zimage"]
FAMILIES = [*DIFFUSION, *FLOW]
GUIDED = [(name, scale) for name in FAMILIES for scale in (1.0, 4.0) if (name, scale) != ("tiny_schnell", 4.0)]
SIZE = 16
"""Pixels; the tiny models' own size, but for FLUX, whose own is that of the real one."""


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def policy_of(folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionPolicy:
    return load_policy(str(folder), device=CPU, dtype=dtype, resolution=SIZE)


def pipeline_of(folder: Path) -> Any:
    """Plain diffusers, with the deterministic sampler that policies have."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    declared = json.loads((folder / "model_index.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(folder, **{n: None for n, p in declared.items() if p == [None, None]})
    if "beta_schedule" in pipeline.scheduler.config:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampler_of(
    policy: DiffusionPolicy, *, eta: float = 0.0, guidance_scale: float = 1.0, num_steps: int = 4
) -> Sampler:
    schedule = policy.schedule(num_steps)
    return Sampler(schedule, stochastic(schedule, eta=eta), guidance_scale)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def painted(policy: DiffusionPolicy, *, guidance_scale: float = 1.0, eta: float = 0.0) -> Tensor:
    sampler = sampler_of(policy, eta=eta, guidance_scale=guidance_scale)
    return evaluate(policy, PROMPTS, [7, 8], [], sampler=sampler, microbatch_size=2).images


def painted_by_diffusers(pipeline: Any, *, guidance_scale: float = 1.0, **settings: Any) -> Tensor:
    stock_scale = guidance_scale - 1 + family_of(type(pipeline).__name__).guidance_when_off
    return pipeline(
        list(PROMPTS), num_inference_steps=4, guidance_scale=stock_scale, generator=seeded(7, 8), output_type="pt",
        **{"height": SIZE, "width": SIZE, **settings},
    ).images  # fmt: skip


@torch.no_grad()
def move(policy: DiffusionPolicy) -> None:
    """As if it had learnt something."""
    generator = torch.Generator().manual_seed(3)
    for weight in policy.trainable.values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


# --- painting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "guidance_scale"), GUIDED, indirect=["model"])
def test_images_are_those_of_the_stock_pipeline(model: Path, guidance_scale: float) -> None:
    images = painted_by_diffusers(pipeline_of(model), guidance_scale=guidance_scale)
    assert images.std() > 0.01
    assert_close(painted(policy_of(model), guidance_scale=guidance_scale), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", DIFFUSION, indirect=True)
def test_so_they_are_with_the_noise_of_steps(model: Path) -> None:
    images = painted_by_diffusers(pipeline_of(model), eta=1.0)
    assert_close(painted(policy_of(model), eta=1.0), images, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch: just slower
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize(("model", "guidance_scale"), GUIDED, indirect=["model"])
def test_replaying_a_fresh_rollout_gives_ratio_one(
    model: Path, lora_rank: int | None, dtype: torch.dtype, guidance_scale: float
) -> None:
    """An unchanged policy assigns its own strokes the very density it recorded, even where a batch mixes steps."""
    policy = policy_of(model, dtype)
    policy.set_trainable(lora_rank, lora_alpha=None, keep_reference=False, seed=0)
    sampler = sampler_of(policy, eta=1.0, guidance_scale=guidance_scale)
    _, trajectory = rollout(policy, PROMPTS * 2, sampler=sampler, generators=seeded(1, 2), microbatch_size=4)
    image, step = (grid.flatten() for grid in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for rows in order.split(4):
        i, t = image[rows], step[rows]
        transition = transition_at(policy, trajectory.latents[i, t], t, trajectory.conditioning[i], sampler=sampler)
        replayed = mean_log_prob(transition, trajectory.latents[i, t + 1])
        assert_close(replayed, trajectory.log_probs[i, t], rtol=0, atol=0)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_a_pipeline_at_hand_paints_the_same(model: Path) -> None:
    pipeline = pipeline_of(model)
    policy = as_policy(pipeline, resolution=SIZE)
    assert policy.network is getattr(pipeline, policy.component)
    assert_close(painted(policy), painted(policy_of(model)), rtol=0, atol=0)


# --- what learns, and where it goes -----------------------------------------------------------------


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_the_reference_is_the_model_before_training(model: Path) -> None:
    for lora_rank in (None, 2):
        policy = policy_of(model)
        before = painted(policy)
        policy.set_trainable(lora_rank, lora_alpha=None, keep_reference=True, seed=0)
        move(policy)
        moved = painted(policy)
        with policy.as_reference():
            assert_close(painted(policy), before, rtol=0, atol=0)
        assert (moved - before).abs().max() > 1e-3
        assert_close(painted(policy), moved, rtol=0, atol=0)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_plain_diffusers_paints_with_an_exported_lora(model: Path, tmp_path: Path) -> None:
    """As the policy does; and so does a policy that takes it up."""
    policy = policy_of(model)
    policy.set_trainable(2, lora_alpha=6.0, keep_reference=False, seed=0)
    assert all(
        any(name.endswith(f"{target}.lora_A.default.weight") for name in policy.trainable)
        for target in policy.lora_targets
    )
    move(policy)
    policy.export(tmp_path, policy.trainable)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert_close(painted_by_diffusers(pipeline), painted(policy), rtol=0, atol=2e-5)
    assert_close(
        painted(load_policy(str(model), device=CPU, weights=tmp_path, resolution=SIZE)),
        painted(policy),
        rtol=0,
        atol=2e-5,
    )


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_plain_diffusers_paints_with_an_exported_denoiser(model: Path, tmp_path: Path) -> None:
    policy = policy_of(model)
    policy.set_trainable(None, lora_alpha=None, keep_reference=False, seed=0)
    move(policy)
    component = policy.export(tmp_path, policy.trainable).name
    pipeline = pipeline_of(model)
    trained = type(policy.network).from_pretrained(tmp_path / component)
    pipeline.register_modules(**{component: trained})
    assert_close(painted_by_diffusers(pipeline), painted(policy), rtol=0, atol=2e-5)
    assert_close(
        painted(load_policy(str(model), device=CPU, weights=tmp_path, resolution=SIZE)), painted(policy), rtol=0, atol=0
    )


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_latents_become_images_and_images_latents_as_in_diffusers(model: Path) -> None:
    policy = policy_of(model)
    latents = policy.initial_noise(seeded(1), copies=2)
    vae = pipeline_of(model).vae
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    with torch.no_grad():
        images = vae.decode(latents / scale + shift).sample / 2 + 0.5
        mean = (vae.encode(2 * images - 1).latent_dist.mean - shift) * scale
        assert_close(policy.decode(latents), images, rtol=0, atol=1e-5)
    assert policy.image_size == images.shape[-2:]
    assert_close(policy.encode_images(images), mean, rtol=0, atol=1e-5)


# --- what the network is told -----------------------------------------------------------------------


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_a_prompt_is_read_once(model: Path) -> None:
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


def test_text_encoders_are_on_the_device_only_while_they_read(tiny_sd3: Path) -> None:
    policy = policy_of(tiny_sd3)
    expected, policy = policy.encode(PROMPTS), policy_of(tiny_sd3)
    places: list[str] = []
    for encoder in policy.text_encoders:
        encoder.model.to = lambda device: places.append(str(device))
        encoder.model.register_forward_pre_hook(lambda *_: places.append("reads"))
    policy.device = torch.device("meta")  # in place of a GPU: its name is what is looked at
    policy.offload_text_encoders()
    policy.encode(PROMPTS)
    assert places == ["cpu"] * 3 + ["meta"] * 3 + ["reads"] * 6 + ["cpu"] * 3
    policy.device = torch.device("cpu")
    assert_close(policy.encode(PROMPTS).parts, expected.parts, rtol=0, atol=0)
    assert len(places) == 15


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


def test_sdxls_autoencoder_does_not_overflow_in_half_precision(tiny_sdxl: Path, tmp_path: Path) -> None:
    assert policy_of(tiny_sdxl, torch.float16).autoencoder.vae.dtype == torch.float32
    assert policy_of(tiny_sdxl, torch.bfloat16).autoencoder.vae.dtype == torch.bfloat16
    fixed = shutil.copytree(tiny_sdxl, tmp_path / "model")
    change(fixed / "vae" / "config.json", force_upcast=False)
    assert policy_of(fixed, torch.float16).autoencoder.vae.dtype == torch.float16


def test_sdxl_without_a_prompt_is_told_nothing_or_the_empty_one(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Guidance away from zeros is what SDXL base does; other models say that they read the empty prompt."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    change(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    images = painted_by_diffusers(pipeline_of(folder), guidance_scale=4.0)
    assert_close(painted(policy_of(folder), guidance_scale=4.0), images, rtol=0, atol=2e-5)
    assert (painted(policy_of(tiny_sdxl), guidance_scale=4.0) - images).abs().max() > 1e-4


def test_latents_with_a_mean_of_their_own_are_scaled_as_in_diffusers(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Playground v2.5, of SDXL's family."""
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    change(folder / "vae" / "config.json", latents_mean=[-1.6, 1.1, 3.3, -1.8], latents_std=[8.4, 5.9, 6.8, 5.5])
    policy = policy_of(folder)
    images = painted_by_diffusers(pipeline_of(folder))
    assert_close(painted(policy), images, rtol=0, atol=2e-5)
    vae, (mean, std) = policy.autoencoder.vae, torch.tensor([[-1.6, 1.1, 3.3, -1.8], [8.4, 5.9, 6.8, 5.5]])
    encoded = vae.encode(2 * images - 1).latent_dist.mean
    expected = (encoded - mean[:, None, None]) * vae.config.scaling_factor / std[:, None, None]
    assert_close(policy.encode_images(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_the_calls_of_the_denoiser_are_counted_right(model: Path) -> None:
    """Images that went through it, for one prediction with guidance: twice as many unless it is told the scale."""
    policy, rows = policy_of(model), list[int]()
    policy.network.register_forward_pre_hook(
        lambda _, given, named: rows.append(len(named.get("hidden_states", given[0] if given else None))),
        with_kwargs=True,
    )
    for guidance_scale in (1.0,) if "schnell" in str(model) else (1.0, 4.0):
        rows.clear()
        sampler = sampler_of(policy, guidance_scale=guidance_scale)
        with torch.no_grad():
            transition_at(
                policy, policy.initial_noise(seeded(0), copies=2), torch.tensor([0, 1]), policy.encode(PROMPTS),
                sampler=sampler,
            )  # fmt: skip
        assert sum(rows) == 2 * policy.num_calls(guidance_scale)


def test_flux_takes_latents_as_the_stock_pipeline_packs_them(tiny_flux: Path) -> None:
    from rlhf_t2i.models.flux import packed, unpacked

    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline_of(tiny_flux)._pack_latents(latents, 2, 4, 6, 8)
    assert_close(packed(latents), expected, rtol=0, atol=0)
    assert_close(unpacked(expected, 6, 8), latents, rtol=0, atol=0)


def test_flux_paints_as_large_as_the_stock_pipeline_if_it_is_not_told(tiny_flux: Path) -> None:
    pipeline = pipeline_of(tiny_flux)
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    assert load_policy(str(tiny_flux), device=CPU).image_size == (size, size)


def test_a_model_without_guidance_refuses_it(tiny_schnell: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale is 4\.0; this model \(FLUX.1 schnell\) has no guidance"):
        painted(policy_of(tiny_schnell), guidance_scale=4.0)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- models that cannot be trained ------------------------------------------------------------------


def test_a_pipeline_of_an_unknown_family_is_refused_with_those_that_work(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(
        ValueError, match="is a KandinskyPipeline; supported are StableDiffusionPipeline, StableDiffusionXLPipeline"
    ):
        policy_of(tmp_path)


def test_a_refiner_is_refused(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    change(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ValueError, match="SDXL refiner"):
        policy_of(folder)


def test_a_distilled_unet_is_refused(tiny_sdxl: Path) -> None:
    pipeline = pipeline_of(tiny_sdxl)
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="takes its guidance scale as an input"):
        as_policy(pipeline)


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
def test_images_of_another_size_are_those_of_the_stock_pipeline(model: Path) -> None:
    policy = load_policy(str(model), device=CPU, resolution=8)
    assert policy.image_size == (8, 8)
    images = painted_by_diffusers(pipeline_of(model), height=8, width=8)
    assert_close(painted(policy), images, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "multiple"), [("tiny_sdxl", 2), ("tiny_sd3", 4)])
def test_a_size_that_no_latents_have_is_refused(name: str, multiple: int, request: pytest.FixtureRequest) -> None:
    with pytest.raises(ValueError, match=f"resolution is 9; for this model it must be a multiple of {multiple}"):
        load_policy(str(request.getfixturevalue(name)), device=CPU, resolution=9)
