"""Summary of the records of a data set, from the keys of its prompts and images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reward_model.datasets.scratch import filled, slices, starts_of_runs
from reward_model.datasets.table import RecordTable
from reward_model.types import Record

Row = tuple[str, int | str]

_NUM_BINS = 4


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of the records of a data set."""

    num_pairs: int
    num_ties: int
    num_two_prompts: int
    num_good: int
    num_bad: int
    num_gaps: int
    """Pairs with a rating gap above 0."""
    histogram: Sequence[Row]
    """The rating gaps above 0, and how many pairs have them."""
    num_prompts: int
    most_of_one_prompt: int
    num_images: int

    def table(self) -> str:
        """Return a table, one count a line, of pairs, ties, rating gaps, labels, prompts and images."""
        num_labels = self.num_good + self.num_bad
        rows: list[Row] = [
            ("pairs", self.num_pairs),
            ("  ties", self.num_ties),
            *_share("  ties among the pairs", self.num_ties, self.num_pairs),
            ("  with two prompts", self.num_two_prompts),
            ("  with a rating gap", self.num_gaps),
            *self.histogram,
            ("labelled images", num_labels),
            ("  label 1 (good)", self.num_good),
            ("  label 0 (bad)", self.num_bad),
            *_share("  good among the labels", self.num_good, num_labels),
            ("distinct prompts", self.num_prompts),
            ("  most records of one", self.most_of_one_prompt),
            ("distinct images", self.num_images),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {n if isinstance(n, str) else f'{n:,}':>9}" for name, n in rows)

    def warnings(self) -> list[str]:
        """Return a sentence for all labels being of one class, and one for all pairs being ties."""
        texts = list[str]()
        if bool(self.num_good) != bool(self.num_bad):
            label = int(self.num_good > 0)
            texts.append(f"all labels are {label}, so that a model which always says so fits them")
        if self.num_pairs and self.num_ties == self.num_pairs:
            texts.append("all pairs are ties, so that equal scores fit them")
        return texts


def summarise(records: Sequence[Record]) -> Summary:
    """Return the counts of a data set. Prompts and images are told apart by 64-bit hashes."""
    table = RecordTable.of(records)
    labels = Counter[int]()
    for part in table.column_parts("label", null=-1):
        labels.update(dict(zip(*map(np.ndarray.tolist, np.unique(part, return_counts=True)), strict=True)))
    sides = [table.column(f"{side}_prompt_key") for side in ("winner", "loser")]
    prompts = _sorted(_prompts(*sides), len(table) + _num_different(*sides))
    images = (part for side in ("winner", "loser") for part in table.column_parts(f"{side}_image_key"))
    num_gaps = sum(int(np.count_nonzero(part > 0)) for part in table.column_parts("rating_gap"))
    per_prompt = starts_of_runs(prompts)
    return Summary(
        num_pairs=labels[-1],
        num_ties=sum(int(np.count_nonzero(part)) for part in table.column_parts("tie")),
        num_two_prompts=_num_different(*sides),
        num_good=labels[1],
        num_bad=labels[0],
        num_gaps=num_gaps,
        histogram=[*_histogram(lambda: (part[part > 0] for part in table.column_parts("rating_gap")))],
        num_prompts=len(per_prompt) - 1,
        most_of_one_prompt=max(
            (int(np.diff(per_prompt[part.start : part.stop + 1]).max(initial=0)) for part in slices(len(per_prompt))),
            default=0,
        ),
        num_images=len(starts_of_runs(_sorted(images, 2 * len(table)))) - 1,
    )


def _num_different(one: np.ndarray, other: np.ndarray) -> int:
    return sum(int(np.count_nonzero(one[part] != other[part])) for part in slices(len(one)))


def _prompts(winners: np.ndarray, losers: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the keys of the prompts of each record in parts: one, or two that differ."""
    for part in slices(len(winners)):
        yield winners[part]
        yield losers[part][losers[part] != winners[part]]


def _sorted(parts: Iterable[np.ndarray], size: int) -> np.ndarray:
    keys = filled(parts, size, np.uint64)
    keys.sort()
    return keys


def describe(records: Sequence[Record]) -> str:
    """Return a table, one count a line, of pairs, ties, rating gaps, labels, prompts and images."""
    return summarise(records).table()


def _share(name: str, count: int, total: int) -> Iterator[Row]:
    """Yield a row with a percentage; no row if the total is 0."""
    if total:
        yield name, f"{count / total:.1%}"


def _histogram(gaps: Callable[[], Iterator[np.ndarray]]) -> Iterator[Row]:
    """Yield one row for each gap if there are few different ones, as of integer ratings; else bins of equal width."""
    counts, lowest, highest = Counter[float](), np.inf, -np.inf
    for part in gaps():
        lowest, highest = min(lowest, part.min(initial=np.inf)), max(highest, part.max(initial=-np.inf))
        if len(counts) <= 2 * _NUM_BINS:
            counts.update(dict(zip(*map(np.ndarray.tolist, np.unique(part, return_counts=True)), strict=True)))
    if len(counts) <= 2 * _NUM_BINS:
        yield from ((f"    gap {gap:g}", count) for gap, count in sorted(counts.items()))
        return
    edges = [lowest + (highest - lowest) / _NUM_BINS * i for i in range(_NUM_BINS)] + [highest]
    for start, end in pairwise(edges):
        inside = sum(int(((start <= part) & (part < end) | (part == end) & (end == highest)).sum()) for part in gaps())
        yield f"    gap {start:.3g} to {end:.3g}", inside
