"""Short trainings by every recipe that two processes share, and the distribution strategies under which they run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recipes import diffusion_dpo, diffusion_nft, draft, flow_grpo
from rlhf_t2i.settings.groups import TrainerConfig
from tests.launch import small_ddpo
from tests.runs import as_for_toy_models, redness

MODES = ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
_SHARDED = ("deepspeed_zero3", "fsdp2")
MODES_OF: dict[str, Sequence[str]] = {
    "ddpo": MODES,
    "ddpo on weights in 8 bits": ("ddp",),
    "ddpo, full denoiser": ("ddp",),
    "ddpo, full denoiser gathered layer by layer": _SHARDED,
    "ddpo from a LoRA": _SHARDED,
    "ddpo with NaN gradients on one process": ("ddp", "deepspeed_zero2", *_SHARDED),  # ZeRO-1 skips as ZeRO-2 does
    "ddpo with too little memory on one process": ("ddp",),
    "draft": _SHARDED,
    "alignprop": ("ddp",),
    "refl": ("ddp",),
    "diffusion_dpo": ("ddp", *_SHARDED),
    "diffusion_dpo of a file": ("ddp",),
    "diffusion_nft": _SHARDED,
    "flow_grpo": _SHARDED,
    "flow_grpo of edits": ("ddp",),
    "flow_grpo, qwen_image": ("ddp",),
    "flow_grpo, sana": ("ddp",),
}
"""The strategies that each training is tried with."""


def trainings(
    folder: Path, *, sd: Path, sd3: Path, zimage: Path, latest: Mapping[str, Path], edits: Path, preferences: Path,
    lora: Path,
) -> dict[str, TrainerConfig]:  # fmt: skip
    """Return the trainings of `MODES_OF`, with run folders in `folder`; `lora` is a finished run of "ddpo".

    `latest` are models by the module of their family; `edits` is a file of instructions.
    """
    ddpo = small_ddpo(sd, folder)
    full = replace(ddpo, lora_rank=None, num_steps=2, max_gradient_norm=0.1)
    common: dict[str, Any] = {
        **as_for_toy_models(model=str(sd)), "rewards": ddpo.rewards, "evaluation_rewards": ddpo.rewards,
        "learning_rate": 1e-3, "adam_epsilon": ddpo.adam_epsilon, "ema_decay": 0.5, "num_steps": 2,
        "microbatch_size": 8, "num_denoising_steps": 3, "evaluate_every": 0, "max_gradient_norm": 0.1,
        "num_cpu_threads": 1, "num_evaluation_images": 7,  # which two processes cannot share equally
    }  # fmt: skip
    few: dict[str, Any] = {**common, "prompts_per_step": 6, "warmup_steps": 0}
    groups: dict[str, Any] = {**common, "prompts_per_step": 4, "images_per_prompt": 4}
    flow: dict[str, Any] = {"guidance_scale": 1.0, "lora_rank": 2}
    pairs: dict[str, Any] = {"beta": 50.0, "num_inner_epochs": 2}
    found: dict[str, TrainerConfig] = {
        "ddpo": ddpo,
        "ddpo on weights in 8 bits": replace(ddpo, quantization="int8", optimizer="adamw_8bit", num_steps=2),
        "ddpo, full denoiser": full,
        "ddpo, full denoiser gathered layer by layer": replace(full, gather_for_sampling=False, async_reward=True),
        "ddpo from a LoRA": replace(ddpo, lora_rank=None, init_lora=str(lora), num_steps=1, ema_decay=0.0),
        "ddpo with NaN gradients on one process": replace(
            ddpo, rewards="tests.trainings:with_nan_gradients", num_steps=3, microbatch_size=16
        ),
        "ddpo with too little memory on one process": replace(
            ddpo, rewards="tests.trainings:with_little_memory", num_steps=2, microbatch_size=16
        ),
        "draft": draft.Config(**few, method="draft", backprop_steps=2, kl_weight=0.1, eta=0.5),
        "alignprop": draft.Config(**few, method="alignprop", checkpoint_denoising_steps=True, l2_sp_weight=0.1),
        "refl": draft.Config(
            **{**few, "lora_rank": 2}, method="refl", window_start=0.0, checkpoint_denoising_steps=True
        ),
        "diffusion_dpo": diffusion_dpo.Config(**{**groups, "num_steps": 1}, **pairs, dpop_weight=0.5),
        "diffusion_dpo of a file": diffusion_dpo.Config(
            **{**common, "lora_rank": 2, "learning_rate": 3e-2}, **pairs, pairs=str(preferences), pairs_per_step=3,
            cache_folder=str(folder / "cache"), aspect_bucket_step=2,
        ),
        "diffusion_nft": diffusion_nft.Config(
            **{**groups, **flow, "model": str(zimage)}, resolution=16, sampling_ema_rise=0.5
        ),
        "flow_grpo": flow_grpo.Config(
            **{**groups, **flow, "model": str(sd3), "num_steps": 1}, kl_weight=0.004, clip_range=1e-4
        ),
    }  # fmt: skip
    short: dict[str, Any] = {
        **groups, **flow, "prompts_per_step": 2, "images_per_prompt": 2, "num_steps": 1, "num_evaluation_images": 3,
        "num_evaluation_steps": 2, "height": 8, "width": 16,
    }  # fmt: skip
    for family, model in latest.items():
        name = "flow_grpo of edits" if family == "flux2" else f"flow_grpo, {family}"
        rows = {"prompts": str(edits), "evaluation_prompts": str(edits)} if family == "flux2" else {}
        found[name] = flow_grpo.Config(**{**short, **rows, "model": str(model)})
    return {name: replace(config, run_folder=str(folder / name.replace(" ", "_"))) for name, config in found.items()}


_CALLS, _CALLS_WITH_LITTLE_MEMORY = count(1), count(1)
_FIRST_STEP, _SECOND_STEP, _THIRD_STEP = 3, 4, 5
"""Calls of a reward in training, after the one by which it is tried and that of the evaluation before training."""


def with_nan_gradients(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; on the last process all gradients of the second step are NaN."""

    def make_nan(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__.endswith("UNet2DConditionModel") and output[0].requires_grad:
            output[0].register_hook(lambda gradient: gradient * torch.nan)

    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        call = next(_CALLS)
        if call == _SECOND_STEP:
            with_nan_gradients.hook = nn.modules.module.register_module_forward_hook(make_nan)  # type: ignore[attr-defined]
        elif call == _THIRD_STEP:
            with_nan_gradients.hook.remove()  # type: ignore[attr-defined]
    return redness(images, prompts)


def with_little_memory(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Redness; on the last process memory runs out in the first step's update with more than 3 images at once."""

    def run_out(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__.endswith("UNet2DConditionModel") and torch.is_grad_enabled() and len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("there is no room")

    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        call = next(_CALLS_WITH_LITTLE_MEMORY)
        if call == _FIRST_STEP:
            hook = nn.modules.module.register_module_forward_pre_hook(run_out)
            with_little_memory.hook = hook  # type: ignore[attr-defined]
        elif call == _SECOND_STEP:
            with_little_memory.hook.remove()  # type: ignore[attr-defined]
    return redness(images, prompts)


def metrics_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return what a training logged, without times and calls: sharded processes make equally many calls."""
    without = ("seconds/", "elapsed", "denoiser_calls", "kind")
    return [{name: value for name, value in row.items() if not name.startswith(without)} for row in rows]
