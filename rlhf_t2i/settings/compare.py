"""Options of recipes/compare.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rlhf_t2i.settings.base import Group, Rule, Settings
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import InputPaths


@dataclass(frozen=True, kw_only=True)
class Config(Settings, group="data"):
    """Settings of a comparison."""

    runs: InputPaths
    """Comma-separated folders of runs that trained a diffusion model, or of recipes/evaluate_policy.py."""
    output: Annotated[str, Group("checkpoints and logging")] = "runs/comparison.html"
    """HTML page to write."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), ("runs", bool(names(self.runs)), "at least one folder")]
