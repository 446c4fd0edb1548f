"""The ``reproduce`` command: runs the cells of tables and keeps the ledger."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.build import build_device
from mdistiller_norm.config import default_config, load_config
from mdistiller_norm.engine.logger import environment
from mdistiller_norm.engine.teacher_file import MANIFEST
from mdistiller_norm.errors import ConfigError, first_line
from mdistiller_norm.program import command
from mdistiller_norm.registry import nearest
from mdistiller_norm.reproduce import runner
from mdistiller_norm.reproduce.ledger import (
    Entry,
    Ledger,
    Record,
    finished_record,
    identity,
    read_ledger,
    write_record,
)
from mdistiller_norm.reproduce.plan import Job, cell_identity, counted, duration, estimate, make_plan
from mdistiller_norm.reproduce.publish import publish
from mdistiller_norm.reproduce.slurm import submit
from mdistiller_norm.reproduce.stats import mean_std
from mdistiller_norm.reproduce.tables import TABLES, Cell, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``reproduce``."""
    codes = "0 all done, 1 a run failed, 2 invalid input, 3 runs remain, 130 or 143 stopped by a signal"
    example = f"{parser.prog} --table 2 --pairs res32x4_res8x4 --methods kd normkd --trials 3"
    parser.epilog = f"example: {example}. Exit codes: {codes}."
    add = parser.add_argument
    add("--table", nargs="+", default=[], metavar="ID", help="1 to 9, digits, short, short_t_norm, short16")
    add("--pairs", nargs="+", default=[], metavar="PAIR", help="columns of the table (default: all)")
    add("--methods", nargs="+", default=[], metavar="ROW", help="rows of the table (default: all)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--trials", type=int, default=3, help="runs per cell, with the seeds 0, 1, ... (default: 3)"
    )
    seeds.add_argument("--seeds", nargs="+", default=[], help="seeds, instead of --trials")
    add(
        "--queue",
        action="store_true",
        help="run the most informative cells first (default tables: all of CIFAR-100)",
    )
    add(
        "--sweep",
        default="",
        metavar="KEY=A,B,C",
        help="run each value of a key, evaluated on held-out images",
    )
    add(
        "--val-split",
        type=float,
        default=0.1,
        help="share of the images that a sweep holds out (default: 0.1)",
    )
    add("--dry-run", action="store_true", help="list finished and pending runs without running them")
    add("--budget", default="", metavar="TIME", help="stop after 9m, 1h30m, ...; the next call continues")
    add("--jobs", type=int, default=1, metavar="N", help="number of runs at a time on this machine")
    add(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes per run, started by torchrun, one GPU each",
    )
    add(
        "--smoke",
        action="store_true",
        help="two epochs per run, to test that everything works; kept separately",
    )
    add("--launcher", choices=["here", "slurm", "submitit-local"], default="here")
    add("--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="options of submitit")
    add("--add", nargs="+", default=[], metavar="FOLDER", help="add finished run folders to the ledger")
    add(
        "--publish",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="publish weights of runs in checkpoints/, in fp16",
    )
    add("--output", default="output", metavar="DIR", help="folder of the run folders (default: output)")
    add("--results", default="", metavar="DIR", help="folder of the ledger (default: results)")
    add(
        "overrides",
        nargs="*",
        metavar="KEY VALUE",
        help="config keys that do not change the result, such as DEVICE",
    )


def main(options: argparse.Namespace) -> int:
    """Plan and run the selected cells; returns the exit code."""
    started = time.monotonic()
    _move_overrides(options)
    output = Path(options.output, "smoke" if options.smoke else "")
    results = Path(options.results or (output / "results" if options.smoke else "results"))
    folder = results / "runs"
    seeds, budget, slurm = _checked_options(options)
    if options.add or options.publish:
        _add_runs(options.add, folder, options.smoke)
        for run in options.publish:
            print(f"published {publish(Path(run), MANIFEST.parent)}")
        return 0
    cells = select_cells(options.table, options.methods, options.pairs, options.queue)
    if options.sweep:
        cells = sweep_cells(cells, options.sweep, options.val_split)
    jobs, published = make_plan(cells, seeds, output, options.smoke, options.overrides, options.queue)
    for cell in published:
        print(f"published weights, nothing to train: {cell.name}")
    ledger = _updated_ledger(jobs, folder, options)
    todo = runner.pending_jobs(jobs, ledger)
    device = environment(build_device(load_config(None, options.overrides).node.DEVICE))["device"]
    records = [entry.record for entry in ledger.all_runs()]
    finished = [
        r
        for r in records
        if (r["environment"]["device"], r.get("processes", 1)) == (device, options.processes)
    ]
    if options.dry_run:
        _print_jobs(jobs, todo, finished)
    counts = f"{len(jobs) - len(todo)} done, {len(todo)} to run"
    print(f"{counted(len(jobs), 'run')}: {counts}{_time(todo, finished)}", flush=True)
    if options.dry_run:
        return 0
    folder.mkdir(parents=True, exist_ok=True)  # before the first training
    if options.launcher == "here":
        deadline = started + budget - min(10.0, budget / 10)  # running jobs need time to save
        here = runner.Runner(todo, folder, options.jobs, options.processes)
        outcomes, signals = here.run(deadline), here.signals
    else:
        cluster = "slurm" if options.launcher == "slurm" else "local"
        outcomes, signals = submit(todo, folder, cluster, slurm, options.processes), []
    _print_cells(cells, read_ledger(folder, options.smoke), options)
    code = _print_outcomes(todo, outcomes, finished) if todo else 0
    print(f"report: {command('report')} --results {results}{' --smoke' if options.smoke else ''}")
    return 128 + signals[0] if signals else code


def _move_overrides(options: argparse.Namespace) -> None:
    """Move config keys that follow the values of a list option, as in ``--seeds 0 1 DEVICE cpu``, to the overrides."""
    sections = [
        rf"{name}\.[\w.]*" if isinstance(value, dict) else name for name, value in default_config().items()
    ]
    key = re.compile(rf"(?:{'|'.join(sections)})(?:=.*)?", re.DOTALL)
    for name in ("table", "pairs", "methods", "seeds", "slurm", "add", "publish"):
        values = getattr(options, name)
        first = next((i for i, value in enumerate(values) if key.fullmatch(value)), len(values))
        options.overrides += values[first:]
        setattr(options, name, values[:first])


def parse_duration(text: str) -> float:
    """Return the seconds of ``90s``, ``9m`` or ``1h30m``; infinity for an empty text."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not match or (text and not any(match.groups())):
        raise ConfigError(f"--budget must be a duration such as 90s, 9m or 1h30m, got {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds if text else float("inf")


def _checked_options(options: argparse.Namespace) -> tuple[list[int], float, dict[str, Any]]:
    """Return the seeds, the budget in seconds and the options of submitit."""
    for wrong, message in (
        (not 1 <= options.trials <= 1000, f"--trials must be in 1 .. 1000, got {options.trials}"),
        (
            not all(map(str.isdecimal, options.seeds)),
            f"--seeds must be integers >= 0, got {' '.join(options.seeds)}",
        ),
        (min(options.jobs, options.processes) < 1, "--jobs and --processes must be >= 1"),
        (options.slurm and options.launcher == "here", "--slurm requires --launcher slurm or submitit-local"),
        (options.budget and options.launcher != "here", "--budget requires --launcher here; see --slurm"),
        (options.jobs > 1 and options.launcher != "here", "--jobs requires --launcher here; see --slurm"),
    ):
        if wrong:
            raise ConfigError(message)
    try:
        slurm = {
            name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in options.slurm)
        }
    except yaml.YAMLError as error:
        raise ConfigError(f"--slurm: the value is not YAML ({first_line(error)})") from error
    seeds = list(dict.fromkeys(map(int, options.seeds))) or list(range(options.trials))
    return seeds, parse_duration(options.budget), slurm


def select_cells(
    tables: Sequence[str], rows: Sequence[str], columns: Sequence[str], queue: bool
) -> list[Cell]:
    """Return the cells of some tables, rows and columns; a row or column has to exist in one of the tables."""
    if not tables and queue:
        tables = [table.id for table in TABLES.values() if table.in_paper and table.dataset == "cifar100"]
    if not tables or set(tables) - set(TABLES):
        raise ConfigError(f"--table must be among {', '.join(TABLES)}, got {', '.join(tables) or 'none'}")
    cells = [cell for name in tables for cell in TABLES[name].cells.values()]
    known_rows, known_columns = [cell.row.key for cell in cells], [cell.column.key for cell in cells]
    for option, names, known in (("--methods", rows, known_rows), ("--pairs", columns, known_columns)):
        if unknown := [name for name in names if name not in known]:
            near = nearest(unknown[0], known) or dict.fromkeys(known)
            raise ConfigError(
                f"{option}: no {unknown[0]!r} in these tables; did you mean {' or '.join(near)}?"
            )
    cells = [c for c in cells if (not rows or c.row.key in rows) and (not columns or c.column.key in columns)]
    if not cells:
        raise ConfigError("--methods and --pairs have no common cell in these tables")
    return cells


def sweep_cells(cells: Sequence[Cell], setting: str, val_split: float) -> list[Cell]:
    """Return the students' cells with each value of ``KEY=A,B,C``, evaluated on held-out training images."""
    key, _, text = setting.partition("=")
    values = text.split(",")
    if not key or not all(values):
        raise ConfigError(
            f"--sweep must be KEY=A,B,C such as NormKD.TEMPERATURE_NORM=1,1.5,2, got {setting!r}"
        )
    if not 0 < val_split <= 0.5:
        raise ConfigError(f"--val-split must be > 0 and <= 0.5, got {val_split:g}")
    swept = []
    for cell in cells:
        for value in values if cell.row.key != "teacher" else ():
            row = Row(f"{cell.row.key},{key}={value}", f"{cell.row.name} with {key} = {value}")
            overrides = (*cell.overrides, f"{key}={value}", f"DATASET.VAL_SPLIT={val_split:g}")
            swept.append(cell._replace(row=row, overrides=overrides))
    try:
        runs = {(cell.table, cell.config, cell_identity(cell)) for cell in swept}
    except ConfigError as error:
        raise ConfigError(f"--sweep: {error} (select rows with --methods)") from error
    if len(runs) < len(swept):
        raise ConfigError(f"--sweep {setting}: two values give the same run")
    return swept


def _add_runs(runs: Sequence[str], folder: Path, smoke: bool) -> None:
    ledger = read_ledger(folder, smoke)
    for record in [finished_record(Path(run), smoke=smoke) for run in runs]:
        known = ledger.of(identity(record["config"])).get(record["seed"])
        # The record of a copied folder differs in its time and in the name of the config file.
        if known and known.record["metrics"] == record["metrics"]:
            print(f"already in the ledger: {known.path}")
        else:
            print(f"added {write_record(record, folder)}")


def _updated_ledger(jobs: Sequence[Job], folder: Path, options: argparse.Namespace) -> Ledger:
    """Return the ledger with runs that have finished since; a dry run does not write them."""
    ledger = read_ledger(folder, options.smoke)
    for path, reason in ledger.left_out:
        print(f"warning: {path} is ignored: {reason}")
    for job in jobs:
        if not ledger.has(*job.key) and (record := runner.trained_record(job)):
            path = job.folder if options.dry_run else write_record(record, folder)
            ledger.add(Entry(path, record, job.key[0]))
    return ledger


def _print_jobs(jobs: Sequence[Job], todo: Sequence[Job], finished: Sequence[Record]) -> None:
    pending = {job.key for job in todo}
    for job in jobs:
        state = "done" if job.cells or job.weights.is_file() else "a teacher, not needed now"
        if job.key in pending:
            after = f", after {job.teacher.name}" if job.teacher and job.teacher.key in pending else ""
            state = f"{job.progress}{_time([job], finished)}{after}"
        print(f"  {job.name}: {state}")


def _time(jobs: Sequence[Job], finished: Sequence[Record]) -> str:
    estimates = [found for job in jobs if (found := estimate(job, finished))]
    if not estimates:
        return ", no finished run to estimate the time from" if jobs else ""
    sources = " and ".join(dict.fromkeys(source for _, source in estimates))
    missing = f", {len(jobs) - len(estimates)} without estimate" if len(estimates) < len(jobs) else ""
    return f", about {duration(sum(seconds for seconds, _ in estimates))} (estimated from {sources}{missing})"


def _print_cells(cells: Sequence[Cell], ledger: Ledger, options: argparse.Namespace) -> None:
    """Print mean and standard deviation of cells with runs; of a sweep, the best first."""
    rows = []
    for cell in cells:
        records = [entry.record for entry in ledger.of(cell_identity(cell, options.smoke)).values()]
        last, best = (mean_std(record[which]["top1"] for record in records) for which in ("last", "best"))
        if last:
            held_out = " on held-out images" if options.sweep else ""
            rows.append(
                (last.mean, f"  {cell.name}: last top-1 {last}, best {best} (n = {last.n}){held_out}")
            )
    for _, text in sorted(rows, reverse=True) if options.sweep else rows:
        print(text)


def _print_outcomes(todo: Sequence[Job], outcomes: runner.Outcomes, finished: Sequence[Record]) -> int:
    """Print the outcomes of jobs; returns the exit code."""
    names = (runner.DONE, runner.FAILED, runner.BLOCKED, runner.QUEUED)
    done, failed, blocked, queued = (sum(outcome == name for outcome in outcomes.values()) for name in names)
    print(f"{done} done, {failed} failed, {blocked} waiting for a teacher")
    if queued:
        print(f"{counted(queued, 'run')} queued on Slurm; add --dry-run to list finished and pending runs")
    left = [job for job in todo if outcomes.get(job.key) not in names]
    if left:
        print(f"{counted(len(left), 'run')} left{_time(left, finished)}; run the same command to continue")
    return 1 if failed or blocked else 3 if left or queued else 0
