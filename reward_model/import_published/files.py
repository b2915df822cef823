"""Readers of the files of a published checkpoint: settings, LoRA config and tensors."""

from __future__ import annotations

import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from reward_model.datasets.fields import shortened
from reward_model.scorers.weights import load_pickle, refuse_inflated
from reward_model.text_files import read_object, read_yaml

_YAML_KEYS = {"general_preference_tau", "value_head_dim", "add_cross_attention", "is_general_preference"}
_PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
    "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
}  # fmt: skip
"""Values that an adapter_config.json must have, or leave out, for the one kind of LoRA that is supported."""


def read_settings(path: Path) -> dict[str, Any]:
    """Return the four settings of a reward_config.yaml; ValueError for a missing, unknown or invalid one."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: this is no published LLaVA-Reward checkpoint.")
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings.")
    for key in sorted(map(str, found.keys() ^ _YAML_KEYS)):
        raise ValueError(f"{path}: the setting {key} is {'unknown' if key in found else 'missing'}.")
    for key in ("add_cross_attention", "is_general_preference"):
        if not isinstance(found[key], bool):
            raise ValueError(f"{path}: {key} is {found[key]!r}; it must be true or false.")
    tau = found["general_preference_tau"]
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau < math.inf:
        raise ValueError(f"{path}: general_preference_tau is {tau!r}; it must be a positive number.")
    if found["is_general_preference"] and found["value_head_dim"] != 2:
        raise ValueError(
            f"{path}: value_head_dim is {found['value_head_dim']!r}; a general-preference head must have 2 outputs."
        )
    return found


def read_lora_config(folder: Path) -> dict[str, Any]:
    """Return rank, alpha and dropout of an adapter_config.json; ValueError for any other kind of LoRA."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}. (The published trainer writes no LoRA under ZeRO-2.)")
    found = read_object(path)
    for key, plain in _PLAIN_LORA.items():
        if (found.get(key) or plain) != plain:
            raise ValueError(f"{path}: {key} is {found[key]!r}; only {plain!r} is supported.")
    if missing := {"r", "lora_alpha"} - found.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    found = {"lora_dropout": 0.0, **found}
    for key in ("r", "lora_alpha", "lora_dropout"):
        if isinstance(found[key], bool) or not isinstance(found[key], int if key == "r" else int | float):
            raise ValueError(f"{path}: {key} is {shortened(found[key])}; it must be a number.")
    return {"lora_rank": found["r"], "lora_alpha": float(found["lora_alpha"]), "lora_dropout": found["lora_dropout"]}


def adapter_file(folder: Path) -> Path:
    """Return the file of the LoRA's weights; FileNotFoundError if there is none."""
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"There is no {folder / 'adapter_model.bin'}. (The published trainer writes no LoRA under ZeRO-2.)"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .bin or .safetensors file by name; code in a .bin is not executed."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found = load_pickle(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds other objects than tensors, or is broken: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} is no dictionary of named tensors.")
    refuse_inflated(found.values(), path)
    return found
