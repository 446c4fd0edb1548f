"""The ledger for other tools: CSV, and TensorBoard's hparams view."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from mdistiller_norm.reproduce.ledger import Entry
from mdistiller_norm.reproduce.views import Report


def write_csv(report: Report, path: Path) -> None:
    """A line for each run that counts."""
    cells: dict[str, list[str]] = {}
    for view in report.tables:
        for cell in view.cells.values():
            for entry in cell.runs.values():
                cells.setdefault(entry.path.name, []).append(cell.cell.name)
    names = [
        "file", "cells", "method", "student", "teacher", "dataset", "seed", "epochs", "best_top1", "best_epoch",
        "last_top1", "last_top5", "teacher_top1", "teacher_hash", "extra_parameters", "seconds", "ms_per_batch",
        "device", "processes", "precision", "torch", "commit", "finished_at",
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for entry in sorted(report.runs, key=lambda entry: entry.path.name):
            record, teacher = entry.record, entry.record["teacher"] or {}
            writer.writerow([
                entry.path.name, "; ".join(cells.get(entry.path.name, [])), "+".join(record["method"]) or "none",
                record["student"], teacher.get("name", ""), record["dataset"], entry.seed, record["epochs"],
                record["best"]["top1"], record["best"]["epoch"], record["last"]["top1"], record["last"]["top5"],
                teacher.get("top1", ""), teacher.get("hash", ""), record["extra_parameters"], record["seconds"],
                entry.milliseconds, record["environment"].get("device", ""), record.get("processes", 1),
                entry.precision,
                record["environment"].get("torch", ""), record["environment"].get("commit", ""), record["at"],
            ])  # fmt: skip


def write_hparams(report: Report, folder: Path) -> None:
    """TensorBoard's hparams view: what each run was, and what it reached."""
    with SummaryWriter(folder) as writer:
        for entry in report.runs:
            reached = {
                "best_top1": entry.top1("best"), "last_top1": entry.top1("last"), "seconds": entry.record["seconds"],
            }  # fmt: skip
            writer.add_hparams(_settings(entry), reached, run_name=entry.path.stem)


def _settings(entry: Entry) -> dict[str, Any]:
    record, solver = entry.record, entry.record["config"]["SOLVER"]
    settings = {
        "method": "+".join(record["method"]) or "none", "student": record["student"], "dataset": record["dataset"],
        "teacher": (record["teacher"] or {}).get("name", "none"), "seed": entry.seed, "epochs": record["epochs"],
        "lr": solver["LR"], "batch_size": solver["BATCH_SIZE"],
    }  # fmt: skip
    for name in record["method"]:
        for key, value in record["config"].get(name, {}).items():
            if isinstance(value, int | float | str):
                settings[f"{name}.{key}"] = value
    return settings
