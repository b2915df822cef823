"""On-disk cache of tensors that a frozen part of one model made."""

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
    """Tensors by key in the safetensors files of a folder; the metadata of each file holds the model's fingerprint.

    Files are written atomically, so several processes may add to one folder, and a run may be killed at any time.
    """

    def __init__(self, folder: Path, *, part: str, fingerprint: str) -> None:
        """Open a folder, which need not exist.

        `part` names the part of the model in messages, `fingerprint` identifies its weights. Raises ValueError if the
        tensors of the folder are of another model.
        """
        self.folder, self.part, self.fingerprint = folder, part, fingerprint
        self._file_of: dict[str, Any] = {}
        self._opened: set[Path] = set()
        self._open_new()

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Return the keys that are not cached, without duplicates."""
        self._open_new()
        return [key for key in dict.fromkeys(keys) if key not in self._file_of]

    def get(self, keys: Sequence[str]) -> Tensor:
        """Return the tensors of these keys, stacked; KeyError for a key that is not cached."""
        return torch.stack([self._file_of[key].get_tensor(key) for key in keys])

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write new tensors to one file."""
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
                    f"this one's {self.fingerprint[:12]}). Remove the folder, or name another one."
                )
            self._opened.add(path)
            self._file_of |= dict.fromkeys(file.keys(), file)
