"""Measure what each lever of speed brings on the CPU, as a ratio within one run: `python benchmarks/levers.py`.

Work with and without a lever runs in turn, and the processor seconds of the fastest call of each are compared, so that
other work on the machine does not decide. On the built-in U-Net with all weights trained, 64 images: the channels-last
layout, compiled blocks, more images in one forward pass, AdamW in one kernel. On the built-in reward model, 32 images:
its LoRA merged into the weights. Prints Markdown; name levers to measure only these.
"""

# torch and diffusers have no usable types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor

from reward_model.scoring import LlavaReward
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.models.speed import compile_blocks, to_channels_last
from rlhf_t2i.sampling.rollout import transition_at
from rlhf_t2i.shapes.names import TOY_MODEL, TOY_REWARD_MODELS, TOY_SKIP_CA_REWARD_MODEL
from rlhf_t2i.types import Sampler

CPU = torch.device("cpu")
IMAGES, STEPS = 64, 8
PROMPT = "a red circle on a blue background"
Row = tuple[str, str, float]
"""Lever, work, and how many times as fast the work is with it."""
Work = Callable[[], Any]
say = partial(print, flush=True)


def seconds(work: Work) -> float:
    """Return the processor seconds of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def times_as_fast(without: Work, with_lever: Work, *, repeats: int) -> float:
    """Return the ratio of the fastest calls, which take turns, after one call of each that warms up."""
    without()
    with_lever()
    pairs = [(seconds(without), seconds(with_lever)) for _ in range(repeats)]
    return min(one for one, _ in pairs) / min(other for _, other in pairs)


def policy_of() -> Any:
    """Return the built-in model with all weights trained."""
    policy = load_policy(TOY_MODEL, device=CPU)
    policy.set_trainable(None, keep_reference=False, seed=0)
    return policy


def passes(policy: Any, *, rows: int = IMAGES) -> tuple[Work, Work]:
    """Return a sampling step of all images without gradient, and a forward and backward pass, `rows` at a time."""
    schedule = policy.schedule(STEPS)
    sampler = Sampler(schedule, stochastic(schedule, eta=1.0), 1.0)
    latents = policy.initial_noise([torch.Generator().manual_seed(0)], copies=IMAGES)
    conditioning, parts = policy.encode([PROMPT] * IMAGES), torch.arange(IMAGES).split(rows)

    def forward(part: Tensor) -> Tensor:
        steps = part % STEPS
        return transition_at(policy, latents[part], steps, conditioning[part], sampler=sampler).mean

    @torch.no_grad()
    def sampling() -> None:
        for part in parts:
            forward(part)

    def update() -> None:
        for part in parts:
            forward(part).square().sum().backward()

    return sampling, update


def compared(name: str, plain: Any, changed: Any, repeats: int) -> Iterator[Row]:
    """Measure sampling and update of two policies."""
    for work, without, with_lever in zip(("sampling", "update"), passes(plain), passes(changed), strict=True):
        yield name, work, times_as_fast(without, with_lever, repeats=repeats)


def channels_last(repeats: int) -> Iterator[Row]:
    """The layout of convolutions."""
    changed = policy_of()
    to_channels_last(changed.network)
    yield from compared("`--channels_last`", policy_of(), changed, repeats)


def compiled(repeats: int) -> Iterator[Row]:
    """Compiled transformer blocks, and the seconds that compiling takes."""
    changed = policy_of()
    count, start = compile_blocks(changed.network), time.process_time()
    for work in passes(changed):
        work()
    name = f"`--compile` ({count} blocks, {time.process_time() - start:.0f} s to compile)"
    yield from compared(name, policy_of(), changed, repeats)


def batching(repeats: int) -> Iterator[Row]:
    """All (image, step) pairs in one forward pass in place of eight passes."""
    policy = policy_of()
    several, one = passes(policy, rows=IMAGES // STEPS), passes(policy)
    for work, without, with_lever in zip(("sampling", "update"), several, one, strict=True):
        yield f"{IMAGES} in place of {IMAGES // STEPS} rows", work, times_as_fast(without, with_lever, repeats=repeats)


def one_kernel(repeats: int) -> Iterator[Row]:
    """AdamW in one kernel."""
    policies = [policy_of(), policy_of()]
    steps = list[Work]()
    for policy, fused in zip(policies, (None, True), strict=True):
        passes(policy)[1]()
        steps.append(torch.optim.AdamW(policy.trainable.values(), lr=1e-6, fused=fused).step)
    yield "AdamW in one kernel", "its step", times_as_fast(*steps, repeats=5 * repeats)
    share = seconds(steps[0]) / (seconds(steps[0]) + seconds(passes(policies[0])[1]))
    say(f"(a step of AdamW is {100 * share:.1f} % of the update of one microbatch)")


def merged(repeats: int) -> Iterator[Row]:
    """A reward model's LoRA merged into its backbone."""
    plain = LlavaReward.from_pretrained(TOY_REWARD_MODELS[TOY_SKIP_CA_REWARD_MODEL], device="cpu")
    other = copy.deepcopy(plain).merge_lora()
    images, prompts = torch.rand(32, 3, 32, 32), [PROMPT] * 32
    works = [partial(model.score, images, prompts) for model in (plain, other)]
    difference = float((works[0]() - works[1]()).abs().max())
    sizes = [sum(p.nbytes for p in model.model.parameters()) / 1e6 for model in (plain, other)]
    name = f"merged LoRA ({sizes[0]:.2f} -> {sizes[1]:.2f} MB, scores differ by {difference:.0e})"
    yield name, "scores", times_as_fast(works[0], works[1], repeats=repeats)


LEVERS = {
    "channels_last": channels_last, "batching": batching, "one_kernel": one_kernel, "merged": merged,
    "compile": compiled,
}  # fmt: skip


def main() -> None:
    """Measure the levers that the command line names, and print a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("levers", nargs="*", choices=[*LEVERS, []], default=list(LEVERS), help="default: all")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each; default 7")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say("| lever | work | times as fast |\n|---|---|---|")
    for name in arguments.levers:
        for lever, work, ratio in LEVERS[name](arguments.repeats):
            say(f"| {lever} | {work} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
