"""Compare runs, or evaluated weights, on one HTML page: a table, curves, and images of the same prompts and seeds.

    python recipes/compare.py --runs runs/ddpo-DATE,runs/draft-DATE
    python recipes/compare.py --runs runs/evaluation-DATE

Reads the run folders only and samples nothing. All runs must have been evaluated on the same prompts and seeds.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.compare import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from pathlib import Path

from tqdm import tqdm

from rlhf_t2i.report.comparison import side_by_side, write_comparison
from rlhf_t2i.settings.lists import names


def main(config: Config) -> Path:
    """Write the page and return its path."""
    columns = side_by_side([Path(name) for name in names(config.runs)])
    output = Path(config.output)
    write_comparison(columns, output)
    tqdm.write(f"compared  {', '.join(column.name for column in columns)}\npage      {output}")
    return output


if __name__ == "__main__":
    run_command(main, config)
