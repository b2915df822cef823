"""Runs, or weights, side by side: a table, curves, and the same prompts and seeds, on one page that stands alone.

    python recipes/compare.py --runs runs/ddpo-DATE,runs/draft-DATE
    python recipes/compare.py --runs runs/evaluation-DATE         the weights that evaluate_policy.py looked at

Only the run folders are read: nothing is painted. All must have painted the same prompts from the same seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rlhf_t2i.config import check, names, parse_config
from rlhf_t2i.report.comparison import side_by_side, write_comparison


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared, and where that is written."""

    runs: str
    """Comma-separated folders of runs that tuned a painter, or of recipes/evaluate_policy.py."""
    output: str = "runs/comparison.html"
    """The page to write."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        check(self, [("runs", bool(names(self.runs)), "at least one folder")])


def main(config: Config) -> Path:
    """Read, lay side by side, write."""
    entries = side_by_side([Path(name) for name in names(config.runs)])
    output = Path(config.output)
    write_comparison(entries, output)
    tqdm.write(f"compared  {', '.join(entry.name for entry in entries)}\npage      {output}")
    return output


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
