"""From the options of reward training to the arguments of trl's trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.reward_config import RewardConfig

from reward_model.training import REQUIRED_ARGUMENTS
from rlhf_t2i.distributed.processes import uses_fsdp
from rlhf_t2i.settings.lists import names


def refuse_strategy(environment: Mapping[str, str], *, quantization: str | None) -> None:
    """Raise ValueError if the launcher's variables configure FSDP, or DeepSpeed for quantised weights."""
    if uses_fsdp(environment):
        raise ValueError("FSDP does not train reward models; use accelerate_configs/deepspeed_zero3.yaml or ddp.yaml.")
    if quantization and environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ValueError(
            f"quantization is {quantization}; with DeepSpeed, which exchanges plain weights, it must be null. Use one "
            f"process or accelerate_configs/ddp.yaml."
        )


def trainer_arguments(config: Any, *, precision: str) -> RewardConfig:
    """Return the arguments of trl's trainer: AdamW with a cosine schedule; validation and checkpoint together."""
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision {precision} is not supported; use no, fp16 or bf16.")
    on_cpu = not torch.cuda.is_available()
    return RewardConfig(
        **REQUIRED_ARGUMENTS,
        output_dir="runs",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=config.gradient_checkpointing,
        per_device_train_batch_size=config.microbatch_size,
        per_device_eval_batch_size=2 * config.microbatch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        num_train_epochs=config.num_epochs,
        max_steps=config.num_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_fraction,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_gradient_norm,
        dataloader_num_workers=config.num_workers,
        eval_steps=config.evaluate_every,
        save_steps=config.evaluate_every,
        save_total_limit=config.keep_checkpoints,
        logging_steps=min(10, config.evaluate_every),
        report_to=names(config.trackers) or "none",
        seed=config.seed,
    )
