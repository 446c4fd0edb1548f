"""The tables of the NormKD paper and of this project's studies, read from ``tables.yaml``."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mdistiller_norm.files import package_data

_NUMBERS = ("top1", "top5", "ms", "parameters")  # of Cell.paper


class Column(NamedTuple):
    """A pair of networks; ``key`` is its name in ``--pairs`` and in the names of config files."""

    key: str
    teacher: str
    student: str

    @property
    def name(self) -> str:
        return f"{self.teacher} → {self.student}"


class Row(NamedTuple):
    """A method or a setting of a method; ``key`` is its name in ``--methods``."""

    key: str
    name: str


class Cell(NamedTuple):
    """A cell of a table and the config file that computes it (empty for published teachers).

    ``paper`` holds the printed numbers: ``top1`` and ``top5`` in percent, ``ms`` per batch, extra ``parameters``.
    ``overrides`` are ``KEY=VALUE`` settings on top of the config.
    """

    table: str
    row: Row
    column: Column
    config: str
    paper: Mapping[str, float]
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"table {self.table}, {self.row.name}, {self.column.name}"


class Delta(NamedTuple):
    """A difference of two rows; ``printed`` holds the paper's value for each column, if it prints any."""

    name: str
    row: str
    minus: str
    printed: Sequence[float] = ()


class Table(NamedTuple):
    """A table with its cells by (row key, column key); ``id`` is a number for the paper's tables.

    ``teacher`` is the config that trains a column's teacher, with ``{teacher}`` as placeholder (empty: published
    weights). ``own_teacher`` is true if it is trained even if weights are published.
    """

    id: str
    title: str
    dataset: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    cells: Mapping[tuple[str, str], Cell]
    teacher: str
    deltas: Sequence[Delta] = ()
    own_teacher: bool = False
    notes: Sequence[str] = ()

    @property
    def in_paper(self) -> bool:
        return self.id.isdigit()

    @property
    def name(self) -> str:
        return f"Table {self.id}" if self.in_paper else f"Table “{self.id}”"

    def teacher_config(self, column: Column) -> str:
        return self.teacher.format(**column._asdict())


class Claim(NamedTuple):
    """A claim: ``row`` is better than ``than`` in every column, or the best row is one of ``peak``."""

    text: str
    tables: Sequence[str]
    row: str = ""
    than: str = ""
    peak: Sequence[str] = ()
    own: bool = False  # about this project's studies


def _table(entry: dict[str, Any]) -> Table:
    columns, cells = [Column(**column) for column in entry["columns"]], {}
    for source in entry["rows"]:
        row, overrides = Row(source["key"], source["name"]), tuple(source.get("overrides", ()))
        for i, column in enumerate(columns):
            config = source.get("config", "").format(**column._asdict())
            paper = {name: source[name][i] for name in _NUMBERS if name in source}
            cells[row.key, column.key] = Cell(entry["id"], row, column, config, paper, overrides)
    rows = list(dict.fromkeys(cell.row for cell in cells.values()))
    deltas = [Delta(**delta) for delta in entry.get("deltas", ())]
    return Table(**entry | {"columns": columns, "rows": rows, "cells": cells, "deltas": deltas})


_SOURCE = package_data("reproduce/tables.yaml")
TABLES: Mapping[str, Table] = {entry["id"]: _table(entry) for entry in _SOURCE["tables"]}
CLAIMS = [Claim(**entry) for entry in _SOURCE["claims"]]  # the paper's first
TEACHERS: Mapping[str, str] = _SOURCE["teachers"]
DATASETS: Mapping[str, dict[str, Any]] = _SOURCE["datasets"]
