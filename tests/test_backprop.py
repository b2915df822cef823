"""Images with a gradient: the right one for each choice of steps, of the right images, at the stated cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.models.stable_diffusion import StableDiffusion
from rlhf_t2i.sampling.backprop import DifferentiableSamples, GradientWindow, sample_with_gradient
from rlhf_t2i.sampling.rollout import rollout
from rlhf_t2i.types import Conditioning, Sampler

PROMPTS = ["a red circle", "a blue square", "a red circle"]
CHOICES = {
    "draft-1": GradientWindow(torch.tensor([3, 3, 3])),
    "draft-2": GradientWindow(torch.tensor([2, 2, 2])),
    "draft": GradientWindow(torch.tensor([0, 0, 0])),
    "draft-lv": GradientWindow(torch.tensor([3, 3, 3]), num_renoisings=2),
    "alignprop": GradientWindow(torch.tensor([3, 0, 2])),
    "refl": GradientWindow(torch.tensor([1, 3, 2]), jumps=True),
}
"""Of four steps."""


class ExactDiffusion(StableDiffusion):
    """The same in float64, for which finite differences are good to eight digits."""

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Tensor:
        return super().initial_noise(generators, copies=copies).double()

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(latents, model_time, conditioning.states.double(), return_dict=False)[0]

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.autoencoder.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5


@pytest.fixture
def policy(tiny_sd_v: Path) -> ExactDiffusion:
    """A random model that predicts v, whose reference is another one: its weights have moved a little."""
    return exact_policy(tiny_sd_v)


def exact_policy(model: Path) -> ExactDiffusion:
    policy = load_policy(str(model), device=torch.device("cpu"))
    policy.set_trainable(None, lora_alpha=None, keep_reference=True, seed=0)
    policy.__class__ = ExactDiffusion
    assert isinstance(policy, ExactDiffusion)
    for module in (policy.network, policy.autoencoder.vae, policy.reference):
        module.double()
    move(policy, directions(policy, seed=7), 0.02)
    return policy


def directions(policy: DiffusionPolicy, *, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.trainable.items()}


@torch.no_grad()
def move(policy: DiffusionPolicy, direction: dict[str, Tensor], length: float) -> None:
    for name, weight in policy.trainable.items():
        weight.add_(direction[name], alpha=length)


def sampler_of(
    policy: DiffusionPolicy, *, eta: float = 0.0, num_steps: int = 4, guidance_scale: float = 1.0
) -> Sampler:
    return Sampler(policy.schedule(num_steps), partial(ddim, eta=eta), guidance_scale)


def seeded(count: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def number(painting: DifferentiableSamples) -> Tensor:
    """One number that every pixel and every gap moves differently."""
    weights = torch.linspace(-1, 1, painting.images.numel(), dtype=torch.float64).view_as(painting.images).sin()
    gaps = torch.linspace(1, 2, len(painting.reference_gap), dtype=torch.float64)
    return (weights * painting.images).sum() + (30 * gaps * painting.reference_gap).sum()


def gradient(policy: DiffusionPolicy, value: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(policy.trainable.values()))
    return dict(zip(policy.trainable, found, strict=True))


def written_out(
    policy: ExactDiffusion,
    before: DiffusionPolicy,
    *,
    window: GradientWindow,
    sampler: Sampler,
    prompts: Sequence[str] = PROMPTS,
) -> DifferentiableSamples:
    """The slow way: one image at a time, the steps before the window ones painted by `before`, all in one graph."""
    schedule, last = sampler.schedule, sampler.schedule.num_steps - 1
    images: list[tuple[Tensor, Tensor]] = []
    variants: list[list[tuple[Tensor, Tensor]]] = []
    for prompt, generator, first in zip(prompts, seeded(len(prompts)), window.first.tolist(), strict=True):
        text = policy.encode([prompt])

        def noise_like(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(x.shape, generator=generator).to(x.dtype)

        def step(
            x: Tensor,
            t: int,
            noise: Tensor,
            *,
            by: DiffusionPolicy = policy,
            jump: bool = False,
            text: Conditioning = text,
        ) -> tuple[Tensor, Tensor]:
            at = torch.tensor([t])
            level, following = schedule.at(at), schedule.at(at + 1)
            seen = by.predict(x, level, text, guidance_scale=sampler.guidance_scale)
            with policy.as_reference():
                reference = policy.predict(x, level, text, guidance_scale=sampler.guidance_scale)
            gap = ((seen.noise - reference.noise) ** 2).mean()
            transition = sampler.dynamics(x, seen, level, following)
            return seen.clean if jump else transition.mean + transition.std * noise, gap

        x, gaps = policy.initial_noise([generator], copies=1), []
        finished = x
        for t in range(last + 1):
            noise = noise_like(x)
            finished = step(finished, t, noise, by=before)[0].detach()
            if t < first:
                x = step(x, t, noise, by=before)[0].detach()
                continue
            x, gap = step(x, t, noise, jump=window.jumps)
            gaps.append(gap)
            if window.jumps:
                break
        images.append((policy.decode(x), torch.stack(gaps).mean()))
        drawn = [[noise_like(x) for _ in range(window.num_renoisings)] for _ in range(2)]
        own = []
        alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
        for back, forth in zip(*drawn, strict=True):
            ratio = alpha[last] / alpha[-1]
            noisy = ratio * finished + (sigma[last] ** 2 - ratio**2 * sigma[-1] ** 2).sqrt() * back
            again, gap = step(noisy, last, forth)
            own.append((policy.decode(again), gap))
        variants.append(own)
    ordered = images + [own[i] for i in range(window.num_renoisings) for own in variants]
    return DifferentiableSamples(
        torch.cat([image for image, _ in ordered]), torch.stack([gap for _, gap in ordered]), 0
    )


# --- the gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_gradient_equals_finite_differences(tiny_sd: Path, choice: str, eta: float) -> None:
    """Along a random direction of all weights of a model that predicts noise; earlier steps do not move."""
    policy = exact_policy(tiny_sd)
    sampler, window, direction = sampler_of(policy, eta=eta), CHOICES[choice], directions(policy, seed=1)
    painting = sample_with_gradient(
        policy, PROMPTS, sampler=sampler, window=window, generators=seeded(), with_reference_gap=True
    )
    pixel_gradient = sum((direction[n] * g).sum().item() for n, g in gradient(policy, number(painting)).items())
    before = frozen_copy(policy)
    ends: list[float] = []
    with torch.no_grad():
        for length in (1e-5, -2e-5):
            move(policy, direction, length)
            ends.append(number(written_out(policy, before, window=window, sampler=sampler)).item())
    assert pixel_gradient == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def frozen_copy(policy: ExactDiffusion) -> ExactDiffusion:
    """The policy as it is now."""

    window = copy.copy(policy)
    window.network = copy.deepcopy(policy.network).requires_grad_(False)
    window.denoiser = window.network
    return window


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("choice", CHOICES)
def test_it_equals_autograd_through_a_written_out_loop(
    policy: ExactDiffusion, choice: str, guidance_scale: float
) -> None:
    """Every weight's gradient, for all steps window and for fewer; one image at a time gives the same as a batch."""
    sampler, window = sampler_of(policy, eta=0.5, guidance_scale=guidance_scale), CHOICES[choice]
    painting = sample_with_gradient(
        policy, PROMPTS, sampler=sampler, window=window, generators=seeded(), with_reference_gap=True
    )
    slow = written_out(policy, frozen_copy(policy), window=window, sampler=sampler)
    assert_close(painting.images, slow.images, rtol=0, atol=1e-6)
    assert_close(painting.reference_gap, slow.reference_gap, rtol=1e-6, atol=0)
    one, other = gradient(policy, number(painting)), gradient(policy, number(slow))
    for name, expected in other.items():
        assert_close(one[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("choice", CHOICES)
def test_checkpointing_changes_nothing(policy: ExactDiffusion, choice: str) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        painting = sample_with_gradient(
            policy, PROMPTS, sampler=sampler_of(policy, eta=1.0), window=CHOICES[choice], generators=seeded(),
            with_reference_gap=True, checkpointing=checkpointing,
        )  # fmt: skip
        found.append(gradient(policy, number(painting)))
    assert all(g.abs().max() > 0 for g in found[0].values())
    assert_close(*found, rtol=1e-12, atol=1e-12)


def test_checkpointing_keeps_adapters_on_and_the_reference_off(tiny_sd: Path) -> None:
    """The reference is painted with adapters switched off, in the backward pass once more."""
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"))
    policy.set_trainable(2, lora_alpha=None, keep_reference=True, seed=0)
    move(policy, directions(policy, seed=3), 0.1)
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        painting = sample_with_gradient(
            policy, PROMPTS, sampler=sampler_of(policy), window=CHOICES["alignprop"], generators=seeded(),
            with_reference_gap=True, checkpointing=checkpointing,
        )  # fmt: skip
        assert (painting.reference_gap > 0).all()
        found.append(gradient(policy, painting.images.sum() + painting.reference_gap.sum()))
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_without_a_reference_the_gap_is_zero(policy: ExactDiffusion) -> None:
    painting = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy), window=CHOICES["draft"], generators=seeded()
    )
    assert painting.reference_gap.tolist() == [0, 0, 0]


