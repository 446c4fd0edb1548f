"""The style of the figures, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdistiller_norm.errors import DataError

STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "svg.hashsalt": "mdistiller_norm",
}  # fmt: skip


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``rows`` by ``columns`` panels, each ``width`` by ``height`` inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: Figure, data: dict[str, Any] | None, stem: Path) -> list[Path]:
    """Write ``stem.png``, ``stem.svg`` and, with data, ``stem.json``; return the paths."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg", "json")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
        if data is not None:
            paths[2].write_text(json.dumps(data) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"the figure {stem} cannot be written ({error})") from error
    return paths if data is not None else paths[:2]
