"""A judge on disk: one safetensors file of what was trained, and one JSON of facts, for each perspective.

llava_reward.json          the facts (`facts.Facts`)
llava_reward.safetensors   lora.*  projector.*  skip_ca.*  head.*
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reward_model.backbones.load import load_backbone
from reward_model.config import RewardModelConfig
from reward_model.model import RewardModel

WEIGHTS, FACTS = "llava_reward.safetensors", "llava_reward.json"


def bundle_tensors(model: RewardModel, name: str) -> dict[str, Tensor]:
    """The weights of a perspective by the names under which a bundle stores them."""
    return {
        f"{group}.{key}": parameter.data
        for group, named in model.groups(name).items()
        for key, parameter in named.items()
    }


def save_bundle(
    facts: RewardModelConfig, tensors: dict[str, Tensor], folder: Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a bundle; each file is whole or not there. A backbone inside the folder is referred to from there."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = Path(facts.backbone)
    if backbone.is_absolute() and backbone.is_relative_to(folder.resolve()):
        facts = replace(facts, backbone=str(backbone.relative_to(folder.resolve())))
    stored = {key: tensor.detach().to(dtype).cpu().contiguous() for key, tensor in tensors.items()}
    part = folder / (WEIGHTS + ".part")
    save_file(stored, part)
    os.replace(part, folder / WEIGHTS)
    part = folder / (FACTS + ".part")
    part.write_text(facts.to_json(), encoding="utf-8")
    os.replace(part, folder / FACTS)
    return folder


def read_config(folder: Path) -> RewardModelConfig:
    """The facts of the bundle in a folder; FileNotFoundError if there is none."""
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(f"{folder} holds no judge: it has no {FACTS}.")
    return RewardModelConfig.from_json((folder / FACTS).read_text(encoding="utf-8"), where=str(folder / FACTS))


def backbone_source(facts: RewardModelConfig, folder: Path) -> str:
    """Where a bundle's backbone is: beside the bundle, or wherever its facts say."""
    beside = folder / facts.backbone
    if not beside.is_dir() and Path(facts.backbone).is_absolute():
        raise FileNotFoundError(
            f"The backbone {facts.backbone} of the judge {folder} is gone. If it was moved, write its new place under "
            f"'backbone' in {folder / FACTS}."
        )
    return str(beside) if beside.is_dir() else facts.backbone


def load_weights(model: RewardModel, name: str, path: Path) -> None:
    """Take the weights of a perspective from a bundle's file; ValueError unless it holds exactly those."""
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights {path} cannot be read: {error}.") from error
    own = bundle_tensors(model, name)
    for key in sorted(own.keys() ^ stored.keys()):
        raise ValueError(f"{path} does not fit its facts: {key} is {'missing' if key in own else 'too much'}.")
    for key, tensor in own.items():
        if tensor.shape != stored[key].shape:
            raise ValueError(
                f"{path} does not fit its facts: {key} is {tuple(stored[key].shape)}, not {tuple(tensor.shape)}."
            )
        tensor.copy_(stored[key])


def add_bundle(model: RewardModel, folder: Path, *, name: str | None = None) -> str:
    """Put a stored perspective on a backbone that is in memory; returns the name it has there.

    Raises ValueError if the bundle was trained on another family or width of backbone, or shows it images otherwise.
    """
    facts = read_config(folder)
    source = Path(backbone_source(facts, folder))
    # In full, so that one backbone has one name, whichever bundle's folder it is seen from.
    backbone = str(source.resolve()) if source.is_dir() else facts.backbone
    facts = replace(facts, perspective=name or facts.perspective, backbone=backbone)
    own = model.backbone.model.config.model_type
    if facts.model_type != own:
        raise ValueError(f"{folder} was trained on a backbone of type {facts.model_type!r}; this one is {own!r}.")
    for other in model.facts.values():
        for shared in ("backbone", "template", "min_pixels", "max_pixels", "num_crops"):
            if getattr(other, shared) != getattr(facts, shared):
                raise ValueError(
                    f"{folder} cannot share a backbone with {other.perspective!r}: its {shared} is "
                    f"{getattr(facts, shared)!r}, not {getattr(other, shared)!r}."
                )
    before = model.active
    try:
        model.add(facts)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit: {error}") from error
    try:
        load_weights(model, facts.perspective, folder / WEIGHTS)
    except ValueError:
        if before:  # an untrained perspective must not stay among the others
            model.use(before)
            model.remove(facts.perspective)
        raise
    return facts.perspective


def load_reward_model(folder: Path, *, dtype: torch.dtype | None = None) -> RewardModel:
    """The backbone of a bundle, by default in the precision that it had in training, with the bundle on it."""
    facts = read_config(folder)
    source = backbone_source(facts, folder)
    backbone = load_backbone(
        source,
        dtype=dtype or getattr(torch, facts.dtype),
        template=facts.template,
        min_pixels=facts.min_pixels,
        max_pixels=facts.max_pixels,
        num_crops=facts.num_crops,
    )
    model = RewardModel(backbone)
    add_bundle(model, folder)
    return model.eval()
