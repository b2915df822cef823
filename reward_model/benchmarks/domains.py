"""Accuracy by domain: source, model, skill, style and length of the prompt."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from reward_model.benchmarks.columns import Floats
from reward_model.benchmarks.metrics import Metric, with_interval
from reward_model.benchmarks.types import Benchmark, Comparison, Item

LENGTHS = (5, 10, 20, 40)
"""Largest number of words of each length class; longer prompts form the last class."""
STYLES = {
    "photo": r"photo(graph|realistic|graphic|s)?|dslr|35mm|bokeh",
    "anime": r"anime|manga|ghibli",
    "painting": r"painting|painted|oil on|watercolou?r|gouache|impressionist",
    "drawing": r"drawing|drawn|sketch|line art|illustration|cartoon|comic",
    "3d": r"3d|render(ed|ing)?|octane|unreal engine|blender|cgi",
}
"""Words that assign a prompt to a style; a prompt may have several styles, or `none`."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The accuracy in one domain."""

    benchmark: str
    by: str
    """Criterion of the domain: source, model, skill, style, words, ..."""
    value: str
    accuracy: Metric
    """On pairs that annotators do not tie, where tied scores are wrong; or on labels, at the label threshold."""


def accuracy_by_domain(
    benchmark: Benchmark,
    values: Floats,
    *,
    threshold: float = 0.0,
    label_threshold: float = 0.0,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[Domain]:
    """Return the accuracy in each domain of a benchmark, the lowest first.

    `values` are score differences (P,) of the comparisons, or scores (N,) of the items of a benchmark of ratings or
    labels. A pair belongs to the domains of both of its images. Rated images are compared within their prompt.
    """
    if benchmark.labels:
        rows = [
            (item.group, float((score >= label_threshold) == label), {*item_domains(item)})
            for item, score, label in zip(benchmark.items, values, benchmark.labels, strict=True)
        ]
    else:
        pairs = benchmark.comparisons or pairs_of_ratings(benchmark)
        if benchmark.ratings:
            values = np.array([values[pair.first] - values[pair.second] for pair in pairs])
        rows = [
            (
                benchmark.items[pair.first].group,
                float(difference * pair.outcome > threshold),
                pair_domains(benchmark, pair),
            )
            for pair, difference in zip(pairs, values, strict=True)
            if pair.outcome
        ]
    by_domain: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for group, credit, members in rows:
        for domain in members:
            by_domain[domain].append((group, credit))
    accuracy = partial(group_accuracy, num_resamples=num_resamples, seed=seed)
    found = [Domain(benchmark.name, by, value, accuracy(part)) for (by, value), part in by_domain.items()]
    return sorted(found, key=lambda domain: (domain.accuracy.value, domain.by, domain.value))


def item_domains(item: Item) -> Iterator[tuple[str, str]]:
    """Yield the domains of an item as (criterion, value): its tags, and the length and styles of its prompt."""
    for by, values in item.tags.items():
        yield from ((by, value) for value in values)
    yield "words", length_class(item.prompt)
    yield from (("style", style) for style in prompt_styles(item.prompt))


def pair_domains(benchmark: Benchmark, pair: Comparison) -> set[tuple[str, str]]:
    """Return the domains of both images of a pair."""
    return {domain for index in (pair.first, pair.second) for domain in item_domains(benchmark.items[index])}


def length_class(prompt: str) -> str:
    """Return the length class of a prompt, such as "6 to 10" words."""
    number, low = len(prompt.split()), 0
    for high in LENGTHS:
        if number <= high:
            return f"{low} to {high}"
        low = high + 1
    return f"{low} and more"


def prompt_styles(prompt: str) -> list[str]:
    """Return the styles whose words occur in a prompt; ["none"] if there are none."""
    found = [style for style, words in STYLES.items() if re.search(rf"\b({words})\b", prompt, flags=re.IGNORECASE)]
    return found or ["none"]


def pairs_of_ratings(benchmark: Benchmark) -> list[Comparison]:
    """Return all pairs of two images of one prompt; the higher rated one is preferred."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(benchmark.items):
        groups[item.group].append(index)
    rating = benchmark.ratings
    return [
        Comparison(i, j, 1 if rating[i] > rating[j] else -1 if rating[i] < rating[j] else 0)
        for members in groups.values()
        for i, j in combinations(members, 2)
    ]


def group_accuracy(rows: Sequence[tuple[str, float]], *, num_resamples: int, seed: int) -> Metric:
    """Return the fraction of right rows, with an interval over resampled groups."""
    groups = np.unique([group for group, _ in rows], return_inverse=True)[1]
    right = np.bincount(groups, weights=[credit for _, credit in rows])
    total = np.bincount(groups)
    return with_interval(
        "accuracy",
        lambda r, t: float(r.sum() / t.sum()),
        right,
        total,
        num_resamples=num_resamples,
        seed=seed,
        count=len(rows),
        num_trials=len(total),
    )
