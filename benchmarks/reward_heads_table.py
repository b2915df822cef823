"""The Markdown tables of `benchmarks/reward_heads.py`, and the differences between heads with their intervals."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

Row = dict[str, Any]


def accuracy(row: Row, *, domain: str = "flat", tier: str | None = None) -> float:
    """Return the accuracy in per cent in a domain: of one tier, or the mean of all."""
    shares = {name: 100 * right / count for name, (right, count) in row["right"][domain].items()}
    return shares[tier] if tier else float(np.mean(list(shares.values())))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by Student's t over the seeds; nan ends for fewer than three."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, math.nan, math.nan
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def shown(values: Sequence[float], *, digits: int = 1) -> str:
    """Return the mean with its interval as text."""
    mean, low, high = interval(values)
    one = f"{mean:z.{digits}f}"
    return one if math.isnan(low) else f"{one} ({low:z.{digits}f} to {high:z.{digits}f})"


def difference(rows: Sequence[Row], head: str, other: str, *, domain: str = "flat", tier: str | None = None) -> str:
    """Return accuracy of `head` minus that of `other`, paired by seed, in points with its interval."""
    by = {(row["head"], row["seed"]): accuracy(row, domain=domain, tier=tier) for row in rows}
    seeds = sorted(seed for name, seed in by if name == head and (other, seed) in by)
    return shown([by[head, seed] - by[other, seed] for seed in seeds]) if seeds else "-"


def print_table(rows: Sequence[Row]) -> None:
    """Print the accuracies by tier and domain for each backbone, number of pairs and fraction of wrong labels."""
    for key in dict.fromkeys((row["backbone"], row["pairs"], row["wrong_labels"]) for row in rows):
        chosen = [row for row in rows if (row["backbone"], row["pairs"], row["wrong_labels"]) == key]
        tiers, domains = list(chosen[0]["right"]["flat"]), [name for name in chosen[0]["right"] if name != "flat"]
        heads = list(dict.fromkeys(row["head"] for row in chosen))
        print_line(f"\n{key[0]}, {key[1]:,} pairs, {100 * key[2]:g} % wrong labels\n")
        columns = ["head", "seeds", "all tiers", *tiers, *domains, "samples", "ECE", "strict from ties", "ms"]
        print_line(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for head in heads:
            own = [row for row in chosen if row["head"] == head]
            cells = [head, str(len(own)), shown([accuracy(row) for row in own])]
            cells += [f"{np.mean([accuracy(row, tier=tier) for row in own]):.1f}" for tier in tiers]
            cells += [f"{np.mean([accuracy(row, domain=domain) for row in own]):.1f}" for domain in domains]
            samples = [100 * row["samples"] for row in own if "samples" in row]  # which the first rows did not measure
            cells.append(f"{np.mean(samples):.1f}" if samples else "-")
            measures = ("calibration_error", "auroc_strict_from_ties", "ms_per_score")
            cells += [f"{np.mean([row[name] for row in own]):.3f}" for name in measures]
            print_line(f"| {' | '.join(cells)} |")
        if "last token" in heads:
            print_line(f"\n| minus last token | all tiers | {' | '.join(tiers)} |\n|{'---|' * (2 + len(tiers))}")
            for head in (head for head in heads if head != "last token"):
                cells = [difference(chosen, head, "last token", tier=tier) for tier in (None, *tiers)]
                print_line(f"| {head} | {' | '.join(cells)} |")


def with_rates(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the learning rate in the name of each head that has several on one backbone."""
    rates: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        rates.setdefault((row["backbone"], row["head"]), set()).add(row["learning_rate"])
    several = {key for key, found in rates.items() if len(found) > 1}
    return [
        {**row, "head": f"{row['head']}, rate {row['learning_rate']:g}"}
        if (row["backbone"], row["head"]) in several
        else row
        for row in rows
    ]


def print_tables(rows: Sequence[Row], policies: Sequence[Row]) -> None:
    """Print the accuracies, the pass rates by best of n and by DDPO, and where SkipCA attends."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    rows = sorted(
        with_rates(rows), key=lambda row: (backbones.index(row["backbone"]), row["wrong_labels"], row["pairs"])
    )
    print_table(rows)
    print_selection(rows)
    print_policies(policies)


def print_selection(rows: Sequence[Row]) -> None:
    """Print the pass rate of the best of n samples, and SkipCA's attention to things."""
    print_line(
        "\n| backbone | pairs | head | seeds | best of 4, % | best of 16, % | attention on things, % (area, %) |"
    )
    print_line(f"|{'---|' * 7}")
    for key in dict.fromkeys((row["backbone"], row["pairs"], row["head"]) for row in rows if not row["wrong_labels"]):
        own = [row for row in rows if (row["backbone"], row["pairs"], row["head"]) == key and not row["wrong_labels"]]
        best = [shown([100 * row["best_of"][n - 1] for row in own]) for n in (4, 16)]
        attention = "-"
        if "attention_on_things" in own[0]:
            area = 100 * own[0]["area_of_things"]
            attention = f"{shown([100 * row['attention_on_things'] for row in own])} ({area:.1f})"
        print_line(f"| {key[0]} | {key[1]:,} | {key[2]} | {len(own)} | {' | '.join(best)} | {attention} |")


def print_policies(rows: Sequence[Row]) -> None:
    """Print the oracle's pass rate before and after DDPO with each head, and the hacking gap."""
    print_line("\n| backbone | pairs | head | seeds | passes before, % | after, % | hacking gap, standard deviations |")
    print_line(f"|{'---|' * 7}")
    for key in dict.fromkeys((row["backbone"], row["pairs"], row["head"]) for row in rows):
        own = [row for row in rows if (row["backbone"], row["pairs"], row["head"]) == key]
        passes = [shown([100 * row["curve"][i]["pass"] for row in own]) for i in (0, -1)]
        gap = shown([row["gap"] for row in own], digits=2)
        print_line(f"| {key[0]} | {key[1]:,} | {key[2]} | {len(own)} | {' | '.join(passes)} | {gap} |")


def print_line(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
