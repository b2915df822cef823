"""`--dry_run` of reward training: a plan says of a step what a real one does, and full sizes are planned."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes import train_reward_model
from reward_model.progress import Progress
from reward_model.training import RewardModelTrainer
from rlhf_t2i.config import parse_config
from rlhf_t2i.plan import make_plan
from rlhf_t2i.plan.backbones import backbone_files, build_backbone, published_backbones
from rlhf_t2i.plan.reward_training import prompt_of, rehearse
from rlhf_t2i.plan.rewards import PARAMETERS
from rlhf_t2i.plan.text import plan_text
from rlhf_t2i.shapes.names import TOY_BACKBONE
from tests.reward_models import backbone_folder
from tests.test_reward_training import data  # noqa: F401  # a fixture

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
QWEN_7B = "Qwen/Qwen2.5-VL-7B-Instruct"


def config_of(family: str = "llava", **options: Any) -> train_reward_model.Config:
    source = TOY_BACKBONE if family == TOY_BACKBONE else str(backbone_folder(family))
    small = {
        "backbone": source, "train_data": "missing.jsonl", "microbatch_size": 2, "accumulation_steps": 3,
        "lora_rank": 4, "num_cpu_threads": 1, "dry_run_image_side": 56, "max_validation_records": 8,
        "evaluate_every": 2,
    }  # fmt: skip
    return train_reward_model.Config(**small | options)


# --- against a real step --------------------------------------------------------------------------


def counted_step(config: train_reward_model.Config, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Run the recipe for one step; return the FLOPs of torch's own counter, and the number of steps of the run."""
    flops, steps = list[int](), list[int]()
    step = RewardModelTrainer.training_step

    def counted(trainer: Any, *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            loss = step(trainer, *args)
        flops.append(counter.get_total_flops())
        return loss

    def stop(_: Any, args: Any, state: Any, control: Any, **parts: Any) -> None:
        steps.append(state.max_steps)
        raise InterruptedError

    monkeypatch.setattr(RewardModelTrainer, "training_step", counted)
    monkeypatch.setattr(Progress, "on_step_end", stop)
    with pytest.raises(InterruptedError):
        train_reward_model.main(config)
    return sum(flops), steps[0]


def test_flops_and_steps_are_those_of_a_real_run(
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the toy backbone, where all images have 16 tokens, with prompts as long as the plan's."""
    pair = {"prompt": prompt_of(60), "winner": "bright0.png", "loser": "dark0.png"}
    for name, count in (("train", 22), ("validation", 4)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(pair)}\n" * count)
    config = config_of(
        TOY_BACKBONE, train_data=str(tmp_path / "train.jsonl"), validation_data=str(tmp_path / "validation.jsonl"),
        image_root=str(data), num_epochs=2, microbatch_size=4, accumulation_steps=2, run_folder=str(tmp_path / "run"),
    )  # fmt: skip
    plan = rehearse(train_reward_model.main, config)
    flops, steps = counted_step(config, monkeypatch)
    assert plan.num_steps == steps == 6  # 22 pairs are 6 batches, and these 3 steps
    assert plan.counts["update"].flops == flops > 0
    assert plan.images == 16


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2_5_vl", {"gradient_checkpointing": True}),
        *(
            pytest.param(family, options, marks=pytest.mark.slow)
            for family, options in {
                "llava": {"loss": "cross_entropy"}, "llava_next": {"loss": "general_preference"},
                "phi3_v": {"mixed_precision": "bf16"}, "qwen3_vl": {"readout": "prompt_likelihood"},
            }.items()
        ),
    ],
)  # fmt: skip
def test_a_plan_counts_what_a_real_step_does(family: str, options: dict[str, Any]) -> None:
    config = config_of(family, **options)
    plan, real = (rehearse(train_reward_model.main, config, fake=fake) for fake in (True, False))
    assert plan.flops == pytest.approx(real.flops)
    assert plan.parts == real.parts
    assert plan.peaks == pytest.approx(real.peaks, rel=0.03)
    again = rehearse(train_reward_model.main, config, repeats=True)
    assert (again.flops, again.peak) == (pytest.approx(plan.flops), pytest.approx(plan.peak, rel=0.02))


