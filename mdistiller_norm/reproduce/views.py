"""What the report is about: cells, tables, claims and teachers with the runs that the ledger has of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mdistiller_norm.engine.logger import Record
from mdistiller_norm.reproduce.charts import Line, line_chart, look
from mdistiller_norm.reproduce.jobs import cell_command
from mdistiller_norm.reproduce.ledger import Entry, Ledger
from mdistiller_norm.reproduce.stats import (
    CONTRADICTED,
    HOLDS,
    UNDECIDED,
    UNTESTED,
    Paired,
    Spread,
    paired,
    spread,
)
from mdistiller_norm.reproduce.tables import Cell, Claim, Column, Delta, Table

Figure = tuple[str, list[tuple[str, str]]]  # a chart, and the looks and names of its lines


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
        """``measured``, ``failed``, ``pending`` or, where nothing trains it, ``published``."""
        if self.runs:
            return "measured"
        if self.failure:
            return "failed"
        return "pending" if self.cell.config else "published"

    @property
    def command(self) -> str:
        """What runs one trial of it."""
        return cell_command(self.cell) if self.cell.config else ""

    def charts(self) -> list[Figure]:
        """Test top-1 of every run, and all its losses."""
        numbers: dict[str, int] = {}
        accuracy, losses = [], []
        for number, (seed, entry) in enumerate(sorted(self.runs.items())):
            metrics = entry.record["metrics"]
            epochs = metrics["epoch"]
            accuracy.append(Line(f"seed {seed}", number, epochs, metrics["test_top1"]))
            for name in [key for key in metrics if key.startswith("loss_") or key == "test_loss"]:
                label = "test" if name == "test_loss" else name.removeprefix("loss_")
                colour = numbers.setdefault(label, len(numbers))
                losses.append(Line(f"{label}, seed {seed}", colour, epochs, metrics[name]))
        return [
            (line_chart("Test top-1 (%)", accuracy), [(look(line.colour), line.label) for line in accuracy]),
            (line_chart("Losses", losses), [(look(colour), label) for label, colour in numbers.items()]),
        ]


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

    def overview(self, column: Column) -> Figure:
        """The rows' mean test top-1 by epoch."""
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
        return line_chart(title, lines), [(look(line.colour), line.label) for line in lines]

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
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if CONTRADICTED in verdicts:
            return CONTRADICTED
        if UNTESTED in verdicts:
            return UNTESTED if len(verdicts) == 1 else "partly tested"
        return UNDECIDED if UNDECIDED in verdicts else HOLDS

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

    smoke: bool
    ledger: Ledger
    tables: list[TableView]
    claims: list[ClaimView]
    teachers: list[TeacherCheck]
    environments: list[tuple[Record, int]]
    others: list[Entry]

    @property
    def runs(self) -> list[Entry]:
        """All finished runs that count."""
        return self.ledger.all_runs()

    @property
    def latest(self) -> str:
        """When the latest of them ended."""
        return max((entry.record["at"] for entry in self.runs), default="")
