"""Tables 1-9 of the NormKD paper, and this project's own, read from ``tables.yaml``: numbers, cells, claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import nearest

# What the paper prints of a cell: accuracies in percent, milliseconds a batch, number of extra parameters.
PRINTED = ("top1", "top5", "ms", "parameters")


@dataclass(frozen=True)
class Column:
    """A pair of networks.

    Attributes:
        key: as in the names of the config files.
        teacher: model name.
        student: model name.
    """

    key: str
    teacher: str
    student: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.teacher} → {self.student}"


@dataclass(frozen=True)
class Row:
    """A method, or a setting of one.

    Attributes:
        key: ``teacher``, ``student``, a method, or the name of a setting.
        name: for people.
    """

    key: str
    name: str


@dataclass(frozen=True)
class Cell:
    """One number of a table, and what measures it.

    Attributes:
        table: its id.
        row: which method or setting.
        column: which pair.
        config: config file, relative to the project; empty where nothing trains it (published teachers).
        paper: what the paper prints, by a key of ``PRINTED``.
        overrides: on top of the file, ``KEY=VALUE``; of sweeps, the tables have a file for each cell.
    """

    table: str
    row: Row
    column: Column
    config: str
    paper: Mapping[str, float]
    overrides: tuple[str, ...] = ()

    @property
    def is_teacher(self) -> bool:
        """Whether this is the teacher itself, which has one run, not one a seed."""
        return self.row.key == "teacher"

    @property
    def name(self) -> str:
        """For people."""
        return f"table {self.table}, {self.row.name}, {self.column.name}"


@dataclass(frozen=True)
class Delta:
    """A difference of two rows that a table prints.

    Attributes:
        name: as printed.
        row: key of the better method.
        minus: key of the other one.
        printed: by column; empty where the paper prints none.
    """

    name: str
    row: str
    minus: str
    printed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        id: ``1`` to ``9``, or one of this project's own such as ``digits``.
        title: what it compares.
        dataset: what its runs train on.
        columns: pairs of networks.
        rows: methods or settings.
        cells: by (row key, column key).
        teacher: config that trains a column's teacher, with ``{teacher}`` in it; empty: published weights only.
        own_teacher: never look for published weights.
        deltas: differences shown under the rows.
        notes: misprints and what the paper leaves open.
    """

    id: str
    title: str
    dataset: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    cells: Mapping[tuple[str, str], Cell]
    teacher: str
    own_teacher: bool
    deltas: tuple[Delta, ...]
    notes: tuple[str, ...]

    @property
    def is_papers(self) -> bool:
        """Whether the paper has it."""
        return self.id.isdigit()

    @property
    def name(self) -> str:
        """For people."""
        return f"Table {self.id}" if self.is_papers else f"Table “{self.id}”"

    def teacher_config(self, column: Column) -> str:
        """The config file that trains a column's teacher, or an empty string."""
        return self.teacher.format(teacher=column.teacher)

    def select(self, rows: list[str] | None = None, columns: list[str] | None = None) -> Iterator[Cell]:
        """Cells by keys of rows and columns, all of them by default, row by row.

        Raises:
            ConfigError: a key that the table does not have.
        """
        _check_names(rows or [], [row.key for row in self.rows], f"row of {self.name}")
        _check_names(columns or [], [column.key for column in self.columns], f"pair of {self.name}")
        for (row, column), cell in self.cells.items():
            if (not rows or row in rows) and (not columns or column in columns):
                yield cell


@dataclass(frozen=True)
class Claim:
    """A statement about tables that runs can support or contradict.

    Attributes:
        text: the statement.
        tables: ids of the tables it is about.
        row: the better row, of every column; empty for a claim about a peak.
        than: the row it is compared with.
        peak: keys of the rows that the best row should be among.
        own: about a table of this project, not of the paper.
    """

    text: str
    tables: tuple[str, ...]
    row: str = ""
    than: str = ""
    peak: tuple[str, ...] = ()
    own: bool = False


@dataclass(frozen=True)
class DatasetFacts:
    """What the cost of a run depends on.

    Attributes:
        images: to train on, an epoch.
        size: height and width in pixels.
        classes: how many.
        variant: of the networks, see :func:`~mdistiller_norm.models.build_model`.
    """

    images: int
    size: int
    classes: int
    variant: str


def _check_names(given: list[str], known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"there is no {what} called {name!r}: {hint}")


@cache
def _source() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
    return content


@cache
def load_tables() -> Mapping[str, Table]:
    """All tables by id."""
    return {entry["id"]: _table(entry) for entry in _source()["tables"]}


@cache
def load_claims() -> tuple[Claim, ...]:
    """All claims, the paper's first."""
    return tuple(
        Claim(**entry | {"tables": tuple(entry["tables"]), "peak": tuple(entry.get("peak", ()))})
        for entry in _source()["claims"]
    )


@cache
def load_datasets() -> Mapping[str, DatasetFacts]:
    """Facts about the data sets of the tables, by ``DATASET.TYPE``."""
    return {name: DatasetFacts(**facts) for name, facts in _source()["datasets"].items()}


def get_table(name: str) -> Table:
    """The table of that id.

    Raises:
        ConfigError: there is none.
    """
    tables = load_tables()
    if name not in tables:
        raise ConfigError(f"there is no table {name!r}: there are {', '.join(tables)}")
    return tables[name]


def _table(entry: dict[str, Any]) -> Table:
    columns = tuple(Column(**column) for column in entry["columns"])
    rows, cells = [], {}
    for described in entry["rows"]:
        row = Row(described["key"], described["name"])
        rows.append(row)
        for i, column in enumerate(columns):
            config = described.get("config", "")
            cells[row.key, column.key] = Cell(
                table=entry["id"],
                row=row,
                column=column,
                config=config.format(key=column.key, teacher=column.teacher, student=column.student),
                paper={name: described[name][i] for name in PRINTED if name in described},
            )
    return Table(
        id=entry["id"], title=entry["title"], dataset=entry["dataset"], columns=columns, rows=tuple(rows), cells=cells,
        teacher=entry["teacher"], own_teacher=entry.get("own_teacher", False),
        deltas=tuple(Delta(**d | {"printed": tuple(d.get("printed", ()))}) for d in entry.get("deltas", ())),
        notes=tuple(entry.get("notes", ())),
    )  # fmt: skip
