"""The ``reproduce`` command: runs the cells of tables and keeps the ledger."""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from mdistiller_norm.build import build_device
from mdistiller_norm.config import load_config
from mdistiller_norm.engine.checkpoint import load_weights, save_atomically
from mdistiller_norm.engine.logger import environment
from mdistiller_norm.engine.teacher_file import MANIFEST, add_to_manifest
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import command
from mdistiller_norm.registry import suggest
from mdistiller_norm.reproduce import report, runner, slurm, stats
from mdistiller_norm.reproduce.ledger import (
    NOT_IDENTIFYING,
    Ledger,
    Record,
    finished_run,
    read_ledger,
    write_record,
)
from mdistiller_norm.reproduce.plan import (
    Job,
    cell_identity,
    counted,
    duration,
    estimate,
    make_plan,
)
from mdistiller_norm.reproduce.tables import TABLES, Cell, Row

# KEY or KEY=VALUE of a config.
_OVERRIDE = re.compile(r"(?:SEED|DEVICE|[A-Z]\w*\.[A-Z][\w.]*)(?:=.*)?", re.DOTALL)


def main(options: argparse.Namespace) -> int:
    """Plan and run the selected cells; returns the exit code."""
    started = time.monotonic()
    _check_options(options)
    output = Path(options.output, "smoke" if options.smoke else "")
    results = Path(options.results or (output / "results" if options.smoke else "results"))
    folder = results / "runs"
    if options.add or options.publish:
        _add_runs([*options.add, *options.publish], folder, options.smoke)
        for run in options.publish:
            print(f"published {publish(Path(run))}")
        if options.publish:
            report.write_report(results, results, options.smoke)
        return 0
    cells = select_cells(options.table, options.methods, options.pairs, options.queue)
    if options.sweep:
        cells = sweep_cells(cells, options.sweep, options.val_split)
    seeds = list(map(int, options.seeds)) or list(range(options.trials))
    jobs = make_plan(cells, seeds, output, options.smoke, options.overrides, options.queue)
    trained = {name for job in jobs for name in job.cells}
    for cell in (cell for cell in cells if cell.name not in trained):
        print(f"published weights, nothing to train: {cell.name}")
    ledger = _updated_ledger(jobs, folder, options)
    todo = runner.pending_jobs(jobs, ledger)
    finished: list[Record] = []  # on this machine, with as many processes
    if options.launcher == "here":
        device = build_device(load_config(None, options.overrides).node.DEVICE)
        machine = environment(device)["device"], options.processes
        for run in (entry.record for entry in ledger.all_runs()):
            if (run["environment"]["device"], run.get("processes", 1)) == machine:
                finished.append(run)
    if options.dry_run:
        _print_jobs(jobs, todo, finished)
    done = len(jobs) - len(todo)
    print(f"{counted(len(jobs), 'run')}: {done} done, {len(todo)} to run{_time(todo, finished)}")
    if options.dry_run:
        return 0
    folder.mkdir(parents=True, exist_ok=True)  # before the first training
    here = runner.Runner(todo, folder, options.jobs, options.processes)
    if options.launcher == "here":
        # Running jobs need time to save.
        outcomes = here.run(started + options.budget - min(10.0, options.budget / 10))
    else:
        outcomes = slurm.submit(todo, folder, options.launcher, options.slurm, options.processes)
    ledger = read_ledger(folder, options.smoke)
    _print_cells(cells, ledger, options)
    code = _print_outcomes(todo, outcomes, finished) if todo else 0
    if code == 0 and (others := runner.pending_jobs(jobs, ledger)):
        print(
            f"{counted(len(others), 'run')} left, recorded with another teacher: repeat the command"
        )
        code = 3
    print(f"report: {command('report')} --results {results}{' --smoke' if options.smoke else ''}")
    return 128 + here.signals[0] if here.signals else code


