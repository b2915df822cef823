"""A plan as text: parameters, memory, cost, hours on some GPUs, and what to switch if it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_t2i.output.text_table import align
from rlhf_t2i.plan.types import Plan

_GIGA, _TERA = 1e9, 1e12
SPARE = 0.9
"""Usable part of a GPU's memory: kernels, fragmentation and the driver take the rest."""
ACHIEVED = 0.8
"""Measured rate of large bfloat16 matrix products over the nominal one, on an H200."""
SHARES = {"stable_diffusion": 0.19, "sdxl": 0.22, "sd3": 0.22, "flux": 0.40}
"""Measured share of that matrix rate in sampling and updates by model family, on an H200; 0.2 for others."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: its GB of memory, as it is sold, and its nominal dense bfloat16 TFLOP/s."""

    name: str
    memory: int | float
    rate: int | float


GPUS = (Gpu("RTX 4090", 24, 165), Gpu("A100", 80, 312), Gpu("H100", 80, 989), Gpu("H200", 141, 989))


def hours(plan: Plan, gpu: Gpu) -> float:
    """Return the hours of all steps on a kind of GPU, one for each process."""
    rate = gpu.rate * _TERA * ACHIEVED * SHARES.get(plan.module, 0.2)
    return plan.num_steps * plan.flops / rate / 3600


def usable_bytes(memory: int | float) -> float:
    """Return the usable bytes of a GPU that is sold with `memory` GB, each of which is 2^30 bytes.

    GDDR memory with ECC (L4, A10, L40S) has up to 6 % less.
    """
    return SPARE * memory * 2**30


def fits(peak: int | float, memory: int | float) -> bool:
    """True if a peak in bytes is within the usable memory of a GPU of so many GB."""
    return peak <= usable_bytes(memory)


def remedies(plan: Plan, config: Any) -> list[str]:
    """Return the options that save memory and are not set, in the order in which to try them."""
    has = {name: getattr(config, name) for name in vars(config)}
    trains_lora = getattr(config, "trains_lora", True)
    accumulated = f" --accumulation_steps {2 * has['accumulation_steps']}" if "accumulation_steps" in has else ""
    switches = [
        ("--offload_text_encoders true", has.get("offload_text_encoders") is False),
        ("--cache_embeddings FOLDER", "cache_embeddings" in has and has["cache_embeddings"] is None),
        ("--gradient_checkpointing true", has.get("gradient_checkpointing") is False),
        (f"--microbatch_size {has['microbatch_size'] // 2}{accumulated}", has["microbatch_size"] > 1),
        ("--quantization int8", has.get("quantization", "") is None and trains_lora and plan.mode in ("single", "ddp")),
        (f"--max_pixels {(has.get('max_pixels') or 0) // 2}", bool(has.get("max_pixels"))),
        ("--lora_rank 16", not trains_lora),
        ("accelerate_configs/deepspeed_zero2.yaml or fsdp2.yaml", not trains_lora),
    ]
    return [switch for switch, helps in switches if helps]


def plan_text(plan: Plan, config: Any) -> str:
    """Return the plan as plain text."""
    held = [f"{name} {size / _GIGA:.2f} GB" for name, size in plan.state.items()]
    share, giga = SHARES.get(plan.module, 0.2), f"{plan.peak / _GIGA:.1f} GB"
    weights = sum(size for _, _, size in plan.parts.values())
    rest = plan.peak - weights - sum(plan.state.values())
    worst = max(plan.peaks, key=lambda phase: plan.peaks[phase])
    is_split = bool(plan.records) and worst == "update" and plan.mode != "zero3"  # which holds a part of the weights
    calls = f"{plan.denoiser_calls:,.0f} denoiser calls, " if plan.denoiser_calls else ""
    measured = "shares measured on an H200" if plan.module else "an assumption: reward training was not measured"
    lines = [
        f"Plan of {plan.recipe} with {plan.model}, {plan.mode}, processes: {plan.processes}. Nothing was run.",
        "",
        *align([("part", "learning", "frozen", "GB"), *(
            (name, f"{learned:,}", f"{frozen:,}", f"{size / _GIGA:.2f}")
            for name, (learned, frozen, size) in plan.parts.items()
        )]),
        "",
        f"device memory  {giga} at its peak, in the phase {worst}; "
        + ", ".join(f"{phase} {peak / _GIGA:.1f}" for phase, peak in plan.peaks.items()),
        f"held always    {', '.join([f'weights {weights / _GIGA:.2f} GB' if is_split else 'weights', *held])}"
        + (f"; activations and batches {rest / _GIGA:.2f} GB at the peak" if is_split else ""),
        f"main memory    {plan.host / _GIGA:.1f} GB a process while weights are loaded, and about 1.5 GB of libraries",
        f"one step       {plan.records or f'{plan.images:,} images'}; each process: {calls}{plan.flops / _TERA:,.1f} "
        f"TFLOP, at most {plan.bytes / _GIGA:,.0f} GB read and written by operations",
        *([f"assumed        {'; '.join(plan.assumed)}"] if plan.assumed else []),
        f"not counted    {'; '.join(plan.left_out)}",
        "",
        *align([("GPU", "usable GB", "fits", f"hours for {plan.num_steps:,} steps"), *(
            (
                f"{gpu.name}, {gpu.memory:g} GB", f"{usable_bytes(gpu.memory) / _GIGA:.1f}",
                "yes" if fits(plan.peak, gpu.memory) else "no", f"{hours(plan, gpu):.1f}",
            )
            for gpu in GPUS
        )]),
        f"Hours are computed at {share:g} of {ACHIEVED:g} of the nominal bfloat16 rate, {measured}.",
    ]  # fmt: skip
    if not all(fits(plan.peak, gpu.memory) for gpu in GPUS):
        lines.append(f"If it does not fit, in this order: {', '.join(remedies(plan, config)) or 'more processes'}.")
    return "\n".join(lines) + "\n"
