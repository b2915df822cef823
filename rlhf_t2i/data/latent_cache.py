"""Tensors that take long to make and never change, on disk: made once, and refused if another model made them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class TensorCache:
    """Tensors by key, in the safetensors files of a folder; each file says which model made it.

    Files are written whole or not at all, so several processes may add to one folder, and a killed one can go on.
    """

    def __init__(self, folder: Path, *, part: str, fingerprint: str) -> None:
        """Look into a folder, which need not be there; ValueError if its tensors were made by another model.

        `part` says in messages what makes them, and `fingerprint` which one it is.
        """
        self.folder, self.part, self.fingerprint = folder, part, fingerprint
        self._file_of: dict[str, Any] = {}
        self._opened: set[Path] = set()
        self._open_new()

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Which of these are not there, each once."""
        self._open_new()
        return [key for key in dict.fromkeys(keys) if key not in self._file_of]

    def get(self, keys: Sequence[str]) -> Tensor:
        """The tensors of these keys, stacked; KeyError for one that is not there."""
        return torch.stack([self._file_of[key].get_tensor(key) for key in keys])

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write new tensors, in one file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        part = path.with_suffix(".part")
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, part, metadata={"made_by": self.fingerprint})
        part.replace(path)
        self._open_new()

    def _open_new(self) -> None:
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._opened):
            try:
                file: Any = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"The cache file {path} cannot be read ({error}); remove it.") from error
            made_by = (file.metadata() or {}).get("made_by", "unknown")
            if made_by != self.fingerprint:
                raise ValueError(
                    f"The cache {self.folder} was made with another {self.part} (its fingerprint is {made_by[:12]}, "
                    f"this one's {self.fingerprint[:12]}). Remove the folder, or name another cache_folder."
                )
            self._opened.add(path)
            self._file_of |= dict.fromkeys(file.keys(), file)
