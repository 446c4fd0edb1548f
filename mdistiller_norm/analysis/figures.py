"""Figures without a display: one style, PNG and SVG, and the numbers behind them."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdistiller_norm.errors import DataError

_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "svg.hashsalt": "mdistiller_norm",
}  # fmt: skip


def styled() -> AbstractContextManager[None]:
    """A context in which figures get this project's style, without touching that of the process."""
    return mpl.rc_context(_STYLE)


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` by ``columns`` panels of that size in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def save(figure: Figure, data: dict[str, Any], stem: Path, with_data: bool) -> list[Path]:
    """Write ``stem.png``, ``stem.svg`` and, if asked for, ``stem.json``.

    Raises:
        DataError: they cannot be written.
    """
    # Not with_suffix: a stem may have a dot of its own.
    written = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg", *(["json"] if with_data else []))]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(written[0], dpi=160)
        figure.savefig(written[1], metadata={"Date": None})
        if with_data:
            written[2].write_text(json.dumps(data) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"the figure {stem} cannot be written ({error})") from error
    return written
