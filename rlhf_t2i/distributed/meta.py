"""Networks that are built before there is memory for their weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn


def without_weights() -> AbstractContextManager[None]:
    """Return a context in which modules are built with parameters on the meta device, and with real buffers."""
    return init_empty_weights()


def has_no_weights(network: nn.Module) -> bool:
    """True for a network that was built without weights, and has not been given any."""
    return any(parameter.is_meta for parameter in network.parameters())


def placed(network: Any, device: torch.device) -> Any:
    """Move a network to a device, unless it has no weights, which cannot be moved."""
    return network if has_no_weights(network) else network.to(device)
