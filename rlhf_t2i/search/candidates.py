"""Best-of-N sampling, with and without early pruning, and its expected result for every smaller N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.search.context import Candidates, CandidateScores, SearchContext
from rlhf_t2i.types import Conditioning


@torch.no_grad()
def best_of_n(context: SearchContext, prompts: Sequence[str], *, generators: Sequence[torch.Generator]) -> Candidates:
    """Generate and score N images of each prompt, where N = len(generators) / len(prompts).

    Each image depends on its own generator only: a smaller N gives a subset of the same images.
    """
    num_candidates_of(prompts, generators)
    start = context.cost_so_far()
    conditioning = repeat_rows(context.model.encode(prompts), len(generators))
    noise = context.model.initial_noise(generators, copies=1)
    latents, _ = context.denoise(noise, conditioning, range(context.num_steps), generators=generators)
    images, scores = context.score(latents, prompts)
    return Candidates(images, scores, context.cost_so_far() - start)


@dataclass(frozen=True, slots=True)
class PruningResult:
    """The result of best-of-N with pruning."""

    candidates: Candidates
    """The S images of each prompt that were completed."""
    survivors: Int[Tensor, "P S"]
    """Indices of these images among the N candidates of their prompt."""
    rounds: dict[int, CandidateScores]
    """Scores of the predicted clean images in each pruning round, by the number of denoising steps taken."""


@torch.no_grad()
def pruned_best_of_n(
    context: SearchContext, prompts: Sequence[str], *, keep: Mapping[int, int], generators: Sequence[torch.Generator]
) -> PruningResult:
    """Best-of-N that scores the predicted clean images early and completes only the promising candidates.

    `keep` maps a number of denoising steps to the number of candidates of each prompt that are kept after it:
    {2: 8, 4: 4} of 16 images in 8 steps costs half of the denoiser calls. Repeatedly dropping the worse half is
    successive halving (Karnin et al., ICML 2013; Jamieson and Talwalkar, arXiv:1502.07943). There a pull of an arm
    returns a sample of its loss; taking images as arms and a denoising step with a scored prediction as a pull is our
    adaptation, and so are rounds in steps instead of equal budgets. Their guarantees do not carry over.

    With a deterministic sampler the survivors equal the images that `best_of_n` generates from the same generators.
    """
    num = num_candidates_of(prompts, generators)
    check_pruning(keep, num=num, num_steps=context.num_steps)
    start, done = context.cost_so_far(), 0
    survivors = torch.arange(num).expand(len(prompts), num)
    conditioning = repeat_rows(context.model.encode(prompts), len(generators))
    latents, row_generators = context.model.initial_noise(generators, copies=1), list(generators)
    rounds: dict[int, CandidateScores] = {}
    for after, num_kept in sorted(keep.items()):
        latents, clean = context.denoise(latents, conditioning, range(done, after), generators=row_generators)
        _, rounds[after] = context.score(clean, prompts)
        # In the original order, so that later images do not depend on how the reward ranked them.
        kept = rounds[after].order[:, :num_kept].sort(dim=1).values
        rows = (kept + torch.arange(len(prompts))[:, None] * survivors.shape[1]).flatten()
        latents, conditioning, row_generators = (
            latents[rows],
            conditioning[rows],
            [row_generators[int(i)] for i in rows],
        )
        survivors, done = survivors.gather(1, kept), after
    latents, _ = context.denoise(latents, conditioning, range(done, context.num_steps), generators=row_generators)
    images, scores = context.score(latents, prompts)
    return PruningResult(Candidates(images, scores, context.cost_so_far() - start), survivors, rounds)


def halving(num: int, *, after: Sequence[int]) -> dict[int, int]:
    """Return the `keep` of `pruned_best_of_n` that drops the worse half after each of these numbers of steps."""
    return {steps: max(1, num >> (i + 1)) for i, steps in enumerate(sorted(set(after)))}


def check_pruning(keep: Mapping[int, int], *, num: int, num_steps: int) -> None:
    """Raise ValueError for rounds outside the schedule, or if a round keeps more candidates than there are."""
    left = num
    for after, num_kept in sorted(keep.items()):
        if not 1 <= after < num_steps:
            raise ValueError(
                f"Candidates cannot be pruned after {after} steps: sampling has {num_steps} steps, so it must be "
                f"between 1 and {num_steps - 1}."
            )
        if not 1 <= num_kept <= left:
            raise ValueError(f"After {after} steps {num_kept} candidates cannot be kept: there are {left}.")
        left = num_kept


def expected_best(scores: Float[Tensor, "P N"], values: Float[Tensor, "P N"] | None = None) -> Float[Tensor, "P N"]:
    """Return the unbiased estimate of best-of-n for n = 1 ... N from one run with N images per prompt.

        expected[n] = sum_i p(n, i) * value of the i-th best image        p(n, i) = C(N - i, n - 1) / C(N, n)

    p(n, i) is the probability that the i-th best image by `scores` is the best of a random subset of n images, so this
    is the mean over all subsets of size n. `values` is the quantity to average over the selected images, such as the
    score of another reward; by default it is `scores`. A score that is not finite is ranked last; a value that is not
    finite is replaced by the lowest finite value of its prompt.
    """
    num = scores.shape[1]
    n, i = torch.meshgrid(torch.arange(1, num + 1), torch.arange(1, num + 1), indexing="ij")
    possible = num - i >= n - 1
    log_p = _log_binomial(torch.where(possible, num - i, n - 1), n - 1) - _log_binomial(torch.full_like(n, num), n)
    p = torch.where(possible, log_p.exp(), 0.0)
    order = _replace_non_finite(scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    values = scores if values is None else values
    lowest = _replace_non_finite(values, torch.inf).min(dim=1, keepdim=True).values
    ranked = torch.where(values.isfinite(), values, lowest).gather(1, order)
    return (ranked.double() @ p.T).float()


def _replace_non_finite(values: Tensor, replacement: float) -> Tensor:
    return torch.where(values.isfinite(), values, replacement)


def _log_binomial(n: Tensor, k: Tensor) -> Tensor:
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def num_candidates_of(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> int:
    """Return the number of generators per prompt; ValueError unless it is a whole number of at least 1."""
    if isinstance(prompts, str):  # a string is a sequence of one-letter prompts
        raise TypeError(f"prompts is the string {prompts!r}; it must be a list of strings, such as [{prompts!r}].")
    num, rest = divmod(len(generators), max(1, len(prompts)))
    if num < 1 or rest:
        raise ValueError(
            f"There are {len(generators)} generators for {len(prompts)} prompts; each image needs its own generator "
            f"and each prompt the same number of images, at least 1."
        )
    return num


def repeat_rows(conditioning: Conditioning, num_rows: int) -> Conditioning:
    """Repeat the conditioning of each prompt so that there are `num_rows` rows in all."""
    return conditioning[torch.arange(len(conditioning)).repeat_interleave(num_rows // len(conditioning))]
