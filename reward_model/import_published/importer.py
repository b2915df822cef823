"""Conversion of a published checkpoint to an adapter checkpoint that gives the same scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_model.config import RewardModelConfig
from reward_model.import_published.files import adapter_file, read_lora_config, read_settings, read_tensors
from reward_model.import_published.names import VARIANTS, NamedTensors, Variant, lora_tensors, other_tensors
from reward_model.skip_ca import SkipCaKeys


@dataclass(frozen=True, slots=True)
class Imported:
    """An adapter checkpoint made from a published one, with notes for the user."""

    config: RewardModelConfig
    notes: list[str]
    """Deviations from the paper that were kept, and parts that were left out: one sentence each."""
    parts: list[str]
    """One line for each group of weights: a statistic, and a remark if it is at its initial value."""


def import_published(
    folder: Path, base: str, output: Path, *, perspective: str, skip_ca_keys: SkipCaKeys | None = None,
    dtype: str = "bfloat16",
) -> Imported:  # fmt: skip
    """Write the adapter checkpoint of a published checkpoint to `output`.

    `base` is the folder or Hub id of the base model. `skip_ca_keys` None keeps those of the published code. `dtype` is
    the precision of the backbone in scoring, which was bfloat16. Raises FileNotFoundError, FileExistsError or
    ValueError, naming the file, the key or the tensor.
    """
    from reward_model.backbones.load import load_backbone
    from reward_model.checkpoint import CONFIG_NAME, adapter_tensors, save_adapter
    from reward_model.model import RewardModel

    if (output / CONFIG_NAME).exists():
        raise FileExistsError(f"{output} already holds a reward model; choose another --output.")
    settings, lora = read_settings(folder / "reward_config.yaml"), read_lora_config(folder / "lora")
    model_type, variant = variant_of(base)
    keys = skip_ca_keys or variant.skip_ca_keys
    notes, skip_ca = notes_on(variant, settings, keys)
    stored = stored_tensors(folder, variant, skip_ca=skip_ca or not settings["add_cross_attention"])
    image_options: dict[str, Any] = {"template": "published", **variant.bounds}
    backbone = load_backbone(base, dtype=getattr(torch, dtype), **image_options)
    config = RewardModelConfig(
        perspective=perspective,
        backbone=os.path.abspath(base) if Path(base).is_dir() else base,
        model_type=model_type,
        width=backbone.width,
        head="general_preference" if settings["is_general_preference"] else "scalar",
        temperature=float(settings["general_preference_tau"]),
        skip_ca=skip_ca,
        skip_ca_keys=keys if skip_ca and keys else "visual",
        skip_ca_eps=variant.skip_ca_eps,
        dtype=dtype,  # pyright: ignore[reportArgumentType]: RewardModelConfig checks it
        **lora,
        **image_options,
    )
    model = RewardModel(backbone)
    model.add(config)
    start = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model, perspective).items()}
    tensors = fitting(stored, start, where=folder)
    exact = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors.values()) else torch.float32
    save_adapter(config, tensors, output, dtype=exact)
    return Imported(config, notes, [*parts_of(tensors, start)])


def variant_of(base: str) -> tuple[str, Variant]:
    """Return the `model_type` of the base model and its variant of the published code; ValueError if there is none."""
    from transformers import PreTrainedConfig

    kind = PreTrainedConfig.get_config_dict(base)[0].get("model_type")
    if kind not in VARIANTS:
        raise ValueError(f"The base {base!r} is of type {kind!r}; published checkpoints are of {', '.join(VARIANTS)}.")
    return str(kind), VARIANTS[str(kind)]


def stored_tensors(folder: Path, variant: Variant, *, skip_ca: bool) -> NamedTensors:
    """Return all tensors of a checkpoint by our names, without those of SkipCA unless `skip_ca`."""
    others, lora = folder / "pytorch_model.bin", adapter_file(folder / "lora")
    stored = other_tensors(read_tensors(others), variant, where=others)
    stored |= lora_tensors(read_tensors(lora), variant, where=lora)
    return {name: entry for name, entry in stored.items() if skip_ca or not name.startswith("skip_ca.")}


def notes_on(variant: Variant, settings: dict[str, Any], keys: SkipCaKeys | None) -> tuple[list[str], bool]:
    """Return the notes on this checkpoint, and True if its SkipCA is used."""
    notes = [
        "reward_config.yaml does not say whether it was trained with --layer_id or --mean_hidden_state; the last layer "
        "and the last token are taken.",
    ]
    if not settings["add_cross_attention"]:
        return notes, False
    if variant.skip_ca_keys is None:
        return [*notes, "SkipCA is left out: the published code never ran it for this family."], False
    return [*notes, f"skip_ca_keys is {keys}. {variant.note}"], True


def fitting(stored: NamedTensors, own: dict[str, Tensor], *, where: Path) -> dict[str, Tensor]:
    """Return the stored tensors by our names; ValueError unless names and shapes are exactly those of `own`."""
    for name in sorted(own.keys() - stored.keys()):
        raise ValueError(f"{where} does not fit the base model: there is no tensor for {name}.")
    for name, (published, tensor) in stored.items():
        if name not in own:
            raise ValueError(f"{where} does not fit the base model: {published} (here {name}) is unexpected.")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{where}: {published} is {tuple(tensor.shape)}; this base model needs {tuple(own[name].shape)}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {published} holds values that are not finite.")
    return {name: tensor for name, (_, tensor) in stored.items()}


def parts_of(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> Sequence[str]:
    """Return a line for each group of weights: a statistic beside its initial value, and a remark if it is untrained.

    The published trainer's optimiser held only the LoRA, so that head, SkipCA and projector may still be at their
    initial values: weights drawn from N(0, 1 / (D + 1)^2), a gain of ones, the base model's projector.
    """
    lines: list[str] = []
    for name in ("head.weight", "skip_ca.query.weight", "skip_ca.key.weight", "skip_ca.value.weight"):
        if name in tensors:
            weights = tensors[name].float()
            std, initial = weights.std().item(), 1 / (weights.shape[1] + 1)
            # The standard error of a standard deviation of n draws is 1 / sqrt(2 n) of it.
            untrained = abs(std / initial - 1) < 4 / (2 * weights.numel()) ** 0.5
            lines.append(_line(name, f"std {std:.3e}, initially {initial:.3e}", untrained))
    if "skip_ca.norm.weight" in tensors:
        largest = (tensors["skip_ca.norm.weight"].float() - 1).abs().max().item()
        lines.append(_line("skip_ca.norm", f"differs by at most {largest:.3e} from its initial gain 1", largest == 0))
    gaps = [
        (tensors[name].float() - initial.float()).abs().max().item()
        for name, initial in start.items()
        if name.startswith("projector.")
    ]
    lines.append(_line("projector", f"differs by at most {max(gaps):.3e} from the base model's", max(gaps) == 0))
    largest = max(tensor.abs().max().item() for name, tensor in tensors.items() if _is_lora_b(name))
    lines.append(_line("lora", f"B is at most {largest:.3e}, initially 0", largest == 0))
    return lines


def _is_lora_b(name: str) -> bool:
    return name.startswith("lora.") and ".lora_B." in name


def _line(part: str, statistic: str, untrained: bool) -> str:
    return f"{part:22}{statistic}{': looks untrained' if untrained else ''}"
