"""Options of `python -m rlhf_t2i.report`."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_t2i.settings.base import Rule
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import InputPaths
from rlhf_t2i.settings.server import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Config(ServerSettings, group="data"):
    """Settings of the report."""

    runs: InputPaths
    """Comma-separated folders of runs whose report.html is written; with --serve, one folder that contains runs."""
    serve: bool = False
    """Serve a page of all runs under --runs instead, which refreshes while they train and links to the report of each;
    no report.html is written."""

    def rules(self) -> list[Rule]:
        one = len(names(self.runs)) == 1 or not self.serve
        return [
            *super().rules(),
            ("runs", bool(names(self.runs)), "at least one folder"),
            ("runs", one, "one folder with --serve"),
        ]
