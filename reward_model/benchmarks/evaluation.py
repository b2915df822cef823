"""Evaluation of a reward model on preference records: scores, metrics, and the pairs with the largest errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.attention import AttentionMap, attention_maps, why_no_map
from reward_model.benchmarks.metrics import Metric, gap_metrics, label_metrics, pair_metrics
from reward_model.benchmarks.statistics import order_consistency
from reward_model.datasets.table import RecordTable
from reward_model.images import to_tensor
from reward_model.losses import decided_logits
from reward_model.prompt_likelihood import token_contributions
from reward_model.scorers.pointwise import PointwiseScorer
from reward_model.scorers.visual_gpt_score import VisualGptScore
from reward_model.scoring import LlavaReward
from reward_model.stored_images import ImageSource
from reward_model.types import Backbone, LabelledImage, PreferencePair, Record, Tags

NUM_SWAPPED = 256
"""Number of pairs that are also scored in the other order."""
PART = 4096
"""Records whose images are opened before the first of them is scored."""


@dataclass(frozen=True, slots=True)
class RecordScores:
    """The outputs of a reward model for the pairs and the labelled images of a data set."""

    pairs: list[PreferencePair]
    logits: Float[Tensor, " P"]
    """Log-odds that the winner is preferred, given that there is no tie; negative where the model is wrong."""
    swapped: Float[Tensor, " S"]
    """Log-odds that the loser is preferred, for the first `NUM_SWAPPED` pairs in the other order."""
    labelled: list[LabelledImage]
    scores: Float[Tensor, " N"]
    """Scores of the labelled images."""
    winner_scores: Float[Tensor, " _"] = field(default_factory=lambda: torch.zeros(0))
    """Scores (P,) of the winners; empty for a model that only compares."""
    loser_scores: Float[Tensor, " _"] = field(default_factory=lambda: torch.zeros(0))


def score_records(
    reward_model: LlavaReward | PointwiseScorer, records: Sequence[Record], *, batch_size: int,
    num_swapped: int = NUM_SWAPPED,
) -> RecordScores:  # fmt: skip
    """Score every record, with the first perspective of a reward model that has several.

    Raises ValueError for labelled images with readout prompt_likelihood, of which no value divides good from bad.
    """
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    labelled = [record for record in records if isinstance(record, LabelledImage)]
    if labelled and isinstance(reward_model, LlavaReward) and reward_model.config().readout == "prompt_likelihood":
        raise ValueError(
            f"{labelled[0].where} is a label; readout prompt_likelihood compares images of one prompt: give pairs."
        )
    logits, swapped, scores, winner_scores, loser_scores = (torch.zeros(0) for _ in range(5))
    if pairs and (not isinstance(reward_model, LlavaReward) or reward_model.gives_scores):
        winner_scores, loser_scores = _scores_of_sides(reward_model, pairs, batch_size=batch_size)
        logits = _decided(reward_model, (winner_scores - loser_scores) / _unit(reward_model))
    elif pairs:
        logits = _logits(reward_model, pairs, swap=False, batch_size=batch_size)
    if pairs[:num_swapped]:
        swapped = _logits(reward_model, pairs[:num_swapped], swap=True, batch_size=batch_size)
    if labelled:
        images, prompts = [one.image for one in labelled], [one.prompt for one in labelled]
        scores = reward_model.score(images, prompts, batch_size=batch_size)
    sides = winner_scores.cpu(), loser_scores.cpu()
    return RecordScores(pairs, logits.cpu(), swapped.cpu(), labelled, scores.cpu(), *sides)


def score_in_parts(
    reward_model: LlavaReward | PointwiseScorer,
    records: RecordTable,
    *,
    batch_size: int,
    usable: Callable[[RecordTable], RecordTable],
) -> RecordScores:
    """Score the usable ones of many records; images are opened shortly before they are scored.

    `usable` returns those of some records that can be scored. Raises ValueError if none can.
    """
    parts, left = list[RecordScores](), NUM_SWAPPED
    for start in range(0, len(records), PART):
        some = usable(records[start : start + PART])
        parts.append(score_records(reward_model, some, batch_size=batch_size, num_swapped=left))
        left -= len(parts[-1].swapped)
    if not any(part.pairs or part.labelled for part in parts):
        raise ValueError(f"None of the {len(records):,} records can be scored.")
    return RecordScores(
        [pair for part in parts for pair in part.pairs],
        torch.cat([part.logits for part in parts]),
        torch.cat([part.swapped for part in parts]),
        [one for part in parts for one in part.labelled],
        torch.cat([part.scores for part in parts]),
        torch.cat([part.winner_scores for part in parts]),
        torch.cat([part.loser_scores for part in parts]),
    )


def _scores_of_sides(
    reward_model: LlavaReward | PointwiseScorer, pairs: Sequence[PreferencePair], *, batch_size: int
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Return the scores of the winners and of the losers."""
    winners = reward_model.score(
        [pair.winner for pair in pairs], [pair.winner_prompt for pair in pairs], batch_size=batch_size
    )
    losers = reward_model.score(
        [pair.loser for pair in pairs], [pair.loser_prompt for pair in pairs], batch_size=batch_size
    )
    return winners, losers


