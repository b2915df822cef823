"""What the recipes that raise the density of good strokes write down of an update, and what it warns of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.report.update_checks import FAST, REPLAY_NOISE, SLOW
from rlhf_t2i.training.metrics import mean_update_metrics
from rlhf_t2i.training.run import Run


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
        **mean_update_metrics(steps),
        "replay_error": run.gather(replay_error).max().item(),
    }


def warn_of_the_first_update(run: Run, metrics: Mapping[str, float]) -> None:
    """Say what replay_error, ratio_std and clip_range tell of settings that will not learn."""
    error, spread, clip_range = metrics["replay_error"], metrics["ratio_std"], metrics["clip_range"]
    if error > REPLAY_NOISE * clip_range:
        run.say(
            f"WARNING: replaying an unchanged policy moves its log-densities by {error:.1e}; beside a clip_range "
            f"of {clip_range:.1e} that is noise. Try the same microbatch_size on another device, or "
            f"mixed_precision: no."
        )
    if 0 < spread < SLOW * clip_range:
        run.say(
            f"WARNING: the first update moved the ratio by {spread:.1e}, of a clip_range of {clip_range:.1e}; it "
            f"will learn slowly. Raise learning_rate."
        )
    if spread > FAST * clip_range:
        run.say(
            f"WARNING: the first update moved the ratio by {spread:.1e}, far beyond a clip_range of "
            f"{clip_range:.1e}; most strokes are clipped and teach nothing. Lower learning_rate, or use fewer "
            f"num_inner_epochs."
        )
