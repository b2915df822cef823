"""Where does a judge fail? Its accuracy by source, model, skill, style and length of the prompt, the worst first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from reward_model.benchmarks.metrics import Metric, bootstrapped
from reward_model.benchmarks.statistics import Floats
from reward_model.benchmarks.types import Benchmark, Comparison, Item

LENGTHS = (5, 10, 20, 40)
"""Last numbers of words of each class of prompts but the longest."""
STYLES = {
    "photo": r"photo(graph|realistic|graphic|s)?|dslr|35mm|bokeh",
    "anime": r"anime|manga|ghibli",
    "painting": r"painting|painted|oil on|watercolou?r|gouache|impressionist",
    "drawing": r"drawing|drawn|sketch|line art|illustration|cartoon|comic",
    "3d": r"3d|render(ed|ing)?|octane|unreal engine|blender|cgi",
}
"""Words by which a prompt asks for a style; one that holds words of several counts for each, one without as `none`."""


@dataclass(frozen=True, slots=True)
class Domain:
    """One row of the report."""

    benchmark: str
    by: str
    """What sorted the images: source, model, skill, style, words, ..."""
    value: str
    accuracy: Metric
    """Of pairs that people do not tie, a tie of the judge being wrong; of labels, at the label threshold."""


def domains_of(
    benchmark: Benchmark, answers: Floats, *, threshold: float = 0.0, label_threshold: float = 0.0,
    num_resamples: int = 2000, seed: int = 0,
) -> list[Domain]:  # fmt: skip
    """The report on one benchmark, the domain with the lowest accuracy first.

    `answers` holds a difference for each comparison, or a score for each item that was rated or labelled. A pair
    belongs to the domains of either of its images. Images that were rated are compared within their prompt.
    """
    if benchmark.labels:
        right = [
            float((score >= label_threshold) == label) for score, label in zip(answers, benchmark.labels, strict=True)
        ]
        rows = [(item.group, credit, domains(item)) for item, credit in zip(benchmark.items, right, strict=True)]
    else:
        pairs = benchmark.comparisons or rated_pairs(benchmark)
        if benchmark.ratings:
            answers = np.array([answers[pair.first] - answers[pair.second] for pair in pairs])
        rows = [
            (benchmark.items[pair.first].group, float(difference * pair.outcome > threshold), _of_pair(benchmark, pair))
            for pair, difference in zip(pairs, answers, strict=True)
            if pair.outcome
        ]
    sorted_rows: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for group, credit, known in rows:
        for domain in known:
            sorted_rows[domain].append((group, credit))
    measure = partial(_accuracy, num_resamples=num_resamples, seed=seed)
    found = [Domain(benchmark.name, by, value, measure(part)) for (by, value), part in sorted_rows.items()]
    return sorted(found, key=lambda domain: (domain.accuracy.value, domain.by, domain.value))


def domains(item: Item) -> Iterator[tuple[str, str]]:
    """What an item is sorted by, and into which class each time."""
    for by, values in item.tags.items():
        yield from ((by, value) for value in values)
    yield "words", words_class(item.prompt)
    yield from (("style", style) for style in styles_of(item.prompt))


def words_class(prompt: str) -> str:
    """How long a prompt is, as a class of numbers of words."""
    number, low = len(prompt.split()), 0
    for high in LENGTHS:
        if number <= high:
            return f"{low} to {high}"
        low = high + 1
    return f"{low} and more"


def styles_of(prompt: str) -> list[str]:
    """The styles that a prompt asks for by name."""
    found = [style for style, words in STYLES.items() if re.search(rf"\b({words})\b", prompt, flags=re.IGNORECASE)]
    return found or ["none"]


def rated_pairs(benchmark: Benchmark) -> list[Comparison]:
    """Each two images of one prompt, the higher rated one having won."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(benchmark.items):
        groups[item.group].append(place)
    rating = benchmark.ratings
    return [
        Comparison(i, j, 1 if rating[i] > rating[j] else -1 if rating[i] < rating[j] else 0)
        for places in groups.values()
        for i, j in combinations(places, 2)
    ]


def _of_pair(benchmark: Benchmark, pair: Comparison) -> set[tuple[str, str]]:
    return {domain for place in (pair.first, pair.second) for domain in domains(benchmark.items[place])}


def _accuracy(rows: Sequence[tuple[str, float]], *, num_resamples: int, seed: int) -> Metric:
    """The share of right rows, its interval over groups."""
    groups = np.unique([group for group, _ in rows], return_inverse=True)[1]
    right = np.bincount(groups, weights=[credit for _, credit in rows])
    total = np.bincount(groups)
    name = "accuracy"
    return bootstrapped(
        name,
        lambda r, t: float(r.sum() / t.sum()),
        right,
        total,
        num_resamples=num_resamples,
        seed=seed,
        count=len(rows),
    )
