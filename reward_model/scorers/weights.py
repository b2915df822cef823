"""Weights of other projects: one file of named tensors, in a folder with tokenizer and config."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
_MOST_INFLATED = 4
"""Largest ratio of the bytes of all tensors to those of their file; tensors that share memory may make it 2."""


def folder_of(source: str | Path, *, scorer: str) -> Path:
    """Return the local folder of a scorer, given itself or a file in it; FileNotFoundError if there is none."""
    path = Path(source)
    if path.is_file():
        return path.parent
    if not path.is_dir():
        raise FileNotFoundError(f"There is no {scorer} in {str(source)!r}: give the folder that holds its weights.")
    return path


def weights_of(source: str | Path, *, scorer: str) -> Path:
    """Return the given file, or the only file of weights in the folder; ValueError if there is not exactly one."""
    path = Path(source)
    if path.is_file():
        return path
    found = sorted(file for file in folder_of(source, scorer=scorer).iterdir() if file.suffix in ENDINGS)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(
            f"The {scorer} in {path} needs one file of weights ({', '.join(ENDINGS)}); there are: {names}."
        )
    return found[0]


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, in float32; of a training checkpoint only the `state_dict`.

    No code in the file is executed. Raises ValueError for a file that is broken or holds no named tensors.
    """
    try:
        stored: Any = load_file(file) if file.suffix == ".safetensors" else load_pickle(file)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"The weights {file} cannot be read: {error}.") from error
    if isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"The weights {file} are no dictionary of named tensors.")
    refuse_inflated(stored.values(), file)
    return {
        str(key).removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in stored.items()
    }


def load_pickle(file: Path) -> Any:
    """Return what `torch.save` wrote, on the CPU; no code in the file is executed.

    Raises what `torch.load` does, and ValueError for a compressed archive that is far smaller than what it holds.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            _refuse_size(sum(member.file_size for member in archive.infolist()), file)
    return torch.load(file, "cpu", weights_only=True)


def refuse_inflated(tensors: Collection[Tensor], file: Path) -> None:
    """Raise ValueError for tensors that are far larger than their file: views, of stride 0 or of one another."""
    _refuse_size(sum(tensor.numel() * tensor.element_size() for tensor in tensors), file)


def _refuse_size(claimed: int, file: Path) -> None:
    size = file.stat().st_size
    if claimed > _MOST_INFLATED * max(size, 1 << 20):
        raise ValueError(f"The weights {file} claim {claimed:,} bytes of memory, and the file has {size:,}.")


def fill(model: nn.Module, tensors: dict[str, Tensor], *, file: Path) -> None:
    """Copy all tensors into a model; ValueError, naming the first that is missing, unexpected or of another shape."""
    own = dict(model.named_parameters())
    if wrong := sorted(own.keys() ^ tensors.keys()):
        kind = "lacks" if wrong[0] in own else "has the unexpected tensor"
        raise ValueError(f"{file} {kind} {wrong[0]} ({len(wrong)} such tensors).")
    for key, parameter in own.items():
        if parameter.shape != tensors[key].shape:
            raise ValueError(f"{file}: {key} is {tuple(tensors[key].shape)}; it must be {tuple(parameter.shape)}.")
        parameter.data = tensors[key].clone()
