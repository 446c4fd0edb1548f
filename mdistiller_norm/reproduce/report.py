"""The report of a ledger: tables, claims and teachers as Markdown and HTML, runs as CSV."""

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from mdistiller_norm.config import leaves
from mdistiller_norm.errors import ConfigError, needs_extra
from mdistiller_norm.files import command, write_text
from mdistiller_norm.reproduce import plan, stats, tables
from mdistiller_norm.reproduce.ledger import SCHEMA, Entry, Record, read_ledger
from mdistiller_norm.reproduce.tables import TABLES, Cell, Claim, Column, Delta, Table

# Properties that do not change the identity of a run but may change its result.
_CONDITIONS: dict[str, Callable[[Entry], str]] = {
    "teacher weights (SHA-256)": lambda entry: entry.teacher_hash,
    "precision": lambda entry: entry.precision,
    "number of processes": lambda entry: str(entry.record.get("processes", 1)),
    "training images (SHA-256)": lambda entry: str(entry.record.get("data", ""))[:10],
}


@dataclass
class CellView:
    """A cell with its finished runs by seed, or its latest failure."""

    cell: Cell
    identity: str
    runs: dict[int, Entry]
    failure: Entry | None
    teacher_top1: float | None = None  # of a teacher without runs, measured by its students' runs

    def top1(self, which: str) -> dict[int, float]:
        return {seed: float(entry.record[which]["top1"]) for seed, entry in self.runs.items()}

    def mean(self, which: str) -> stats.MeanStd | None:
        return stats.mean_std(self.top1(which).values())

    def minus(self, other: Self, which: str) -> stats.PairedDifference | None:
        """Return the paired difference of two rows; None without common seeds with the same teacher."""
        teachers = {
            entry.teacher_hash for entry in (*self.runs.values(), *other.runs.values())
        } - {""}
        if len(teachers) > 1:
            return None
        return stats.paired_difference(self.top1(which), other.top1(which))

    @property
    def difference(self) -> float | None:
        best, paper = self.mean("best"), self.cell.paper.get("top1")
        return best.mean - paper if best and paper is not None else None

    @property
    def agreement(self) -> str:
        """``within`` or ``outside`` two standard deviations of the paper's number, or empty."""
        best, difference = self.mean("best"), self.difference
        if not best or best.std is None or difference is None:
            return ""
        return "within" if abs(difference) <= 2 * best.std else "outside"


class TableView(NamedTuple):
    """A table with its cells by (row key, column key)."""

    table: Table
    cells: Mapping[tuple[str, str], CellView]

    @property
    def measured(self) -> int:
        return sum(bool(cell.runs) for cell in self.cells.values())

    def column(self, column: Column) -> dict[str, CellView]:
        return {row.key: self.cells[row.key, column.key] for row in self.table.rows}

    def delta(
        self, delta: Delta, column: Column
    ) -> tuple[float | None, stats.PairedDifference | None]:
        first, second = (self.cells[row, column.key] for row in (delta.row, delta.minus))
        papers, printed = [cell.cell.paper.get("top1") for cell in (first, second)], None
        if delta.printed:
            printed = delta.printed[self.table.columns.index(column)]
        elif papers[0] and papers[1]:
            printed = papers[0] - papers[1]
        return printed, first.minus(second, "best")

    def warnings(self, column: Column) -> list[str]:
        cells, lines = self.column(column), []
        cells.pop("teacher", None)  # not compared with the other rows
        runs = [entry for cell in cells.values() for entry in cell.runs.values()]
        for digits in sorted({entry.teacher_hash for entry in runs} & tables.TEACHERS.keys()):
            lines.append(f"The teacher {digits} of {column.name} is {tables.TEACHERS[digits]}.")
        for name, value in _CONDITIONS.items():
            recorded = filter(None, map(value, runs))  # older records lack some
            counts = Counter(recorded).most_common()
            listed = ", ".join(
                f"{text} ({plan.counted(number, 'run')})" for text, number in counts
            )
            if len(counts) > 1:
                lines.append(f"Runs of {column.name} differ in {name}: {listed}.")
        return lines


def verdict(verdicts: set[str]) -> str:
    """Return the verdict on a claim from those of its comparisons."""
    if stats.UNTESTED in verdicts and len(verdicts) > 1 and stats.CONTRADICTED not in verdicts:
        return "partly tested"
    order = (stats.CONTRADICTED, stats.UNTESTED, stats.UNDECIDED, stats.HOLDS)
    return next(name for name in order if name in verdicts)


def collect(folder: Path, smoke: bool = False) -> Record:
    """Read a ledger and return the contents of the report, by name."""
    ledger = read_ledger(folder, smoke)
    failures = {entry.identity: entry for entry in ledger.failures}

    def view(cell: Cell) -> CellView:
        name = plan.cell_identity(cell, smoke)
        return CellView(cell, name, ledger.of(name), failures.get(name))

    views = {
        table.id: TableView(table, {key: view(cell) for key, cell in table.cells.items()})
        for table in TABLES.values()
    }
    runs = ledger.all_runs()
    every = [cell for view in views.values() for cell in view.cells.values()]
    placed = {cell.identity for cell in every}
    shown = {entry.path for cell in every for entry in cell.runs.values()}
    columns = [(view, column) for view in views.values() for column in view.table.columns]
    measured = {name for name, view in views.items() if view.measured}
    tested = [
        claim for claim in tables.CLAIMS if not claim.own or measured.intersection(claim.tables)
    ]
    facts = [
        {"processes": 1} | run.record | run.record["environment"] | {"precision": run.precision}
        for run in runs
    ]
    keys = [key for key in SCHEMA["part"] if key != "from_step"]
    environments = Counter(tuple(fact[key] for key in keys) for fact in facts).most_common()
    return {
        "smoke": smoke,
        "ledger": ledger,
        "runs": runs,
        "tables": list(views.values()),
        "teachers": [row for view, column in columns for row in _teacher(view, column)],
        "claims": [_judge(claim, views) for claim in tested],
        "environments": [(dict(zip(keys, values, strict=True)), n) for values, n in environments],
        "other_teachers": [
            run for run in runs if run.identity in placed and run.path not in shown
        ],
        "others": [run for run in runs if run.identity not in placed],
    }


def _teacher(view: TableView, column: Column) -> list[Record]:
    cells = view.column(column)
    runs = [
        entry for cell in cells.values() for entry in cell.runs.values() if entry.teacher_hash
    ]
    measured = sorted({entry.record["teacher"]["top1"] for entry in runs})
    paper, own = None, cells.get("teacher")
    if own and measured:
        own.teacher_top1, paper = measured[-1], own.cell.paper.get("top1")
    return [{
        "table": view.table.name, "name": column.teacher, "paper": paper, "measured": measured,
        "hashes": sorted({entry.teacher_hash for entry in runs}),
    }] if measured else []  # fmt: skip


def _judge(claim: Claim, views: Mapping[str, TableView]) -> Record:
    comparisons: list[Record] = []
    places = [(views[name], column) for name in claim.tables for column in TABLES[name].columns]
    for view, column in places:
        cells = view.column(column)
        first, second = _compared(claim, cells)
        last, best = first.minus(second, "last"), first.minus(second, "best")
        if claim.peak and not all(cell.runs for cell in cells.values()):
            last = best = None
        comparisons.append({
            "where": f"{view.table.name}, {column.name}", "last": last, "best": best,
            "rows": f"{first.cell.row.name} {stats.MINUS} {second.cell.row.name}",
            "verdict": last.verdict if last else stats.UNTESTED,
        })  # fmt: skip
    verdicts = {comparison["verdict"] for comparison in comparisons}
    return {"claim": claim, "comparisons": comparisons, "verdict": verdict(verdicts)}


def _compared(claim: Claim, cells: Mapping[str, CellView]) -> list[CellView]:
    if claim.row:
        return [cells[claim.row], cells[claim.than]]
    ranked = sorted(cells.values(), key=lambda cell: -getattr(cell.mean("last"), "mean", -1.0))
    inside = [cell for cell in ranked if cell.cell.row.key in claim.peak]
    outside = [cell for cell in ranked if cell.cell.row.key not in claim.peak]
    return [inside[0], outside[0]]


def render(report: Record, template: str) -> str:
    """Return the report by ``report.md.j2`` or ``report.html.j2``; values are escaped in both."""
    with needs_extra("report", "the report"):
        import jinja2

        from mdistiller_norm.reproduce import charts
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals |= {"plan": plan, "stats": stats, "charts": charts, "program": command}
    text = environment.get_template(template).render(report=report).rstrip() + "\n"
    return text if "html" in template else text.replace("&#39;", "'").replace("&#34;", '"')


def write_csv(report: Record, path: Path) -> None:
    """Write a line for each run, with the columns of ``record.yaml``."""
    cells = [cell for view in report["tables"] for cell in view.cells.values()]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows, columns = csv.writer(file), SCHEMA["csv"]
        rows.writerow(["file", "cells", "ms_per_batch", "precision", *columns])
        for entry in sorted(report["runs"], key=lambda entry: entry.path.name):
            names = [cell.cell.name for cell in cells if entry in cell.runs.values()]
            values = dict(
                leaves(entry.record | {"method": "+".join(entry.record["method"]) or "none"})
            )
            head = [entry.path.name, "; ".join(names), entry.milliseconds, entry.precision]
            rows.writerow(head + [values.get(key, "") for key in columns.values()])


def write_report(results: Path, out: Path, smoke: bool = False, with_csv: bool = False) -> None:
    """Write the report of the ledger in ``results`` to a folder."""
    if not (results / "runs").is_dir():
        raise ConfigError(f"{results} contains no ledger (folder runs), which reproduce writes")
    report = collect(results / "runs", smoke)
    out.mkdir(parents=True, exist_ok=True)
    write_text(render(report, "report.md.j2"), out / "TABLES.md")
    write_text(render(report, "report.html.j2"), out / "report.html")
    if with_csv:
        write_csv(report, out / "runs.csv")
    print(f"wrote TABLES.md, report.html{' and runs.csv' if with_csv else ''} in {out}")


def main(options: argparse.Namespace) -> int:
    """Write the report; returns the exit code."""
    results = Path(
        options.results or (Path(options.output, "smoke/results") if options.smoke else "results")
    )
    write_report(results, Path(options.out or results), options.smoke, options.export == "csv")
    return 0
