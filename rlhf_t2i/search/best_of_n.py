"""Best-of-N: paint several images, keep the one the judge likes best; and what fewer of them would have given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.search.context import Candidates, SearchContext, Verdict


@torch.no_grad()
def best_of_n(context: SearchContext, prompts: Sequence[str], *, generators: Sequence[torch.Generator]) -> Candidates:
    """Paint N images of each prompt, as many as there are generators for it, and judge them.

    Image i of a prompt depends on its own generator only: with fewer of them the others stay as they are.
    """
    num_for_each(prompts, generators)
    start = context.spent()
    conditioning = repeated(context.model.encode(prompts), len(generators))
    noise = context.model.initial_noise(generators, copies=1)
    latents, _ = context.walk(noise, conditioning, range(context.num_steps), generators=generators)
    images, verdict = context.judge(latents, prompts)
    return Candidates(images, verdict, context.spent() - start)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of N images of which most were given up early."""

    candidates: Candidates
    """The finished ones."""
    survivors: Int[Tensor, "P S"]
    """Which of the N they are."""
    rounds: dict[int, Verdict]
    """What was said after so many steps of the images that were still in the race."""


@torch.no_grad()
def pruned_best_of_n(
    context: SearchContext, prompts: Sequence[str], *, keep: Mapping[int, int], generators: Sequence[torch.Generator]
) -> Pruned:
    """Best-of-N that judges early what each image will become, and paints only the promising ones to the end.

    `keep` says how many images of each prompt go on after how many denoising steps: {2: 8, 4: 4} of 16 images in
    8 steps costs half of the denoiser calls. Dropping the worse half again and again is successive halving (Karnin et
    al., ICML 2013; Jamieson and Talwalkar, arXiv:1502.07943). There an arm is pulled for more samples of its loss;
    that the arms are images, and a pull is a denoising step whose predicted clean image is judged, is ours, and so
    is giving the rounds in steps instead of equal budgets. None of their guarantees carries over.

    With a deterministic sampler the survivors are the very images that `best_of_n` paints of the same generators.
    """
    num = num_for_each(prompts, generators)
    check_pruning(keep, num=num, num_steps=context.num_steps)
    start, done = context.spent(), 0
    alive = torch.arange(num).expand(len(prompts), num)
    conditioning = repeated(context.model.encode(prompts), len(generators))
    latents, own = context.model.initial_noise(generators, copies=1), list(generators)
    rounds: dict[int, Verdict] = {}
    for after, num_kept in sorted(keep.items()):
        latents, clean = context.walk(latents, conditioning, range(done, after), generators=own)
        _, rounds[after] = context.judge(clean, prompts)
        # In their first order, so that what is painted later does not depend on how the judge ranked them.
        kept = rounds[after].order[:, :num_kept].sort(dim=1).values
        rows = (kept + torch.arange(len(prompts))[:, None] * alive.shape[1]).flatten()
        latents, conditioning, own = latents[rows], conditioning[rows], [own[int(i)] for i in rows]
        alive, done = alive.gather(1, kept), after
    latents, _ = context.walk(latents, conditioning, range(done, context.num_steps), generators=own)
    images, verdict = context.judge(latents, prompts)
    return Pruned(Candidates(images, verdict, context.spent() - start), alive, rounds)


def halving(n: int, *, after: Sequence[int]) -> dict[int, int]:
    """What `pruned_best_of_n` keeps if the worse half goes after each of these numbers of steps."""
    return {steps: max(1, n >> (i + 1)) for i, steps in enumerate(sorted(set(after)))}


def check_pruning(keep: Mapping[int, int], *, num: int, num_steps: int) -> None:
    """ValueError for rounds outside the schedule, and for survivors that do not become fewer."""
    left = num
    for after, num_kept in sorted(keep.items()):
        if not 1 <= after < num_steps:
            raise ValueError(
                f"Images cannot be pruned after {after} steps: painting takes {num_steps}, so it must be between 1 "
                f"and {num_steps - 1}."
            )
        if not 1 <= num_kept <= left:
            raise ValueError(f"After {after} steps {num_kept} images cannot be kept: there are {left}.")
        left = num_kept


def expected_best(scores: Float[Tensor, "P N"], values: Float[Tensor, "P N"] | None = None) -> Float[Tensor, "P N"]:
    """What best-of-n would give for n = 1 ... N, estimated without bias from one run of N images.

        expected[n] = sum_i chance(n, i) * value of the i-th best        chance(n, i) = C(N - i, n - 1) / C(N, n)

    chance(n, i) is that of all sets of n images in which the i-th best by `scores` is the best: each set is as good
    a best-of-n as any, and this is the mean over all of them. `values` are what is asked of the picked image, such as
    another judge's score; by default `scores`. A score that is no finite number is the worst; such a value counts as
    the lowest of its prompt.
    """
    num = scores.shape[1]
    n, i = torch.meshgrid(torch.arange(1, num + 1), torch.arange(1, num + 1), indexing="ij")
    possible = num - i >= n - 1
    log_chance = _log_binomial(torch.where(possible, num - i, n - 1), n - 1) - _log_binomial(torch.full_like(n, num), n)
    chance = torch.where(possible, log_chance.exp(), 0.0)
    order = _finite(scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
    asked = scores if values is None else values
    lowest = _finite(asked, torch.inf).min(dim=1, keepdim=True).values
    ranked = torch.where(asked.isfinite(), asked, lowest).gather(1, order)
    return (ranked.double() @ chance.T).float()


def _finite(values: Tensor, otherwise: float) -> Tensor:
    return torch.where(values.isfinite(), values, otherwise)


def _log_binomial(n: Tensor, k: Tensor) -> Tensor:
    n, k = n.double(), k.double()
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def num_for_each(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> int:
    """How many images of each prompt; ValueError if there is not one generator for each of them."""
    if isinstance(prompts, str):  # which is a sequence of one-letter prompts
        raise TypeError(f"prompts is the text {prompts!r}; it must be a list of texts, such as [{prompts!r}].")
    num, rest = divmod(len(generators), max(1, len(prompts)))
    if num < 1 or rest:
        raise ValueError(
            f"{len(generators)} generators came for {len(prompts)} prompts; each image needs its own, and each "
            f"prompt the same number of images, at least 1."
        )
    return num


def repeated(conditioning: Float[Tensor, "P L D"], num_rows: int) -> Float[Tensor, "B L D"]:
    """The conditioning of every row: each prompt's, as often as it has images."""
    return conditioning.repeat_interleave(num_rows // len(conditioning), dim=0)
