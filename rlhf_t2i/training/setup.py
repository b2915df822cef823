"""Load a policy and set up its trainer on the processes of `accelerate launch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i.data.latent_cache import TensorCache
from rlhf_t2i.data.text_cache import StoredPrompts
from rlhf_t2i.distributed.placement import layout_of, placement_config, placement_table
from rlhf_t2i.distributed.processes import make_engine, watch_processes
from rlhf_t2i.distributed.types import Engine
from rlhf_t2i.models.lazy_encoders import encode_and_release, return_freed_memory
from rlhf_t2i.output.run_folder import update_run_info
from rlhf_t2i.prompt_rows import EditPrompt
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.settings.groups import TrainerConfig
from rlhf_t2i.training.checkpoint import Checkpoints
from rlhf_t2i.training.early_stop import EarlyStop
from rlhf_t2i.training.ema import Decay, MovingAverage, decay_after_a_start
from rlhf_t2i.training.evaluation import evaluation_set
from rlhf_t2i.training.fingerprints import record_fingerprints
from rlhf_t2i.training.prompt_sets import PromptSets
from rlhf_t2i.training.run import Run, start_run
from rlhf_t2i.training.start import set_start
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Policy

NUM_MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1, "adamw_8bit": 0.5}
"""Optimiser state of a weight, in float32 numbers."""


def make_trainer(
    config: TrainerConfig,
    prompts: PromptSets,
    *,
    recipe: str,
    report: Callable[[Path], Path],
    keep_reference: bool = False,
    keep_initial_weights: bool = False,
    sampling_ema: Decay | None = None,
    lora_dropout: float = 0.0,
    extra: Sequence[Any] = (),
) -> Trainer:
    """Load the policy, shard it as `accelerate launch` says, and resume the run if asked to. Collective.

    `keep_reference` keeps what `policy.as_reference` needs; `sampling_ema` adds the average "sampling". Checkpoints
    also hold the state_dict of each of `extra`. Raises what `load_rewards`, `start_run`,
    `record_fingerprints`, `load_policy` and `set_start` do.
    """
    rewards = load_rewards(config.evaluation_rewards)
    evaluation = evaluation_set(
        prompts.evaluation, num_images=config.num_evaluation_images, seed=config.evaluation_seed
    )
    try_rewards(rewards, prompts.evaluation)  # those that are trained on are among them
    single = rewards.without_groups()
    if config.early_stop_reward not in (None, *(reward.name for reward in single.rewards)):
        rewards.refuse_groups("early_stop_reward needs scores that differ between models")
    # Twice as long, so that who stands still is named before its partners' collective calls fail.
    run = start_run(asdict(config), recipe=recipe, collective_timeout=2 * config.stall_timeout)
    record_fingerprints(run, prompts)
    _record_prompts(run, prompts)
    run.print(config.defaults_text())
    policy = _load_with_prompts(config, prompts, run)
    set_start(policy, config, run, keep_reference=keep_reference, lora_dropout=lora_dropout)
    if config.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    _speed_up(policy, config, run)
    num_averages = (config.ema_decay > 0) + (sampling_ema is not None)
    engine = _engine(policy, run, config, num_averages=num_averages)
    averages = {"ema": MovingAverage(engine.weights, decay=decay_after_a_start(config.ema_decay))}
    if sampling_ema is not None:
        averages["sampling"] = MovingAverage(engine.weights, decay=sampling_ema)
    initial = {name: weight.detach().clone() for name, weight in engine.weights.items() if keep_initial_weights}
    early_stop = EarlyStop(config.early_stop_reward, patience=config.patience) if config.early_stop_reward else None
    checkpoints = Checkpoints(
        run, engine, keep=config.keep_checkpoints,
        copies={n: a.average for n, a in averages.items()} | ({"best": early_stop.weights} if early_stop else {}),
        extra=[*averages.values(), *extra, *([early_stop] if early_stop else [])],
    )  # fmt: skip
    step = checkpoints.restore()
    run.watch = watch_processes(run.accelerator, seconds=config.stall_timeout)
    return Trainer(
        config, run, policy, engine, averages, initial, checkpoints, single, evaluation, prompts.title, early_stop,
        report, step,
    )  # fmt: skip


def _load_with_prompts(config: TrainerConfig, prompts: PromptSets, run: Run) -> Any:
    """Load the model; with a cache of prompts encode them first, without a denoiser in memory.

    Prompts with a reference image are not cached on disk but in the policy, which then needs its denoiser at once.
    """
    if not config.cache_embeddings:
        return _load(config, run)
    edits = any(isinstance(prompt, EditPrompt) for prompt in (*prompts.training, *prompts.evaluation))
    policy = _load(config, run, only_encodes=not edits)
    _encode_prompts(policy, prompts, run)
    if edits:
        return policy
    del policy
    return_freed_memory()
    return _load(config, run)


def _load(config: TrainerConfig, run: Run, *, only_encodes: bool = False) -> Any:
    """Load the model; ValueError for quantised weights with a strategy that cannot exchange them."""
    from rlhf_t2i.models.load import load_policy  # takes seconds

    if config.quantization and run.mode not in ("single", "ddp"):
        raise ValueError(
            f"quantization is {config.quantization}; with {run.mode}, which exchanges plain weights, it must be null. "
            f"Train quantised models on one process or under DDP: what a LoRA's optimiser holds is small."
        )
    policy = load_policy(
        config.model, device=run.device, dtype=run.dtype, resolution=config.image_size, whole=not config.trains_lora,
        offload_text_encoders=config.offload_text_encoders, quantization=config.quantization,
        complex_human_instruction=config.complex_human_instruction,
        prompt_store=partial(_prompt_store, Path(config.cache_embeddings)) if config.cache_embeddings else None,
        only_encodes=only_encodes,
    )  # fmt: skip
    if run.is_main:
        update_run_info(run.folder, {"image_size": list(policy.image_size)})
    return policy


def _speed_up(policy: Any, config: TrainerConfig, run: Run) -> None:
    """Compile the denoiser and choose its memory layout, as asked; ValueError with a strategy that shards weights."""
    from rlhf_t2i.models.speed import compile_blocks, to_channels_last  # takes seconds

    for name in ("compile", "channels_last"):
        if getattr(config, name) and run.mode not in ("single", "ddp"):
            raise ValueError(f"{name} is true; with {run.mode}, which shards the weights, it must be false.")
    if config.channels_last:
        to_channels_last(policy.network)
    if config.compile:
        run.print(f"compile   {compile_blocks(policy.network)} blocks, each at its first call")


def _prompt_store(folder: Path, fingerprint: str) -> StoredPrompts:
    return StoredPrompts(TensorCache(folder, part="text encoder", fingerprint=fingerprint))


def _encode_prompts(policy: Any, prompts: PromptSets, run: Run) -> None:
    """Encode this process's share of the prompts that the cache lacks, and let go of the text encoders. Collective."""
    own = list(dict.fromkeys([*prompts.training, *prompts.evaluation]))[run.rank :: run.num_processes]
    count = encode_and_release(policy, own, tick=run.tick)
    total = int(run.gather(torch.tensor([count], device=run.device)).sum())
    run.print(f"embeddings  {total:,} prompts encoded, the others read from the cache; text encoders are not in memory")


