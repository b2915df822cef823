"""Trained weights of tiny models, in the folders and layouts that runs and other tools write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_t2i.models.lora import LoraConfiguration
from tests.policies import perturb, policy_of

LORA = "pytorch_lora_weights.safetensors"


def lora_of(model: Path, folder: Path, *, rank: int = 2, alpha: float | None = None) -> Path:
    """Write a LoRA of a model into `folder/lora`, as a run does; return its file."""
    policy = policy_of(model)
    policy.set_trainable(LoraConfiguration(rank, alpha), keep_reference=False, seed=0)
    perturb(policy)
    return policy.export(folder, policy.trainable) / LORA


def in_kohyas_layout(lora: Path, file: Path, *, alphas: Sequence[float]) -> Path:
    """Write a LoRA in Kohya's layout, with alphas that its layers have in turn; return its file."""
    weights, turn = convert_state_dict_to_kohya(load_file(lora)), itertools.cycle(alphas)
    save_file({k: torch.tensor(next(turn)) if k.endswith("alpha") else w for k, w in weights.items()}, file)
    return file


def denoiser_of(model: Path, folder: Path) -> Path:
    """Write the full denoiser of a model into a folder, as a run does; return its folder."""
    policy = policy_of(model)
    policy.set_trainable(None, keep_reference=False, seed=0)
    perturb(policy)
    return policy.export(folder, policy.trainable)


def describe_run(run: Path, **config: object) -> None:
    """Write the settings and the record of a run into its folder."""
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "run.json").write_text(json.dumps({}))


def checkpoint_of(weights: Mapping[str, Tensor], run: Path, **config: object) -> Path:
    """Write a checkpoint of some weights and the settings of its run; return its folder."""
    folder = run / "checkpoints" / "step_000001"
    folder.mkdir(parents=True)
    stored = {f"weight/{name}": weight for name, weight in weights.items()}
    save_file(stored, folder / "weights-00001-of-00001.safetensors")
    describe_run(run, **config)
    return folder
