"""Scores of a head of `benchmarks/reward_heads.py` for encoded images."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.reward_heads_data import NUM_CANDIDATES, Encoded
from benchmarks.reward_heads_variants import HeadInputs, SkipCa, Variant
from reward_model.model import RewardModel


def head_inputs(model: RewardModel, variant: Variant, data: Encoded, rows: Tensor, others: Tensor) -> HeadInputs:
    """Run the language model on some images; `others` are those that each is compared with."""
    prompts = ["" if variant.ignores_prompt else data.prompts[i] + variant.prompt_end for i in rows.tolist()]
    vision = data.last[rows]
    if variant.reads_both:
        vision = torch.cat([vision, data.last[others]], dim=1)
    tokens = model.backbone.prompt_tokenizer(prompts, [vision.shape[1]] * len(rows))
    features = torch.zeros_like(vision) if variant.ignores_image else vision
    output = model.backbone.forward({**tokens, "features": features})
    return HeadInputs(output, vision, data.middle[rows], tokens["input_ids"])


def outputs(model: RewardModel, variant: Variant, data: Encoded, rows: Tensor, others: Tensor) -> Tensor:
    """Return the outputs (B, d) of a head for some images."""
    return variant(head_inputs(model, variant, data, rows, others))


def log_odds(model: RewardModel, variant: Variant, data: Encoded, first: Tensor, second: Tensor) -> Tensor:
    """Return the log-odds (B,) that the images `first` are preferred to the images `second` of the same prompts."""
    rows, others = torch.cat([first, second]), torch.cat([second, first])
    return variant.logits(*outputs(model, variant, data, rows, others).chunk(2))


@torch.no_grad()
def pair_log_odds(model: RewardModel, variant: Variant, data: Encoded) -> np.ndarray:
    """Return the log-odds of the winner of each pair."""
    num_pairs = len(data.prompts) // 2
    parts = [log_odds(model, variant, data, rows, rows + num_pairs) for rows in torch.arange(num_pairs).split(128)]
    return torch.cat(parts).double().numpy()


@torch.no_grad()
def candidate_scores(model: RewardModel, variant: Variant, data: Encoded) -> Float[Tensor, "P 16"]:
    """Return the score of each candidate of each prompt; without one, its mean log-odds against the others."""
    index = torch.arange(len(data.prompts))
    if not variant.reads_both and variant.kind == "scalar":
        parts = [outputs(model, variant, data, rows, rows)[:, 0] for rows in index.split(256)]
        return torch.cat(parts).view(-1, NUM_CANDIDATES)
    groups = index.view(-1, NUM_CANDIDATES)
    scores = torch.zeros(groups.shape)
    for step in range(1, NUM_CANDIDATES):
        others = groups.roll(step, dims=1).flatten()
        parts = [
            log_odds(model, variant, data, *rows) for rows in zip(index.split(128), others.split(128), strict=True)
        ]
        scores += torch.cat(parts).view(groups.shape) / (NUM_CANDIDATES - 1)
    return scores


def rightly_ordered(scores: Float[Tensor, "P 16"], passed: Bool[Tensor, "P 16"]) -> float:
    """Return the share of pairs of a prompt's samples, one that passes and one that fails, that scores order rightly.

    Ties count as half.
    """
    is_pair = passed[:, :, None] & ~passed[:, None, :]
    gap = (scores[:, :, None] - scores[:, None, :])[is_pair]
    return float(((gap > 0).float() + 0.5 * (gap == 0).float()).mean())


@torch.no_grad()
def attention_on_things(
    model: RewardModel, variant: SkipCa, data: Encoded, images: Float[Tensor, "N 3 Y X"]
) -> tuple[float, float]:
    """Return the mean share of SkipCA's attention that falls on things, and their share of the area.

    `images` are the drawings of `data` without texture; a pixel is of a thing if it has another colour than the corner.
    A visual token counts by the share of its patch.
    """
    is_thing = ((images - images[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.05).float()
    side = math.isqrt(data.last.shape[1])
    share = F.adaptive_avg_pool2d(is_thing, side).flatten(1)
    rows = torch.arange(len(images)).split(128)
    attention = torch.cat([variant.attention(head_inputs(model, variant, data, part, part)) for part in rows])
    return float((attention * share).sum(dim=1).mean()), float(share.mean())
