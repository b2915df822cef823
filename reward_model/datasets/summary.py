"""Summary of the records of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from reward_model.datasets.split import record_prompts
from reward_model.types import LabelledImage, PreferencePair, Record

Row = tuple[str, int | str]

_NUM_BINS = 4


def describe(records: Sequence[Record]) -> str:
    """Return a table, one count a line, of pairs, ties, rating gaps, labels, prompts and images."""
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    labelled = [record for record in records if isinstance(record, LabelledImage)]
    gaps = [pair.rating_gap for pair in pairs if pair.rating_gap > 0]
    images = {image for pair in pairs for image in (pair.winner, pair.loser)} | {one.image for one in labelled}
    per_prompt = Counter(prompt for record in records for prompt in {*record_prompts(record)})
    num_ties, num_good = sum(pair.tie for pair in pairs), sum(one.label == 1 for one in labelled)
    rows: list[Row] = [
        ("pairs", len(pairs)),
        ("  ties", num_ties),
        *_share("  ties among the pairs", num_ties, len(pairs)),
        ("  with two prompts", sum(pair.winner_prompt != pair.loser_prompt for pair in pairs)),
        ("  with a rating gap", len(gaps)),
        *_histogram(gaps),
        ("labelled images", len(labelled)),
        ("  label 1 (good)", num_good),
        ("  label 0 (bad)", len(labelled) - num_good),
        *_share("  good among the labels", num_good, len(labelled)),
        ("distinct prompts", len(per_prompt)),
        ("  most records of one", max(per_prompt.values(), default=0)),
        ("distinct images", len(images)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {count if isinstance(count, str) else f'{count:,}':>9}" for name, count in rows)


def useless_records(records: Sequence[Record]) -> list[str]:
    """Return a sentence for all labels being of one class, and one for all pairs being ties; both teach no order."""
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    labels = {record.label for record in records if isinstance(record, LabelledImage)}
    texts = list[str]()
    if len(labels) == 1:
        texts.append(f"all labels are {labels.pop()}, so that a model which always says so fits them")
    if pairs and all(pair.tie for pair in pairs):
        texts.append("all pairs are ties, so that equal scores fit them")
    return texts


def _share(name: str, count: int, total: int) -> Iterator[Row]:
    """Yield a row with a percentage; no row if the total is 0."""
    if total:
        yield name, f"{count / total:.1%}"


def _histogram(gaps: Sequence[float]) -> Iterator[Row]:
    """Yield one row for each gap if there are few different ones, as of integer ratings; else bins of equal width."""
    counts = sorted(Counter(gaps).items())
    if len(counts) <= 2 * _NUM_BINS:
        yield from ((f"    gap {gap:g}", count) for gap, count in counts)
        return
    lowest, highest = counts[0][0], counts[-1][0]
    edges = [lowest + (highest - lowest) / _NUM_BINS * i for i in range(_NUM_BINS)] + [highest]
    for start, end in pairwise(edges):
        inside = sum(start <= gap < end or gap == end == highest for gap in gaps)
        yield f"    gap {start:.3g} to {end:.3g}", inside
