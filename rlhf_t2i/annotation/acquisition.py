"""Choice of the questions that teach a reward model most, by the scores of an ensemble.

A pair's preference has the probability p_e = sigmoid(log-odds) by member e. In nats, with H the binary entropy:

    disagreement   H(mean p) - mean H(p): what the answer says about which member is right
                   (BALD; Houlsby et al., arXiv:1112.5745)
    entropy        H(mean p): how open the answer is (uncertainty sampling; Lewis and Gale, arXiv:cmp-lg/9407020)

Two images that are equally good have the highest entropy although their answer teaches little; members who agree on
that have no disagreement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Acquisition = Literal["disagreement", "entropy", "random"]
_MAX_SETS = 500
"""Sets of images of one prompt that are compared; of more, so many are drawn."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Images of one prompt to ask about."""

    prompt: int
    images: tuple[int, ...]
    favourite: int | None
    """Index in `images` of the one that the reward model prefers; None for a single image."""


def binary_entropy(probability: Tensor) -> Tensor:
    """Return the entropy, in nats, of a yes with some probability."""
    return torch.special.entr(probability) + torch.special.entr(1 - probability)


def value_of_answers(log_odds: Float[Tensor, "E *N M"], rule: Acquisition) -> Float[Tensor, "*N M"]:
    """Return how much each answer would teach, by the log-odds of each member; zeros for `random`."""
    probabilities = torch.sigmoid(log_odds)
    mean_entropy = binary_entropy(probabilities.mean(dim=0))
    match rule:
        case "disagreement":
            return mean_entropy - binary_entropy(probabilities).mean(dim=0)
        case "entropy":
            return mean_entropy
        case "random":
            return torch.zeros_like(mean_entropy)


def choose_questions(
    scores: Float[Tensor, "E P K"], *, num_images: int, count: int, temperature: float, rule: Acquisition,
    generator: torch.Generator,
) -> list[Chosen]:  # fmt: skip
    """Return questions about `num_images` (1, 2 or 4) of a prompt's K images, about at most `count` prompts.

    Each prompt has its most valuable set of images, in random order, and the most valuable prompts come first. Sets
    and prompts of equal value are in random order; so `random` draws both.
    """
    scores = scores.double().cpu()
    _, num_prompts, copies = scores.shape
    sets = torch.combinations(torch.arange(copies), num_images)
    sets = sets[torch.randperm(len(sets), generator=generator)[:_MAX_SETS]]
    if num_images == 1:
        values = value_of_answers(scores[:, :, sets[:, 0]] / temperature, rule)
    else:
        log_odds = (scores[..., :, None] - scores[..., None, :]) / temperature
        pairwise = value_of_answers(log_odds, rule)
        pairs = torch.combinations(torch.arange(num_images), 2)
        values = pairwise[:, sets[:, pairs[:, 0]], sets[:, pairs[:, 1]]].mean(dim=-1)
    best = values.argmax(dim=1)
    order = torch.randperm(num_prompts, generator=generator)
    order = order[values.max(dim=1).values[order].argsort(descending=True, stable=True)]
    chosen: list[Chosen] = []
    for prompt in order[:count].tolist():
        images = sets[best[prompt]][torch.randperm(num_images, generator=generator)]
        favourite = int(scores[:, prompt, images].mean(dim=0).argmax()) if num_images > 1 else None
        chosen.append(Chosen(prompt, tuple(images.tolist()), favourite))
    return chosen


def certainty(scores: Float[Tensor, "E P K"], *, temperature: float) -> float:
    """Return the mean probability, in [1/2, 1], of the preference that is expected between two images of a prompt.

    This is the accuracy that the reward model expects of itself on pairs of the policy's images.
    """
    log_odds = (scores[..., :, None] - scores[..., None, :]).double() / temperature
    probability = torch.sigmoid(log_odds).mean(dim=0)
    first, second = torch.triu_indices(scores.shape[-1], scores.shape[-1], offset=1)
    return torch.maximum(probability, 1 - probability)[:, first, second].mean().item()
