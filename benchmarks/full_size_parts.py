"""Rows of full_size.py that measure parts of a training on a device: replay, profile, levers of speed, scores."""

# diffusers and torch's profiler have no usable types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.full_size_models import random_pipeline, random_reward_model
from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.passed import PassedObjects, passing
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.types import Sampler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
PROMPT = "a red circle on a blue background"
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """Two steps of a recipe on a model."""

    recipe: str
    model: str
    resolution: int
    images: int
    guidance_scale: float
    checkpointing: bool = False
    microbatch_size: int = 8
    precision: str = "bf16"
    quantization: str | None = None
    num_denoising_steps: int = 4
    num_steps: int = 2
    """Training steps; the first one also warms up."""
    without: tuple[str, ...] = ()
    """Parts of the pipeline that are left out."""


@dataclass
class Machine:
    """The device, its matrix rate once that is known, and the plans to compare with."""

    device: torch.device
    plans: dict[str, dict[str, float]]
    rate: float = 0.0
    """Operations a second of large matrix products."""

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset(self) -> None:
        """Free what can be freed, and forget the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """Return the most bytes since `reset`; None on a CPU."""
        return float(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else None

    def share(self, flops: float | None, seconds: float) -> float | None:
        """Return the share of the matrix rate at which so many operations took so long; None if one is unknown."""
        return flops / seconds / self.rate if flops and seconds and self.rate else None

    def seconds(self, work: Callable[[], Any], *, repeats: int = 3) -> float:
        """Return the mean seconds of a call, after one that warms up."""
        work()
        self.synchronise()
        start = time.monotonic()
        for _ in range(repeats):
            work()
        self.synchronise()
        return (time.monotonic() - start) / repeats


def rate_row(machine: Machine) -> Rows:
    """Measure the rate of matrix products, in bfloat16 on a GPU."""
    on_gpu = machine.device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a = torch.randn(side, side, device=machine.device, dtype=dtype)
    machine.rate = 2 * side**3 / machine.seconds(lambda: a @ a, repeats=20)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    yield {"device": name, "torch": torch.__version__, "tflops": machine.rate / 1e12}


def policy_of(machine: Machine, training: Training, dtype: torch.dtype) -> Any:
    """Return a random model with a LoRA, as a recipe loads it."""
    pipeline = random_pipeline(training.model, device=machine.device, dtype=dtype, without=training.without)
    with passing(PassedObjects({training.model: pipeline}, {}, {})):
        policy = load_policy(training.model, device=machine.device, dtype=dtype, resolution=training.resolution)
    policy.set_trainable(LoraConfiguration(4), keep_reference=False, seed=0)
    return policy


def sampler_of(policy: Any, training: Training, *, num_steps: int = 4) -> Sampler:
    """Return a sampler with noise in every step."""
    schedule = policy.schedule(num_steps)
    return Sampler(schedule, stochastic(schedule, eta=1.0), training.guidance_scale)


@torch.no_grad()
def replay_rows(machine: Machine, trainings: Mapping[str, Training], dtypes: Sequence[str]) -> Rows:
    """Measure the largest log-ratio of unchanged weights, with as many rows as in sampling and with others."""
    for (name, training), precision in ((item, precision) for item in trainings.items() for precision in dtypes):
        policy, count = policy_of(machine, training, DTYPES[precision]), training.microbatch_size
        sampler = sampler_of(policy, training)
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        prompts = [PROMPT] * count
        _, found = rollout(policy, prompts, sampler=sampler, generators=generators, microbatch_size=count)
        mixed = torch.arange(count) % sampler.schedule.num_steps
        cases = {"equal rows": (count, mixed.clamp_max(0)), "half the rows": (count // 2, mixed.clamp_max(0))}
        cases |= {"mixed steps": (count, mixed), "mixed steps, half the rows": (count // 2, mixed)}
        errors = dict[str, float]()
        for how, (rows, steps) in cases.items():
            i, t = torch.arange(rows), steps[:rows]
            inputs = found.latents[i, t], t, found.conditioning[i]
            log_probs = mean_log_prob(transition_at(policy, *inputs, sampler=sampler), found.latents[i, t + 1])
            errors[how] = float((log_probs - found.log_probs[i, t]).abs().max())
        yield {"model": name, "precision": precision, **errors}
        del policy, found
        machine.reset()


def passes_of(machine: Machine, policy: Any, training: Training) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a forward pass without gradient, as in sampling, and a forward and backward pass, as in an update."""
    sampler, count = sampler_of(policy, training), training.microbatch_size
    generators = [torch.Generator().manual_seed(0)]
    latents, steps = policy.initial_noise(generators, copies=count), torch.zeros(count, dtype=torch.int64)
    conditioning = policy.encode([PROMPT] * count)

    def forward() -> Tensor:
        return transition_at(policy, latents, steps, conditioning, sampler=sampler).mean

    return torch.no_grad()(forward), lambda: forward().square().mean().backward()


def profile_rows(machine: Machine, training: Training) -> Rows:
    """List the operations that take the most time of a sampling step and of an update, with their shares."""
    policy = policy_of(machine, training, DTYPES[training.precision])
    on_gpu = machine.device.type == "cuda"
    for name, work in zip(("sampling step", "update"), passes_of(machine, policy, training), strict=True):
        seconds = machine.seconds(work, repeats=1)
        with torch.profiler.profile(with_stack=False) as profile:
            work()
            machine.synchronise()
        times = {
            event.key: float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            for event in profile.key_averages()
        }
        total, most = sum(times.values()), sorted(times, key=lambda key: -times[key])[:12]
        launches = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
        yield {
            "of": name, "seconds": seconds, "busy_share": total / 1e6 / seconds, "launches": launches,
            "operations": {key[:80]: round(times[key] / total, 3) for key in most},
        }  # fmt: skip


def compile_rows(machine: Machine, training: Training) -> Rows:
    """Measure both passes with channels_last, and with each transformer block compiled, over those without."""
    policy = policy_of(machine, training, DTYPES[training.precision])
    passes = passes_of(machine, policy, training)
    before = [machine.seconds(work) for work in passes]
    policy.network.to(memory_format=torch.channels_last)
    after = [machine.seconds(work) for work in passes]
    yield {"lever": "channels_last", "forward": before[0] / after[0], "with_backward": before[1] / after[1]}
    policy.network.to(memory_format=torch.contiguous_format)
    start = time.monotonic()
    for module in policy.network.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile()
    for work in passes:
        work()
    compiling = time.monotonic() - start
    after = [machine.seconds(work) for work in passes]
    speeds = {"forward": before[0] / after[0], "with_backward": before[1] / after[1]}
    yield {"lever": "compiled transformer blocks", **speeds, "seconds_to_compile": compiling}


def score_rows(
    machine: Machine, size: dict[str, Any], *, sides: Sequence[int], batches: Sequence[int] = (1, 8, 32)
) -> Rows:
    """Measure a score's seconds by image size and batch, and the part of them that preprocessing takes."""
    dtype = torch.bfloat16 if machine.device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        reward = random_reward_model(size, Path(folder), device=machine.device, dtype=dtype)
        for side in sides:
            for batch in batches:
                images = torch.rand(batch, 3, side, side, device=machine.device)
                prompts = [PROMPT] * batch
                seconds = machine.seconds(partial(reward.score_all, images, prompts, batch_size=batch), repeats=2)
                prepare = machine.seconds(partial(reward.model.backbone.prepare, list(images), prompts), repeats=2)
                yield {"side": side, "batch": batch, "seconds": seconds / batch, "preparing": prepare / seconds}
