"""Options of attention, and of memory and speed in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.by_model import by_model


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(Settings, group="system"):
    """Attention backend."""

    attention: Literal["auto", "flash", "efficient", "math", "cudnn"] = "auto"
    """Backend of torch's scaled-dot-product attention: auto is flash, efficient or math, whichever torch prefers for
    the inputs; another is used where it can be, and math elsewhere. cuDNN's, whose backward pass can give gradients
    that are not finite (seen with FLUX.1), is used only on request."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemorySettings(Settings, group="system"):
    """Trades of speed for memory in training."""

    gradient_checkpointing: bool = by_model(False, family="gradient_checkpointing")
    """Recompute activations in the backward pass instead of storing them: less memory, about a third slower."""
    offload_text_encoders: bool = False
    """Keep the text encoders in main memory except while they encode new prompts."""
    cache_embeddings: str | None = None
    """Folder for encoded prompts, for all runs with one model and precision: text encoders are loaded only for prompts
    that it lacks, before the first step. Prompts with a reference image are not kept; null encodes in each run."""
    gather_for_sampling: bool = True
    """Under ZeRO-3 and FSDP2: gather all weights once for sampling, which is fast; false gathers them layer by layer in
    every forward pass, in less memory."""


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(Settings, group="system"):
    """Faster kernels in training."""

    compile: bool = False
    """Compile the repeated blocks of the denoiser by torch.compile: minutes at the start for each number of images in a
    forward pass, for steps that may then be faster. On one process or under DDP; a CPU needs a C++ compiler."""
    channels_last: bool = False
    """Store the weights of a U-Net's convolutions with channels as the last dimension in memory: faster or slower,
    depending on the device and the model (benchmarks/levers.py). On one process or under DDP."""
