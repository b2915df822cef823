"""Take over a published LLaVA-Reward checkpoint: its folder becomes one bundle that scores as it did.

    python -m reward_model.import_published FOLDER --base microsoft/Phi-3.5-vision-instruct --perspective alignment \\
        --output runs/published

FOLDER holds reward_config.yaml (the head and its temperature), pytorch_model.bin (head, SkipCA, projector) and lora/
(adapter_config.json, adapter_model.bin). `--base` is the model that it was trained on. What the published code did
otherwise than the paper is kept, under the names in `reward_model.compatibility`, and printed; so is which parts look
as if they had never been trained.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from reward_model.compatibility import SkipCaKeys
from reward_model.config import RewardModelConfig
from reward_model.published_names import VARIANTS, Variant, lora_tensors, other_tensors

_YAML_KEYS = {"general_preference_tau", "value_head_dim", "add_cross_attention", "is_general_preference"}
_PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip
"""What an adapter_config.json must say, or leave out, for the LoRA to be of the one kind that a bundle holds."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A bundle that was made of a published checkpoint, and what is to be known of it."""

    facts: RewardModelConfig
    notes: list[str]
    """What was kept or left out, a sentence each."""
    parts: list[str]
    """Each part's number, and whether it looks untrained."""


def import_published(
    folder: Path, base: str, output: Path, *, perspective: str, skip_ca_keys: SkipCaKeys | None = None,
    dtype: str = "bfloat16",
) -> Imported:  # fmt: skip
    """Write the bundle of a published checkpoint to `output`.

    `skip_ca_keys` None keeps what the published code looked at; `dtype` is the backbone's when it scores, which was
    bfloat16. Raises FileNotFoundError, FileExistsError or ValueError, naming the file, the key or the tensor.
    """
    from reward_model.backbones.load import load_backbone
    from reward_model.checkpoint import CONFIG_NAME, adapter_tensors, save_adapter
    from reward_model.model import RewardModel

    if (output / CONFIG_NAME).exists():
        raise FileExistsError(f"{output} already holds a judge; choose another --output.")
    settings, lora = read_settings(folder / "reward_config.yaml"), read_lora_config(folder / "lora")
    kind, variant = variant_of(base)
    stored = other_tensors(read_tensors(folder / "pytorch_model.bin"), variant, where=folder / "pytorch_model.bin")
    path = adapter_file(folder / "lora")
    stored |= lora_tensors(read_tensors(path), variant, where=path)
    keys = skip_ca_keys or variant.skip_ca_keys
    notes, skip_ca = notes_on(variant, settings, keys)
    if settings["add_cross_attention"] and not skip_ca:  # which the notes say
        stored = {name: entry for name, entry in stored.items() if not name.startswith("skip_ca.")}
    shown: dict[str, Any] = {"template": "published", **variant.bounds}
    backbone = load_backbone(base, dtype=getattr(torch, dtype), **shown)
    facts = RewardModelConfig(
        perspective=perspective,
        backbone=os.path.abspath(base) if Path(base).is_dir() else base,
        model_type=kind,
        width=backbone.width,
        head="general_preference" if settings["is_general_preference"] else "scalar",
        temperature=float(settings["general_preference_tau"]),
        skip_ca=skip_ca,
        skip_ca_keys=keys if skip_ca and keys else "visual",
        skip_ca_eps=variant.skip_ca_eps,
        dtype=dtype,  # pyright: ignore[reportArgumentType]: checked there
        **lora,
        **shown,
    )
    model = RewardModel(backbone)
    model.add(facts)
    start = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model, perspective).items()}
    tensors = fitting(stored, start, where=folder)
    exact = torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors.values()) else torch.float32
    save_adapter(facts, tensors, output, dtype=exact)
    return Imported(facts, notes, [*parts_of(tensors, start)])


def variant_of(base: str) -> tuple[str, Variant]:
    """The family of the base model, and how the published code named and ran it; ValueError for any other."""
    from transformers import PreTrainedConfig

    kind = PreTrainedConfig.get_config_dict(base)[0].get("model_type")
    if kind not in VARIANTS:
        raise ValueError(f"The base {base!r} is of type {kind!r}; published checkpoints are of {', '.join(VARIANTS)}.")
    return str(kind), VARIANTS[str(kind)]


# --- the files ------------------------------------------------------------------------------------


def read_settings(path: Path) -> dict[str, Any]:
    """The four settings of a reward_config.yaml; ValueError for a missing, unknown or impossible one."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: this is no published LLaVA-Reward checkpoint.")
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings.")
    for key in sorted(map(str, found.keys() ^ _YAML_KEYS)):
        raise ValueError(f"{path}: the setting {key} is {'unknown' if key in found else 'missing'}.")
    for key in ("add_cross_attention", "is_general_preference"):
        if not isinstance(found[key], bool):
            raise ValueError(f"{path}: {key} is {found[key]!r}; it must be true or false.")
    tau = found["general_preference_tau"]
    if isinstance(tau, bool) or not isinstance(tau, int | float) or tau <= 0:
        raise ValueError(f"{path}: general_preference_tau is {tau!r}; it must be a positive number.")
    if found["is_general_preference"] and found["value_head_dim"] != 2:
        raise ValueError(
            f"{path}: value_head_dim is {found['value_head_dim']!r}; a general-preference head is read with 2 outputs."
        )
    return found


def read_lora_config(folder: Path) -> dict[str, Any]:
    """Rank, alpha and dropout of an adapter_config.json; ValueError for any LoRA that is not a plain one."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. (The published trainer writes no LoRA under ZeRO-2.)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    for key, plain in _PLAIN_LORA.items():
        if (found.get(key) or plain) != plain:
            raise ValueError(f"{path}: {key} is {found[key]!r}; only {plain!r} can be taken over.")
    if missing := {"r", "lora_alpha"} - found.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    own = {"lora_rank": found["r"], "lora_alpha": float(found["lora_alpha"])}
    return {**own, "lora_dropout": float(found.get("lora_dropout", 0.0))}


