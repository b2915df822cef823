"""One HTML page per run: what rose, by how much, how sure that is, what it cost, and what may have gone wrong.

The page needs nothing but itself: images are embedded, curves are inline SVG, and its security policy lets the
browser fetch nothing and run nothing but the slider. `python -m rlhf_t2i.report --runs FOLDER` writes it afresh.
"""

from rlhf_t2i.report.charts import Chart, charts, draw
from rlhf_t2i.report.checks import findings
from rlhf_t2i.report.finding import Finding
from rlhf_t2i.report.head import HEAD, STYLES
from rlhf_t2i.report.page import write_report

__all__ = ["HEAD", "STYLES", "Chart", "Finding", "charts", "draw", "findings", "write_report"]
