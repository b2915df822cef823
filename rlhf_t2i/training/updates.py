"""Optimiser steps whose gradient is not finite: they are skipped, and stop a run that cannot train."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_t2i.distributed.types import Engine

_REMEDY = "Try --attention math, --mixed_precision no (or bf16 in place of fp16), or a lower --learning_rate."


class Updates:
    """Optimiser steps of an engine, with a count of those that were skipped in a row."""

    def __init__(
        self, engine: Engine, *, max_skipped: int, has_scaler: bool, gather: Callable[[Tensor], Tensor],
        print: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Stop after `max_skipped` skipped updates in a row, or at the first update if no loss scaler may lower it."""
        self._engine, self._max_skipped, self._gather, self._print = engine, max_skipped, gather, print
        self._num_skipped, self._is_first = 0, not has_scaler

    def take(self, learning_rate: float, *, step: int) -> dict[str, float]:
        """Take one optimiser step; return `gradient_norm` before clipping and `skipped_updates`, 0 or 1. Collective.

        An update whose gradient is not finite is skipped on all processes. Raises RuntimeError, naming the layers, if
        it is the first one, and after `max_skipped` of these in a row.
        """
        bad = self._not_finite() if self._is_first else []
        norm, skipped = self._engine.optimizer_step(learning_rate)
        if skipped and self._is_first:
            raise RuntimeError(
                f"The gradient of the first update is not finite in {len(bad)} of {len(self._engine.weights)} trained "
                f"weights ({', '.join(bad[:3])}{', ...' * (len(bad) > 3)}), so nothing can be learned. {_REMEDY}"
            )
        self._is_first = False
        self._num_skipped = self._num_skipped + 1 if skipped else 0
        if skipped:
            self._print(f"WARNING: the gradient of step {step + 1} is not finite; the update was skipped.")
        if self._num_skipped >= self._max_skipped:
            last = f"The last {self._max_skipped} updates, up to step {step + 1}, had gradients that are not finite."
            raise RuntimeError(f"{last} {_REMEDY}")
        return {"gradient_norm": norm if math.isfinite(norm) else 0.0, "skipped_updates": float(skipped)}

    def _not_finite(self) -> list[str]:
        """Return the names of trained weights whose gradient is not finite on any process. Collective."""
        gradients = self._engine.gradients()
        flags = [gradient is not None and not bool(gradient.isfinite().all()) for gradient in gradients.values()]
        device = next(iter(self._engine.weights.values())).device
        found = self._gather(torch.tensor([flags], device=device)).any(dim=0).tolist()
        return [name for name, is_bad in zip(gradients, found, strict=True) if is_bad]
