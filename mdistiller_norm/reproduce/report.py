"""The report of a ledger: tables, claims and teachers as Markdown and HTML, runs as CSV."""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mdistiller_norm.config import leaves
from mdistiller_norm.errors import ConfigError, needs_extra
from mdistiller_norm.files import write_text
from mdistiller_norm.program import command
from mdistiller_norm.reproduce.ledger import Entry, Ledger, Record, load_schema, read_ledger
from mdistiller_norm.reproduce.plan import cell_command, cell_identity, counted, duration
from mdistiller_norm.reproduce.stats import (
    CONTRADICTED,
    HOLDS,
    MINUS,
    UNDECIDED,
    UNTESTED,
    MeanStd,
    PairedDifference,
    mean_std,
    paired_difference,
    signed,
)
from mdistiller_norm.reproduce.tables import Cell, Claim, Column, Delta, Table, load_claims, load_tables

# Properties that do not change the identity of a run but may change its result.
_CONDITIONS: dict[str, Callable[[Entry], str]] = {
    "precision": lambda entry: entry.precision,
    "number of processes": lambda entry: str(entry.record.get("processes", 1)),
    "training images (SHA-256)": lambda entry: str(entry.record.get("data", ""))[:10],
}


@dataclass
class CellView:
    """A cell with its finished runs by seed, or its latest failure."""

    cell: Cell
    runs: dict[int, Entry]
    failure: Entry | None
    teacher_top1: float | None = None  # of a teacher without runs, as measured by its students' runs

    def top1(self, which: str) -> dict[int, float]:
        """Return the top-1 of the ``best`` or ``last`` epoch by seed."""
        return {seed: float(entry.record[which]["top1"]) for seed, entry in self.runs.items()}

    def mean(self, which: str) -> MeanStd | None:
        """Return mean and standard deviation of the top-1 of the ``best`` or ``last`` epoch."""
        return mean_std(self.top1(which).values())

    @property
    def difference(self) -> float | None:
        """Mean top-1 of the best epochs minus the paper's number."""
        best, paper = self.mean("best"), self.cell.paper.get("top1")
        return best.mean - paper if best and paper is not None else None

    @property
    def agreement(self) -> str:
        """``within`` or ``outside`` two standard deviations of the paper's number, or empty."""
        best, difference = self.mean("best"), self.difference
        if not best or best.std is None or difference is None:
            return ""
        return "within" if abs(difference) <= 2 * best.std else "outside"

    @property
    def state(self) -> str:
        if not self.cell.config:
            return "published weights"
        return "measured" if self.runs else "failed" if self.failure else "pending"


class TableView(NamedTuple):
    """A table with its cells by (row key, column key)."""

    table: Table
    cells: Mapping[tuple[str, str], CellView]

    @property
    def measured(self) -> int:
        return sum(bool(cell.runs) for cell in self.cells.values())

    @property
    def total(self) -> int:
        """Number of cells that runs can fill."""
        return sum(bool(cell.cell.config) for cell in self.cells.values())

    def column(self, column: Column) -> dict[str, CellView]:
        """Return the cells of a column by row key."""
        return {row.key: self.cells[row.key, column.key] for row in self.table.rows}

    def delta(self, delta: Delta, column: Column) -> tuple[float | None, PairedDifference | None]:
        """Return the paper's and the measured difference of two rows in their best epochs."""
        cells = self.column(column)
        first, second = cells[delta.row], cells[delta.minus]
        measured = paired_difference(first.top1("best"), second.top1("best"))
        if delta.printed:
            return delta.printed[self.table.columns.index(column)], measured
        papers = first.cell.paper.get("top1"), second.cell.paper.get("top1")
        return papers[0] - papers[1] if papers[0] and papers[1] else None, measured

    def warnings(self, column: Column) -> list[str]:
        """Return a line for each property that differs between the students' runs of a column."""
        cells = [cell for cell in self.column(column).values() if not cell.cell.is_teacher]
        lines = []
        for name, value in _CONDITIONS.items():
            counts = Counter(value(entry) for cell in cells for entry in cell.runs.values())
            del counts[""]  # not recorded
            listed = ", ".join(f"{text} ({counted(number, 'run')})" for text, number in counts.most_common())
            lines += [f"Runs of {column.name} differ in {name}: {listed}."] if len(counts) > 1 else []
        return lines


class Comparison(NamedTuple):
    """A claim in one column: the difference of two rows in the last epochs, which decide, and in the best epochs."""

    where: str
    rows: str
    last: PairedDifference | None
    best: PairedDifference | None

    @property
    def verdict(self) -> str:
        return self.last.verdict if self.last else UNTESTED


class ClaimView(NamedTuple):
    """A claim with its comparisons."""

    claim: Claim
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if UNTESTED in verdicts and len(verdicts) > 1 and CONTRADICTED not in verdicts:
            return "partly tested"
        return next(verdict for verdict in (CONTRADICTED, UNTESTED, UNDECIDED, HOLDS) if verdict in verdicts)


class Report(NamedTuple):
    """Contents of the report; ``others`` are runs that are not part of a table."""

    smoke: bool
    ledger: Ledger
    tables: list[TableView]
    claims: list[ClaimView]
    teachers: list[Record]
    environments: list[tuple[Record, int]]
    others: list[Entry]


