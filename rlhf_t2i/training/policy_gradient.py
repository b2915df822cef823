"""Metrics and warnings of a clipped policy-gradient update (DDPO, Flow-GRPO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.training.metrics import FAST, REPLAY_NOISE, SLOW, mean_update_metrics
from rlhf_t2i.types import ProcessGroup


def update_metrics(
    processes: ProcessGroup,
    samples: Float[Tensor, "N 3"],
    steps: Sequence[dict[str, float]],
    *,
    clip_range: float,
    replay_error: Float[Tensor, " 1"],
    with_kl: bool,
) -> dict[str, float]:
    """Average an update over the (image, step) pairs and optimiser steps of all processes. Collective.

    `samples` holds loss, log-ratio and KL divergence of each pair of this process. `ratio_std` is the root mean square
    of log-ratios; `replay_error` the maximum over processes.
    """
    loss, log_ratio, kl = processes.gather(samples).T
    return {
        "loss": loss.mean().item(),
        "ratio_mean": log_ratio.exp().mean().item(),
        "ratio_std": log_ratio.square().mean().sqrt().item(),
        "clip_range": clip_range,
        "clip_fraction": ((log_ratio.exp() - 1).abs() > clip_range).float().mean().item(),
        **({"kl": kl.mean().item()} if with_kl else {}),
        **mean_update_metrics(steps),
        "replay_error": processes.gather(replay_error).max().item(),
    }


def first_update_warnings(metrics: Mapping[str, float]) -> list[str]:
    """Return a warning for each of replay_error and ratio_std that will slow or spoil training."""
    error, ratio_std, clip_range = metrics["replay_error"], metrics["ratio_std"], metrics["clip_range"]
    warnings: list[str] = []
    if error > REPLAY_NOISE * clip_range:
        warnings.append(
            f"WARNING: replaying the unchanged policy changes its log-probabilities by {error:.1e}, which is noise "
            f"compared with a clip_range of {clip_range:.1e}. Try the same microbatch_size on another device, or "
            f"mixed_precision: no."
        )
    if 0 < ratio_std < SLOW * clip_range:
        warnings.append(
            f"WARNING: the first update moved the ratio by {ratio_std:.1e} with a clip_range of {clip_range:.1e}; "
            f"training will be slow. Raise learning_rate."
        )
    if ratio_std > FAST * clip_range:
        warnings.append(
            f"WARNING: the first update moved the ratio by {ratio_std:.1e}, far beyond a clip_range of "
            f"{clip_range:.1e}; most denoising steps are clipped and have no gradient. Lower learning_rate or "
            f"num_inner_epochs."
        )
    return warnings
