"""Frozen weights in 8 or 4 bits (torchao, bitsandbytes)."""

# bitsandbytes has no usable types.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["int8", "nf4"]


def quantize(network: Any, kind: Quantization, *, device: torch.device, dtype: torch.dtype) -> None:
    """Store the weights of a frozen network's linear layers in 8 or 4 bits on `device`, in place; compute in `dtype`.

    int8 has one scale for each output of a layer, rounded symmetrically (torchao's weight-only int8); nf4 has one for
    each 64 weights, rounded to the quantiles of a normal distribution (QLoRA, arXiv:2305.14314, by bitsandbytes). Left
    as they are: convolutions, embeddings, LoRA adapters, and layers that the network declares to need float32 (T5's
    `wo`). Raises ModuleNotFoundError without the extra `quant`.
    """
    check_installed(kind)
    exact = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    chosen = [
        name
        for name, module in network.named_modules()
        if type(module) is nn.Linear and ".lora_" not in name and not exact & {*name.split(".")}
    ]
    if kind == "int8":
        _to_int8(network, set(chosen), device)
        return
    for name in chosen:
        parent, _, last = name.rpartition(".")
        layer = _in_4_bits(network.get_submodule(name), dtype)
        setattr(network.get_submodule(parent), last, layer.to(device))  # which rounds its weights
    network.is_loaded_in_4bit = True  # by this peft knows how to adapt the layers


def num_elements(parameter: Tensor) -> int:
    """Return the number of weights in a parameter, of which bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def check_installed(kind: Quantization) -> None:
    """Raise ModuleNotFoundError, with the command that installs it, if the library of a format is missing."""
    try:
        with _quiet_import():
            import_module("torchao.quantization" if kind == "int8" else "bitsandbytes")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; quantization {kind} needs: pip install 'rlhf-t2i[quant]'") from error


def _to_int8(network: nn.Module, chosen: set[str], device: torch.device) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(network, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in chosen, device=device)


def _in_4_bits(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """Return bitsandbytes' layer in place of a linear layer, with weights that are rounded when it is moved."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kind: dict[str, Any] = {"compress_statistics": False, "quant_type": "nf4"}
    new = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta", **kind)
    new.weight = Params4bit(layer.weight.data, requires_grad=False, module=new, **kind)
    new.bias = layer.bias
    # Else processors with AVX512-BF16 repack the weights in a forward pass without gradients, into a form that has no
    # backward pass, needs outputs in multiples of 32, and gives other predictions than the update's forward pass.
    new.support_avx512bf16_for_cpu = False
    return new


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Silence the log of what torchao cannot load and of what it registers in torch."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
