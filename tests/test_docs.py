"""What the documentation promises by name is there."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from recipes import ddpo, draft

DOCS = Path(__file__).parent.parent / "docs"
LAUNCHER = {"config_file"}


@pytest.mark.parametrize(("heading", "recipe"), [("DDPOConfig", ddpo), ("AlignPropConfig", draft)])
def test_each_setting_that_replaces_one_of_trl_exists(heading: str, recipe: Any) -> None:
    section = (DOCS / "coming_from_trl.md").read_text().split(f"## `{heading}`")[1].split("\n## ")[0]
    named = set(re.findall(r"--([a-z_0-9]+)", section)) - LAUNCHER
    assert len(named) > 4
    assert named <= {field.name for field in fields(recipe.Config)}


def test_every_setting_of_trls_ddpo_is_accounted_for() -> None:
    """The fields of DDPOConfig in trl 0.23.1."""
    section = (DOCS / "coming_from_trl.md").read_text().split("## `DDPOConfig`")[1].split("\n## ")[0]
    named = {
        name
        for row in section.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named >= {
        "exp_name", "run_name", "seed", "log_with", "tracker_kwargs", "accelerator_kwargs", "project_kwargs",
        "tracker_project_name", "logdir", "num_epochs", "save_freq", "num_checkpoint_limit", "mixed_precision",
        "allow_tf32", "resume_from", "sample_num_steps", "sample_eta", "sample_guidance_scale", "sample_batch_size",
        "sample_num_batches_per_epoch", "train_batch_size", "train_use_8bit_adam", "train_learning_rate",
        "train_adam_beta1", "train_adam_beta2", "train_adam_weight_decay", "train_adam_epsilon",
        "train_gradient_accumulation_steps", "train_max_grad_norm", "train_num_inner_epochs", "train_cfg",
        "train_adv_clip_max", "train_clip_range", "train_timestep_fraction", "per_prompt_stat_tracking",
        "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count", "async_reward_computation",
        "max_workers", "negative_prompts", "push_to_hub",
    }  # fmt: skip
