"""Write the report of finished or running runs, and print its path.

python -m rlhf_t2i.report --runs runs/ddpo-DATE,runs/draft-DATE
python -m rlhf_t2i.report runs/ddpo-DATE runs/draft-DATE
"""

import sys
from pathlib import Path

from rlhf_t2i.config import names, parse_config
from rlhf_t2i.report import page, search
from rlhf_t2i.settings.report import Config
from rlhf_t2i.training.run_folder import is_search

if __name__ == "__main__":
    folders = sys.argv[1:]
    if not folders or any(argument.startswith("-") for argument in folders):
        folders = names(parse_config(Config, __doc__).runs)
    for folder in map(Path, folders):
        print(search.write_report(folder) if is_search(folder) else page.write_report(folder))  # noqa: T201
