"""The plots of `benchmarks/reward_heads.py`, drawn from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.reward_heads_table import Row, accuracy, interval
from rlhf_t2i.shapes.compositions import TIERS

SHOWN = ("last token", "mean pooling", "SkipCA", "prompt likelihood")
"""Heads of the plots; tables have all."""
COLOURS: dict[str, str] = dict(zip(SHOWN, ("#4477aa", "#aa8800", "#cc3311", "#228833"), strict=True))
MARKERS: dict[str, str] = dict(zip(SHOWN, "os^D", strict=True))

mpl.use("svg")
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "reward_heads", "font.family": "sans-serif", "font.size": 11}


def plot_all(rows: Sequence[Row], policies: Sequence[Row], folder: Path, *, pairs: int) -> list[Path]:
    """Write accuracy by tier and the best of n samples, and accuracy by number of pairs and policies if there are some.

    Return the files.
    """
    rows = [row for row in rows if row["pairs"] and row["wrong_labels"] == 0 and row["head"] in SHOWN]
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))

    def by_tier(axes: Any, backbone: str) -> None:
        _by_tier(axes, [row for row in rows if row["backbone"] == backbone and row["pairs"] == pairs])

    def by_pairs(axes: Any, backbone: str) -> None:
        _by_pairs(axes, [row for row in rows if row["backbone"] == backbone])

    def by_step(axes: Any, backbone: str) -> None:
        _by_step(axes, [row for row in policies if row["backbone"] == backbone])

    def by_n(axes: Any, backbone: str) -> None:
        _by_n(axes, [row for row in rows if row["backbone"] == backbone and row["pairs"] == pairs])

    files = [
        _plot(folder / "reward_heads_tiers.svg", backbones, "accuracy, %", by_tier),
        _plot(folder / "reward_heads_best_of_n.svg", backbones, "images that pass, %", by_n),
    ]
    counts = {backbone: {row["pairs"] for row in rows if row["backbone"] == backbone} for backbone in backbones}
    if several := [backbone for backbone in backbones if len(counts[backbone]) > 1]:
        files.append(_plot(folder / "reward_heads_pairs.svg", several, "accuracy, %", by_pairs))
    if policies:
        trained = list(dict.fromkeys(row["backbone"] for row in policies))
        files.append(_plot(folder / "reward_heads_policy.svg", trained, "images that pass, %", by_step))
    return files


def _plot(path: Path, backbones: Sequence[str], label: str, draw: Callable[[Any, str], None]) -> Path:
    """Draw one panel for each backbone, side by side with one scale."""
    figure = Figure(figsize=(4.6 * len(backbones) + 2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(backbones), sharey=True, squeeze=False)[0]
    for axes, backbone in zip(panels, backbones, strict=True):
        draw(axes, backbone)
        axes.set_title(f"{backbone} backbone")
        axes.grid(axis="y", color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, 0), min(high, 102))  # intervals may reach beyond what a percentage can be
    panels[0].set_ylabel(label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    return path


def _errors(axes: Any, head: str, x: Sequence[float], values: Sequence[Sequence[float]], *, line: bool = True) -> None:
    """Draw means with 95 % intervals over seeds."""
    means, lows, highs = np.array([interval(each) for each in values]).T
    bars = np.nan_to_num([means - lows, highs - means])
    axes.errorbar(
        x, means, yerr=bars, label=head, color=COLOURS[head], marker=MARKERS[head], markersize=5, capsize=2,
        linestyle="-" if line else "none",
    )  # fmt: skip


def _by_tier(axes: Any, rows: Sequence[Row]) -> None:
    for number, head in enumerate(SHOWN):
        if own := [row for row in rows if row["head"] == head]:
            places = np.arange(len(TIERS)) + 0.15 * (number - 1.5)
            _errors(
                axes, head, places.tolist(), [[accuracy(row, tier=tier) for row in own] for tier in TIERS], line=False
            )
    axes.axhline(50, color="#888888", linewidth=0.8)
    axes.set_xticks(range(len(TIERS)), TIERS, rotation=30)


def _by_pairs(axes: Any, rows: Sequence[Row]) -> None:
    for head in SHOWN:
        own = [row for row in rows if row["head"] == head]
        if counts := sorted({row["pairs"] for row in own}):
            _errors(axes, head, counts, [[accuracy(row) for row in own if row["pairs"] == n] for n in counts])
    axes.axhline(50, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    counts = sorted({row["pairs"] for row in rows})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("preference pairs")


def _by_n(axes: Any, rows: Sequence[Row]) -> None:
    for head in SHOWN:
        if own := [row for row in rows if row["head"] == head]:
            numbers = (1, 2, 4, 8, 16)
            _errors(axes, head, numbers, [[100 * row["best_of"][n - 1] for row in own] for n in numbers])
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("samples of which one is selected")


def _by_step(axes: Any, rows: Sequence[Row]) -> None:
    for head in SHOWN:
        if own := [row for row in rows if row["head"] == head]:
            steps = [point["step"] for point in own[0]["curve"]]
            _errors(axes, head, steps, [[100 * row["curve"][i]["pass"] for row in own] for i in range(len(steps))])
    axes.set_xlabel("steps of DDPO")
