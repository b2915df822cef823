"""Adapter checkpoints: the trained weights of one perspective and its config, without the frozen backbone.

llava_reward.json          the config (`config.RewardModelConfig`)
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
from reward_model.quantization import Quantization

WEIGHTS_NAME, CONFIG_NAME = "llava_reward.safetensors", "llava_reward.json"


def adapter_tensors(model: RewardModel, name: str) -> dict[str, Tensor]:
    """Return the weights of a perspective by their names in an adapter checkpoint."""
    return {
        f"{group}.{key}": parameter.data
        for group, named in model.groups(name).items()
        for key, parameter in named.items()
    }


def save_adapter(
    config: RewardModelConfig, tensors: dict[str, Tensor], folder: Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write an adapter checkpoint and return its folder; each file is replaced atomically.

    The path of a backbone inside the folder is stored relative to it, so that the folder can be moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone = Path(config.backbone)
    if backbone.is_absolute() and backbone.is_relative_to(folder.resolve()):
        config = replace(config, backbone=str(backbone.relative_to(folder.resolve())))
    stored = {key: tensor.detach().to(dtype).cpu().contiguous() for key, tensor in tensors.items()}
    part = folder / (WEIGHTS_NAME + ".part")
    save_file(stored, part)
    os.replace(part, folder / WEIGHTS_NAME)
    part = folder / (CONFIG_NAME + ".part")
    part.write_text(config.to_json(), encoding="utf-8")
    os.replace(part, folder / CONFIG_NAME)
    return folder


def read_config(folder: Path) -> RewardModelConfig:
    """Return the config of an adapter checkpoint; FileNotFoundError if the folder holds none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a reward model: it has no {CONFIG_NAME}.")
    return RewardModelConfig.from_json(path.read_text(encoding="utf-8"), where=str(path))


def backbone_source(config: RewardModelConfig, folder: Path) -> str:
    """Return the path or Hub id of an adapter checkpoint's backbone; FileNotFoundError if its folder is gone."""
    beside = folder / config.backbone
    if not beside.is_dir() and Path(config.backbone).is_absolute():
        raise FileNotFoundError(
            f"The backbone {config.backbone} of the reward model {folder} is gone. If it was moved, write its new path "
            f"under 'backbone' in {folder / CONFIG_NAME}."
        )
    return str(beside) if beside.is_dir() else config.backbone


def load_adapter_weights(model: RewardModel, name: str, path: Path) -> None:
    """Copy stored weights into a perspective; ValueError unless names and shapes are exactly those of the model."""
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights {path} cannot be read: {error}.") from error
    own = adapter_tensors(model, name)
    for key in sorted(own.keys() ^ stored.keys()):
        raise ValueError(f"{path} does not fit its config: {key} is {'missing' if key in own else 'unexpected'}.")
    for key, tensor in own.items():
        if tensor.shape != stored[key].shape:
            raise ValueError(
                f"{path} does not fit its config: {key} is {tuple(stored[key].shape)}, not {tuple(tensor.shape)}."
            )
        tensor.copy_(stored[key])


def load_adapter(model: RewardModel, folder: Path, *, name: str | None = None) -> str:
    """Add a stored perspective to a model in memory and return its name there, by default its own.

    Raises ValueError for a backbone of another family or width, or another template or image size; the model is then
    unchanged.
    """
    config = read_config(folder)
    source = Path(backbone_source(config, folder))
    # An absolute path, so that perspectives from different folders name the same backbone alike.
    backbone = str(source.resolve()) if source.is_dir() else config.backbone
    config = replace(config, perspective=name or config.perspective, backbone=backbone)
    own = model.backbone.model.config.model_type
    if config.model_type != own:
        raise ValueError(f"{folder} was trained on a backbone of type {config.model_type!r}; this one is {own!r}.")
    for other in model.configs.values():
        for shared in ("backbone", "template", "min_pixels", "max_pixels", "num_crops"):
            if getattr(other, shared) != getattr(config, shared):
                raise ValueError(
                    f"{folder} cannot share a backbone with {other.perspective!r}: its {shared} is "
                    f"{getattr(config, shared)!r}, not {getattr(other, shared)!r}."
                )
    before = model.active
    try:
        model.add(config)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit: {error}") from error
    try:
        load_adapter_weights(model, config.perspective, folder / WEIGHTS_NAME)
    except ValueError:
        if before:  # an untrained perspective must not stay among the others
            model.use(before)
            model.remove(config.perspective)
        raise
    return config.perspective


def load_reward_model(
    folder: Path, *, dtype: torch.dtype | None = None, quantization: Quantization | None = None
) -> RewardModel:
    """Load an adapter checkpoint and its backbone, in the backbone's precision of training unless `dtype` is given.

    `quantization` is as in `load_backbone`, whatever it was in training.
    """
    config = read_config(folder)
    source = backbone_source(config, folder)
    backbone = load_backbone(
        source,
        dtype=dtype or getattr(torch, config.dtype),
        template=config.template,
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
        num_crops=config.num_crops,
        quantization=quantization,
    )
    model = RewardModel(backbone)
    load_adapter(model, folder)
    return model.eval()
