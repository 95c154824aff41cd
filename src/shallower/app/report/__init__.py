"""report.html: what came of squeezing a model, on one page that opens without a network.

    write_report("small/")                      # from result.json, and curve.json where there is one

`data.py` is what the page says, `charts.py` its plots, `page.py` puts them into page.html.
"""

from shallower.app.report.data import Report, read_report
from shallower.app.report.page import PAGE, render, write_report

__all__ = ["PAGE", "Report", "read_report", "render", "write_report"]
