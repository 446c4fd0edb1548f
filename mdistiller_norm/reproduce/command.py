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
from mdistiller_norm.registry import nearest
from mdistiller_norm.reproduce.ledger import Entry, Ledger, add, finished_record, identity, read_ledger
from mdistiller_norm.reproduce.plan import (
    Estimator,
    Job,
    Plan,
    cell_identity,
    counted,
    duration,
    make_plan,
)
from mdistiller_norm.reproduce.publish import publish
from mdistiller_norm.reproduce.runner import (
    BLOCKED,
    DONE,
    FAILED,
    QUEUED,
    Outcomes,
    Runner,
    pending_jobs,
    trained_record,
)
from mdistiller_norm.reproduce.slurm import submit
from mdistiller_norm.reproduce.stats import mean_std
from mdistiller_norm.reproduce.tables import Cell, Row, get_table, load_tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``reproduce``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"example: {parser.prog} --table 2 --pairs res32x4_res8x4 --methods kd normkd --trials 3\n"
        "exit code: 0 all done, 1 a run failed, 2 invalid input, 3 runs remain, 130/143 stopped by a signal"
    )
    add = parser.add_argument
    add("--table", nargs="+", default=[], metavar="ID", help="1 to 9, digits, short, short_t_norm, short16")
    add("--pairs", nargs="+", default=[], metavar="PAIR", help="columns of the table (default: all)")
    add("--methods", nargs="+", default=[], metavar="ROW", help="rows of the table (default: all)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--trials", type=int, default=3, help="runs per cell, with the seeds 0, 1, ... (default: 3)")
    seeds.add_argument("--seeds", nargs="+", default=[], help="seeds, instead of --trials")
    add("--queue", action="store_true", help="run the most informative cells first (default tables: all of CIFAR-100)")
    add("--sweep", default="", metavar="KEY=A,B,C", help="run each value of a key, evaluated on held-out images")
    add("--val-split", type=float, default=0.1, help="share of the images that a sweep holds out (default: 0.1)")
    add("--dry-run", action="store_true", help="list finished and pending runs without running them")
    add("--budget", default="", metavar="TIME", help="stop after 9m, 1h30m, ...; the next call continues")
    add("--jobs", type=int, default=1, metavar="N", help="number of runs at a time on this machine")
    add("--processes", type=int, default=1, metavar="N", help="processes per run, started by torchrun, one GPU each")
    add("--smoke", action="store_true", help="two epochs per run, to test that everything works; kept separately")
    add("--launcher", choices=["here", "slurm", "submitit-local"], default="here")
    add("--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="options of submitit")
    add("--add", nargs="+", default=[], metavar="FOLDER", help="add finished run folders to the ledger")
    add("--publish", nargs="+", default=[], metavar="FOLDER", help="publish weights of runs in checkpoints/, in fp16")
    add("--output", default="output", metavar="DIR", help="folder of the run folders (default: output)")
    add("--results", default="", metavar="DIR", help="folder of the ledger (default: results)")
    add("overrides", nargs="*", metavar="KEY VALUE", help="config keys that do not change the result, such as DEVICE")


def main(options: argparse.Namespace) -> int:
    """Plan and run the selected cells; returns the exit code."""
    started = time.monotonic()
    _move_overrides(options)
    output = Path(options.output, "smoke" if options.smoke else "")
    folder = Path(options.results or (output / "results" if options.smoke else "results"), "runs")
    budget, slurm = parse_duration(options.budget), _slurm_options(options)
    if options.dry_run and (options.add or options.publish):
        raise ConfigError("--dry-run cannot be combined with --add and --publish")
    if options.add:
        return _add_runs(options.add, folder, options.smoke)
    for run in options.publish:
        print(f"published {publish(Path(run), MANIFEST.parent)}")
    if options.publish:
        return 0
    cells = select_cells(options.table, options.methods, options.pairs, options.queue)
    if options.sweep:
        cells = sweep_cells(cells, options.sweep, options.val_split)
    plan = make_plan(cells, _seeds(options), output, options.smoke, options.overrides, options.queue)
    ledger = _updated_ledger(plan.jobs, folder, options)
    todo = pending_jobs(plan.jobs, ledger)
    device = environment(build_device(load_config(None, options.overrides).node.DEVICE))["device"]
    estimator = Estimator(ledger.all_runs(), device, options.processes)
    _print_plan(plan, todo, ledger, estimator, options.dry_run)
    code = 0
    if todo and not options.dry_run:
        folder.mkdir(parents=True, exist_ok=True)  # before the first training
        if options.launcher == "here":
            deadline = started + budget - min(10.0, budget / 10)  # running jobs need time to save
            runner = Runner(todo, folder, options.jobs, options.processes, deadline)
            outcomes, code = runner.run(), runner.signal and 128 + runner.signal
        else:
            cluster = "slurm" if options.launcher == "slurm" else "local"
            outcomes = submit(todo, folder, cluster, slurm, options.processes)
        code = code or _exit_code(todo, outcomes)
        _print_outcomes(todo, outcomes, read_ledger(folder, options.smoke), estimator)
    if options.sweep:
        _print_sweep(cells, read_ledger(folder, options.smoke), options.smoke)
    return code


def _move_overrides(options: argparse.Namespace) -> None:
    """Move config keys that follow the values of a list option, as in ``--seeds 0 1 DEVICE cpu``, to the overrides."""
    sections = [rf"{name}\.[\w.]*" if isinstance(value, dict) else name for name, value in default_config().items()]
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


def _slurm_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of submitit after checking the options about execution."""
    if min(options.jobs, options.processes) < 1:
        raise ConfigError("--jobs and --processes must be >= 1")
    if options.slurm and options.launcher == "here":
        raise ConfigError("--slurm requires --launcher slurm or submitit-local")
    if options.launcher != "here" and (options.budget or options.jobs > 1):
        raise ConfigError("--budget and --jobs require --launcher here; see --slurm")
    pairs = dict(pair.partition("=")[::2] for pair in options.slurm)
    try:
        return {name: yaml.safe_load(value) for name, value in pairs.items()}
    except yaml.YAMLError as error:
        raise ConfigError(f"--slurm: the value is not YAML ({first_line(error)})") from error


def _seeds(options: argparse.Namespace) -> list[int]:
    if not 1 <= options.trials <= 1000:
        raise ConfigError(f"--trials must be in 1 .. 1000, got {options.trials}")
    if not all(re.fullmatch(r"\d+", seed) for seed in options.seeds):
        raise ConfigError(f"--seeds must be integers >= 0, got {' '.join(options.seeds)}")
    return list(dict.fromkeys(map(int, options.seeds))) or list(range(options.trials))


def select_cells(tables: Sequence[str], rows: Sequence[str], columns: Sequence[str], queue: bool) -> list[Cell]:
    """Return the cells of some tables, rows and columns; a row or column has to exist in one of the tables."""
    if not tables and not queue:
        raise ConfigError(f"--table or --queue is required; tables: {', '.join(load_tables())}")
    chosen = [get_table(name) for name in tables]
    if not chosen:
        chosen = [table for table in load_tables().values() if table.in_paper and table.dataset == "cifar100"]
    cells = [cell for table in chosen for cell in table.cells.values()]
    known_rows, known_columns = [cell.row.key for cell in cells], [cell.column.key for cell in cells]
    for option, names, known in (("--methods", rows, known_rows), ("--pairs", columns, known_columns)):
        for name in names:
            if name not in known:
                near = nearest(name, known) or dict.fromkeys(known)
                raise ConfigError(f"{option}: no {name!r} in these tables; did you mean {' or '.join(near)}?")
    cells = [c for c in cells if (not rows or c.row.key in rows) and (not columns or c.column.key in columns)]
    if not cells:
        raise ConfigError("--methods and --pairs have no common cell in these tables")
    return cells


def sweep_cells(cells: Sequence[Cell], setting: str, val_split: float) -> list[Cell]:
    """Return the students' cells with each value of a key, evaluated on held-out training images.

    Args:
        cells: cells of tables; teachers are left out.
        setting: ``KEY=A,B,C``.
        val_split: ``DATASET.VAL_SPLIT`` of the runs.
    """
    key, _, text = setting.partition("=")
    values = text.split(",")
    if not key or not all(values):
        raise ConfigError(f"--sweep must be KEY=A,B,C such as NormKD.TEMPERATURE_NORM=1,1.5,2, got {setting!r}")
    if not 0 < val_split <= 0.5:
        raise ConfigError(f"--val-split must be > 0 and <= 0.5, got {val_split:g}")
    swept = []
    for cell in cells:
        for value in values if not cell.is_teacher else ():
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


def _add_runs(runs: Sequence[str], folder: Path, smoke: bool) -> int:
    ledger = read_ledger(folder, smoke)
    for record in [finished_record(Path(run), smoke=smoke) for run in runs]:
        known = ledger.of(identity(record["config"])).get(record["seed"])
        # The record of a copied folder differs in its time and in the name of the config file.
        if known and known.record["metrics"] == record["metrics"]:
            print(f"already in the ledger: {known.path}")
        else:
            print(f"added {add(record, folder)}")
    return 0


def _updated_ledger(jobs: Sequence[Job], folder: Path, options: argparse.Namespace) -> Ledger:
    """Return the ledger with runs that have finished since; a dry run does not write them."""
    ledger = read_ledger(folder, options.smoke)
    for job in jobs:
        name, seed = job.key
        if seed not in ledger.of(name) and (record := trained_record(job)):
            path = job.folder if options.dry_run else add(record, folder)
            ledger.runs.setdefault(name, {})[seed] = Entry(path, record, name)
    return ledger


def _print_plan(plan: Plan, todo: Sequence[Job], ledger: Ledger, estimator: Estimator, verbose: bool) -> None:
    for path, reason in ledger.left_out:
        print(f"warning: {path} is ignored: {reason}")
    for cell in plan.published:
        print(f"published weights, nothing to train: {cell.name}")
    pending = {job.key for job in todo}
    for job in plan.jobs if verbose else ():
        state = "done" if job.cells or job.weights.is_file() else "a teacher, not needed now"
        if job.key in pending:
            after = f", after {job.teacher.name}" if job.teacher and job.teacher.key in pending else ""
            state = f"{_progress(job)}{_time([job], estimator)}{after}"
        print(f"  {job.name}: {state}")
    counts = f"{len(plan.jobs) - len(todo)} done, {len(todo)} to run"
    print(f"{counted(len(plan.jobs), 'run')}: {counts}{_time(todo, estimator)}")


def _progress(job: Job) -> str:
    return f"{job.epochs_done} of {job.config['SOLVER']['EPOCHS']} epochs done"


def _time(jobs: Sequence[Job], estimator: Estimator) -> str:
    estimates = [estimate for job in jobs if (estimate := estimator.estimate(job))]
    if not estimates:
        return ", no finished run to estimate the time from" if jobs else ""
    sources = " and ".join(dict.fromkeys(source for _, source in estimates))
    missing = f", {len(jobs) - len(estimates)} without estimate" if len(estimates) < len(jobs) else ""
    return f", about {duration(sum(seconds for seconds, _ in estimates))} (estimated from {sources}{missing})"


def _exit_code(todo: Sequence[Job], outcomes: Outcomes) -> int:
    if {FAILED, BLOCKED} & set(outcomes.values()):
        return 1
    return 0 if all(outcomes.get(job.key) == DONE for job in todo) else 3


def _print_outcomes(todo: Sequence[Job], outcomes: Outcomes, ledger: Ledger, estimator: Estimator) -> None:
    counts = {outcome: [*outcomes.values()].count(outcome) for outcome in (DONE, FAILED, BLOCKED, QUEUED)}
    print(f"{counts[DONE]} done, {counts[FAILED]} failed, {counts[BLOCKED]} waiting for a teacher")
    if counts[QUEUED]:
        print(f"{counted(counts[QUEUED], 'run')} queued on Slurm; add --dry-run to list finished and pending runs")
    failures = {(entry.identity, entry.seed): entry.record["error"] for entry in ledger.failures}
    for job in todo:
        if outcomes.get(job.key) == FAILED:
            print(f"  failed: {job.name}: {failures.get(job.key, 'unknown error')}")
    left = [job for job in todo if outcomes.get(job.key) not in counts]
    if left:
        print(f"{counted(len(left), 'run')} left{_time(left, estimator)}; run the same command to continue")
        for job in left:
            print(f"  {job.name}: {_progress(job)}")


def _print_sweep(cells: Sequence[Cell], ledger: Ledger, smoke: bool) -> None:
    """Print the mean accuracies on the held-out images, the best first."""
    measured = []
    for cell in cells:
        runs = ledger.of(cell_identity(cell, smoke)).values()
        if numbers := mean_std(entry.record["last"]["top1"] for entry in runs):
            measured.append((numbers, cell))
    for numbers, cell in sorted(measured, key=lambda pair: -pair[0].mean):
        print(f"  {numbers} (n = {numbers.n}) on held-out images: {cell.row.name}, {cell.column.name}")
