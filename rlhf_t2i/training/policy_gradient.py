"""Metrics and warnings of a clipped policy-gradient update (DDPO, Flow-GRPO)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.sampling.rollout import with_rows
from rlhf_t2i.training.metrics import FAST, REPLAY_NOISE, SLOW, mean_update_metrics
from rlhf_t2i.training.microbatches import Microbatches
from rlhf_t2i.types import DiffusionModel, ProcessGroup, Sampler, Trajectory


class Replay:
    """A rollout, to be replayed in forward passes of as many images as it was sampled in, or of fewer that fit."""

    def __init__(self, model: DiffusionModel, trajectory: Trajectory, *, sampler: Sampler) -> None:
        self._model, self._trajectory, self._sampler = model, trajectory, sampler

    def accumulated(
        self, microbatches: Microbatches, work: Callable[[Trajectory], Tensor], *, is_unchanged: bool
    ) -> Tensor:
        """Return `work(trajectory)`, which accumulates gradients with at most its `num_rows` images in a forward pass.

        If fewer fit than it was sampled in, its log-probabilities are computed anew while the policy `is_unchanged`
        since the rollout: in half precision their rounding depends on that number. Collective.
        """
        return microbatches.accumulated(
            lambda size: work(self._at(size, is_unchanged=is_unchanged)), most=self._trajectory.num_rows
        )

    def _at(self, microbatch_size: int, *, is_unchanged: bool) -> Trajectory:
        if microbatch_size < self._trajectory.num_rows:
            if is_unchanged:
                self._trajectory = with_rows(
                    self._model, self._trajectory, sampler=self._sampler, num_rows=microbatch_size
                )
            else:
                self._trajectory = replace(self._trajectory, num_rows=microbatch_size)
        return self._trajectory


def update_metrics(
    processes: ProcessGroup,
    samples: Sequence[Float[Tensor, "N 3"]],
    steps: Sequence[dict[str, float]],
    *,
    clip_range: float,
    with_kl: bool,
) -> dict[str, float]:
    """Average an update over the (image, step) pairs and optimiser steps of all processes. Collective.

    `samples` holds, for each optimiser step, loss, log-ratio and KL divergence of each pair of this process.
    `ratio_std` is the root mean square of log-ratios; `replay_error` is the largest change of a log-probability before
    the first optimiser step, of all processes, which should be 0.
    """
    replay_error = samples[0][:, 1].abs().max().view(1)
    loss, log_ratio, kl = processes.gather(torch.cat([*samples])).T
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