def _check_options(options: argparse.Namespace) -> None:
    # Config keys may follow the values of a list option, as in --seeds 0 1 DEVICE cpu.
    for name in ("table", "pairs", "methods", "seeds", "slurm", "add", "publish"):
        values = getattr(options, name)
        first = next(
            (i for i, word in enumerate(values) if _OVERRIDE.fullmatch(word)), len(values)
        )
        options.overrides += values[first:]
        setattr(options, name, values[:first])
    here, limited = options.launcher == "here", options.jobs > 1 or options.budget < math.inf
    for wrong, message in (
        (not all(map(str.isdecimal, options.seeds)), "--seeds must be integers >= 0"),
        (here and options.slurm, "--slurm requires --launcher slurm or submitit-local"),
        (limited and not here, "--jobs and --budget require --launcher here; see --slurm"),
        (not 0 < options.val_split <= 0.5, "--val-split must be > 0 and <= 0.5"),
    ):
        if wrong:
            raise ConfigError(message)


def select_cells(
    tables: Sequence[str], rows: Sequence[str], columns: Sequence[str], queue: bool
) -> list[Cell]:
    """Return the cells of some tables, rows and columns; a row or column has to exist in one of the tables."""
    if not tables and queue:
        tables = [
            key for key, table in TABLES.items() if table.in_paper and table.dataset == "cifar100"
        ]
    if not tables or set(tables) - set(TABLES):
        raise ConfigError(f"--table must be among {', '.join(TABLES)}, got {tables or 'none'}")
    cells = [cell for name in tables for cell in TABLES[name].cells.values()]
    known_rows = dict.fromkeys(cell.row.key for cell in cells)
    known_columns = dict.fromkeys(cell.column.key for cell in cells)
    for option, names, known in (
        ("--methods", rows, known_rows),
        ("--pairs", columns, known_columns),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"{option}: no {name!r} in these tables: {suggest(name, known)}"
                )
    chosen = [cell for cell in cells if not rows or cell.row.key in rows]
    return [cell for cell in chosen if not columns or cell.column.key in columns]


def sweep_cells(cells: Sequence[Cell], setting: str, val_split: float) -> list[Cell]:
    """Return the students' cells with each value of ``KEY=A,B,C``, evaluated on held-out training images."""
    key, _, text = setting.partition("=")
    values = text.split(",")
    if not key or not all(values) or key.startswith(NOT_IDENTIFYING):
        raise ConfigError(
            "--sweep must be KEY=A,B,C such as KD.TEMPERATURE=2,4, of a key that belongs to a run's identity, "
            f"got {setting!r}"
        )
    swept = []
    for cell in cells:
        for value in values if cell.row.key != "teacher" else ():
            row = Row(f"{cell.row.key},{key}={value}", f"{cell.row.name} with {key} = {value}")
            overrides = (*cell.overrides, f"{key}={value}", f"DATASET.VAL_SPLIT={val_split:g}")
            swept.append(cell._replace(row=row, overrides=overrides))
    return swept


def _add_runs(runs: Sequence[str], folder: Path, smoke: bool) -> None:
    ledger = read_ledger(folder, smoke)
    for run in [finished_run(Path(run), smoke=smoke) for run in runs]:
        known = ledger.of(run.identity).get(run.record["seed"])
        # The record of a copied folder differs in its time and in the name of the config file.
        if known and known.record["metrics"] == run.record["metrics"]:
            print(f"already in the ledger: {known.path}")
        else:
            print(f"added {write_record(run.record, folder)}")


