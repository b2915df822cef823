"""What the recipes that raise the density of good strokes write down of an update."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.run import Run


def update_metrics(
    run: Run,
    strokes: Float[Tensor, "N 3"],
    steps: Sequence[dict[str, float]],
    *,
    clip_range: float,
    replay_error: Float[Tensor, " 1"],
    with_kl: bool,
) -> dict[str, float]:
    """Means over the strokes of all processes, of each its loss, log-ratio and KL, and over optimiser steps.

    `ratio_std` is the root mean square of log-ratios, and `replay_error` the largest over all processes.
    """
    loss, log_ratio, kl = run.gather(strokes).T
    return {
        "loss": loss.mean().item(),
        "ratio_mean": log_ratio.exp().mean().item(),
        "ratio_std": log_ratio.square().mean().sqrt().item(),
        "clip_range": clip_range,
        "clip_fraction": ((log_ratio.exp() - 1).abs() > clip_range).float().mean().item(),
        **({"kl": kl.mean().item()} if with_kl else {}),
        "gradient_norm": sum(s["gradient_norm"] for s in steps) / len(steps),
        "skipped_updates": sum(s["skipped_updates"] for s in steps),
        "replay_error": run.gather(replay_error).max().item(),
    }
