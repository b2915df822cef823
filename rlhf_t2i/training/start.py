"""The weights that a run starts from, and the reference model that it is compared with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_t2i.output.run_folder import START, read_config, run_of
from rlhf_t2i.settings.groups import TrainerConfig
from rlhf_t2i.training.run import Run


def set_start(policy: Any, config: TrainerConfig, run: Run, *, keep_reference: bool, lora_dropout: float) -> None:
    """Load init_weights and init_lora into a policy, choose what is trained, and keep the reference model if asked to.

    The LoRA that a run starts from is copied into its folder, where a resumed run finds it. Raises FileNotFoundError or
    ValueError for weights that do not fit the model.
    """
    from rlhf_t2i.models.kohya import check_kohya  # takes seconds
    from rlhf_t2i.models.lora import LoraConfiguration, set_lora_dropout, uses_dora
    from rlhf_t2i.models.warm_start import start_from_lora, start_from_weights

    is_base = config.reference_model == "base"
    if config.init_weights:
        keep_base = keep_reference and is_base
        start_from_weights(policy, Path(config.init_weights), model=config.model, keep_base=keep_base)
        run.print(f"start     denoiser of {config.init_weights}")
    if config.init_lora is None:
        lora = LoraConfiguration.from_options(asdict(config))
        policy.set_trainable(lora, keep_reference=keep_reference, seed=config.seed)
    else:
        copy = run.folder / START
        source = Path(config.init_lora) if run.resumed_from is None else copy
        _check_denoiser_of(source, config)
        rank, alpha = start_from_lora(
            policy, source, model=config.model, rank=config.lora_rank, alpha=config.lora_alpha,
            keep_start=keep_reference and not is_base,
        )  # fmt: skip
        if run.is_main and run.resumed_from is None:
            policy.export(copy, policy.trainable)
        run.print(f"start     LoRA {config.init_lora} (rank {rank}, alpha {alpha:g})")
    if lora_dropout:
        set_lora_dropout(policy.network, lora_dropout)
    if config.export_format == "both":
        check_kohya(policy)
    if uses_dora(policy.network) and (run.mode in ("zero3", "fsdp2") or config.lora_scale != 1):
        raise ValueError(
            f"A DoRA needs whole weights and has no lora_scale: the strategy is {run.mode} and lora_scale is "
            f"{config.lora_scale}; take DDP, ZeRO-1 or ZeRO-2, and a lora_scale of 1."
        )
    if keep_reference:
        warm = config.init_lora or config.init_weights
        run.print(f"reference {config.model}{f', started from {warm}' if warm and not is_base else ''}")


def _check_denoiser_of(lora: Path, config: TrainerConfig) -> None:
    """Raise ValueError if a LoRA's run trained it on other denoiser weights than this run starts from."""
    run = run_of(lora)
    weights = read_config(run).get("init_weights") if run is not None else None
    if weights is not None and weights != config.init_weights:
        raise ValueError(
            f"The LoRA {str(lora)!r} was trained on the denoiser {weights}; give --init_weights {weights} too."
        )
