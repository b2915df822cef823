"""Faster kernels for a denoiser in training: compiled blocks and the channels-last memory layout."""

# torch.compile and diffusers have no usable types.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_MOST_GRAPHS = 64
"""Graphs that torch keeps of one block: one for each shape, with and without a LoRA."""


def to_channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions, and so compute, with channels as the last dimension in memory.

    ValueError for a network whose convolutions are not most of its layers, such as a transformer.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    if convolutions < 2:
        raise ValueError(
            f"channels_last is true; it must be false for a {type(network).__name__}, which is no U-Net and has "
            f"{convolutions} convolutions."
        )
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def compile_blocks(network: nn.Module, *, backend: str = "inductor") -> int:
    """Compile each repeated block of a network in place at its first call; return how many there are.

    Every shape is compiled once, as fixed. Forward passes without gradient run the graphs of those with one, since
    graphs of two kinds round differently, and an update could then not replay its rollout exactly; what they save for a
    backward pass is let go with the output. ValueError for a network that names no repeated blocks.
    """
    kind: Any = type(network)
    names = getattr(kind, "_repeated_blocks", None) or getattr(kind, "_no_split_modules", None) or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"compile is true; it must be false for a {kind.__name__}, whose blocks are not known.")
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)
    network.forward = _with_graph(network.forward)
    return len(blocks)


def _with_graph(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward pass that always builds a graph, and lets go of it if no gradient is asked for."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with torch.enable_grad():
            output = forward(*args, **kwargs)
        return tree_map_only(Tensor, Tensor.detach, output)

    return run
