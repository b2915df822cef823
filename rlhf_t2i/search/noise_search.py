"""Search for the initial noise that a deterministic sampler turns into the best image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import per_image, randn
from rlhf_t2i.search.candidates import num_candidates_of, repeat_rows
from rlhf_t2i.search.context import Candidates, CandidateScores, SearchContext, call_reward, num_rewards
from rlhf_t2i.types import Conditioning


@torch.no_grad()
def neighbourhood_search(
    context: SearchContext,
    prompts: Sequence[str],
    *,
    num_rounds: int,
    similarity: float,
    generators: Sequence[torch.Generator],
) -> Candidates:
    """Sample neighbours of the best noise so far in each round: zero-order search of Ma et al. (arXiv:2501.09732).

        neighbour = similarity * best noise + sqrt(1 - similarity^2) * fresh noise

    Each round generates one image per generator; the first round starts from fresh noise. A neighbour is again
    standard normal, and `similarity` is its correlation with the best noise: 0 is random search, 0.95 the published
    neighbourhood. Returns the images of all rounds in order.
    """
    num = num_candidates_of(prompts, generators)
    check_noise_search(context, num_rounds=num_rounds)
    if not 0 <= similarity < 1:
        raise ValueError(f"similarity is {similarity}; it must be in [0, 1).")
    start = context.cost_so_far()
    conditioning = repeat_rows(context.model.encode(prompts), len(generators))
    noise = context.model.initial_noise(generators, copies=1)
    noises: list[Tensor] = []
    rounds: list[tuple[Tensor, CandidateScores]] = []
    for round_ in range(num_rounds):
        if round_:
            best = _concatenate(rounds).order[:, 0]
            pivot = torch.cat(noises, dim=1)[torch.arange(len(prompts)), best.to(noise.device)]
            fresh = randn(noise.shape, generators=generators, device=noise.device)
            noise = similarity * pivot.repeat_interleave(num, dim=0) + math.sqrt(1 - similarity**2) * fresh
        latents, _ = context.denoise(noise, conditioning, range(context.num_steps), generators=generators)
        rounds.append(context.score(latents, prompts))
        noises.append(noise.unflatten(0, (len(prompts), num)))
    images = torch.cat([images for images, _ in rounds], dim=1)
    return Candidates(images, _concatenate(rounds), context.cost_so_far() - start)


@torch.no_grad()
def gradient_search(
    context: SearchContext,
    prompts: Sequence[str],
    *,
    num_rounds: int,
    learning_rate: float,
    prior_weight: float = 0.01,
    max_gradient_norm: float = 0.1,
    generators: Sequence[torch.Generator],
) -> Candidates:
    """Ascend the gradient of the reward with respect to the noise, as in ReNO (arXiv:2406.04312).

        loss = -reward(image of noise) + prior_weight * (|noise|^2 / 2 - (D - 1) log |noise|)

    The second term is minus the log-density of the norm of D standard normal numbers (up to a constant): it keeps the
    noise on the shell that the model was trained on. Steps are those of SGD with Nesterov momentum 0.9, the gradient
    of each noise clipped to the norm `max_gradient_norm`. Returns the images of all rounds, those of the initial noise
    first. All denoising steps are held in memory, and a round costs two denoiser calls a step (forward and backward),
    so this is for models with few steps.

    Raises ValueError for a reward that is not differentiable.
    """
    num = num_candidates_of(prompts, generators)
    check_noise_search(context, num_rounds=num_rounds)
    start = context.cost_so_far()
    conditioning = repeat_rows(context.model.encode(prompts), len(generators))
    row_prompts = [prompt for prompt in prompts for _ in range(num)]
    noise = context.model.initial_noise(generators, copies=1)
    velocity = torch.zeros_like(noise)
    rounds: list[tuple[Tensor, CandidateScores]] = []
    for round_ in range(num_rounds):
        gradients: list[Tensor] = []
        latents: list[Tensor] = []
        last = round_ == num_rounds - 1

        def work(rows: Tensor, noise: Tensor = noise, last: bool = last) -> tuple[Tensor, Tensor]:
            return _forward_and_backward(
                context, noise[rows], conditioning[rows], [row_prompts[int(i)] for i in rows],
                prior_weight=prior_weight, backward=not last,
            )  # fmt: skip

        for finished, gradient in context.in_batches(len(noise), work):
            latents.append(finished)
            gradients.append(gradient)
        passes = 1 if last else 2
        context.denoiser_calls += (
            len(noise) * context.num_steps * passes * context.model.num_calls(context.sampler.guidance_scale)
        )
        rounds.append(context.score(torch.cat(latents), prompts))
        if last:
            break
        without_veto = {name: scores for name, scores in rounds[0][1].by_name.items() if name != "veto"}
        context.reward_calls += len(noise) * num_rewards(without_veto)
        gradient = torch.cat(gradients)
        norm = gradient.flatten(1).norm(dim=1)
        gradient = gradient * per_image((max_gradient_norm / norm.clamp_min(1e-12)).clamp_max(1.0))
        velocity = 0.9 * velocity + gradient
        noise = noise - learning_rate * (gradient + 0.9 * velocity)
    images = torch.cat([images for images, _ in rounds], dim=1)
    return Candidates(images, _concatenate(rounds), context.cost_so_far() - start)


def _forward_and_backward(
    context: SearchContext,
    noise: Float[Tensor, "B C H W"],
    conditioning: Conditioning,
    prompts: Sequence[str],
    *,
    prior_weight: float,
    backward: bool,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Return the final latents and the gradient of the loss with respect to the noise; zeros without `backward`."""
    if not backward:
        latents = _sample(context, noise, conditioning)
        return latents, torch.zeros_like(noise)
    with torch.enable_grad():
        noise = noise.detach().requires_grad_(True)
        latents = _sample(context, noise, conditioning)
        # Not clamped: saturated pixels would have no gradient.
        reward = call_reward(context.reward, context.model.decode(latents), prompts)["reward"]
        if not reward.requires_grad:
            raise ValueError(
                "The reward has no gradient with respect to the images. gradient_search needs a differentiable reward, "
                "such as llava_reward; neighbourhood_search takes any."
            )
        length = noise.flatten(1).norm(dim=1)
        prior = length**2 / 2 - (noise[0].numel() - 1) * length.log()
        loss = -reward.sum() + prior_weight * prior.sum()
        return latents.detach(), torch.autograd.grad(loss, noise)[0]


