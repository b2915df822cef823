"""Trained weights loaded into a model: every layout that diffusers reads, and none that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.models.lora import LoraConfiguration
from tests.policies import images_of, perturb, pipeline_of, policy_of, stock_images
from tests.trained_weights import checkpoint_of, denoiser_of, describe_run, in_kohyas_layout, lora_of

# --- a LoRA that does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "other"),
    [
        ("tiny_sd", "tiny_sd3"), ("tiny_sd", "tiny_sdxl"), ("tiny_sd3", "tiny_sd"), ("tiny_sdxl", "tiny_sd"),
        ("tiny_sd3", "tiny_flux"), ("tiny_flux", "tiny_zimage"),
    ],
)  # fmt: skip
def test_a_lora_of_another_model_is_refused_by_name(
    trained: str, other: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    file = lora_of(request.getfixturevalue(trained), tmp_path)
    model = request.getfixturevalue(other)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        policy_of(model, weights=tmp_path)
    message = str(caught.value)
    assert str(file) in message
    assert str(model) in message
    assert "\n" not in message


def changed(file: Path, name: str, weight: Tensor | None) -> str:
    """Replace, add or remove (None) a weight of a LoRA whose name ends with `name`; return its full name."""
    weights = load_file(file)
    full = next((key for key in weights if key.endswith(name)), name)
    weights.pop(full, None)
    save_file({**weights, **({} if weight is None else {full: weight})}, file)
    return full


def test_a_lora_with_one_weight_of_another_shape_or_layer_is_refused_with_the_weight(
    tiny_sd: Path, tmp_path: Path
) -> None:
    file = lora_of(tiny_sd, tmp_path / "shape")
    changed(file, "attn2.to_k.lora_A.weight", torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"1 find no layer of their shape \(down_blocks.*attn2\.to_k\.lora_A\.weight"):
        policy_of(tiny_sd, weights=file)
    file = lora_of(tiny_sd, tmp_path / "layer")
    changed(file, "unet.down_blocks.9.to_k.lora_A.weight", torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"\(down_blocks\.9\.to_k\.lora_A\.weight\)"):
        policy_of(tiny_sd, weights=file)
    file = lora_of(tiny_sd, tmp_path / "part")
    changed(file, "controlnet.to_k.lora_A.weight", torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"\(controlnet\.to_k\.lora_A\.weight\)"):
        policy_of(tiny_sd, weights=file)


def test_a_lora_that_lacks_half_of_a_layer_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path)
    changed(file, "attn2.to_k.lora_B.weight", None)
    with pytest.raises(ValueError, match=r"is incomplete: .*attn2\.to_k has one of lora_A and lora_B only"):
        policy_of(tiny_sd, weights=file)


@pytest.mark.parametrize(
    ("name", "kind"), [("x.dora_scale", "a DoRA in Kohya's layout"), ("x.lokr_w1", "a LoKr"), ("x.hada_w1_a", "a LoHa")]
)
def test_an_adapter_that_diffusers_would_ignore_in_part_is_refused(
    name: str, kind: str, tiny_sd: Path, tmp_path: Path
) -> None:
    save_file({name: torch.zeros(1), "x.lora": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=f"is {kind}, which is not supported"):
        policy_of(tiny_sd, weights=tmp_path)


def test_a_damaged_lora_is_named(tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors' are damaged"):
        policy_of(tiny_sd, weights=tmp_path)


# --- layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_a_lora_in_kohyas_layout_gives_the_same_images_as_in_diffusers(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    file = in_kohyas_layout(lora_of(model, tmp_path / "run", rank=4), tmp_path / "kohya.safetensors", alphas=[2.0])
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(file)
    expected = stock_images(pipeline)
    assert (expected - stock_images(pipeline_of(model))).abs().max() > 1e-4
    assert_close(images_of(policy_of(model, weights=file)), expected, rtol=0, atol=2e-5)


def test_each_layer_of_a_lora_in_kohyas_layout_has_its_own_alpha(tiny_sd: Path, tmp_path: Path) -> None:
    file = in_kohyas_layout(lora_of(tiny_sd, tmp_path, rank=4), tmp_path / "kohya.safetensors", alphas=[4.0, 2.0, 1.0])
    weights = load_file(file)
    scaled = {
        key: weight * weights[key.replace("lora_up.weight", "alpha")] / 4 if "lora_up" in key else weight
        for key, weight in weights.items()
    }
    at_full = {key: torch.tensor(4.0) if key.endswith("alpha") else weight for key, weight in scaled.items()}
    save_file(at_full, tmp_path / "scaled.safetensors")
    expected = images_of(policy_of(tiny_sd, weights=tmp_path / "scaled.safetensors"))
    assert_close(images_of(policy_of(tiny_sd, weights=file)), expected, rtol=0, atol=1e-6)


def test_a_lora_of_the_text_encoder_too_is_loaded_whole_or_refused(tiny_sd: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_sd, tmp_path)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    [generator] = [torch.Generator().manual_seed(0)]
    changed(file, f"{layer}.down.weight", torch.randn(2, 16, generator=generator))
    changed(file, f"{layer}.up.weight", torch.randn(16, 2, generator=generator))
    # Our metadata describes the U-Net only, so the file gets none.
    save_file(load_file(file), file)
    pipeline = pipeline_of(tiny_sd)
    pipeline.load_lora_weights(file)
    expected, loaded = stock_images(pipeline), images_of(policy_of(tiny_sd, weights=file))
    assert_close(loaded, expected, rtol=0, atol=2e-5)
    changed(file, f"{layer.replace('layers.0', 'layers.9')}.down.weight", torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"does not fit .* \(text_encoder\.text_model"):
        policy_of(tiny_sd, weights=file)


# --- denoisers, checkpoints and runs of another model -------------------------------------------------


@pytest.mark.parametrize(("trained", "other"), [("tiny_sd", "tiny_sdxl"), ("tiny_sdxl", "tiny_sd")])
def test_a_denoiser_of_another_model_is_refused_with_its_weights(
    trained: str, other: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = denoiser_of(request.getfixturevalue(trained), tmp_path)
    with pytest.raises(ValueError, match=r"denoiser .* does not fit the model .*weights") as caught:
        policy_of(request.getfixturevalue(other), weights=tmp_path)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_denoiser_of_another_class_is_refused(tiny_sd: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    folder = denoiser_of(tiny_sd3, tmp_path)
    with pytest.raises(ValueError, match="it is a SD3Transformer2DModel, not a UNet2DConditionModel"):
        policy_of(tiny_sd, weights=folder)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_checkpoint_that_does_not_fit_is_refused(lora_rank: int | None, tiny_sd: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_sd)
    policy.set_trainable(LoraConfiguration(lora_rank) if lora_rank else None, keep_reference=False, seed=0)
    perturb(policy)
    weights = {name: weight.detach() for name, weight in policy.trainable.items()}
    config = {"model": str(tiny_sd), "lora_rank": lora_rank, "lora_alpha": None}
    whole = checkpoint_of(weights, tmp_path / "whole", **config)
    assert_close(images_of(policy_of(tiny_sd, weights=whole)), images_of(policy), rtol=0, atol=0)
    first = next(iter(weights))
    cut = {name: weight for name, weight in weights.items() if name != first}
    with pytest.raises(ValueError, match=f"it lacks 1 of the model's .* weights .{first}"):
        policy_of(tiny_sd, weights=checkpoint_of(cut, tmp_path / "cut", **config))
    wide = {**weights, first: torch.zeros(99)}
    with pytest.raises(ValueError, match=f"have another shape there .{first}"):
        policy_of(tiny_sd, weights=checkpoint_of(wide, tmp_path / "wide", **config))


def test_a_lora_of_a_run_fits_a_sibling_of_its_base_and_is_refused_by_its_layers_elsewhere(
    tiny_sd: Path, tiny_sd_v: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    policy = policy_of(tiny_sd)
    policy.set_trainable(LoraConfiguration(2), keep_reference=False, seed=0)
    perturb(policy)
    file = policy.export(tmp_path, policy.trainable)
    weights = {name: weight.detach() for name, weight in policy.trainable.items()}
    checkpoint = checkpoint_of(weights, tmp_path, model=str(tiny_sd), lora_rank=2, lora_alpha=None)
    pipeline = pipeline_of(tiny_sd_v)
    pipeline.load_lora_weights(file)
    for source in (tmp_path, checkpoint):
        assert_close(images_of(policy_of(tiny_sd_v, weights=source)), stock_images(pipeline), rtol=0, atol=2e-5)
        with pytest.raises(ValueError, match=r"does not fit the model .*sdxl.*attn2"):
            policy_of(tiny_sdxl, weights=source)


def test_all_weights_of_another_model_are_refused_with_both_names_and_a_lora_of_them_too(
    tiny_sd: Path, tiny_sd_v: Path, tmp_path: Path
) -> None:
    whole, lora = tmp_path / "whole", tmp_path / "lora"
    denoiser = denoiser_of(tiny_sd, whole)
    stored = {"x": torch.zeros(1)}
    checkpoint = checkpoint_of(stored, whole, model=str(tiny_sd), lora_rank=None, lora_alpha=None)
    lora_of(tiny_sd, lora)
    describe_run(lora, model=str(tiny_sd), init_weights=str(whole))
    for weights in (whole, checkpoint, lora):
        with pytest.raises(ValueError, match="trained the model") as caught:
            policy_of(tiny_sd_v, weights=weights)
        assert repr(str(tiny_sd)) in str(caught.value)
        assert repr(str(tiny_sd_v)) in str(caught.value)
    policy_of(tiny_sd_v, weights=denoiser)
