"""Start of training from weights that exist: a LoRA that goes on, or a full denoiser in place of the model's own."""

from __future__ import annotations

from pathlib import Path

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lora import ADAPTER, keep_lora
from rlhf_t2i.models.lora_files import LoraFile, find_lora, load_lora, read_lora
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.models.weights import check_run, denoiser_folder, load_denoiser


def start_from_weights(policy: DiffusionPolicy, source: Path, *, model: str, keep_base: bool) -> None:
    """Replace the denoiser of `model` by that of a run folder, or of a `unet` or `transformer` folder.

    With `keep_base` the model's own denoiser is the reference. Raises FileNotFoundError or ValueError for a folder
    without a denoiser of this model.
    """
    check_run(source, model=model)
    folder = denoiser_folder(source, policy.component)
    if folder is None:
        raise FileNotFoundError(
            f"{str(source)!r} holds no full denoiser. Give a run folder that has {policy.component!r}, or that folder."
        )
    if keep_base:
        policy.keep_reference()
    with only_errors():
        load_denoiser(policy.network, folder, model=model)


def start_from_lora(
    policy: DiffusionPolicy, source: Path, *, model: str, rank: int | None, alpha: float | None, keep_start: bool
) -> tuple[int, float]:
    """Go on training the LoRA of a run folder, a folder, a file or a Hub id; return its rank and alpha.

    With `keep_start` the LoRA as it is now is the reference, otherwise the denoiser without it. Raises
    FileNotFoundError or ValueError for a LoRA that does not fit `model`, that trains text encoders too, or that has
    another rank or alpha than the given ones (None is any).
    """
    check_run(source, model=model)
    file = find_lora(source)
    if file is None:
        raise FileNotFoundError(f"{str(source)!r} holds no LoRA. Give a run folder that has 'lora', or a LoRA file.")
    lora = read_lora(file, type(policy), policy.network)
    _load_trainable(policy, lora, model=model)
    if lora.other_parts:
        raise ValueError(
            f"The LoRA {str(file)!r} has weights of {', '.join(lora.other_parts)}, which training leaves alone; give "
            f"one of the {policy.component} only."
        )
    config = policy.network.peft_config[ADAPTER]
    for name, given, found in (("lora_rank", rank, config.r), ("lora_alpha", alpha, float(config.lora_alpha))):
        if given is not None and given != found:
            raise ValueError(f"{name} is {given}, but the LoRA {str(file)!r} has {found}; leave {name} out.")
    if keep_start:
        keep_lora(policy.network)
    return config.r, float(config.lora_alpha)


def _load_trainable(policy: DiffusionPolicy, lora: LoraFile, *, model: str) -> None:
    """Freeze the denoiser and load a LoRA into it, to be trained."""
    network = policy.network.requires_grad_(False)
    with only_errors():
        network.to(policy.dtype)
        load_lora(lora, network, model=model)
    network.set_adapter(ADAPTER)
