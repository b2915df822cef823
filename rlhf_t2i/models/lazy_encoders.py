"""Text encoders that are loaded when a prompt has to be encoded, for runs whose prompts may all be in a cache."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PER_FILE = 64
"""Prompts that are encoded, and written to the store, at a time."""
_SMALL = 1 << 22
"""Bytes up to which a file's content is hashed."""


class LazyEncoder(nn.Module):
    """A text encoder that is loaded by its first call, onto the device that it was moved to before."""

    def __init__(self, load: Callable[[], Any], *, config: Any) -> None:
        super().__init__()
        self.config = config
        self._load, self._device = load, torch.device("cpu")
        self._loaded: list[Any] = []  # no submodule, whose weights would be this module's

    @property
    def network(self) -> Any:
        """The network, loaded if it was not."""
        if not self._loaded:
            self._loaded.append(self._load().requires_grad_(False).eval().to(self._device))
        return self._loaded[0]

    def release(self) -> None:
        """Let go of the weights; the next call loads them again."""
        self._loaded.clear()

    def to(self, *args: Any, **kwargs: Any) -> LazyEncoder:
        """Move the network, now or when it is loaded, to a device."""
        self._device = torch.device(args[0] if args else kwargs["device"])
        for network in self._loaded:
            network.to(self._device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)


def encode_and_release(policy: Any, prompts: Sequence[str], *, tick: Callable[[], None]) -> int:
    """Encode the prompts that a policy's store lacks, and let go of its text encoders; return how many they were.

    `tick` is called between batches.
    """
    missing = policy.prompt_store.missing(list(dict.fromkeys(prompts)))
    for start in range(0, len(missing), _PER_FILE):
        policy.encode(missing[start : start + _PER_FILE])
        tick()
    for encoder in policy.text_encoders:
        encoder.model.release()
    return len(missing)


def return_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps that of weights under 32 MB, 1.5 GB for SDXL's text encoders."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def fingerprint_of_files(folder: Path, parts: Iterable[str], *, settings: Any) -> str:
    """Return a hash of the files of a pipeline's parts, without reading large ones, and of settings.

    A large file is taken for another one if its size or its time of change is another.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file()):
        stat = file.stat()
        version = f"{stat.st_size} {stat.st_mtime_ns}".encode() if stat.st_size > _SMALL else file.read_bytes()
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + version + b"\0")
    return digest.hexdigest()
