"""Search for the noise that a deterministic sampler turns into the best image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import per_image, randn
from rlhf_t2i.search.best_of_n import num_for_each, repeated
from rlhf_t2i.search.context import Candidates, SearchContext, Verdict, num_rewards, verdicts


@torch.no_grad()
def neighbourhood_search(
    context: SearchContext,
    prompts: Sequence[str],
    *,
    num_rounds: int,
    similarity: float,
    generators: Sequence[torch.Generator],
) -> Candidates:
    """Try neighbours of the best noise so far, round after round; zero-order search of Ma et al. (arXiv:2501.09732).

        neighbour = similarity * best noise + sqrt(1 - similarity^2) * fresh noise

    In each round a prompt has as many images as there are generators for it; the first round is of fresh noise. A
    neighbour is again standard normal noise, `similarity` its correlation with the best: 0 is random search, 0.95 the
    published neighbourhood. Returns the images of all rounds, in that order.
    """
    num = num_for_each(prompts, generators)
    check_noise_search(context, num_rounds=num_rounds)
    if not 0 <= similarity < 1:
        raise ValueError(f"similarity is {similarity}; it must be in [0, 1).")
    start = context.spent()
    conditioning = repeated(context.model.encode(prompts), len(generators))
    noise = context.model.initial_noise(generators, copies=1)
    tried: list[Tensor] = []
    found: list[tuple[Tensor, Verdict]] = []
    for round_ in range(num_rounds):
        if round_:
            best = _joined(found).order[:, 0]
            pivot = torch.cat(tried, dim=1)[torch.arange(len(prompts)), best.to(noise.device)]
            fresh = randn(noise.shape, generators=generators, device=noise.device)
            noise = similarity * pivot.repeat_interleave(num, dim=0) + math.sqrt(1 - similarity**2) * fresh
        latents, _ = context.walk(noise, conditioning, range(context.num_steps), generators=generators)
        found.append(context.judge(latents, prompts))
        tried.append(noise.unflatten(0, (len(prompts), num)))
    return Candidates(torch.cat([images for images, _ in found], dim=1), _joined(found), context.spent() - start)


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
    """Climb the reward's gradient with respect to the noise, like ReNO (arXiv:2406.04312), for few-step models.

        loss = -reward(image of noise) + prior_weight * (|noise|^2 / 2 - (D - 1) log |noise|)

    The second part is minus the log-density of the length of D standard normal numbers (up to a constant): it keeps
    the noise on the shell where the model has learnt. Steps are those of SGD with Nesterov momentum 0.9, the gradient
    of each noise cut to `max_gradient_norm`. Returns the images of all rounds, the first ones of the plain noise.
    A round costs two denoiser calls a step: there and back.

    Raises ValueError for a reward through which no gradient flows.
    """
    num = num_for_each(prompts, generators)
    check_noise_search(context, num_rounds=num_rounds)
    start = context.spent()
    conditioning = repeated(context.model.encode(prompts), len(generators))
    of_row = [prompt for prompt in prompts for _ in range(num)]
    noise = context.model.initial_noise(generators, copies=1)
    velocity = torch.zeros_like(noise)
    found: list[tuple[Tensor, Verdict]] = []
    for round_ in range(num_rounds):
        gradients: list[Tensor] = []
        latents: list[Tensor] = []
        last = round_ == num_rounds - 1

        def work(rows: Tensor, noise: Tensor = noise, last: bool = last) -> tuple[Tensor, Tensor]:
            return _there_and_back(
                context, noise[rows], conditioning[rows], [of_row[int(i)] for i in rows],
                prior_weight=prior_weight, back=not last,
            )  # fmt: skip

        for finished, gradient in context.in_batches(len(noise), work):
            latents.append(finished)
            gradients.append(gradient)
        passes = 1 if last else 2
        context.denoiser_calls += (
            len(noise) * context.num_steps * passes * context.model.num_calls(context.sampler.guidance_scale)
        )
        found.append(context.judge(torch.cat(latents), prompts))
        if last:
            break
        context.reward_calls += len(noise) * num_rewards({n: s for n, s in found[0][1].scores.items() if n != "veto"})
        gradient = torch.cat(gradients)
        norm = gradient.flatten(1).norm(dim=1)
        gradient = gradient * per_image((max_gradient_norm / norm.clamp_min(1e-12)).clamp_max(1.0))
        velocity = 0.9 * velocity + gradient
        noise = noise - learning_rate * (gradient + 0.9 * velocity)
    return Candidates(torch.cat([images for images, _ in found], dim=1), _joined(found), context.spent() - start)


def _there_and_back(
    context: SearchContext,
    noise: Float[Tensor, "B C H W"],
    conditioning: Float[Tensor, "B L D"],
    prompts: Sequence[str],
    *,
    prior_weight: float,
    back: bool,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """Paint with a graph and return the finished latents, and the loss's gradient with respect to the noise."""
    if not back:
        latents = _painted(context, noise, conditioning)
        return latents, torch.zeros_like(noise)
    with torch.enable_grad():
        noise = noise.detach().requires_grad_(True)
        latents = _painted(context, noise, conditioning)
        # Not clamped: where an image is saturated its gradient would be gone.
        reward = verdicts(context.reward, context.model.decode(latents), prompts)["reward"]
        if not reward.requires_grad:
            raise ValueError(
                "The reward gives no gradient, so it cannot be climbed: use a differentiable one, such as a judge, or "
                "search the neighbourhood."
            )
        length = noise.flatten(1).norm(dim=1)
        prior = length**2 / 2 - (noise[0].numel() - 1) * length.log()
        loss = -reward.sum() + prior_weight * prior.sum()
        return latents.detach(), torch.autograd.grad(loss, noise)[0]


def _painted(context: SearchContext, latents: Tensor, conditioning: Tensor) -> Tensor:
    """Finished latents, all rows at once; the sampler draws nothing."""
    schedule = context.sampler.schedule
    for step in range(context.num_steps):
        at = torch.full((len(latents),), step)
        level, next_level = schedule.at(at), schedule.at(at + 1)
        prediction = context.model.predict(latents, level, conditioning, guidance_scale=context.sampler.guidance_scale)
        latents = context.sampler.dynamics(latents, prediction, level, next_level).mean
    return latents


def check_noise_search(context: SearchContext, *, num_rounds: int) -> None:
    """ValueError for a sampler that draws noise on the way, and for no round at all."""
    if num_rounds < 1:
        raise ValueError(f"num_rounds is {num_rounds}; it must be at least 1.")
    if (context.noise_of_steps() > 0).any():
        raise ValueError(
            "The sampler adds noise on the way, so the first noise alone does not decide the image. Searching for it "
            "needs a deterministic sampler: DDIM with eta = 0."
        )


def _joined(found: Sequence[tuple[Tensor, Verdict]]) -> Verdict:
    """The verdicts of several rounds as one."""
    names = found[0][1].scores
    return Verdict(
        {name: torch.cat([verdict.scores[name] for _, verdict in found], dim=1) for name in names},
        torch.cat([verdict.vetoed for _, verdict in found], dim=1),
    )