# --- the images -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("choice", ["draft-1", "draft", "draft-lv", "alignprop"])
def test_the_images_are_those_of_a_rollout(tiny_sd: Path, choice: str, eta: float) -> None:
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"))
    policy.set_trainable(None, lora_alpha=None, keep_reference=False, seed=0)
    sampler = sampler_of(policy, eta=eta)
    painting = sample_with_gradient(policy, PROMPTS, sampler=sampler, window=CHOICES[choice], generators=seeded())
    images, _ = rollout(policy, PROMPTS, sampler=sampler, generators=seeded(), microbatch_size=3)
    assert_close(painting.images[:3].detach().clamp(0, 1), images, rtol=0, atol=1e-5)


def test_renoised_variants_are_new_images_as_noisy_as_the_last_level(policy: ExactDiffusion) -> None:
    """Denoised from the last level, they resemble their image and differ from one another."""
    painting = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy), window=CHOICES["draft-lv"], generators=seeded()
    )
    one, two, three = painting.images.detach().chunk(3)
    assert (one - two).abs().max() > 1e-4
    assert (two - three).abs().max() > 1e-4


def test_a_image_does_not_depend_on_its_neighbours(policy: ExactDiffusion) -> None:
    sampler = sampler_of(policy, eta=1.0)
    for name, window in CHOICES.items():
        whole = sample_with_gradient(policy, PROMPTS, sampler=sampler, window=window, generators=seeded())
        alone = sample_with_gradient(
            policy, PROMPTS[2:], sampler=sampler, generators=seeded()[2:],
            window=GradientWindow(window.first[2:], jumps=window.jumps, num_renoisings=window.num_renoisings),
        )  # fmt: skip
        assert_close(whole.images[2::3], alone.images, rtol=0, atol=1e-9, msg=name)


