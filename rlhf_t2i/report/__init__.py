"""HTML pages about finished work: the report of a training run or of a search, and the comparison of runs.

Each page is one file that loads nothing else. `python -m rlhf_t2i.report --runs FOLDER` writes a run's report again.
"""

from rlhf_t2i.report.charts import Chart, charts
from rlhf_t2i.report.page import write_report
from rlhf_t2i.report.svg import draw

__all__ = ["Chart", "charts", "draw", "write_report"]
