"""Write the report of finished or running runs and searches, and print its path.

    python -m rlhf_t2i.report --runs runs/ddpo-DATE,runs/best_of_n-DATE
"""

from pathlib import Path

from rlhf_t2i.config import parse_config
from rlhf_t2i.report import page, search
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.report import Config
from rlhf_t2i.training.run_folder import is_search

if __name__ == "__main__":
    config = parse_config(Config, __doc__)
    for folder in map(Path, names(config.runs)):
        print(search.write_report(folder) if is_search(folder) else page.write_report(folder))  # noqa: T201