def test_pixels_beyond_black_and_white_are_kept_with_their_gradient(policy: ExactDiffusion) -> None:
    policy.autoencoder.vae.decoder.conv_out.weight.data *= 30
    painting = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy), window=CHOICES["draft-1"], generators=seeded()
    )
    beyond = (painting.images < 0) | (painting.images > 1)
    assert beyond.any()
    assert all(g.abs().max() > 0 for g in gradient(policy, (painting.images * beyond).sum()).values())


# --- the cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "calls"), [("draft", 12), ("draft-1", 12), ("draft-lv", 18), ("alignprop", 12), ("refl", 9)]
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_calls_of_the_denoiser_are_counted(tiny_sd: Path, choice: str, calls: int, guidance_scale: float) -> None:
    policy = load_policy(str(tiny_sd), device=torch.device("cpu"))
    counted: list[int] = []
    policy.network.register_forward_pre_hook(lambda module, given: counted.append(len(given[0])))
    painting = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy, guidance_scale=guidance_scale), window=CHOICES[choice],
        generators=seeded(),
    )  # fmt: skip
    assert painting.num_calls == sum(counted) == calls * int(guidance_scale)


def stored_bytes(policy: DiffusionPolicy, *, num_steps: int, gradient_window: int, checkpointing: bool) -> int:
    """What the graph of a painting holds, the weights left out."""
    storages: dict[int, Tensor] = {}
    weights = {p.data_ptr() for p in [*policy.network.parameters(), *policy.autoencoder.vae.parameters()]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        painting = sample_with_gradient(
            policy, PROMPTS, sampler=sampler_of(policy, num_steps=num_steps), generators=seeded(),
            window=GradientWindow(torch.full((3,), num_steps - gradient_window)), checkpointing=checkpointing,
        )  # fmt: skip
    assert painting.images.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_does_not_grow_with_the_steps_before_the_kept_ones(policy: ExactDiffusion, checkpointing: bool) -> None:
    few, many = (stored_bytes(policy, num_steps=n, gradient_window=2, checkpointing=checkpointing) for n in (4, 20))
    assert few == many


def test_with_checkpointing_a_kept_step_stores_little(policy: ExactDiffusion) -> None:
    plain, thin = (
        [stored_bytes(policy, num_steps=5, gradient_window=k, checkpointing=c) for k in (1, 5)] for c in (False, True)
    )
    per_step = [(many - one) / 4 for one, many in (plain, thin)]
    assert per_step[1] < per_step[0] / 20