def collect(folder: Path, smoke: bool = False) -> Report:
    """Read a ledger and assign its runs to tables and claims."""
    ledger = read_ledger(folder, smoke)
    failures = {entry.identity: entry for entry in ledger.failures}
    views, placed = {}, set()
    for table in load_tables().values():
        cells = {}
        for key, cell in table.cells.items():
            name = cell_identity(cell, smoke)
            placed.add(name)
            cells[key] = CellView(cell, ledger.of(name), failures.get(name))
        views[table.id] = TableView(table, cells)
    runs = ledger.all_runs()
    teachers = [row for view in views.values() for column in view.table.columns for row in _teacher(view, column)]
    claims = [ClaimView(claim, _compare(claim, views)) for claim in load_claims()]
    others = [entry for entry in runs if entry.identity not in placed]
    return Report(smoke, ledger, list(views.values()), claims, teachers, _environments(runs), others)


def _teacher(view: TableView, column: Column) -> list[Record]:
    """Return the paper's top-1 of a column's teacher, the values measured by its students' runs, and its hashes."""
    cells = view.column(column)
    runs = [entry.record["teacher"] for cell in cells.values() for entry in cell.runs.values()]
    measured = sorted({teacher["top1"] for teacher in runs if teacher})
    hashes = sorted({teacher["hash"][:10] for teacher in runs if teacher})
    paper, own = None, cells.get("teacher")
    if own and measured:
        own.teacher_top1, paper = measured[-1], own.cell.paper.get("top1")
    row = {"table": view.table.name, "name": column.teacher, "paper": paper, "measured": measured, "hashes": hashes}
    return [row] if measured else []


def _environments(runs: Sequence[Entry]) -> list[tuple[Record, int]]:
    counts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for entry in runs:
        names = ("device", "torch", "python", "commit", "modified", "platform")
        values = {name: entry.record["environment"][name] for name in names}
        values |= {"precision": entry.precision, "processes": entry.record.get("processes", 1)}
        counts[tuple(values.items())] += 1
    return [(dict(items), count) for items, count in counts.most_common()]


def _compare(claim: Claim, tables: Mapping[str, TableView]) -> list[Comparison]:
    comparisons = []
    for view in (tables[name] for name in claim.tables):
        for column in view.table.columns:
            cells = view.column(column)
            first, second = (cells[claim.row], cells[claim.than]) if claim.row else _peak(cells, claim.peak)
            last, best = (paired_difference(first.top1(which), second.top1(which)) for which in ("last", "best"))
            if claim.peak and not all(cell.runs for cell in cells.values()):
                last = best = None
            rows = f"{first.cell.row.name} {MINUS} {second.cell.row.name}"
            comparisons.append(Comparison(f"{view.table.name}, {column.name}", rows, last, best))
    return comparisons


def _peak(cells: Mapping[str, CellView], peak: Sequence[str]) -> list[CellView]:
    """Return the best row inside a range and the best one outside, by the last epochs."""

    def height(cell: CellView) -> float:
        mean = cell.mean("last")
        return mean.mean if mean else -1.0

    return [max((cells[key] for key in cells if (key in peak) == inside), key=height) for inside in (True, False)]


def render(report: Report, template: str) -> str:
    """Return the report by ``report.md.j2`` or ``report.html.j2``; values are escaped in both."""
    with needs_extra("report", "the report"):
        import jinja2

        from mdistiller_norm.reproduce.charts import mean_chart, run_charts
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.undefined = jinja2.StrictUndefined
    functions = (cell_command, counted, duration, mean_chart, mean_std, run_charts, signed)
    environment.globals |= {function.__name__: function for function in functions} | {"program": command}
    text = environment.get_template(template).render(report=report).rstrip() + "\n"
    return text if "html" in template else text.replace("&#39;", "'").replace("&#34;", '"')


def write_csv(report: Report, path: Path) -> None:
    """Write a line for each run, with the columns of ``record.yaml``."""
    cells: dict[Path, list[str]] = {}
    for cell in (cell for view in report.tables for cell in view.cells.values()):
        for entry in cell.runs.values():
            cells.setdefault(entry.path, []).append(cell.cell.name)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows, columns = csv.writer(file), load_schema()["csv"]
        rows.writerow(["file", "cells", "ms_per_batch", "precision", *columns])
        for entry in sorted(report.ledger.all_runs(), key=lambda entry: entry.path.name):
            values = dict(leaves(entry.record)) | {"method": "+".join(entry.record["method"]) or "none"}
            head = [entry.path.name, "; ".join(cells.get(entry.path, [])), entry.milliseconds, entry.precision]
            rows.writerow(head + [values.get(key, "") for key in columns.values()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``report``."""
    parser.epilog = f"example: {parser.prog} --export csv"
    parser.add_argument("--results", default="", metavar="DIR", help="folder of the ledger (default: results)")
    parser.add_argument("--out", default="", metavar="DIR", help="output folder (default: the folder of the ledger)")
    parser.add_argument("--smoke", action="store_true", help="report the runs of reproduce --smoke instead")
    parser.add_argument("--output", default="output", metavar="DIR", help="as for reproduce, with --smoke")
    parser.add_argument("--export", choices=["csv"], help="write runs.csv too, one line per run")


def main(options: argparse.Namespace) -> int:
    """Write the report; returns the exit code."""
    default = Path(options.output, "smoke", "results") if options.smoke else Path("results")
    results = Path(options.results or default)
    if not (results / "runs").is_dir():
        raise ConfigError(f"{results} contains no ledger (folder runs), which reproduce writes")
    report, out = collect(results / "runs", options.smoke), Path(options.out or results)
    out.mkdir(parents=True, exist_ok=True)
    write_text(render(report, "report.md.j2"), out / "TABLES.md")
    write_text(render(report, "report.html.j2"), out / "report.html")
    if options.export:
        write_csv(report, out / "runs.csv")
    for name in ["TABLES.md", "report.html", *(["runs.csv"] if options.export else [])]:
        print(f"wrote {out / name}")
    return 0
