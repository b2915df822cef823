"""Summary of the records of a data set, from the keys of its prompts and images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

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
    gaps: np.ndarray
    """The rating gaps above 0, (P,)."""
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
            ("  with a rating gap", len(self.gaps)),
            *_histogram(self.gaps),
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
    label, ties, gaps = table.column("label", null=-1), table.column("tie"), table.column("rating_gap")
    winners, losers = table.column("winner_prompt_key"), table.column("loser_prompt_key")
    has_two = winners != losers
    _, per_prompt = np.unique(np.concatenate([winners, losers[has_two]]), return_counts=True)
    images = np.concatenate([table.column("winner_image_key"), table.column("loser_image_key")])
    return Summary(
        num_pairs=int((label < 0).sum()),
        num_ties=int(ties.sum()),
        num_two_prompts=int(has_two.sum()),
        num_good=int((label == 1).sum()),
        num_bad=int((label == 0).sum()),
        gaps=gaps[gaps > 0],
        num_prompts=len(per_prompt),
        most_of_one_prompt=int(per_prompt.max(initial=0)),
        num_images=len(np.unique(images)),
    )


def describe(records: Sequence[Record]) -> str:
    """Return a table, one count a line, of pairs, ties, rating gaps, labels, prompts and images."""
    return summarise(records).table()


def _share(name: str, count: int, total: int) -> Iterator[Row]:
    """Yield a row with a percentage; no row if the total is 0."""
    if total:
        yield name, f"{count / total:.1%}"


def _histogram(gaps: np.ndarray) -> Iterator[Row]:
    """Yield one row for each gap if there are few different ones, as of integer ratings; else bins of equal width."""
    counts = sorted(Counter(gaps.tolist()).items())
    if len(counts) <= 2 * _NUM_BINS:
        yield from ((f"    gap {gap:g}", count) for gap, count in counts)
        return
    lowest, highest = counts[0][0], counts[-1][0]
    edges = [lowest + (highest - lowest) / _NUM_BINS * i for i in range(_NUM_BINS)] + [highest]
    for start, end in pairwise(edges):
        inside = int(((start <= gaps) & (gaps < end) | (gaps == end) & (end == highest)).sum())
        yield f"    gap {start:.3g} to {end:.3g}", inside
