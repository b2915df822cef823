"""Write the report of finished or running runs, and print where it is.

python -m rlhf_t2i.report --runs runs/ddpo-DATE,runs/draft-DATE
"""

from pathlib import Path

from rlhf_t2i.config import names, parse_config
from rlhf_t2i.settings.report import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

    from rlhf_t2i.report.page import write_report

    for folder in names(config.runs):
        print(write_report(Path(folder)))  # noqa: T201
