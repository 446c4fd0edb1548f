"""What ``tools/reproduce.py`` does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdistiller_norm.build import build_device
from mdistiller_norm.config import load_config
from mdistiller_norm.engine.teacher_file import MANIFEST
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.reproduce.estimate import Estimator, clock
from mdistiller_norm.reproduce.execution import trained_record
from mdistiller_norm.reproduce.jobs import Job, Plan, cell_config, cell_identity, identity, make_plan
from mdistiller_norm.reproduce.ledger import Entry, Ledger, add, check_writable, finished_record, read_ledger
from mdistiller_norm.reproduce.publish import publish
from mdistiller_norm.reproduce.runner import Runner, Summary, pending_jobs
from mdistiller_norm.reproduce.stats import plus_minus, spread
from mdistiller_norm.reproduce.tables import Cell, Row, get_table, load_tables
from mdistiller_norm.reproduce.words import counted


def select_cells(tables: Sequence[str], rows: Sequence[str], columns: Sequence[str], queue: bool) -> list[Cell]:
    """The cells that a command line names.

    Raises:
        ConfigError: unknown names, no table named, or nothing is chosen.
    """
    if not tables and not queue:
        raise ConfigError(f"--table is missing: name some of {', '.join(load_tables())}, or give --queue")
    chosen = [get_table(name) for name in tables]
    if not chosen:
        chosen = [table for table in load_tables().values() if table.is_papers and table.dataset == "cifar100"]
    # A name needs to be in one of several tables only.
    known_rows = {row.key for table in chosen for row in table.rows}
    known_columns = {column.key for table in chosen for column in table.columns}
    cells: list[Cell] = []
    for table in chosen:
        own_rows = [key for key in rows if key not in known_rows or key in {row.key for row in table.rows}]
        own_columns = [key for key in columns if key not in known_columns or key in {c.key for c in table.columns}]
        if bool(rows) == bool(own_rows) and bool(columns) == bool(own_columns):
            cells += table.select(own_rows, own_columns)
    if not cells:
        raise ConfigError("--methods and --pairs have no cell in common in any of the tables")
    return cells


def sweep(cells: Sequence[Cell], setting: str, val_split: float) -> list[Cell]:
    """The students' cells with each value of a key, evaluated on held-out training images.

    Args:
        cells: of tables; teachers are left out.
        setting: ``KEY=A,B,C``.
        val_split: ``DATASET.VAL_SPLIT`` of the runs.

    Raises:
        ConfigError: not of that form, a key that a row's method does not read or that changes nothing, or nothing held
            out.
    """
    key, _, values = setting.partition("=")
    if not key or not all(values.split(",")):
        raise ConfigError(f"--sweep takes KEY=A,B,C, not {setting!r}: for example NormKD.TEMPERATURE_NORM=1,1.5,2")
    if not 0 < val_split <= 0.5:
        raise ConfigError(f"--val-split must be above 0 and at most 0.5, not {val_split:g}")
    varied: list[Cell] = []
    for cell in cells:
        own = []
        for value in values.split(",") if not cell.is_teacher else ():
            overrides = (*cell.overrides, f"{key}={value}", f"DATASET.VAL_SPLIT={val_split:g}")
            row = Row(f"{cell.row.key},{key}={value}", f"{cell.row.name} with {key} = {value}")
            own.append(_checked(replace(cell, row=row, overrides=overrides)))
        if len({cell_identity(one) for one in own}) < len(own):
            raise ConfigError(f"--sweep {setting}: two of these values make the same run")
        varied += own
    return varied


def _checked(cell: Cell) -> Cell:
    try:
        cell_config(cell)
    except ConfigError as error:
        raise ConfigError(f"--sweep of the row {cell.row.key.split(',')[0]}: {error}: see --methods") from error
    return cell


def print_sweep(cells: Sequence[Cell], folder: Path, smoke: bool) -> None:
    """Print the accuracies on the held-out images, the best mean of the last epochs first."""
    ledger = read_ledger(folder, smoke)
    measured = []
    for cell in cells:
        if numbers := spread(entry.top1("last") for entry in ledger.of(cell_identity(cell, smoke)).values()):
            measured.append((numbers, cell))
    for numbers, cell in sorted(measured, key=lambda pair: -pair[0].mean):
        print(f"  {plus_minus(numbers)} (n {numbers.n}) on held-out images: {cell.row.name}, {cell.column.name}")


def add_folders(runs: Sequence[Path], folder: Path, smoke: bool) -> int:
    """Take finished run folders into the ledger; a run that it has already stays one run.

    Raises:
        DataError: one of them is not a finished run.
    """
    ledger = read_ledger(folder, smoke)
    for record in [finished_record(run, smoke=smoke) for run in runs]:
        known = ledger.of(identity(record["config"])).get(record["seed"])
        # Another record of it may have another time, of a copied folder, and the name of the cell's config file.
        if known and known.record["metrics"] == record["metrics"]:
            print(f"there already: {known.path}")
        else:
            print(f"added {add(record, folder)}")
    return 0


def publish_folders(runs: Sequence[Path]) -> int:
    """Put the weights of finished runs into ``checkpoints/``.

    Raises:
        UserError: one of them cannot be published; those before it are.
    """
    for run in runs:
        print(f"published {publish(run, MANIFEST.parent)}")
    return 0


def reproduce(
    cells: Sequence[Cell], seeds: Sequence[int], *, output: Path, folder: Path, smoke: bool, extra: Sequence[str],
    by_value: bool, dry_run: bool, jobs: int, processes: int, deadline: float, launcher: str, slurm: Mapping[str, Any],
) -> int:  # fmt: skip
    """Plan, list, run; returns the exit code.

    Raises:
        UserError: something about the input cannot work.
    """
    plan = make_plan(cells, seeds, output=output, smoke=smoke, extra=extra, by_value=by_value)
    ledger = read_ledger(folder, smoke)
    for job in plan.jobs:
        if job.seed not in ledger.of(job.identity) and (record := trained_record(job)):
            path = job.folder if dry_run else add(record, folder)  # finished while nobody watched
            ledger.runs.setdefault(job.identity, {})[job.seed] = Entry(path, record, job.identity)
    todo = pending_jobs(plan.jobs, ledger)
    device = build_device(load_config(None, extra).node.DEVICE)
    estimator = Estimator(ledger.all_runs(), device, processes)
    _print_plan(plan, todo, ledger, estimator, verbose=dry_run)
    if dry_run or not todo:
        return 0
    check_writable(folder)
    if launcher == "here":
        summary = Runner(todo, folder, jobs=jobs, processes=processes, deadline=deadline).run()
    else:
        from mdistiller_norm.reproduce.launcher import launch

        cluster = "local" if launcher == "submitit-local" else "slurm"
        notes = output / ".submitit"
        summary = launch(todo, folder, cluster=cluster, options=slurm, notes=notes, processes=processes)
    _print_summary(summary, estimator, queued=launcher == "slurm")
    return summary.exit_code


def _print_plan(plan: Plan, todo: Sequence[Job], ledger: Ledger, estimator: Estimator, verbose: bool) -> None:
    for path, reason in ledger.left_out:
        print(f"warning: {path} is left out: {reason}")
    for cell in plan.published:
        print(f"published weights, nothing to train: {cell.name}")
    left = {job.key for job in todo}
    if verbose:
        for job in plan.jobs:
            state = "done"
            if job.key in left:
                estimate = estimator.of(job)
                state = f"about {clock(estimate.seconds)} from {estimate.source}"
                if job.epochs_done:
                    state += f", {job.epochs_done} of {job.epochs} epochs are done"
            elif not job.cells:
                state = "a teacher, not needed now" if not job.weights.is_file() else "done"
            first = f"  after {job.teacher.name}" if job.teacher and job.teacher.key in left else ""
            print(f"  {job.name}: {state}{first}")
    total = estimator.total(todo)
    estimated = f", about {clock(total.seconds)} one after another ({total.source})" if todo else ""
    print(f"{counted(len(plan.jobs), 'run')}: {len(plan.jobs) - len(todo)} done, {len(todo)} to run{estimated}")
    load = os.getloadavg()[0]
    if "short trial" in total.source and load >= 1:
        print(
            f"note: this machine is busy (load average {load:.1f}): a short trial on it, and so the time, is too long"
        )


def _print_summary(summary: Summary, estimator: Estimator, queued: bool) -> None:
    print(f"{len(summary.done)} done, {len(summary.failed)} failed, {len(summary.blocked)} without their teacher")
    for job, error in summary.failed:
        print(f"  failed: {job.name}: {error}")
    if summary.left and queued:
        print(f"{counted(len(summary.left), 'run')} queued on Slurm; the same command with --dry-run says what is done")
    elif summary.left:
        total = clock(estimator.total(summary.left).seconds)
        print(f"{counted(len(summary.left), 'run')} left, about {total}; the same command goes on:")
        for job in summary.left:
            behind = f" ({job.epochs_done} of {job.epochs} epochs are done)" if job.epochs_done else ""
            print(f"  {job.name}{behind}")
