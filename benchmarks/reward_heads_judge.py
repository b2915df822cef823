"""What a head of `benchmarks/reward_heads.py` says of encoded images."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.reward_heads_data import NUM_CANDIDATES, Encoded
from benchmarks.reward_heads_variants import Seen, Variant
from reward_model.model import RewardModel


def outputs(model: RewardModel, variant: Variant, data: Encoded, rows: Tensor, others: Tensor) -> Tensor:
    """Return the outputs (B, d) of a head for some images; `others` are those that each is compared with."""
    prompts = ["" if variant.ignores_prompt else data.prompts[i] + variant.prompt_end for i in rows.tolist()]
    vision = data.last[rows]
    if variant.reads_both:
        vision = torch.cat([vision, data.last[others]], dim=1)
    tokens = model.backbone.prompt_tokenizer(prompts, [vision.shape[1]] * len(rows))
    features = torch.zeros_like(vision) if variant.ignores_image else vision
    output = model.backbone.forward({**tokens, "features": features})
    return variant(Seen(output, vision, data.middle[rows], tokens["input_ids"]))


def log_odds(model: RewardModel, variant: Variant, data: Encoded, first: Tensor, second: Tensor) -> Tensor:
    """Return the log-odds (B,) that the images `first` are preferred to the images `second` of the same prompts."""
    rows, others = torch.cat([first, second]), torch.cat([second, first])
    return variant.logits(*outputs(model, variant, data, rows, others).chunk(2))


@torch.no_grad()
def judge_pairs(model: RewardModel, variant: Variant, data: Encoded) -> np.ndarray:
    """Return the log-odds of the winner of each pair."""
    num_pairs = len(data.prompts) // 2
    parts = [log_odds(model, variant, data, rows, rows + num_pairs) for rows in torch.arange(num_pairs).split(128)]
    return torch.cat(parts).double().numpy()


@torch.no_grad()
def judge_candidates(model: RewardModel, variant: Variant, data: Encoded) -> Float[Tensor, "P 16"]:
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
