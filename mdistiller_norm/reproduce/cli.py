"""The command lines of ``tools/reproduce.py`` and ``tools/report.py``."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.errors import ConfigError, first_line

_LEDGER = "results"
_SMOKE = "smoke"  # folder of the short schedule's runs and of its ledger, inside the output folder


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``9m``, ``1h30m``.

    Raises:
        ConfigError: not a duration.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if not match or not any(match.groups()):
        raise ConfigError(f"--budget {text!r} is not a duration: write it like 90s, 9m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def _slurm_options(pairs: Sequence[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--slurm takes NAME=VALUE, not {pair!r}: for example slurm_partition=gpu")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--slurm {pair!r}: the value is not YAML ({first_line(error)})") from error
    return options


def _move_overrides(options: argparse.Namespace) -> None:
    """Move config keys behind the values of a list option to the overrides: ``--seeds 0 1 SOLVER.PRECISION bf16``."""
    from mdistiller_norm.config import default_config

    # The name of a section alone is a value of the list: KD for the row kd.
    keys = [rf"{name}\.[\w.]*" if isinstance(value, dict) else name for name, value in default_config().items()]
    key = re.compile(rf"(?:{'|'.join(keys)})(?:=.*)?", re.DOTALL)
    for name in ("table", "pairs", "methods", "seeds", "slurm", "add", "publish"):
        words = getattr(options, name) or []
        end = next((place for place, word in enumerate(words) if key.fullmatch(word)), len(words))
        options.overrides += words[end:]
        setattr(options, name, words[:end])
    for word in options.seeds:
        if not re.fullmatch(r"-?\d+", word):
            raise ConfigError(f"argument --seeds: invalid int value: {word!r}: see tools/reproduce.py --help")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command ``reproduce``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Run what fills the paper's tables. Finished runs are skipped, interrupted ones go on, a failing one is\n"
        "recorded and the rest goes on. tools/report.py makes the report."
    )
    parser.epilog = (
        "example: python tools/reproduce.py --table 2 --pairs res32x4_res8x4 --methods kd normkd --trials 3\n"
        "exit code: 0 all is done, 1 a run failed, 2 wrong input, 3 something is left to do, 130/143 stopped"
    )
    parser.add_argument(
        "--table", nargs="+", default=[], metavar="ID", help="1 to 9, digits, short, short_t_norm, short16"
    )
    parser.add_argument("--pairs", nargs="+", default=[], metavar="PAIR", help="columns of the table; all by default")
    parser.add_argument("--methods", nargs="+", default=[], metavar="ROW", help="rows of the table; all by default")
    trials = parser.add_mutually_exclusive_group()
    trials.add_argument(
        "--trials", type=int, default=3, help="runs of each cell, with the seeds 0, 1, ... (default: 3)"
    )
    trials.add_argument("--seeds", nargs="+", help="the seeds, instead of --trials")
    parser.add_argument("--queue", action="store_true", help="in the order of value; without --table all of CIFAR-100")
    parser.add_argument("--sweep", default="", metavar="KEY=A,B,C", help="runs with each value, on held-out images")
    parser.add_argument("--val-split", type=float, default=0.1, help="what a sweep holds out (default: 0.1)")
    parser.add_argument("--dry-run", action="store_true", help="list what is done and what is pending, run nothing")
    parser.add_argument("--budget", default="", metavar="TIME", help="stop after 9m, 1h30m ...; the next call goes on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time on this machine")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run, by torchrun: a GPU each")
    parser.add_argument("--smoke", action="store_true", help="two epochs a run, to see that all works; kept apart")
    parser.add_argument("--launcher", choices=["here", "slurm", "submitit-local"], default="here")
    parser.add_argument("--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="options of submitit")
    parser.add_argument(
        "--add", nargs="+", default=[], metavar="FOLDER", help="take finished run folders into the ledger"
    )
    parser.add_argument(
        "--publish",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="put finished runs' weights into checkpoints/, in fp16",
    )
    parser.add_argument("--output", default="output", metavar="DIR", help="folder of the run folders (default: output)")
    parser.add_argument("--results", default="", metavar="DIR", help=f"folder of the ledger (default: {_LEDGER})")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys of how runs are executed")


def main(options: argparse.Namespace) -> int:
    """Run the command ``reproduce``."""
    _move_overrides(options)
    output = Path(options.output, _SMOKE) if options.smoke else Path(options.output)
    results = Path(options.results) if options.results else output / "results" if options.smoke else Path(_LEDGER)

    if options.trials < 1:
        raise ConfigError(f"--trials must be >= 1, got {options.trials}")
    seeds = [int(word) for word in options.seeds] or list(range(options.trials))
    if min(options.jobs, options.processes) < 1 or min(seeds) < 0:
        raise ConfigError("--jobs and --processes must be at least 1, --seeds zero or positive")
    budget = parse_duration(options.budget) if options.budget else float("inf")
    deadline = time.monotonic() + budget - min(10.0, budget / 10)  # running jobs need a moment to save
    slurm = _slurm_options(options.slurm)
    if slurm and options.launcher == "here":
        raise ConfigError("--slurm is for --launcher slurm or submitit-local, and --launcher is missing")
    if options.launcher != "here" and (options.budget or options.jobs > 1):
        raise ConfigError(f"--budget and --jobs are for runs here: with --launcher {options.launcher} see --slurm")

    if options.dry_run and (options.add or options.publish):
        raise ConfigError("--dry-run is for the runs of tables: --add and --publish would write all the same")

    from mdistiller_norm.reproduce import commands

    if options.add:
        return commands.add_folders([Path(folder) for folder in options.add], results / "runs", options.smoke)
    if options.publish:
        return commands.publish_folders([Path(folder) for folder in options.publish])
    cells = commands.select_cells(options.table, options.methods, options.pairs, options.queue)
    if options.sweep:
        cells = commands.sweep(cells, options.sweep, options.val_split)
    code = commands.reproduce(
        cells, list(dict.fromkeys(seeds)), output=output, folder=results / "runs", smoke=options.smoke,
        extra=options.overrides, by_value=options.queue, dry_run=options.dry_run, jobs=options.jobs,
        processes=options.processes, deadline=deadline, launcher=options.launcher, slurm=slurm,
    )  # fmt: skip
    if options.sweep:
        commands.print_sweep(cells, results / "runs", options.smoke)
    return code
