"""From the ledger to the views of the report: every run at its place, every claim judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdistiller_norm.engine.logger import Record
from mdistiller_norm.reproduce.jobs import cell_identity
from mdistiller_norm.reproduce.ledger import Entry, read_ledger
from mdistiller_norm.reproduce.stats import paired
from mdistiller_norm.reproduce.tables import Claim, load_claims, load_tables
from mdistiller_norm.reproduce.views import CellView, ClaimView, Comparison, Report, TableView, TeacherCheck
from mdistiller_norm.reproduce.words import MINUS


def collect(folder: Path, smoke: bool = False) -> Report:
    """Read the ledger and put every run where it belongs."""
    ledger = read_ledger(folder, smoke)
    failures = {entry.identity: entry for entry in ledger.failures}
    tables, placed = [], set()
    for table in load_tables().values():
        views = {}
        for key, cell in table.cells.items():
            name = cell_identity(cell, smoke)
            placed.add(name)
            views[key] = CellView(cell, ledger.of(name), failures.get(name or ""))
        tables.append(TableView(table, views))
    others = [entry for entry in ledger.all_runs() if entry.identity not in placed]
    teachers = _teachers(tables)
    claims = [_judge(claim, {view.table.id: view for view in tables}) for claim in load_claims()]
    return Report(smoke, ledger, tables, claims, teachers, _environments(ledger.all_runs()), others)


def _teachers(tables: list[TableView]) -> list[TeacherCheck]:
    checks = []
    for view in tables:
        for column in view.table.columns:
            taught = [
                entry.record["teacher"]
                for (_, key), cell in view.cells.items()
                if key == column.key
                for entry in cell.runs.values()
                if entry.record["teacher"]
            ]
            own = view.cells.get(("teacher", column.key))
            if taught:
                measured = sorted({teacher["top1"] for teacher in taught})
                hashes = sorted({teacher["hash"][:10] for teacher in taught})
                paper = own.cell.paper.get("top1") if own else None
                checks.append(TeacherCheck(view.table.name, column.teacher, paper, measured, hashes))
                if own and not own.runs:
                    own.teacher_top1 = measured[-1]
    return checks


def _environments(runs: list[Entry]) -> list[tuple[Record, int]]:
    keys = ("device", "torch", "python", "commit", "modified", "platform")
    counts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for entry in runs:
        seen = {key: entry.record["environment"].get(key) for key in keys}
        seen |= {"precision": entry.precision, "processes": entry.record.get("processes", 1)}
        counts[tuple(seen.items())] += 1
    return [(dict(items), count) for items, count in counts.most_common()]


def _judge(claim: Claim, tables: Mapping[str, TableView]) -> ClaimView:
    comparisons = []
    for name in claim.tables:
        view = tables[name]
        for column in view.table.columns:
            rows = {row.key: view.cells[row.key, column.key] for row in view.table.rows}
            first, second = (claim.row, claim.than) if claim.row else _peak(rows, claim.peak)
            last, best = (paired(rows[first].top1(which), rows[second].top1(which)) for which in ("last", "best"))
            if claim.peak and not all(cell.runs for cell in rows.values()):
                last = best = None
            what = f"{rows[first].cell.row.name} {MINUS} {rows[second].cell.row.name}"
            where = f"{view.table.name}, {column.name}"
            comparisons.append(Comparison(where, what, last, best))
    return ClaimView(claim, comparisons)


def _peak(rows: Mapping[str, CellView], peak: tuple[str, ...]) -> tuple[str, str]:
    """The best row inside a range and the best one outside, by our runs, else by the paper's numbers."""

    def height(key: str) -> float:
        measured = rows[key].last
        return measured.mean if measured else rows[key].cell.paper.get("top1", 0.0) - 1000

    return max(peak, key=height), max((key for key in rows if key not in peak), key=height)
