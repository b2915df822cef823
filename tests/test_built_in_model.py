"""The toy models: small diffusers pipelines whose images are sharp and follow prompts poorly; their builders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.shapes.names import (
    TOY_FLOW_MODEL,
    TOY_FLOW_MODEL_FOLDER,
    TOY_MODEL,
    TOY_MODEL_FOLDER,
    TOY_PROMPTS,
    TOY_REWARD_MODELS,
    TOY_SIGN_MODEL,
    TOY_SIGN_MODEL_FOLDER,
    TOY_SIGN_PROMPTS,
)
from rlhf_t2i.shapes.oracle import oracle_scores, shows_something
from rlhf_t2i.shapes.scenes import all_scenes, render
from rlhf_t2i.shapes.sign_oracle import MIN_FIT, read_signs
from rlhf_t2i.shapes.signs import parse_sign
from rlhf_t2i.training.evaluation import Evaluation, evaluate, evaluation_set
from tests.policies import sampler_of
from tests.toys import CPU


@pytest.fixture(scope="module")
def base() -> DiffusionPolicy:
    return load_policy(TOY_MODEL, device=CPU)


@pytest.fixture(scope="module")
def flow() -> DiffusionPolicy:
    return load_policy(TOY_FLOW_MODEL, device=CPU)


def evaluated(policy: DiffusionPolicy, *, guidance_scale: float) -> Evaluation:
    """Evaluate a policy by the oracle, on 102 images of held-out prompts."""
    prompts, seeds = evaluation_set(load_prompts(TOY_PROMPTS, held_out=True), num_images=102, seed=5)
    sampler = sampler_of(policy, guidance_scale=guidance_scale, num_steps=8)
    return evaluate(policy, prompts, seeds, load_rewards("oracle_pass").rewards, sampler=sampler, microbatch_size=51)


def test_images_are_sharp_but_follow_prompts_poorly(base: DiffusionPolicy) -> None:
    evaluation = evaluated(base, guidance_scale=1.0)
    assert shows_something(evaluation.images).float().mean() >= 0.9
    assert 0.25 <= evaluation.scores["oracle_pass"].mean() <= 0.5


def test_the_model_of_words_writes_legible_signs_in_the_right_colours_and_misspells_many() -> None:
    policy = load_policy(TOY_SIGN_MODEL, device=CPU)
    prompts, seeds = evaluation_set(load_prompts(TOY_SIGN_PROMPTS, held_out=True), num_images=44, seed=5)
    sampler = sampler_of(policy, guidance_scale=1.0, num_steps=8)
    found = evaluate(policy, prompts, seeds, load_rewards("oracle_pass").rewards, sampler=sampler, microbatch_size=44)
    assert found.images.shape[2:] == (24, 80)
    assert 0.2 <= found.scores["oracle_pass"].mean() <= 0.6
    readings, asked = read_signs(found.images), [parse_sign(prompt) for prompt in prompts]
    assert np.mean([reading.fit >= MIN_FIT for reading in readings]) >= 0.8
    ink = [(r.sign.colour, r.sign.background) == (a.colour, a.background) for r, a in zip(readings, asked, strict=True)]
    assert np.mean(ink) >= 0.95


@pytest.mark.slow
def test_guidance_improves_prompt_following(base: DiffusionPolicy) -> None:
    """So the model does represent the prompt, and training can improve on it."""
    plain, guided = (evaluated(base, guidance_scale=scale).scores["oracle_pass"].mean() for scale in (1.0, 3.0))
    assert guided > plain + 0.1


@pytest.mark.slow
def test_images_of_the_flow_model_are_sharp_and_guidance_improves_prompt_following(flow: DiffusionPolicy) -> None:
    plain, guided = (evaluated(flow, guidance_scale=scale) for scale in (1.0, 3.0))
    assert shows_something(plain.images).float().mean() >= 0.8
    assert 0.2 <= plain.scores["oracle_pass"].mean() <= 0.5
    assert guided.scores["oracle_pass"].mean() > plain.scores["oracle_pass"].mean() + 0.1


def test_the_autoencoder_preserves_what_the_oracle_scores(base: DiffusionPolicy) -> None:
    rng = np.random.default_rng(3)
    scenes = [scene for scene in all_scenes("one") for _ in range(6)]
    images = render(scenes, rng=rng)
    with torch.no_grad():
        restored = base.decode(base.autoencoder.vae.encode(images * 2 - 1).latents)
    assert oracle_scores(restored, [scene.prompt for scene in scenes]).passed.float().mean() >= 0.98


def test_the_model_folders_are_small_and_hold_weights_and_configs_only() -> None:
    others = {*TOY_REWARD_MODELS.values(), TOY_FLOW_MODEL_FOLDER, TOY_SIGN_MODEL_FOLDER}
    files = [path for path in TOY_MODEL_FOLDER.rglob("*") if path.is_file() and others.isdisjoint(path.parents)]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in TOY_FLOW_MODEL_FOLDER.rglob("*") if path.is_file()) <= 6_000_000
    assert sum(path.stat().st_size for path in TOY_SIGN_MODEL_FOLDER.rglob("*") if path.is_file()) <= 4_000_000
    weights = [tensor for path in files if path.suffix == ".safetensors" for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {torch.float16}


def test_the_model_is_a_stable_diffusion_pipeline() -> None:
    index = json.loads((TOY_MODEL_FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_the_flow_model_is_a_z_image_pipeline_with_the_same_autoencoder() -> None:
    index = json.loads((TOY_FLOW_MODEL_FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "ZImagePipeline"
    assert index["transformer"] == ["diffusers", "ZImageTransformer2DModel"]
    one, other = (
        load_file(f / "vae" / "diffusion_pytorch_model.safetensors") for f in (TOY_MODEL_FOLDER, TOY_FLOW_MODEL_FOLDER)
    )
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_building_the_flow_model_is_deterministic_and_resumes(tmp_path: Path) -> None:
    from rlhf_t2i.shapes import build_flow

    sizes = {"num_misalign_updates": 1, "num_images": 16}
    build_flow.build_flow(tmp_path / "uninterrupted", num_flow_updates=2, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_flow, "corrupted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_flow.build_flow(tmp_path / "stopped", num_flow_updates=2, **sizes)
    build_flow.build_flow(tmp_path / "stopped", num_flow_updates=2, **sizes)
    uninterrupted, stopped = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("uninterrupted", "stopped")
    )
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in uninterrupted.items())


@pytest.mark.slow
def test_building_is_deterministic_and_resumes(tmp_path: Path) -> None:
    from rlhf_t2i.shapes import build

    sizes = {"num_autoencoder_updates": 3, "num_misalign_updates": 2, "num_images": 16}
    build.build(tmp_path / "uninterrupted", num_denoiser_updates=4, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "corrupted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build.build(tmp_path / "stopped", num_denoiser_updates=4, **sizes)
    build.build(tmp_path / "stopped", num_denoiser_updates=4, **sizes)
    uninterrupted, stopped = (
        load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("uninterrupted", "stopped")
    )
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, stopped[name]), name


def interrupted(*_: object) -> None:
    """Interrupt the build before its last stage."""
    raise KeyboardInterrupt
