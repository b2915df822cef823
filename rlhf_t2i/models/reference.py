"""The reference model of a training of all weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def frozen_copy(network: nn.Module, *, dtype: torch.dtype) -> nn.Module:
    """Return a frozen copy of a network whose linear layers and convolutions are in `dtype`.

    Autocast would convert these for every forward pass, and only these: the copy computes the same bits as a float32
    one. It is made without one.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    converted = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
        for layer in layers
        for parameter in layer.parameters(recurse=False)
    }
    return copy.deepcopy(network, converted).requires_grad_(False)  # takes those in place of copies of its own
