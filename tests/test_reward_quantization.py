"""Reward models on a language model in 8 or 4 bits: what is rounded, what learns, and what is saved."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from recipes import evaluate_reward_model, train_reward_model
from reward_model.backbones.load import LORA_TARGETS, load_backbone
from reward_model.checkpoint import WEIGHTS_NAME, load_reward_model
from reward_model.model import RewardModel, last_real_token
from reward_model.quantization import Quantization
from rlhf_t2i.plan.reward_training import rehearse
from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.shapes.names import TOY_BACKBONE_FOLDER, TOY_REWARD_MODEL_FOLDER
from rlhf_t2i.shapes.scenes import parse_prompt, render
from tests.reward_models import ALL_FAMILIES, backbone_folder, config_of, random_image
from tests.test_reward_training import command, data, run, trained_weights  # noqa: F401  # data is a fixture

KINDS: list[Quantization] = ["int8", "nf4"]
QUANTIZED = "(quantization='int8')"
PROMPTS = ["a red fox", "a blue cat"]


def inputs_of(model: RewardModel) -> dict[str, Tensor]:
    images = [random_image(56, 56, seed=seed) for seed in range(2)]
    return model.backbone.prepare(images, PROMPTS)


def is_quantized(parameter: nn.Parameter) -> bool:
    return type(parameter) is not nn.Parameter


# --- what is rounded and what learns -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llava", "int8"), ("qwen2_5_vl", "nf4"),
        *(pytest.param(f, k, marks=pytest.mark.slow) for f, k in zip(ALL_FAMILIES[1:], KINDS * 2, strict=True)),
    ],
)  # fmt: skip
def test_only_the_language_models_layers_are_rounded_and_every_adapter_learns(family: str, kind: Quantization) -> None:
    model = RewardModel(load_backbone(str(backbone_folder(family)), quantization=kind))
    model.add(config_of(family))
    model.set_trainable()
    rounded = {name for name, p in model.model.named_parameters() if is_quantized(p)}
    language = {f"{n}.base_layer.weight" for n, m in model.model.named_modules() if isinstance(m, LoraLayer)}
    assert rounded == language
    assert {name.split(".")[-3] for name in rounded} <= set(LORA_TARGETS)
    trained = [p for named in model.groups(model.active).values() for p in named.values()]
    assert {p.dtype for p in trained} == {torch.float32}
    for name, parameter in model.model.named_parameters():  # a gradient reaches A once B is not zero
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.train()
    model(**inputs_of(model)).sum().backward()
    lora = model.groups(model.active)["lora"]
    unmoved = [name for name, p in lora.items() if p.grad is None or not p.grad.any()]
    assert unmoved == []


DRAWN = ["a red circle on a blue background", "two green squares on a red background"] * 4


def drawings() -> Tensor:
    return render([parse_prompt(prompt) for prompt in DRAWN], rng=np.random.default_rng(0))


def test_states_of_the_toy_backbone_change_by_thousandths_in_8_bits_and_by_hundredths_in_4() -> None:
    """The norm of the difference over that of the last token's states."""
    states = {}
    for kind in (None, *KINDS):
        backbone = load_backbone(str(TOY_BACKBONE_FOLDER), quantization=kind)
        with torch.no_grad():
            output = backbone.forward(backbone.prepare(list(drawings()), DRAWN))
        states[kind] = last_real_token(output.hidden, output.hidden_mask)
    errors = [float((states[kind] - states[None]).norm() / states[None].norm()) for kind in KINDS]
    assert 1e-4 < errors[0] < 0.03 < errors[1] < 0.3


def test_scores_of_the_built_in_reward_model_stay_close() -> None:
    name = f"llava_reward:{TOY_REWARD_MODEL_FOLDER}"
    exact, rounded = (load_reward(f"{name}{options}")(drawings(), DRAWN[::-1]) for options in ("", QUANTIZED))
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.std()


def test_evaluation_holds_a_llava_reward_in_8_bits_and_refuses_it_for_others() -> None:
    machine: Any = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
    model: Any = evaluate_reward_model.load_reward(evaluate_reward_model.Config(quantization="int8"), machine)
    assert any(is_quantized(p) for p in model.model.backbone.language_model.parameters())
    with pytest.raises(ValueError, match="quantization is int8; it must be null for 'clip:a-clip'"):
        evaluate_reward_model.load_reward(
            evaluate_reward_model.Config(quantization="int8", reward="clip:a-clip"), machine
        )


