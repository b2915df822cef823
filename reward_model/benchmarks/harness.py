"""Ask a judge about a benchmark and measure it under every rule."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PillowImage

from reward_model.benchmarks.domains import Domain, domains_of
from reward_model.benchmarks.metrics import Metric, label_metrics
from reward_model.benchmarks.rules import Compared, best_band, compared, comparison_metrics, rated_metrics
from reward_model.benchmarks.statistics import Floats
from reward_model.benchmarks.types import Benchmark, Image, PairwiseScorer, Scorer
from reward_model.images import ImageInput

_DECODED = 256
"""Images that were bytes and are decoded at once."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a judge is worth on one benchmark."""

    benchmark: Benchmark
    metrics: Sequence[Metric]
    domains: Sequence[Domain]


@torch.no_grad()
def score_items(judge: Scorer, benchmark: Benchmark, *, batch_size: int = 32) -> Floats:
    """The judge's score of each item in float64; an image that occurs twice under one prompt is shown once."""
    place: dict[tuple[Image, str], int] = {}
    rows = [place.setdefault((item.image, item.prompt), len(place)) for item in benchmark.items]
    shown = list(place)
    parts: list[torch.Tensor] = []
    for start in range(0, len(shown), _DECODED):
        some = shown[start : start + _DECODED]
        images = [_decoded(image) for image, _ in some]
        parts.append(judge.score(images, [prompt for _, prompt in some], batch_size=batch_size).cpu())
    scores = torch.cat(parts).double().numpy()
    if not np.isfinite(scores).all():
        prompt = shown[int(np.argmin(np.isfinite(scores)))][1]
        raise ValueError(f"The judge's score of an image of {benchmark.name} is not finite; its prompt is {prompt!r}.")
    return scores[rows]


def evaluate(
    judge: Scorer,
    benchmark: Benchmark,
    *,
    threshold: float = 0.0,
    label_threshold: float = 0.0,
    batch_size: int = 32,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """Everything that the rules say of a judge on a benchmark.

    Scores that differ by `threshold` or less are a tie of the judge; an image is called good (safe) if its score is
    `label_threshold` or more, which for a LLaVA-Reward judge is a probability of one half at 0.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    if benchmark.comparisons:
        answers = score_differences(judge, benchmark, batch_size=batch_size)
        band = None
        if benchmark.validation is not None:
            known = _pairs(benchmark.validation, score_differences(judge, benchmark.validation, batch_size=batch_size))
            band = best_band(known.differences, known.outcomes)
        metrics = comparison_metrics(_pairs(benchmark, answers, threshold=threshold), band=band, **options)
    else:
        answers = score_items(judge, benchmark, batch_size=batch_size)
        if benchmark.labels:
            probability = torch.from_numpy(answers - label_threshold).sigmoid().numpy()
            metrics = label_metrics(answers, benchmark.labels, probability, **options)
        else:
            metrics = rated_metrics(answers, benchmark.ratings, [item.group for item in benchmark.items], **options)
    domains = domains_of(benchmark, answers, threshold=threshold, label_threshold=label_threshold, **options)
    return Result(benchmark, metrics, domains)


@torch.no_grad()
def score_differences(judge: Scorer, benchmark: Benchmark, *, batch_size: int = 32) -> Floats:
    """How much better the first image of each comparison is: of scores, or in log-odds if the judge only compares."""
    pairs = benchmark.comparisons
    if not isinstance(judge, PairwiseScorer) or judge.gives_scores:
        scores = score_items(judge, benchmark, batch_size=batch_size)
        return np.array([scores[pair.first] - scores[pair.second] for pair in pairs])
    parts: list[torch.Tensor] = []
    for start in range(0, len(pairs), _DECODED):
        some = pairs[start : start + _DECODED]
        first = [benchmark.items[pair.first] for pair in some]
        second = [benchmark.items[pair.second] for pair in some]
        one, two = ([_decoded(item.image) for item in side] for side in (first, second))
        parts.append(judge.logits(one, two, [item.prompt for item in first], batch_size=batch_size).cpu())
    return torch.cat(parts).double().numpy()


def _pairs(benchmark: Benchmark, differences: Floats, *, threshold: float = 0.0) -> Compared:
    pairs = benchmark.comparisons
    groups = [benchmark.items[pair.first].group for pair in pairs]
    return compared(differences, [pair.outcome for pair in pairs], groups, threshold=threshold)


def _decoded(image: Image) -> ImageInput:
    return PillowImage.open(io.BytesIO(image)) if isinstance(image, bytes) else image
