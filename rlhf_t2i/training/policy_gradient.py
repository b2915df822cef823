"""Metrics and warnings of a clipped policy-gradient update (DDPO, Flow-GRPO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


class UpdateWarnings:
    """Prints what will slow or spoil training: ratios that do not start at 1, and a first update of a wrong size."""

    def __init__(self, print: Callable[[str], None]) -> None:
        self._print, self._largest = print, 0.0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check the update of a step; a replay_error is told again only if it has grown tenfold."""
        error, ratio_std, clip_range = metrics["replay_error"], metrics["ratio_std"], metrics["clip_range"]
        if not error <= max(REPLAY_NOISE * clip_range, 10 * self._largest):
            self._largest = error
            self._print(
                f"WARNING: in step {step + 1} replaying the unchanged policy changed its log-probabilities by "
                f"{error:.1e}, {error / clip_range:.2g} times the clip_range ({clip_range:.1e}): noise decides which "
                f"ratios are clipped. Set mixed_precision to no (docs/troubleshooting.md)."
            )
        if step > 0:
            return
        if 0 < ratio_std < SLOW * clip_range:
            self._print(
                f"WARNING: the first update moved the ratio by {ratio_std:.1e} with a clip_range of {clip_range:.1e}; "
                f"training will be slow. Raise learning_rate."
            )
        if ratio_std > FAST * clip_range:
            self._print(
                f"WARNING: the first update moved the ratio by {ratio_std:.1e}, far beyond a clip_range of "
                f"{clip_range:.1e}; most denoising steps are clipped and have no gradient. Lower learning_rate or "
                f"num_inner_epochs."
            )
