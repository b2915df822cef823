"""Hash of a frozen part of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def fingerprint_of(modules: Sequence[nn.Module], *, dtype: torch.dtype, settings: Sequence[Any]) -> str:
    """Return a hash of networks' weights, their precision, and settings that JSON can hold."""
    digest = hashlib.sha256(json.dumps([str(dtype), settings], sort_keys=True).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
