"""LoRAs: their layers, DoRA and rsLoRA, and what their export gives in diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from rlhf_t2i.models import kohya
from rlhf_t2i.models.kohya import of_a_transformer
from rlhf_t2i.models.lora import LoraConfiguration, lora_dropout, set_lora_dropout, uses_dora
from rlhf_t2i.output.run_folder import KOHYA_LORA
from rlhf_t2i.settings.ddpo import Config
from tests.policies import LATEST, PROMPTS, images_of, perturb, pipeline_of, policy_of, stock_images
from tests.toys import seeded
from tests.trained_weights import checkpoint_of

FAMILIES = [
    "tiny_sd",
    "tiny_sdxl",
    "tiny_sd3",
    "tiny_flux",
    "tiny_zimage",
    *(pytest.param(name, marks=pytest.mark.slow) for name in LATEST),
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", ["attention_mlp", "all_linear"])
def test_an_exported_lora_of_more_layers_gives_the_same_images_in_diffusers(
    targets: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    policy, attention = policy_of(model), policy_of(model)
    endings = policy.target_layers(policy.network, targets)
    attention.set_trainable(LoraConfiguration(2), keep_reference=False, seed=0)
    policy.set_trainable(LoraConfiguration(2, targets=targets), keep_reference=False, seed=0)
    assert attention.trainable.keys() < policy.trainable.keys()
    for ending in endings:
        assert any(f"{ending}.lora_A.default.weight" in trained for trained in policy.trainable), ending
    perturb(policy)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(policy.export(tmp_path, policy.trainable))
    assert_close(stock_images(pipeline), images_of(policy), rtol=0, atol=5e-5)


def test_layers_are_chosen_by_the_endings_of_their_names(tiny_sd: Path) -> None:
    policy = policy_of(tiny_sd)
    policy.set_trainable(LoraConfiguration(2, targets="attn2.to_k, to_v"), keep_reference=False, seed=0)
    layers = {name.partition(".lora_")[0] for name in policy.trainable}
    assert {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in layers} == {
        "attn2.to_k", "attn1.to_v", "attn2.to_v",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"No layer of the denoiser ends with to_w; it has, for example, conv_in"):
        policy_of(tiny_sd).set_trainable(LoraConfiguration(2, targets="to_k,to_w"), keep_reference=False, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny_sd", "use_dora"), ("tiny_sd", "use_rslora"), ("tiny_sdxl", "use_rslora"), ("tiny_sd3", "use_dora")],
)
def test_an_exported_dora_or_rslora_gives_the_same_images_in_diffusers_and_when_loaded(
    kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    policy = policy_of(model)
    policy.set_trainable(LoraConfiguration(4, 6.0, **{kind: True}), keep_reference=False, seed=0)
    base = images_of(policy)
    perturb(policy)
    assert uses_dora(policy.network) == (kind == "use_dora")
    assert any("lora_magnitude_vector" in name for name in policy.trainable) == (kind == "use_dora")
    expected = images_of(policy)
    assert (expected - base).abs().max() > 1e-3
    with policy.as_reference():
        assert_close(images_of(policy), images_of(policy_of(model)), rtol=0, atol=0)
    folder = policy.export(tmp_path, policy.trainable)
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(folder)
    assert_close(stock_images(pipeline), expected, rtol=0, atol=5e-5)
    assert_close(images_of(policy_of(model, weights=folder)), expected, rtol=0, atol=5e-5)
    config = {"model": str(model), "lora_rank": 4, "lora_alpha": 6.0, "lora_targets": None}
    kinds = {"use_dora": False, "use_rslora": False, kind: True}
    checkpoint = checkpoint_of(policy.trainable, tmp_path / "run", **config, **kinds)
    assert_close(images_of(policy_of(model, weights=checkpoint)), expected, rtol=0, atol=5e-5)


def test_an_rslora_is_scaled_by_the_root_of_its_rank(tiny_sd: Path) -> None:
    scales = []
    for use_rslora in (False, True):
        policy = policy_of(tiny_sd)
        policy.set_trainable(LoraConfiguration(4, 6.0, use_rslora=use_rslora), keep_reference=False, seed=0)
        layer = next(module for module in policy.network.modules() if hasattr(module, "scaling"))
        scales.append(layer.scaling["default"])
    assert scales == [6 / 4, 6 / 2]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_a_lora_exported_in_kohyas_layout_gives_the_same_images_in_diffusers(
    name: str, use_rslora: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    """Of every layer of the U-Net that can have one."""
    policy = policy_of(model)
    layers = [name for name, part in policy.network.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    policy.set_trainable(
        LoraConfiguration(4, 6.0, targets=",".join(layers), use_rslora=use_rslora), keep_reference=False, seed=0
    )
    perturb(policy)
    policy.export(tmp_path, policy.trainable, kohya=True)
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / KOHYA_LORA))
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(tmp_path / KOHYA_LORA)
    assert_close(stock_images(pipeline), images_of(policy), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("tiny_flux", r"transformer_blocks\.\d+\.(attn|ff|norm1)|single.*(proj_out|norm\.linear)"),
        ("tiny_flux", r"transformer_blocks\.\d+\.attn\.to_[qv]"),
        pytest.param("tiny_flux2", "attention_mlp", marks=pytest.mark.slow),
        pytest.param("tiny_qwen_image", "all_linear", marks=pytest.mark.slow),
    ],
)
def test_a_lora_of_a_transformer_in_kohyas_layout_gives_the_same_images_in_diffusers(
    name: str, targets: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Layers that are one in the original models, of which some may be trained only."""
    model = request.getfixturevalue(name)
    policy = policy_of(model)
    if targets not in ("attention_mlp", "all_linear"):
        named = [
            n for n, part in policy.network.named_modules() if isinstance(part, nn.Linear) and re.match(targets, n)
        ]
        targets = ",".join(named)
    lora = LoraConfiguration(2, 6.0, targets=targets, use_rslora=True)
    policy.set_trainable(lora, keep_reference=False, seed=0)
    perturb(policy)
    policy.export(tmp_path, policy.trainable, kohya=True)
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / KOHYA_LORA))
    pipeline = pipeline_of(model)
    before = stock_images(pipeline)
    pipeline.load_lora_weights(tmp_path / KOHYA_LORA)
    assert_close(stock_images(pipeline), images_of(policy), rtol=0, atol=5e-5)
    assert (before - images_of(policy)).abs().max() > 1e-3