def _unit(reward_model: LlavaReward | PointwiseScorer) -> float:
    """Return the difference of two scores that is one unit of log-odds."""
    if isinstance(reward_model, LlavaReward):
        return reward_model.config().temperature
    return reward_model.function.log_odds_unit


def _decided(reward_model: LlavaReward | PointwiseScorer, logits: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    tie_width = reward_model.config().tie_width if isinstance(reward_model, LlavaReward) else 0.0
    return decided_logits(logits, tie_width=tie_width)


def _logits(
    reward_model: LlavaReward | PointwiseScorer, pairs: Sequence[PreferencePair], *, swap: bool, batch_size: int
) -> Float[Tensor, " P"]:
    """Return the log-odds of the winner of each pair, or of the loser with `swap`, which is then the first image."""
    winners = [pair.winner for pair in pairs], [pair.winner_prompt for pair in pairs]
    losers = [pair.loser for pair in pairs], [pair.loser_prompt for pair in pairs]
    first, second = (losers, winners) if swap else (winners, losers)
    logits = reward_model.logits(first[0], second[0], first[1], second_prompts=second[1], batch_size=batch_size)
    return _decided(reward_model, logits)


def record_metrics(scores: RecordScores) -> list[Metric]:
    """Return all metrics that are defined for these records, with 95 % intervals."""
    found: list[Metric] = []
    if scores.pairs:
        found += pair_metrics(scores.logits.numpy(), [0 if pair.tie else 1 for pair in scores.pairs])
        rated = [i for i, pair in enumerate(scores.pairs) if pair.rating_gap > 0]
        if rated:
            found += gap_metrics(scores.logits[rated].numpy(), [scores.pairs[i].rating_gap for i in rated])
        num_swapped = len(scores.swapped)
        order = order_consistency(torch.sigmoid(scores.logits[:num_swapped]), torch.sigmoid(scores.swapped))
        note = "largest |p(a beats b) + p(b beats a) - 1|, each pair in both orders"
        found.append(Metric("order_gap", order.largest_gap, None, None, num_swapped, note))
    if scores.labelled:
        labels = [one.label for one in scores.labelled]
        found += label_metrics(scores.scores.numpy(), labels, torch.sigmoid(scores.scores).numpy())
    return found


@dataclass(frozen=True, slots=True)
class Mistake:
    """A pair whose loser the reward model prefers."""

    winner: ImageSource
    loser: ImageSource
    winner_prompt: str
    loser_prompt: str
    log_odds: float
    """Log-odds of the loser, > 0."""
    where: str
    tags: Tags = field(default_factory=dict[str, tuple[str, ...]])
    maps: tuple[AttentionMap, AttentionMap] | None = None
    """Where SkipCA attends in the winner and in the loser, as they are scored."""
    contributions: Sequence[tuple[str, float]] = ()
    """The tokens of the prompt with their contributions to `log_odds`, if a score is the prompt's likelihood."""


def worst_mistakes(scores: RecordScores, *, count: int) -> list[Mistake]:
    """Return at most `count` pairs without a tie whose loser is preferred, that with the largest log-odds first."""
    wrong = [i for i, pair in enumerate(scores.pairs) if not pair.tie and scores.logits[i] < 0]
    worst = sorted(wrong, key=lambda i: scores.logits[i].item())[:count]
    return [
        Mistake(p.winner, p.loser, p.winner_prompt, p.loser_prompt, -scores.logits[i].item(), p.where, p.tags)
        for i, p in ((i, scores.pairs[i]) for i in worst)
    ]


def with_explanations(reward_model: LlavaReward | PointwiseScorer, mistakes: Sequence[Mistake]) -> list[Mistake]:
    """Return the mistakes with maps of SkipCA's attention, or with the contributions of tokens to a likelihood.

    Those of a model that has neither stay as they are, and so do pairs with two prompts under a likelihood.
    """
    if not isinstance(reward_model, LlavaReward):
        function = reward_model.function
        if not isinstance(function, VisualGptScore):
            return list(mistakes)
        return [_with_contributions(function.backbone, one) for one in mistakes]
    if why_no_map(reward_model) is None:
        return [_with_maps(reward_model, one) for one in mistakes]
    config = reward_model.config()
    if config.readout != "prompt_likelihood":
        return list(mistakes)
    with reward_model.model.using(config.perspective):
        return [_with_contributions(reward_model.model.backbone, one) for one in mistakes]


def _with_maps(reward_model: LlavaReward, one: Mistake) -> Mistake:
    winner, loser = attention_maps(reward_model, [one.winner, one.loser], [one.winner_prompt, one.loser_prompt])
    return replace(one, maps=(winner, loser))


def _with_contributions(backbone: Backbone, one: Mistake) -> Mistake:
    if one.winner_prompt != one.loser_prompt:
        return one
    loser, winner = to_tensor(one.loser), to_tensor(one.winner)
    return replace(one, contributions=token_contributions(backbone, loser, winner, one.loser_prompt))