def _record_prompts(run: Run, prompts: PromptSets) -> None:
    """Print which prompts are used for what, and record it in the run folder."""
    run.print(f"prompts   {prompts.text()}")
    if run.is_main:
        prompts.save(run.folder)
        counts = {"count": len(set(prompts.evaluation)), "trained_on": prompts.num_shared, "title": prompts.title}
        update_run_info(run.folder, {"evaluation_prompts": counts})


def _engine(policy: Policy, run: Run, config: TrainerConfig, *, num_averages: int) -> Engine:
    """Hand the policy's network and an optimiser to the processes, after printing how much memory each will need.

    Raises ValueError if DeepSpeed's config and the recipe disagree.
    """
    optimizer = _optimizer(policy, run, config)
    layout = layout_of(
        policy.denoiser, run.mode, processes=run.num_processes, num_averages=num_averages,
        reference=policy.reference is not None, num_moments=NUM_MOMENTS[config.optimizer],
    )  # fmt: skip
    precision, microbatch_size = run.accelerator.mixed_precision, config.microbatch_size
    run.print(placement_table(layout, precision=precision, microbatch_size=microbatch_size))
    if (images := config.images_per_optimizer_step) is not None:
        run.print(f"update      {images} images in one optimiser step; their gradients accumulate over microbatches")
    if run.is_main:
        placement = placement_config(layout, precision=precision, microbatch_size=microbatch_size)
        update_run_info(run.folder, {"trainable_parameters": layout.trainable, "placement": placement})
    engine = make_engine(
        run.accelerator, run.mode, policy.denoiser, optimizer,
        max_gradient_norm=config.max_gradient_norm, microbatch_size=microbatch_size, log=run.print,
    )  # fmt: skip
    policy.denoiser = engine.network
    if policy.reference is not None:
        policy.reference = engine.shard_frozen(policy.reference)
    return engine


def _optimizer(policy: Policy, run: Run, config: TrainerConfig) -> torch.optim.Optimizer:
    """Return the optimiser of the trained weights; ValueError for one that the distribution strategy does not have."""
    weights, decay = policy.trainable.values(), config.weight_decay
    betas, epsilon = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    match config.optimizer:
        case "adamw":
            fused = {"fused": True} if _fuses(run) else {}
            return torch.optim.AdamW(weights, betas=betas, eps=epsilon, weight_decay=decay, **fused)
        case "adam":
            return torch.optim.Adam(weights, betas=betas, eps=epsilon, weight_decay=decay)
        case "sgd":
            if run.mode.startswith("zero"):
                raise ValueError("optimizer is sgd; with ZeRO it must be adamw or adam, whose state DeepSpeed shards.")
            return torch.optim.SGD(weights, momentum=config.adam_beta1, weight_decay=decay)
        case "adamw_8bit":
            if run.mode not in ("single", "ddp"):
                raise ValueError(f"optimizer is adamw_8bit; with {run.mode}, which shards its state, it must be adamw.")
            return _adamw_in_8_bits()(weights, betas=betas, eps=epsilon, weight_decay=decay)


def _fuses(run: Run) -> bool:
    """Return True where one kernel takes the whole step of AdamW, without copies of gradients in memory.

    With fp16 the kernel itself would skip a step, which accelerate then does not notice.
    """
    return run.device.type == "cuda" and run.mode in ("single", "ddp") and run.dtype != torch.float16


def _adamw_in_8_bits() -> Any:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; the optimizer adamw_8bit needs: pip install 'rlhf-t2i[quant]'") from error
    return AdamW8bit
