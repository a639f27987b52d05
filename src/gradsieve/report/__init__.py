"""Numbers → figures → one self-contained HTML page."""

from gradsieve.report.page import Page, Source, Stage
from gradsieve.report.render import render, write_report

__all__ = ["Page", "Source", "Stage", "render", "write_report"]
