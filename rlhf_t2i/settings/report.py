"""Options of `python -m rlhf_t2i.report`."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.settings.base import Rule, Settings
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import InputPaths


@dataclass(frozen=True, kw_only=True)
class Config(Settings, group="data"):
    """Settings of the report."""

    runs: InputPaths
    """Comma-separated folders of runs whose report.html is written."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), ("runs", bool(names(self.runs)), "at least one folder")]
