"""Networks are loaded in the precision in which they are held, and let go when they are not needed."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from recipes import evaluate_policy
from rlhf_t2i.models import load, pipeline_parts
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.models.pipeline_parts import load_in_pieces
from rlhf_t2i.report.comparison import read_columns
from tests.policies import MODELS, PROMPTS, images_of, perturb, pipeline_of, policy_of, sampler_of
from tests.runs import REDNESS
from tests.toys import seeded
from tests.trained_weights import describe_run, lora_of

BF16 = torch.bfloat16


def tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_half_precision_networks_are_loaded_as_if_float32_ones_had_been_converted(model: Path) -> None:
    pipeline, policy = pipeline_of(model), policy_of(model, BF16)
    assert_close(tensors(policy.network), tensors(getattr(pipeline, policy.component).to(BF16)), rtol=0, atol=0)
    assert_close(tensors(policy.autoencoder.vae), tensors(pipeline.vae.to(BF16)), rtol=0, atol=0)
    names = [name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipeline, name, None)]
    for encoder, name in zip(policy.text_encoders, names, strict=True):
        parameters = {key: p.to(BF16) for key, p in getattr(pipeline, name).named_parameters()}
        assert_close(dict(encoder.model.named_parameters()), parameters, rtol=0, atol=0)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_a_denoiser_is_read_in_pieces_and_stays_float32_if_all_its_weights_are_trained(tiny_sd: Path) -> None:
    kind = type(policy_of(tiny_sd).network)
    assert load_in_pieces(kind, tiny_sd / "unet", BF16).dtype == BF16
    assert policy_of(tiny_sd, BF16, whole=True).network.dtype == torch.float32
    assert policy_of(tiny_sd, torch.float16).text_encoders[0].model.dtype == torch.float16


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd3"], indirect=True)
def test_the_reference_of_a_whole_model_is_smaller_in_half_precision_and_computes_the_same_bits(model: Path) -> None:
    policy = policy_of(model, BF16, whole=True)
    policy.set_trainable(None, keep_reference=True, seed=0)
    sizes = [sum(p.nbytes for p in network.parameters()) for network in (policy.network, policy.reference)]
    assert sizes[1] < 0.6 * sizes[0]
    assert not any(parameter.requires_grad for parameter in policy.reference.parameters())
    latents, level = policy.initial_noise(seeded(1), copies=2), sampler_of(policy).schedule.at(torch.tensor([1, 2]))
    with torch.no_grad():
        own = policy.predict(latents, level, policy.encode(PROMPTS), guidance_scale=4.0)
        with policy.as_reference():
            reference = policy.predict(latents, level, policy.encode(PROMPTS), guidance_scale=4.0)
    assert torch.equal(own.clean, reference.clean)


def test_a_lora_is_float32_on_a_half_precision_denoiser(tiny_sd: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_sd, BF16)
    policy.set_trainable(LoraConfiguration(2), keep_reference=False, seed=0)
    perturb(policy)
    policy.export(tmp_path, policy.trainable)
    loaded = policy_of(tiny_sd, BF16, weights=tmp_path)
    adapters = {name: p for name, p in loaded.network.named_parameters() if ".lora_" in name}
    assert_close(adapters, dict(policy.trainable), rtol=0, atol=0)
    assert_close(images_of(loaded), images_of(policy), rtol=0, atol=0)


def test_the_first_policy_is_let_go_before_the_second_is_loaded(
    tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier: list[weakref.ref[Any]] = []
    original = load.load_policy

    def loaded(*arguments: Any, **named: Any) -> DiffusionPolicy:
        assert all(network() is None for network in earlier)
        policy = original(*arguments, **named)
        earlier.append(weakref.ref(policy.network))
        return policy

    monkeypatch.setattr(load, "load_policy", loaded)
    options = {"model": str(tiny_sd), "weights": "base,base", "run_folder": str(tmp_path / "run")}
    options |= {"evaluation_prompts": "shapes", "evaluation_rewards": REDNESS, "num_evaluation_images": 2}
    options |= {"num_evaluation_steps": 2, "microbatch_size": 2, "guidance_scale": 1.0, "num_cpu_threads": 1}
    evaluate_policy.main(evaluate_policy.Config(**options))
    assert len(earlier) == 2


def test_an_evaluation_of_a_siblings_lora_says_and_records_both_bases(
    tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_of(tiny_sd, run := tmp_path / "run")
    describe_run(
        run, model=str(tiny_sd), resolution=16, guidance_scale=4.0, num_denoising_steps=50,
        evaluation_prompts="shapes", evaluation_rewards=REDNESS,
    )  # fmt: skip
    folder = tmp_path / "evaluation"
    config = evaluate_policy.Config(
        model=str(tiny_sd_v), weights=f"base,{run}", run_folder=str(folder), num_evaluation_images=2,
        num_evaluation_steps=2, microbatch_size=2, guidance_scale=1.0, num_cpu_threads=1,
    )  # fmt: skip
    table = evaluate_policy.main(config)
    assert table["base"] != table[str(run)]
    printed = capsys.readouterr().out
    assert f"{run} was trained on {tiny_sd}; its LoRA is loaded into another base, {tiny_sd_v}" in printed
    base, lora = read_columns(folder, name="evaluation")
    assert lora.metadata == base.metadata | {"LoRA of": str(tiny_sd), "loaded into": str(tiny_sd_v)}


def test_buffers_that_the_files_have_take_no_memory_until_they_are_read(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The positions of an SD 3 are computed in float32, larger than anything else that loading needs."""
    devices = list[str]()
    forget = pipeline_parts._forget_stored_buffers

    def noted(network: torch.nn.Module) -> None:
        forget(network)
        devices.extend(name for name, buffer in network.named_buffers() if not buffer.is_meta)

    monkeypatch.setattr(pipeline_parts, "_forget_stored_buffers", noted)
    kind: Any = diffusers.SD3Transformer2DModel
    loaded = load_in_pieces(kind, tiny_sd3 / "transformer", BF16)
    assert devices == []
    expected = kind.from_pretrained(tiny_sd3 / "transformer", dtype=BF16)
    assert torch.equal(loaded.pos_embed.pos_embed, expected.pos_embed.pos_embed)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