def publish(folder: Path) -> Path:
    """Write the last epoch's weights of a run of the paper's tables in fp16 and their manifest entry."""
    run = finished_run(folder)
    cells = [cell for table in TABLES.values() if table.in_paper for cell in table.cells.values()]
    if run.identity not in map(cell_identity, cells):
        raise ConfigError(f"{folder} does not fill a cell of the paper's tables")
    record = run.record
    words = [record["student"], record["dataset"], *record["method"], f"seed{record['seed']}"]
    if (path := MANIFEST.with_name("_".join(words) + ".pt")).exists():
        raise ConfigError(
            f"{path} exists: remove it and its entry in {MANIFEST} to publish another"
        )
    weights = load_weights(folder / "student_last.pt")
    for name, value in weights.state.items():
        # Vectors (batch norms, biases) may exceed the range of fp16.
        if value.dtype == torch.float32 and value.ndim > 1:
            weights.state[name] = value.half()
    path.parent.mkdir(exist_ok=True)
    save_atomically({"model": weights.state, "about": weights.about}, path)
    add_to_manifest(
        MANIFEST,
        path,
        model=record["student"],
        dataset=record["dataset"],
        method="+".join(record["method"]),
        epochs=record["epochs"],
        top1=round(record["last"]["top1"], 2),
        command=record["command"],
        commit=record["environment"].get("commit"),
    )
    return path


def _updated_ledger(jobs: Sequence[Job], folder: Path, options: argparse.Namespace) -> Ledger:
    ledger = read_ledger(folder, options.smoke)
    for path, reason in ledger.left_out:
        print(f"warning: {path} is ignored: {reason}")
    for job in jobs:
        if not ledger.has(*job.key) and (run := runner.trained(job)):
            ledger.add(run)
            if not options.dry_run:
                write_record(run.record, folder)
    return ledger


def _print_jobs(jobs: Sequence[Job], todo: Sequence[Job], finished: Sequence[Record]) -> None:
    pending = {job.key for job in todo}
    for job in jobs:
        state = "done" if job.cells or job.weights.is_file() else "a teacher, not needed now"
        if job.key in pending:
            state = f"{job.progress}{_time([job], finished)}"
            if job.teacher and job.teacher.key in pending:
                state += f", after {job.teacher.name}"
        print(f"  {job.name}: {state}")


def _time(jobs: Sequence[Job], finished: Sequence[Record]) -> str:
    if not (estimates := [found for job in jobs if (found := estimate(job, finished))]):
        return ", no finished run to estimate the time from" if jobs else ""
    sources = " and ".join(dict.fromkeys(source for _, source in estimates))
    missing = len(jobs) - len(estimates)
    if missing:
        sources += f", {missing} without estimate"
    total = duration(sum(seconds for seconds, _ in estimates))
    return f", about {total} (estimated from {sources})"


def _print_cells(cells: Sequence[Cell], ledger: Ledger, options: argparse.Namespace) -> None:
    held_out, rows = " on held-out images" if options.sweep else "", []
    for cell in cells:
        runs = ledger.of(cell_identity(cell, options.smoke)).values()
        if last := stats.mean_std(run.record["last"]["top1"] for run in runs):
            best = stats.mean_std(run.record["best"]["top1"] for run in runs)
            text = f"  {cell.name}: last top-1 {last}, best {best} (n = {last.n}){held_out}"
            rows.append((last.mean, text))
    for _, text in sorted(rows, reverse=True) if options.sweep else rows:
        print(text)


def _print_outcomes(
    todo: Sequence[Job], outcomes: dict[tuple[str, int], str], finished: Sequence[Record]
) -> int:
    counts = Counter(outcomes.values())
    failed, blocked, queued = counts[runner.FAILED], counts[runner.BLOCKED], counts[runner.QUEUED]
    print(f"{counts[runner.DONE]} done, {failed} failed, {blocked} waiting for a teacher")
    if queued:
        print(
            f"{counted(queued, 'run')} queued on Slurm; --dry-run lists finished and pending runs"
        )
    if left := [job for job in todo if outcomes[job.key] == runner.STOPPED]:
        print(
            f"{counted(len(left), 'run')} left{_time(left, finished)}; repeat the command to resume"
        )
    return 1 if failed or blocked else 3 if left or queued else 0
