"""Sampling with a gradient: the gradient of each method, the images, and the cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.lora import LoraConfiguration
from rlhf_t2i.sampling.backprop import DifferentiableSamples, GradientWindow, sample_with_gradient
from rlhf_t2i.sampling.rollout import rollout
from tests.exact_policy import (
    PROMPTS,
    ExactDiffusion,
    exact_policy,
    frozen_copy,
    random_direction,
    shift_weights,
    written_out,
)
from tests.policies import policy_of, sampler_of
from tests.toys import seeded

WINDOWS = {
    "draft-1": GradientWindow(torch.tensor([3, 3, 3])),
    "draft-2": GradientWindow(torch.tensor([2, 2, 2])),
    "draft": GradientWindow(torch.tensor([0, 0, 0])),
    "draft-lv": GradientWindow(torch.tensor([3, 3, 3]), num_renoisings=2),
    "alignprop": GradientWindow(torch.tensor([3, 0, 2])),
    "refl": GradientWindow(torch.tensor([1, 3, 2]), jumps=True),
}
"""Windows of four steps, for three images."""


@pytest.fixture
def policy(tiny_sd_v: Path) -> ExactDiffusion:
    """A random v-prediction model whose weights differ a little from its reference."""
    return exact_policy(tiny_sd_v)


def generators() -> list[torch.Generator]:
    return seeded(0, 1, 2)


def scalar(samples: DifferentiableSamples) -> Tensor:
    """Return a number to which every pixel and every gap contributes with a weight of its own."""
    weights = torch.linspace(-1, 1, samples.images.numel(), dtype=torch.float64).view_as(samples.images).sin()
    gaps = torch.linspace(1, 2, len(samples.reference_gap), dtype=torch.float64)
    return (weights * samples.images).sum() + (30 * gaps * samples.reference_gap).sum()


def gradient(policy: DiffusionPolicy, value: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(policy.trainable.values()))
    return dict(zip(policy.trainable, found, strict=True))


# --- the gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "eta"), [*((method, 1.0) for method in WINDOWS), ("draft", 0.0)])
def test_the_gradient_equals_finite_differences(tiny_sd: Path, method: str, eta: float) -> None:
    """For a noise-prediction model, along a random direction of all weights; steps before the window are constant."""
    policy = exact_policy(tiny_sd)
    sampler, window, direction = sampler_of(policy, eta=eta), WINDOWS[method], random_direction(policy, seed=1)
    samples = sample_with_gradient(
        policy, PROMPTS, sampler=sampler, window=window, generators=generators(), with_reference_gap=True
    )
    slope = sum((direction[n] * g).sum().item() for n, g in gradient(policy, scalar(samples)).items())
    before = frozen_copy(policy)
    ends: list[float] = []
    with torch.no_grad():
        for length in (1e-5, -2e-5):
            shift_weights(policy, direction, length)
            ends.append(scalar(written_out(policy, before, window=window, sampler=sampler)).item())
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(("method", "guidance_scale"), [*((method, 3.0) for method in WINDOWS), ("draft", 1.0)])
def test_the_gradient_equals_autograd_through_a_written_out_loop(
    policy: ExactDiffusion, method: str, guidance_scale: float
) -> None:
    """For every weight; sampling one image at a time gives the same as a batch."""
    sampler, window = sampler_of(policy, eta=0.5, guidance_scale=guidance_scale), WINDOWS[method]
    samples = sample_with_gradient(
        policy, PROMPTS, sampler=sampler, window=window, generators=generators(), with_reference_gap=True
    )
    slow = written_out(policy, frozen_copy(policy), window=window, sampler=sampler)
    assert_close(samples.images, slow.images, rtol=0, atol=1e-6)
    assert_close(samples.reference_gap, slow.reference_gap, rtol=1e-6, atol=0)
    found = gradient(policy, scalar(samples))
    for name, expected in gradient(policy, scalar(slow)).items():
        assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("method", WINDOWS)
def test_checkpointing_does_not_change_the_gradient(policy: ExactDiffusion, method: str) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        samples = sample_with_gradient(
            policy, PROMPTS, sampler=sampler_of(policy, eta=1.0), window=WINDOWS[method], generators=generators(),
            with_reference_gap=True, checkpointing=checkpointing,
        )  # fmt: skip
        found.append(gradient(policy, scalar(samples)))
    assert all(g.abs().max() > 0 for g in found[0].values())
    assert_close(*found, rtol=1e-12, atol=1e-12)


def test_checkpointing_recomputes_the_policy_with_adapters_and_the_reference_without(tiny_sd: Path) -> None:
    policy = policy_of(tiny_sd)
    policy.set_trainable(LoraConfiguration(2), keep_reference=True, seed=0)
    shift_weights(policy, random_direction(policy, seed=3), 0.1)
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        samples = sample_with_gradient(
            policy, PROMPTS, sampler=sampler_of(policy), window=WINDOWS["alignprop"], generators=generators(),
            with_reference_gap=True, checkpointing=checkpointing,
        )  # fmt: skip
        assert (samples.reference_gap > 0).all()
        found.append(gradient(policy, samples.images.sum() + samples.reference_gap.sum()))
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_reference_gap_is_zero_if_it_is_not_requested(policy: ExactDiffusion) -> None:
    samples = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy), window=WINDOWS["draft"], generators=generators()
    )
    assert samples.reference_gap.tolist() == [0, 0, 0]


# --- the images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("method", ["draft-1", "draft", "draft-lv", "alignprop"])
def test_the_images_are_those_of_a_rollout(tiny_sd: Path, method: str, eta: float) -> None:
    policy = policy_of(tiny_sd)
    policy.set_trainable(None, keep_reference=False, seed=0)
    sampler = sampler_of(policy, eta=eta)
    samples = sample_with_gradient(policy, PROMPTS, sampler=sampler, window=WINDOWS[method], generators=generators())
    images, _ = rollout(policy, PROMPTS, sampler=sampler, generators=generators(), microbatch_size=3)
    assert_close(samples.images[:3].detach().clamp(0, 1), images, rtol=0, atol=1e-5)


def test_renoised_variants_differ_from_their_image_and_from_one_another(policy: ExactDiffusion) -> None:
    samples = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy), window=WINDOWS["draft-lv"], generators=generators()
    )
    one, two, three = samples.images.detach().chunk(3)
    assert (one - two).abs().max() > 1e-4
    assert (two - three).abs().max() > 1e-4


def test_an_image_does_not_depend_on_the_rest_of_its_batch(policy: ExactDiffusion) -> None:
    sampler = sampler_of(policy, eta=1.0)
    for name, window in WINDOWS.items():
        batch = sample_with_gradient(policy, PROMPTS, sampler=sampler, window=window, generators=generators())
        alone = sample_with_gradient(
            policy, PROMPTS[2:], sampler=sampler, generators=generators()[2:],
            window=GradientWindow(window.first[2:], jumps=window.jumps, num_renoisings=window.num_renoisings),
        )  # fmt: skip
        assert_close(batch.images[2::3], alone.images, rtol=0, atol=1e-9, msg=name)


def test_pixels_outside_the_unit_range_keep_their_gradient(policy: ExactDiffusion) -> None:
    policy.autoencoder.vae.decoder.conv_out.weight.data *= 30
    samples = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy), window=WINDOWS["draft-1"], generators=generators()
    )
    outside = (samples.images < 0) | (samples.images > 1)
    assert outside.any()
    assert all(g.abs().max() > 0 for g in gradient(policy, (samples.images * outside).sum()).values())


# --- the cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "calls"), [("draft", 12), ("draft-1", 12), ("draft-lv", 18), ("alignprop", 12), ("refl", 9)]
)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_denoiser_calls_are_counted(tiny_sd: Path, method: str, calls: int, guidance_scale: float) -> None:
    policy = policy_of(tiny_sd)
    counted: list[int] = []
    policy.network.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
    samples = sample_with_gradient(
        policy, PROMPTS, sampler=sampler_of(policy, guidance_scale=guidance_scale), window=WINDOWS[method],
        generators=generators(),
    )  # fmt: skip
    assert samples.num_calls == sum(counted) == calls * int(guidance_scale)


def stored_bytes(policy: DiffusionPolicy, *, num_steps: int, num_steps_in_window: int, checkpointing: bool) -> int:
    """Return the bytes that the graph of a batch of samples holds, not counting the weights."""
    storages: dict[int, Tensor] = {}
    weights = {p.data_ptr() for p in [*policy.network.parameters(), *policy.autoencoder.vae.parameters()]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        samples = sample_with_gradient(
            policy, PROMPTS, sampler=sampler_of(policy, num_steps=num_steps), generators=generators(),
            window=GradientWindow(torch.full((3,), num_steps - num_steps_in_window)), checkpointing=checkpointing,
        )  # fmt: skip
    assert samples.images.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_does_not_grow_with_the_steps_before_the_window(policy: ExactDiffusion, checkpointing: bool) -> None:
    few, many = (stored_bytes(policy, num_steps=n, num_steps_in_window=2, checkpointing=checkpointing) for n in (4, 20))
    assert few == many


def test_with_checkpointing_a_step_of_the_window_stores_little(policy: ExactDiffusion) -> None:
    plain, checkpointed = (
        [stored_bytes(policy, num_steps=5, num_steps_in_window=k, checkpointing=c) for k in (1, 5)]
        for c in (False, True)
    )
    per_step = [(many - one) / 4 for one, many in (plain, checkpointed)]
    assert per_step[1] < per_step[0] / 20
