"""`python -m rlhf_t2i.report FOLDER ...` writes the page of each run folder and says where it is."""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_t2i.report.page import write_report

if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("Name the folder of a run: python -m rlhf_t2i.report FOLDER")
    for folder in sys.argv[1:]:
        print(write_report(Path(folder)))  # noqa: T201
