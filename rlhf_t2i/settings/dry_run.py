"""The option that plans a run instead of starting it."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.settings.base import Settings


@dataclass(frozen=True, kw_only=True)
class DryRunSettings(Settings, group="system"):
    """Planning."""

    dry_run: bool = False
    """Print parameters, peak memory, cost and hours for these options and this number of processes, from one step
    without weights, and end."""
