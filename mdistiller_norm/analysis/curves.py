"""Learning curves of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mdistiller_norm.analysis.figures import new_figure
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.errors import DataError

_DRAWN = ("epoch", "test_top1", "train_top1", "test_loss", "loss_ce")


def read_run(path: Path) -> dict[str, list[float]]:
    """Metrics by name, of a run folder or of a record of the ledger.

    Raises:
        DataError: it holds none, or one that is drawn lacks a number for an epoch.
    """
    metrics: Any
    if path.is_dir():
        records = read_metrics(path / "metrics.jsonl")
        if not records:
            raise DataError(f"{path} has no metrics.jsonl with a finished epoch")
        metrics = {name: [record.get(name) for record in records] for name in records[0]}
    else:
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise DataError(f"{path} is neither a run folder nor a record of a finished run ({error})") from error
    found: dict[str, list[float]] = metrics if isinstance(metrics, dict) else {}
    for name in dict.fromkeys((*_DRAWN, *(name for name in found if name.startswith("loss_")))):
        values = found.get(name)
        numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        if not values or not numbers or len(values) != len(found["epoch"]):
            raise DataError(f"the metrics of {path} are damaged: {name} is not a number in every epoch")
    return found


def compute(paths: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
    """The metrics of some runs, and each one's best and last test top-1.

    Raises:
        DataError: see :func:`read_run`.
    """
    runs = []
    for path, name in zip(paths, names, strict=True):
        metrics = read_run(path)
        accuracy = metrics["test_top1"]
        runs.append({"name": name, "best": max(accuracy), "last": accuracy[-1], "metrics": metrics})
    return {"runs": runs}


def draw(data: dict[str, Any]) -> Figure:
    """Accuracy, and the losses: cross entropy and the test's, then each distillation loss."""
    figure, axes = new_figure(1, 3, 4.2, 3.4)
    accuracy, common, distillation = axes[0]
    for number, run in enumerate(data["runs"]):
        metrics, colour = run["metrics"], f"C{number % 10}"
        epochs = metrics["epoch"]
        label = f"{run['name']}: best {run['best']:.2f}, last {run['last']:.2f}"
        accuracy.plot(epochs, metrics["test_top1"], color=colour, lw=1.4, label=label)
        accuracy.plot(epochs, metrics["train_top1"], color=colour, lw=0.8, ls=":")
        common.plot(epochs, metrics["test_loss"], color=colour, lw=1.4)
        common.plot(epochs, metrics["loss_ce"], color=colour, lw=0.8, ls=":")
        for name, values in metrics.items():
            if name.startswith("loss_") and name not in ("loss_ce", "loss_total"):
                distillation.plot(epochs, values, color=colour, lw=1.4)
    accuracy.set(title="Top-1 (%): test, dotted train", xlabel="epoch")
    common.set(title="Cross entropy: test, dotted train (weighted)", xlabel="epoch")
    distillation.set(title="Distillation loss (weighted)", xlabel="epoch")
    common.set_yscale("log")
    distillation.set_visible(bool(distillation.lines))
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure
