"""The report: what the ledger says of every cell of every table, as Markdown, as one HTML file, as CSV."""

from __future__ import annotations

import csv as csv_files
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from torch.utils.tensorboard import SummaryWriter

from mdistiller_norm.engine.logger import Record
from mdistiller_norm.errors import DataError
from mdistiller_norm.reproduce.charts import COLOURS, Line, line_chart
from mdistiller_norm.reproduce.estimate import clock
from mdistiller_norm.reproduce.jobs import cell_command, cell_identity, config_path
from mdistiller_norm.reproduce.ledger import Entry, Ledger, read_ledger
from mdistiller_norm.reproduce.stats import (
    CONTRADICTED,
    HOLDS,
    UNDECIDED,
    UNTESTED,
    Paired,
    Spread,
    paired,
    plus_minus,
    spread,
)
from mdistiller_norm.reproduce.tables import Cell, Claim, Column, Delta, Table, load_claims, load_tables

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"
README_MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")


def signed(value: float) -> str:
    """A difference with its sign, to two decimals."""
    text = f"{value:+.2f}"
    return "±0.00" if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


@dataclass
class CellView:
    """A cell and the runs that fill it.

    Attributes:
        cell: of the table.
        runs: finished ones, by seed.
        failure: the latest failed run, where none is finished for its seed.
        teacher_top1: accuracy of the teacher as its students' runs measured it (teachers' cells without runs).
    """

    cell: Cell
    runs: dict[int, Entry]
    failure: Entry | None = None
    teacher_top1: float | None = None

    def top1(self, which: str) -> dict[int, float]:
        """Accuracies by seed, of the ``best`` or ``last`` epoch."""
        return {seed: entry.top1(which) for seed, entry in self.runs.items()}

    @property
    def best(self) -> Spread | None:
        """Over the runs, best epoch on the test set: what the paper's code reports."""
        return spread(self.top1("best").values())

    @property
    def last(self) -> Spread | None:
        """Over the runs, last epoch: not selected on the test set."""
        return spread(self.top1("last").values())

    @property
    def top5(self) -> Spread | None:
        """Over the runs, best epoch by top-1."""
        return spread(entry.top5("best") for entry in self.runs.values())

    @property
    def milliseconds(self) -> Spread | None:
        """Of a training step, over the runs."""
        return spread(entry.milliseconds for entry in self.runs.values())

    @property
    def parameters(self) -> int | None:
        """What the method trains besides the student."""
        return next((entry.record["extra_parameters"] for entry in self.runs.values()), None)

    @property
    def difference(self) -> float | None:
        """Our mean of the best epochs minus the paper's number."""
        paper = self.cell.paper.get("top1")
        return self.best.mean - paper if self.best and paper is not None else None

    @property
    def agreement(self) -> str:
        """``within`` two standard deviations of our runs, ``outside``, or empty where that cannot be said."""
        if self.difference is None or self.best is None or self.best.std is None:
            return ""
        return "within" if abs(self.difference) <= 2 * self.best.std else "outside"

    @property
    def state(self) -> str:
        """``measured``, ``failed``, ``no config`` or ``pending``."""
        if self.runs:
            return "measured"
        if self.failure:
            return "failed"
        if self.cell.config and not config_path(self.cell.config).is_file():
            return "no config"
        return "pending" if self.cell.config else "published"

    @property
    def command(self) -> str:
        """What runs one trial of it."""
        return cell_command(self.cell) if self.cell.config else ""

    def charts(self) -> list[str]:
        """Test top-1 of every run, and all its losses."""
        colours: dict[str, int] = {}
        accuracy, losses = [], []
        for number, (seed, entry) in enumerate(sorted(self.runs.items())):
            metrics = entry.record["metrics"]
            epochs = metrics["epoch"]
            accuracy.append(Line(f"seed {seed}", number, epochs, metrics["test_top1"]))
            for name in [key for key in metrics if key.startswith("loss_") or key == "test_loss"]:
                label = "test" if name == "test_loss" else name.removeprefix("loss_")
                colour = colours.setdefault(label, len(colours))
                losses.append(Line(f"{label}, seed {seed}", colour, epochs, metrics[name]))
        return [line_chart("Test top-1 (%)", accuracy), line_chart("Losses", losses)] if self.runs else []

    def legends(self) -> list[list[tuple[int, str]]]:
        """Colours and names for the two charts."""
        names = dict.fromkeys(
            "test" if key == "test_loss" else key.removeprefix("loss_")
            for entry in self.runs.values()
            for key in entry.record["metrics"]
            if key.startswith("loss_") or key == "test_loss"
        )
        seeds = [(i % COLOURS, f"seed {seed}") for i, seed in enumerate(sorted(self.runs))]
        return [seeds, [(i % COLOURS, name) for i, name in enumerate(names)]]


@dataclass
class TableView:
    """A table with its cells' runs.

    Attributes:
        table: the paper's, or one of this project.
        cells: by (row key, column key).
    """

    table: Table
    cells: Mapping[tuple[str, str], CellView]

    @property
    def measured(self) -> int:
        """Cells with at least one run."""
        return sum(bool(cell.runs) for cell in self.cells.values())

    @property
    def measured_first(self) -> bool:
        """Sorts tables with runs before those without."""
        return not self.measured

    @property
    def total(self) -> int:
        """Cells that a run can fill."""
        return sum(cell.state != "published" for cell in self.cells.values())

    def row(self, key: str) -> list[CellView]:
        """Its cells, by column."""
        return [self.cells[key, column.key] for column in self.table.columns]

    def delta(self, delta: Delta, column: Column) -> Paired | None:
        """A printed difference, from our runs' best epochs."""
        first, second = (self.cells[key, column.key].top1("best") for key in (delta.row, delta.minus))
        return paired(first, second)

    def printed_delta(self, delta: Delta, index: int) -> float | None:
        """The paper's difference: as printed, else from its means."""
        if delta.printed:
            return delta.printed[index]
        column = self.table.columns[index].key
        means = [self.cells[key, column].cell.paper.get("top1") for key in (delta.row, delta.minus)]
        return means[0] - means[1] if means[0] is not None and means[1] is not None else None

    def overview(self, column: Column) -> tuple[str, list[tuple[int, str]]]:
        """A chart of the rows' mean test top-1 by epoch, and its legend."""
        lines: list[Line] = []
        for row in self.table.rows:
            runs = list(self.cells[row.key, column.key].runs.values())
            if not runs or row.key == "teacher":
                continue
            curves = [entry.record["metrics"]["test_top1"] for entry in runs]
            mean = [sum(values) / len(values) for values in zip(*curves, strict=False)]
            label = f"{row.name} (n {len(runs)})"
            lines.append(Line(label, len(lines), range(1, len(mean) + 1), mean))
        if len(lines) < 2:
            return "", []
        title = f"Test top-1 (%), mean of the runs: {column.name}"
        return line_chart(title, lines), [(line.colour % COLOURS, line.label) for line in lines]

    @property
    def printed(self) -> set[str]:
        """What the paper prints in it besides top-1."""
        return {key for view in self.cells.values() for key in view.cell.paper} - {"top1"}


@dataclass
class Comparison:
    """A claim on one column.

    Attributes:
        where: table and pair.
        what: the two rows.
        last: over the runs' last epochs; decides.
        best: over their best epochs.
    """

    where: str
    what: str
    last: Paired | None
    best: Paired | None

    @property
    def verdict(self) -> str:
        """By the last epochs, which were not selected on the test set."""
        return self.last.verdict if self.last else UNTESTED


@dataclass
class ClaimView:
    """A claim and what the runs say of it."""

    claim: Claim
    comparisons: list[Comparison]

    @property
    def verdict(self) -> str:
        """In a word."""
        counts = Counter(comparison.verdict for comparison in self.comparisons)
        for verdict in (CONTRADICTED, UNDECIDED, UNTESTED):
            if counts[verdict] == len(self.comparisons) or (verdict == CONTRADICTED and counts[verdict]):
                return verdict
        return HOLDS if counts[HOLDS] == len(self.comparisons) else "partly tested"

    @property
    def summary(self) -> str:
        """How many comparisons fall where."""
        counts = Counter(comparison.verdict for comparison in self.comparisons)
        order = (HOLDS, CONTRADICTED, UNDECIDED, UNTESTED)
        total = len(self.comparisons)
        return ", ".join(f"{verdict}: {counts[verdict]} of {total}" for verdict in order if counts[verdict])


@dataclass
class TeacherCheck:
    """A teacher as the runs saw it.

    Attributes:
        table: where its students are.
        name: model.
        paper: top-1 that the paper prints, if it does.
        measured: top-1 values that students' runs measured of it.
        hashes: of its weights; several mean that runs of one table had different teachers.
    """

    table: str
    name: str
    paper: float | None
    measured: list[float]
    hashes: list[str]


@dataclass
class Report:
    """Everything the report shows."""

    folder: Path
    smoke: bool
    ledger: Ledger
    tables: list[TableView]
    claims: list[ClaimView]
    teachers: list[TeacherCheck]
    environments: list[tuple[Record, int]]
    others: list[Entry] = field(default_factory=list)

    @property
    def runs(self) -> list[Entry]:
        """All finished runs that count."""
        return self.ledger.all_runs()

    @property
    def latest(self) -> str:
        """When the latest of them ended."""
        return max((entry.record["at"] for entry in self.runs), default="")


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
    return Report(folder, smoke, ledger, tables, claims, teachers, _environments(ledger.all_runs()), others)


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
    keys = ("device", "torch", "python", "mdistiller_norm", "commit", "modified", "platform")
    counts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for entry in runs:
        seen = {key: entry.record["environment"].get(key) for key in keys}
        seen["precision"] = entry.record["config"]["SOLVER"]["PRECISION"]
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


def comparison_text(comparison: Paired | None) -> str:
    """A paired difference in words."""
    if comparison is None:
        return "no common seeds"
    if comparison.low is None or comparison.high is None:
        return f"{signed(comparison.mean)} (n = {comparison.n}: fewer than 3 trials, no interval)"
    return f"{signed(comparison.mean)} [{signed(comparison.low)}, {signed(comparison.high)}] (n = {comparison.n})"


def _in_short(view: CellView) -> str:
    """A cell of a wide table, in one line of text."""
    paper = view.cell.paper.get("top1")
    before = f"{paper:.2f} → " if paper is not None else ""
    if not view.runs:
        return before + _state_text(view)
    text = f"{before}**{plus_minus(view.best)}** (n {len(view.runs)}, last {plus_minus(view.last)}"
    return text + (f", {signed(view.difference)})" if view.difference is not None else ")")


def _state_text(view: CellView) -> str:
    if view.teacher_top1 is not None:
        return f"{view.teacher_top1:.2f} in its students' runs"
    return "published weights" if view.state == "published" else view.state


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _narrow_rows(view: TableView) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table with one column of the paper."""
    header = ["", "paper", "ours, best epoch", "ours, last epoch", "n", "difference"]
    if not view.table.is_papers:
        header = ["", "best epoch", "last epoch", "n"]
    extra: list[tuple[str, Callable[[CellView], str], Callable[[CellView], str]]] = []
    if "top5" in view.printed:
        extra.append(("top-5", lambda c: f"{c.cell.paper['top5']:.2f}", lambda c: plus_minus(c.top5)))
    if "ms" in view.printed:
        extra.append(("ms a batch", lambda c: f"{c.cell.paper['ms']:g}", lambda c: plus_minus(c.milliseconds)))
        extra.append(
            (
                "extra parameters",
                lambda c: f"{c.cell.paper['parameters']:,}",
                lambda c: "" if c.parameters is None else f"{c.parameters:,}",
            )
        )
    for name, _, _ in extra:
        header += [f"{name}, paper", f"{name}, ours"]
    rows = []
    for row in view.table.rows:
        (cell,) = view.row(row.key)
        paper = cell.cell.paper.get("top1")
        line = [row.name, *([f"{paper:.2f}" if paper is not None else NOTHING] if view.table.is_papers else [])]
        best = plus_minus(cell.best) if cell.runs else _state_text(cell)
        line += [best, plus_minus(cell.last), str(len(cell.runs))]
        if view.table.is_papers:
            line.append(signed(cell.difference) if cell.difference is not None else "")
        for _, of_paper, ours in extra:
            line += [of_paper(cell) if "top5" in cell.cell.paper or "ms" in cell.cell.paper else NOTHING, ours(cell)]
        rows.append(line)
    return header, rows


def _delta_rows(view: TableView) -> list[list[str]]:
    rows = []
    names = {row.key: row.name for row in view.table.rows}
    for delta in view.table.deltas:
        line = [f"{delta.name} = {names[delta.row]} {MINUS} {names[delta.minus]}"]
        for i, column in enumerate(view.table.columns):
            printed, ours = view.printed_delta(delta, i), view.delta(delta, column)
            text = f"{signed(printed)} → " if printed is not None else ""
            line.append(text + (comparison_text(ours) if ours else "pending"))
        rows.append(line)
    return rows


def to_markdown(report: Report) -> str:
    """``TABLES.md``."""
    out = ["# Measured tables", ""]
    if report.smoke:
        out += ["**Smoke runs: two epochs each, to see that everything works. No results.**", ""]
    out += [
        f"{len(report.runs)} runs in the ledger" + (f", the latest of {report.latest[:10]}" if report.latest else "")
        + ". Made by `python tools/report.py`; the same with learning curves: `report.html`.", "",
        "Top-1 in percent on the test set, mean ± sample standard deviation over n seeds. *Best* is the best epoch on "
        "the test set, which is what the paper's code reports; *last* is the last epoch, selected by nothing. The "
        "difference is ours (best) minus the paper's; in wide tables a cell reads *paper → ours*. Δ1 and Δ2 are paired "
        "over seeds, of the best epochs, with a 95% interval.", "",
    ]  # fmt: skip
    measured = [view for view in report.tables if view.measured]
    empty = [view for view in report.tables if not view.measured]
    for view in measured:
        out += [f"## {view.table.name}: {view.table.title}", ""]
        out += [f"{view.measured} of {view.total} cells measured.", ""]
        if len(view.table.columns) == 1:
            header, rows = _narrow_rows(view)
            out += [*_markdown_table(header, rows), ""]
            out += [f"- {name}: {value}" for name, value in _delta_rows(view)]
        else:
            header = ["", *(column.name for column in view.table.columns)]
            rows = [[row.name, *(_in_short(cell) for cell in view.row(row.key))] for row in view.table.rows]
            out += _markdown_table(header, [*rows, *_delta_rows(view)])
        out += ["", *(f"- {note}" for note in view.table.notes), ""]
    if empty:
        out += ["## Pending", "", "No run yet; the paper's numbers of these tables are in `report.html`.", ""]
        out += [f"- {view.table.name}: {view.table.title} ({view.total} cells)" for view in empty]
        out.append("")
    out += ["## Claims", "", "Paired over seeds, last epochs, 95% interval by Student's t.", ""]
    for claim in report.claims:
        out.append(f"- {claim.claim.text}: **{claim.verdict}** ({claim.summary})")
        out += [
            f"  - {c.where}: {c.what}: {comparison_text(c.last)}; best epochs {comparison_text(c.best)}; {c.verdict}"
            for c in claim.comparisons
            if c.last
        ]
    if report.teachers:
        out += ["", "## Teachers", ""]
        rows = [
            [
                check.table, check.name, f"{check.paper:.2f}" if check.paper is not None else NOTHING,
                ", ".join(f"{value:.2f}" for value in check.measured),
                ", ".join(check.hashes) + (" (different teachers!)" if len(check.hashes) > 1 else ""),
            ]
            for check in report.teachers
        ]  # fmt: skip
        out += _markdown_table(["table", "teacher", "paper", "measured by its students' runs", "weights"], rows)
    if report.environments:
        out += ["", "## Environment", ""]
        for environment, count in report.environments:
            out.append(f"- {count} runs: {environment_text(environment)}")
    if report.ledger.failures:
        out += ["", "## Failed runs", ""]
        out += [f"- {run_name(entry)}: {entry.record['error']}" for entry in report.ledger.failures]
    if report.ledger.left_out:
        out += ["", "## Files left out", ""]
        out += [f"- `{path.name}`: {reason}" for path, reason in report.ledger.left_out]
    if report.ledger.duplicates:
        out += ["", "## Second runs of the same seed, not counted", ""]
        out += [f"- `{entry.path.name}`" for entry in report.ledger.duplicates]
    if report.others:
        out += ["", "## Runs of no table", ""]
        out += [
            f"- {run_name(entry)}: best {entry.top1('best'):.2f}, last {entry.top1('last'):.2f}{measured_on(entry)} "
            f"(`{entry.path.name}`)"
            for entry in report.others
        ]
    return "\n".join(out).rstrip() + "\n"


def run_name(entry: Entry) -> str:
    """A run for people."""
    about = entry.record["config"]["EXPERIMENT"]
    return f"{about['PROJECT']}/{about['TAG']}, seed {entry.seed}"


def measured_on(entry: Entry) -> str:
    """What a run's accuracy was measured on, if not on the test set."""
    fraction = entry.record["config"]["DATASET"].get("VAL_SPLIT", 0)
    return f" on {fraction:.0%} of the training set, held out" if fraction else ""


def environment_text(environment: Record) -> str:
    """An environment in one line."""
    commit = (environment["commit"] or "unknown")[:10] + (" with local changes" if environment["modified"] else "")
    return (
        f"{environment['device']}, {environment['precision']}, torch {environment['torch']}, "
        f"Python {environment['python']}, {environment['platform']}, commit {commit}"
    )


def to_html(report: Report) -> str:
    """``report.html``: one file, no network."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.undefined = jinja2.StrictUndefined
    functions = {
        "signed": signed, "plus_minus": plus_minus, "comparison_text": comparison_text, "clock": clock,
        "environment_text": environment_text, "run_name": run_name, "measured_on": measured_on,
        "state_text": _state_text,
        "narrow": _narrow_rows, "delta_rows": _delta_rows, "safe": Markup,
    }  # fmt: skip
    return templates.get_template("report.html.j2").render(report=report, **functions) + "\n"


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
        "device", "precision", "torch", "commit", "finished_at",
    ]  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv_files.writer(file)
        writer.writerow(names)
        for entry in sorted(report.runs, key=lambda entry: entry.path.name):
            record, teacher = entry.record, entry.record["teacher"] or {}
            writer.writerow([
                entry.path.name, "; ".join(cells.get(entry.path.name, [])), "+".join(record["method"]) or "none",
                record["student"], teacher.get("name", ""), record["dataset"], entry.seed, record["epochs"],
                record["best"]["top1"], record["best"]["epoch"], record["last"]["top1"], record["last"]["top5"],
                teacher.get("top1", ""), teacher.get("hash", ""), record["extra_parameters"], record["seconds"],
                entry.milliseconds, record["environment"].get("device", ""), record["config"]["SOLVER"]["PRECISION"],
                record["environment"].get("torch", ""), record["environment"].get("commit", ""), record["at"],
            ])  # fmt: skip


def write_hparams(report: Report, folder: Path) -> None:
    """TensorBoard's hparams view: what each run was, and what it reached."""
    for entry in report.runs:
        record = entry.record
        solver = record["config"]["SOLVER"]
        settings = {
            "method": "+".join(record["method"]) or "none", "student": record["student"], "dataset": record["dataset"],
            "teacher": (record["teacher"] or {}).get("name", "none"), "seed": entry.seed, "epochs": record["epochs"],
            "lr": solver["LR"], "batch_size": solver["BATCH_SIZE"],
        }  # fmt: skip
        for name in record["method"]:
            for key, value in record["config"].get(name, {}).items():
                if isinstance(value, int | float | str):
                    settings[f"{name}.{key}"] = value
        reached = {"best_top1": entry.top1("best"), "last_top1": entry.top1("last"), "seconds": record["seconds"]}
        with SummaryWriter(folder) as writer:
            writer.add_hparams(settings, reached, run_name=entry.path.stem)


def _update_readme(report: Report, path: Path) -> bool:
    """Rewrite what stands between the marks of ``results/README.md``; returns whether there were any."""
    if not path.is_file():
        return False
    begin, end = README_MARKS
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return False
    lines = [
        f"- {view.table.name} ({view.table.title}): {view.measured} of {view.total} cells"
        for view in report.tables
        if view.measured
    ]
    text = "\n".join(lines or ["- nothing yet"])
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    return True


def write_report(folder: Path, out: Path, *, smoke: bool, csv: bool, hparams: Path | None) -> list[Path]:
    """Write the files.

    Args:
        folder: of the records.
        out: gets ``TABLES.md``, ``report.html`` and, if asked for, ``runs.csv``; a ``README.md`` there is brought up to
            date between its marks.
        smoke: of the short schedule's runs.
        csv: write ``runs.csv``.
        hparams: folder for TensorBoard's view, or None.

    Returns:
        What was written.

    Raises:
        DataError: a file cannot be written.
    """
    report = collect(folder, smoke)
    written = [out / "TABLES.md", out / "report.html"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        written[0].write_text(to_markdown(report), encoding="utf-8")
        written[1].write_text(to_html(report), encoding="utf-8")
        if _update_readme(report, out / "README.md"):
            written.append(out / "README.md")
        if csv:
            written.append(out / "runs.csv")
            write_csv(report, written[-1])
        if hparams:
            written.append(hparams)
            write_hparams(report, hparams)
    except OSError as error:
        raise DataError(f"the report cannot be written to {out} ({error})") from error
    return written