def _sample(context: SearchContext, latents: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the final latents of a deterministic sampler, all rows in one batch."""
    schedule = context.sampler.schedule
    for step in range(context.num_steps):
        at = torch.full((len(latents),), step)
        level, next_level = schedule.at(at), schedule.at(at + 1)
        prediction = context.model.predict(latents, level, conditioning, guidance_scale=context.sampler.guidance_scale)
        latents = context.sampler.dynamics(latents, prediction, level, next_level).mean
    return latents


def check_noise_search(context: SearchContext, *, num_rounds: int) -> None:
    """Raise ValueError for a stochastic sampler and for less than one round."""
    if num_rounds < 1:
        raise ValueError(f"num_rounds is {num_rounds}; it must be at least 1.")
    if (context.step_stds() > 0).any():
        raise ValueError(
            "The sampler adds noise in its steps, so the initial noise alone does not determine the image. Noise "
            "search needs a deterministic sampler: DDIM with eta = 0."
        )


def _concatenate(rounds: Sequence[tuple[Tensor, CandidateScores]]) -> CandidateScores:
    """Return the scores of several rounds side by side."""
    names = rounds[0][1].by_name
    return CandidateScores(
        {name: torch.cat([scores.by_name[name] for _, scores in rounds], dim=1) for name in names},
        torch.cat([scores.vetoed for _, scores in rounds], dim=1),
    )
