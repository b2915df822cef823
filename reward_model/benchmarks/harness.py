"""Evaluation of a scorer on a benchmark under every rule in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reward_model.benchmarks.columns import Floats
from reward_model.benchmarks.domains import Domain, accuracy_by_domain
from reward_model.benchmarks.metrics import Metric, label_metrics
from reward_model.benchmarks.rules import (
    ScoredPairs,
    best_tie_threshold,
    comparison_metrics,
    rating_metrics,
    scored_pairs,
)
from reward_model.benchmarks.types import Benchmark, Image, PairwiseScorer, Scorer


@dataclass(frozen=True, slots=True)
class Result:
    """The metrics of a scorer on one benchmark."""

    benchmark: Benchmark
    metrics: Sequence[Metric]
    domains: Sequence[Domain]
    """Accuracy by domain, the lowest first."""


def evaluate(
    scorer: Scorer,
    benchmark: Benchmark,
    *,
    threshold: float = 0.0,
    label_threshold: float = 0.0,
    batch_size: int = 32,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Result:
    """Evaluate a scorer on a benchmark under every rule in use.

    threshold: scores of two images that differ by at most this much, >= 0, are a tie.
    label_threshold: images with at least this score are predicted good (safe). 0, the default, is a probability of one
        half for LLaVA-Reward.
    batch_size: images in one call of the model.
    num_resamples: bootstrap resamples of each interval, which are drawn with `seed`.

    A scorer that only compares (general-preference head) can be evaluated on benchmarks of pairs; for others, its
    `score` raises ValueError. A score that is not finite raises ValueError.
    """
    options = {"num_resamples": num_resamples, "seed": seed}
    if benchmark.comparisons:
        values = score_differences(scorer, benchmark, batch_size=batch_size)
        tuned_threshold = None
        if benchmark.validation is not None:
            differences = score_differences(scorer, benchmark.validation, batch_size=batch_size)
            validation = _scored_pairs(benchmark.validation, differences)
            tuned_threshold = best_tie_threshold(validation.differences, validation.outcomes)
        pairs = _scored_pairs(benchmark, values, threshold=threshold)
        metrics = comparison_metrics(pairs, tuned_threshold=tuned_threshold, **options)
    else:
        values = score_items(scorer, benchmark, batch_size=batch_size)
        if benchmark.labels:
            probability = torch.from_numpy(values - label_threshold).sigmoid().numpy()
            metrics = label_metrics(values, benchmark.labels, probability, **options)
        else:
            metrics = rating_metrics(values, benchmark.ratings, [item.group for item in benchmark.items], **options)
    domains = accuracy_by_domain(benchmark, values, threshold=threshold, label_threshold=label_threshold, **options)
    return Result(benchmark, metrics, domains)


@torch.no_grad()
def score_items(scorer: Scorer, benchmark: Benchmark, *, batch_size: int = 32) -> Floats:
    """Return the score of each item in float64, (N,). An image that occurs twice with one prompt is scored once.

    Raises ValueError if a score is not finite.
    """
    index: dict[tuple[Image, str], int] = {}
    rows = [index.setdefault((item.image, item.prompt), len(index)) for item in benchmark.items]
    distinct = list(index)
    found = scorer.score([image for image, _ in distinct], [prompt for _, prompt in distinct], batch_size=batch_size)
    scores = found.cpu().double().numpy()
    if not np.isfinite(scores).all():
        prompt = distinct[int(np.argmin(np.isfinite(scores)))][1]
        raise ValueError(f"The score of an image of {benchmark.name} is not finite; its prompt is {prompt!r}.")
    return scores[rows]


@torch.no_grad()
def score_differences(scorer: Scorer, benchmark: Benchmark, *, batch_size: int = 32) -> Floats:
    """Return score(first) - score(second) for each comparison, (P,); log-odds if the scorer only compares."""
    pairs = benchmark.comparisons
    if not isinstance(scorer, PairwiseScorer) or scorer.gives_scores:
        scores = score_items(scorer, benchmark, batch_size=batch_size)
        return np.array([scores[pair.first] - scores[pair.second] for pair in pairs])
    first = [benchmark.items[pair.first] for pair in pairs]
    second = [benchmark.items[pair.second].image for pair in pairs]
    images, prompts = [item.image for item in first], [item.prompt for item in first]
    return scorer.logits(images, second, prompts, batch_size=batch_size).cpu().double().numpy()


def _scored_pairs(benchmark: Benchmark, differences: Floats, *, threshold: float = 0.0) -> ScoredPairs:
    pairs = benchmark.comparisons
    groups = [benchmark.items[pair.first].group for pair in pairs]
    return scored_pairs(differences, [pair.outcome for pair in pairs], groups, threshold=threshold)