def test_flux_single_blocks_in_kohyas_layout_are_read_by_diffusers() -> None:
    """With the width of the real model, which diffusers' converter insists on."""
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    names = {f"single_transformer_blocks.3.{part}": count for part, count in rows.items()}
    network = SimpleNamespace(
        get_submodule=lambda name: SimpleNamespace(out_features=names[name], scaling={"default": 0.5})
    )
    generator = torch.Generator().manual_seed(0)
    for trained in (names, dict(list(names.items())[:3])):
        weights = {
            f"{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
            for name, count in trained.items()
            for side, shape in (("A", (2, 3072)), ("B", (count, 2)))
        }
        converted = of_a_transformer(network, weights, layers=kohya._LAYERS["FluxPipeline"])
        assert {name.partition(".")[0] for name in converted} == {"lora_unet_single_blocks_3_linear1"}
        found = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(converted)
        for name in trained:
            down, up = (found[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
            own = weights[f"{name}.lora_B.weight"][:8] @ weights[f"{name}.lora_A.weight"]
            assert_close(up[:8] @ down, 0.5 * own)


def test_kohyas_layout_is_refused_where_it_does_not_exist(
    tiny_sd: Path, tiny_sd3: Path, tiny_flux: Path, tmp_path: Path
) -> None:
    for model, options, message in (
        (tiny_sd3, {}, "a LoRA of Stable Diffusion 3 is .* only: diffusers does not read"),
        (tiny_sd, {"use_dora": True}, "it must be diffusers with a DoRA"),
        (tiny_flux, {"targets": "all_linear"}, r"the layer \S+ of FLUX\.1, .* attention or attention_mlp"),
    ):
        policy = policy_of(model)
        policy.set_trainable(LoraConfiguration(2, **options), keep_reference=False, seed=0)
        with pytest.raises(ValueError, match=f"export_format is both; .*{message}"):
            policy.export(tmp_path, policy.trainable, kohya=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True; it must be false: a LoRA is trained only with lora_rank"),
        ({"lora_targets": "to_q"}, "lora_targets is to_q; it must be null"),
        ({"lora_rank": 4, "lora_targets": ","}, "a preset or at least one name"),
        ({"lora_rank": 4, "use_dora": True, "lora_scale": 0.5}, "lora_scale is 0.5; it must be 1 with use_dora"),
        ({"init_lora": "x", "use_rslora": True}, "use_rslora is True; it must be false: the file of init_lora says it"),
        ({"export_format": "both"}, "export_format is both; it must be diffusers without a LoRA"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)  # type: ignore[arg-type]


def test_the_rank_of_a_lora_that_goes_on_is_its_own_whatever_the_familys_is() -> None:
    config = Config(model="StableDiffusionPipeline", prompts="p.txt", rewards="oracle", init_lora="runs/x")
    assert config.lora_rank is None
    assert config.trains_lora


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_acts_in_updates_only_and_is_drawn_from_a_seed(checkpointing: bool, tiny_sd: Path) -> None:
    policy = policy_of(tiny_sd)
    policy.set_trainable(LoraConfiguration(2), keep_reference=False, seed=0)
    perturb(policy)
    before = images_of(policy)
    set_lora_dropout(policy.network, 0.5)
    if checkpointing:
        policy.enable_gradient_checkpointing()
    latents, state = policy.initial_noise(seeded(1), copies=2), torch.get_rng_state()
    level, conditioning = policy.levels_at(torch.tensor([300, 600])), policy.encode(PROMPTS)

    def gradients(seed: int) -> torch.Tensor:
        with lora_dropout(policy.denoiser, seed=seed):
            policy.predict(latents, level, conditioning, guidance_scale=1.0).noise.square().mean().backward()
        found = torch.cat([weight.grad.flatten() for weight in policy.trainable.values() if weight.grad is not None])
        policy.network.zero_grad()
        return found

    first = gradients(1)
    assert_close(gradients(1), first, rtol=0, atol=0)
    assert (gradients(2) - first).abs().max() > 0
    assert_close(images_of(policy), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