def adapter_file(folder: Path) -> Path:
    """Where the LoRA's weights are."""
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"There is no {folder / 'adapter_model.bin'}. (The published trainer writes no LoRA under ZeRO-2.)"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .safetensors; no code that a .bin may hold is run."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} holds something else than tensors, or is broken: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} does not hold tensors by their names.")
    return found


# --- what they hold -------------------------------------------------------------------------------


def notes_on(variant: Variant, settings: dict[str, Any], keys: SkipCaKeys | None) -> tuple[list[str], bool]:
    """What is to be said of this checkpoint, and whether its SkipCA is used."""
    notes = [
        "reward_config.yaml does not say whether it was trained with --layer_id or --mean_hidden_state; the last layer "
        "and the last token are taken.",
    ]
    if not settings["add_cross_attention"]:
        return notes, False
    if variant.skip_ca_keys is None:
        return [*notes, "SkipCA is left out: the published code never ran it for this family."], False
    return [*notes, f"skip_ca_keys is {keys}. {variant.note}"], True


def fitting(stored: dict[str, tuple[str, Tensor]], own: dict[str, Tensor], *, where: Path) -> dict[str, Tensor]:
    """The stored tensors by the bundle's names; ValueError unless they are just those, in their shapes."""
    for name in sorted(own.keys() - stored.keys()):
        raise ValueError(f"{where} lacks what the base model needs: there is no tensor for {name}.")
    for name, (published, tensor) in stored.items():
        if name not in own:
            raise ValueError(f"{where}: the base model has no place for {published} (here {name}).")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{where}: {published} is {tuple(tensor.shape)}; this base model needs {tuple(own[name].shape)}."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {published} holds values that are not finite.")
    return {name: tensor for name, (_, tensor) in stored.items()}


def parts_of(tensors: dict[str, Tensor], start: dict[str, Tensor]) -> Sequence[str]:
    """Each part's number beside its value at the start of a training, and whether it looks as if it had stayed there.

    The published trainer's optimiser held only the LoRA, so that head, SkipCA and projector may be as they began:
    weights drawn from N(0, 1 / (D + 1)), a gain of ones, the base model's projector.
    """
    lines: list[str] = []
    for name in ("head.weight", "skip_ca.query.weight", "skip_ca.key.weight", "skip_ca.value.weight"):
        if name in tensors:
            weights = tensors[name].float()
            std, drawn = weights.std().item(), 1 / (weights.shape[1] + 1)
            # The standard error of a standard deviation of n draws is 1 / sqrt(2 n) of it.
            fresh = abs(std / drawn - 1) < 4 / (2 * weights.numel()) ** 0.5
            lines.append(_line(name, f"std {std:.3e}, {drawn:.3e} when drawn", fresh))
    if "skip_ca.norm.weight" in tensors:
        furthest = (tensors["skip_ca.norm.weight"].float() - 1).abs().max().item()
        lines.append(_line("skip_ca.norm", f"at most {furthest:.3e} from its first gain of 1", furthest == 0))
    gaps = [(tensors[name].float() - start[name].float()).abs().max().item() for name in _of(start, "projector.")]
    lines.append(_line("projector", f"at most {max(gaps):.3e} from the base model's", max(gaps) == 0))
    largest = max(tensors[name].abs().max().item() for name in _of(tensors, "lora.") if ".lora_B." in name)
    lines.append(_line("lora", f"B at most {largest:.3e}, 0 at the start", largest == 0))
    return lines


def _of(tensors: dict[str, Tensor], group: str) -> list[str]:
    return [name for name in tensors if name.startswith(group)]


def _line(part: str, number: str, fresh: bool) -> str:
    return f"{part:22}{number}{': looks untrained' if fresh else ''}"


def main(arguments: Sequence[str]) -> None:
    """Import one checkpoint, and say what became of it."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_model.import_published", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="the published checkpoint")
    parser.add_argument("--base", required=True, help="folder or Hub id of the model that it was trained on")
    parser.add_argument("--perspective", required=True, help="what it judges: alignment, fidelity, safety, ranking")
    parser.add_argument("--output", type=Path, required=True, help="where the bundle goes")
    parser.add_argument("--skip-ca-keys", choices=get_args(SkipCaKeys), help="other than the published code's")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the backbone")
    given = parser.parse_args(arguments)
    try:
        made = import_published(
            given.folder, given.base, given.output,
            perspective=given.perspective, skip_ca_keys=given.skip_ca_keys, dtype=given.dtype,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    told = [*made.notes, "", *made.parts, "", f"judge     {given.output}"]
    sys.stdout.write("\n".join(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
