"""``report.html``: the report as one page that loads nothing."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from mdistiller_norm.reproduce import words
from mdistiller_norm.reproduce.estimate import clock
from mdistiller_norm.reproduce.stats import plus_minus
from mdistiller_norm.reproduce.views import Report


def to_html(report: Report) -> str:
    """``report.html``: one file, no network."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.undefined = jinja2.StrictUndefined
    names = ("signed", "comparison_text", "environment_text", "run_name", "measured_on", "state_text", "narrow_rows",
             "delta_rows", "differences", "counted", "parts_text")  # fmt: skip
    functions = {name: getattr(words, name) for name in names} | {
        "plus_minus": plus_minus, "clock": clock, "safe": Markup, "uncorrected": words.UNCORRECTED,
    }  # fmt: skip
    return templates.get_template("report.html.j2").render(report=report, **functions) + "\n"