# --- runs ---------------------------------------------------------------------------------------------


def run_config(data: Path, folder: Path, **options: Any) -> train_reward_model.Config:  # noqa: F811
    small = {
        "backbone": str(backbone_folder("llava")), "train_data": str(data / "pairs.jsonl"),
        "validation_data": str(data / "pairs.jsonl"), "lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-2,
        "microbatch_size": 4, "accumulation_steps": 1, "num_steps": 4, "evaluate_every": 2, "patience": 0,
        "num_cpu_threads": 1, "quantization": "int8", "run_folder": str(folder),
    }  # fmt: skip
    return train_reward_model.Config(**small | options)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("int8", "bf16"), ("nf4", "no")])
def test_a_resume_is_exact_and_the_adapter_is_an_ordinary_one(
    data: Path,  # noqa: F811
    tmp_path: Path,
    kind: Quantization,
    precision: str,
) -> None:
    """It holds float32 tensors of the names and shapes of any other, and loads over plain and over rounded weights."""
    whole = train_reward_model.main(run_config(data, tmp_path / "whole", quantization=kind, mixed_precision=precision))
    stopped = run_config(data, tmp_path / "stopped", quantization=kind, mixed_precision=precision)
    train_reward_model.main(stopped.with_options(num_steps=2))
    resumed = train_reward_model.main(stopped.with_options(resume=True))
    found, expected = (load_file(folder / WEIGHTS_NAME) for folder in (resumed, whole))
    assert_close(found, expected, rtol=0, atol=0)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    plain, rounded = (load_reward_model(whole, quantization=each) for each in (None, kind))
    assert not any(is_quantized(p) for p in plain.model.parameters())
    scores = [model(**inputs_of(model)).detach() for model in (plain, rounded)]
    assert_close(scores[0], scores[1], rtol=0.3, atol=0.3)
    with pytest.raises(ValueError, match="quantization"):
        train_reward_model.main(stopped.with_options(resume=True, quantization=None))


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(data: Path, tmp_path: Path) -> None:  # noqa: F811
    """DDP does not exchange the rounded weights, which each process has loaded."""
    same = {"quantization": "int8", "lora_dropout": 0.0, "num_steps": 3, "evaluate_every": 3, "learning_rate": 1e-3}
    run(command(data, tmp_path / "one", accumulation_steps=2, **same))
    run(command(data, tmp_path / "two", processes=2, **same))
    one, two = trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two")
    assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_what_is_saved_is_planned() -> None:
    """Of a linear layer in bfloat16 int8 keeps half and three bytes of scales a row, nf4 a half and 4 / 64 bytes."""
    config = train_reward_model.Config(
        backbone=str(backbone_folder("llava")), train_data="missing.jsonl", microbatch_size=2, accumulation_steps=1,
        lora_rank=4, num_cpu_threads=1, mixed_precision="bf16", dry_run_image_side=28,
    )  # fmt: skip
    layers = [
        module.weight
        for module in load_backbone(str(backbone_folder("llava"))).language_model.modules()
        if type(module) is nn.Linear
    ]
    size, rows = sum(weight.numel() for weight in layers), sum(len(weight) for weight in layers)
    kept = {None: 2 * size, "int8": size + 3 * rows, "nf4": size / 2 + size / 16}
    plans = {kind: rehearse(train_reward_model.main, config.with_options(quantization=kind)) for kind in kept}
    for kind, plan in plans.items():
        less = kept[None] - kept[kind]
        assert plan.parts["language model"][2] == plans[None].parts["language model"][2] - less
        assert plan.peak == plans[None].peak - less


# --- refusals -----------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = run_config(data, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        for command in (train_reward_model.main, lambda config: rehearse(train_reward_model.main, config)):
            with pytest.raises(ValueError, match="quantization is int8; with DeepSpeed, which exchanges plain weights"):
                command(config)
    name = f"llava_reward:{TOY_REWARD_MODEL_FOLDER}"
    with pytest.raises(ValueError, match="cannot be merged into weights of 8 or 4 bits"):
        load_reward(f"{name}(quantization='int8', merge=True)")
    with pytest.raises(ValueError, match="quantization is 'int4'; it must be 'int8', 'nf4' or None"):
        load_reward(f"{name}(quantization='int4')")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs: pip install 'rlhf-t2i\[quant\]'"):
        train_reward_model.main(config)