def test_fp16_is_planned_with_a_backbone_in_float32() -> None:
    plans = {each: rehearse(train_reward_model.main, config_of(mixed_precision=each)) for each in ("bf16", "fp16")}
    sizes = {each: plan.parts["language model"][2] for each, plan in plans.items()}
    assert sizes["fp16"] == 2 * sizes["bf16"] == plans["bf16"].parts["language model"][1] * 4


# --- launches and data ------------------------------------------------------------------------------


def test_zero_holds_a_part_of_the_optimiser_and_ddp_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained weight has two float32 moments, and under ZeRO a float32 copy; a bucket of gradients is 2 GB."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    ddp = rehearse(train_reward_model.main, config_of())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    zero = rehearse(train_reward_model.main, config_of())
    trained = sum(learned for learned, _, _ in ddp.parts.values())
    assert (ddp.mode, zero.mode, ddp.images, zero.images) == ("ddp", "zero2", 48, 48)
    assert ddp.state == {"gradients": 4 * trained, "optimizer": 8 * trained, "buffers": 4 * trained}
    assert zero.state["optimizer"] == pytest.approx(12 / 4 * trained)
    assert zero.peaks["update"] - ddp.peaks["update"] == pytest.approx(2e9, rel=0.01)


def test_hours_are_for_1000_steps_if_the_data_are_elsewhere() -> None:
    config = config_of(TOY_BACKBONE, microbatch_size=8, train_data="s3://bucket/pairs.jsonl")
    before = dict(os.environ)
    plan = rehearse(train_reward_model.main, config)
    assert dict(os.environ) == before
    text = plan_text(plan, config)
    assert "hours for 1,000 steps" in text
    assert "s3://bucket/pairs.jsonl is not here to be counted" in text
    assert "24 pairs, 16 visual tokens to an image" in text
    rest = plan.peak - sum(size for _, _, size in plan.parts.values()) - sum(plan.state.values())
    assert f"activations and batches {rest / 1e9:.2f} GB at the peak" in text
    assert rest > 0.02e9
    assert "an assumption: reward training was not measured" in text
    assert rehearse(train_reward_model.main, replace(config, num_steps=70)).num_steps == 70


# --- full size -----------------------------------------------------------------------------------------


PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072, "llava-hf/llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032, "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    **{name: count for name, count in PARAMETERS.items() if name.startswith(("Qwen", "microsoft"))},
}  # fmt: skip
"""Parameters of the published weights."""
LEFT_OUT = {"microsoft/Phi-3.5-vision-instruct": 32_064 * 3072 + 12_596_224}
"""The language-model head and the last layer of the tower, which are not loaded."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbones_have_their_published_sizes(name: str, tmp_path: Path) -> None:
    source = backbone_files(name, tmp_path / "backbone")
    model = build_backbone(str(source), dtype=torch.bfloat16, empty=partial(torch.empty, device="meta"))
    assert sum(p.numel() for p in model.parameters()) + LEFT_OUT.get(name, 0) == PUBLISHED[name]
    assert PUBLISHED.keys() == published_backbones().keys()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("reward_*.yaml")), ids=lambda path: path.stem)
def test_a_config_can_be_planned_at_full_size(path: Path) -> None:
    config = parse_config(train_reward_model.Config, arguments=["--config", str(path)])
    plan = make_plan(train_reward_model.main, config)
    own = {name: learned for name, (learned, _, _) in plan.parts.items() if learned}
    of_readout = {"SkipCA", "head"} if config.readout == "last_token" else set[str]()
    assert own.keys() == {"LoRA", "projector", *of_readout}
    if config.backbone == QWEN_7B:
        assert sum(frozen for _, frozen, _ in plan.parts.values()) + own["projector"] == PARAMETERS[QWEN_7B]
        assert own["SkipCA"] == 3 * 3584**2 + 3584
        assert 24e9 < plan.peak < 48e9  # the paper trains on 48 GB
        assert plan.images == (32 if path.stem.endswith("safety") else 64)


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "somebody/model"}, "The sizes of the backbone 'somebody/model' are not known here, only those"),
        ({"max_pixels": 100_000}, "max_pixels does not apply to LLaVA-1.5, only to Qwen2.5-VL and Qwen3-VL"),
        ({"backbone": str(CONFIGS)}, "has no config.json with a model_type"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        rehearse(train_reward_model.main, config_of(**options))


def test_fsdp_is_refused_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP does not train reward models"):
        rehearse(train_reward_model.main, config_of())
