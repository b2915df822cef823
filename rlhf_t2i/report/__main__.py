"""Write the report of finished or running runs, and print its path.

python -m rlhf_t2i.report --runs runs/ddpo-DATE,runs/draft-DATE
python -m rlhf_t2i.report runs/ddpo-DATE runs/draft-DATE
"""

import sys
from pathlib import Path

from rlhf_t2i.config import names, parse_config
from rlhf_t2i.report.page import write_report
from rlhf_t2i.settings.report import Config

if __name__ == "__main__":
    folders = sys.argv[1:]
    if not folders or any(argument.startswith("-") for argument in folders):
        folders = names(parse_config(Config, __doc__).runs)
    for folder in folders:
        print(write_report(Path(folder)))  # noqa: T201
