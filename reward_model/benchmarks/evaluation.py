"""Ask a judge about records that people have answered, and measure how far it agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.benchmarks.metrics import Metric, gap_metrics, label_metrics, pair_metrics
from reward_model.benchmarks.statistics import order_consistency
from reward_model.losses import decided_logits
from reward_model.scorers.pointwise import PointwiseScorer
from reward_model.scoring import LlavaReward
from reward_model.types import LabelledImage, PreferencePair, Record

NUM_SWAPPED = 256


@dataclass(frozen=True, slots=True)
class RecordScores:
    """What a judge says of each pair and of each labelled image."""

    pairs: list[PreferencePair]
    logits: Float[Tensor, " P"]
    """Log-odds that the winner is preferred, if it is no tie: negative where the judge is wrong."""
    swapped: Float[Tensor, " S"]
    """Of the first `NUM_SWAPPED` pairs, asked the other way round: log-odds that the loser is preferred."""
    labelled: list[LabelledImage]
    scores: Float[Tensor, " N"]


def score_records(judge: LlavaReward | PointwiseScorer, records: Sequence[Record], *, batch_size: int) -> RecordScores:
    """The judge's answer to every record, by its first perspective if it has several."""
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    labelled = [record for record in records if isinstance(record, LabelledImage)]
    logits, swapped, scores = torch.zeros(0), torch.zeros(0), torch.zeros(0)
    if pairs:
        logits = _logits(judge, pairs, "winner", "loser", batch_size)
        swapped = _logits(judge, pairs[:NUM_SWAPPED], "loser", "winner", batch_size)
    if labelled:
        scores = judge.score([one.image for one in labelled], [one.prompt for one in labelled], batch_size=batch_size)
    return RecordScores(pairs, logits.cpu(), swapped.cpu(), labelled, scores.cpu())


def _logits(
    judge: LlavaReward | PointwiseScorer, pairs: Sequence[PreferencePair], first: str, second: str, batch_size: int
) -> Float[Tensor, " P"]:
    """Log-odds of one side of each pair, `winner` or `loser`, against the other."""
    images, prompts = (
        [[getattr(pair, side + kind) for pair in pairs] for side in (first, second)] for kind in ("", "_prompt")
    )
    logits = judge.logits(images[0], images[1], prompts[0], second_prompts=prompts[1], batch_size=batch_size)
    return decided_logits(logits, tie_width=judge.config().tie_width if isinstance(judge, LlavaReward) else 0.0)


def record_metrics(answers: RecordScores) -> list[Metric]:
    """Everything that can be measured of these answers, with 95 % intervals."""
    found: list[Metric] = []
    if answers.pairs:
        found += pair_metrics(answers.logits.numpy(), [0 if pair.tie else 1 for pair in answers.pairs])
        rated = [i for i, pair in enumerate(answers.pairs) if pair.rating_gap > 0]
        if rated:
            found += gap_metrics(answers.logits[rated].numpy(), [answers.pairs[i].rating_gap for i in rated])
        asked = len(answers.swapped)
        both = order_consistency(torch.sigmoid(answers.logits[:asked]), torch.sigmoid(answers.swapped))
        note = "largest |p(a beats b) + p(b beats a) - 1|, asked in both orders"
        found.append(Metric("order_gap", both.largest_gap, None, None, asked, note))
    if answers.labelled:
        labels = [one.label for one in answers.labelled]
        found += label_metrics(answers.scores.numpy(), labels, torch.sigmoid(answers.scores).numpy())
    return found


@dataclass(frozen=True, slots=True)
class Mistake:
    """A pair in which the judge preferred the loser."""

    winner: Path
    loser: Path
    winner_prompt: str
    loser_prompt: str
    log_odds: float
    """How sure it was of the loser, > 0."""
    where: str


def worst_mistakes(answers: RecordScores, *, count: int) -> list[Mistake]:
    """The strict pairs that the judge got most wrong, the worst first."""
    strict = [i for i, pair in enumerate(answers.pairs) if not pair.tie and answers.logits[i] < 0]
    worst = sorted(strict, key=lambda i: answers.logits[i].item())[:count]
    return [
        Mistake(p.winner, p.loser, p.winner_prompt, p.loser_prompt, -answers.logits[i].item(), p.where)
        for i, p in ((i, answers.pairs[i]) for i in worst)
    ]
