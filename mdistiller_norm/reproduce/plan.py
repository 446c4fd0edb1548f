"""From table cells to jobs: configs, teachers, order and estimated time."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdistiller_norm.config import Config, load_config, method_names
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher_file import known_teacher
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import find_config
from mdistiller_norm.models import build_model
from mdistiller_norm.program import command
from mdistiller_norm.reproduce.ledger import NOT_IDENTIFYING, Entry, finished_record, identity
from mdistiller_norm.reproduce.tables import Cell, get_table, load_datasets
from mdistiller_norm.run_folder import run_folder

SMOKE = ("SOLVER.EPOCHS=2", "SOLVER.LR_DECAY_STAGES=[1]")
TEACHER_SEED = 0
_START = 5.0  # seconds to import PyTorch, read the data and evaluate the teacher
_FEATURE_METHODS = {"fitnet", "at", "rkd", "crd", "ofd", "reviewkd"}
_RESERVED = ("EXPERIMENT.", "LOG.PREFIX", "SEED", "DISTILLER.TEACHER_WEIGHTS")
JobKey = tuple[str, int]  # identity and seed


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        config: resolved config, of ``config_file`` (relative to the project) with ``overrides``.
        cells: names of the cells that it fills; empty for a teacher that only its students need.
        teacher: job that must finish first.
        rank: position in the order by value.
    """

    name: str
    config: Mapping[str, Any]
    config_file: str
    overrides: tuple[str, ...]
    key: JobKey
    folder: Path
    smoke: bool
    cells: tuple[str, ...] = ()
    teacher: Job | None = None
    rank: int = 0

    @property
    def weights(self) -> Path:
        return self.folder / "student_last.pt"

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command ``train`` that start or resume the run."""
        return ["--cfg", str(find_config(self.config_file)), "--resume", *self.overrides]

    @property
    def epochs_done(self) -> int:
        return len(read_metrics(self.folder / "metrics.jsonl"))


class Plan(NamedTuple):
    """Jobs, teachers before their students, and the teachers' cells with published weights."""

    jobs: list[Job]
    published: list[Cell]


@cache
def _load(config_file: str, overrides: tuple[str, ...]) -> Config:
    return load_config(find_config(config_file), overrides)


def cell_config(cell: Cell, smoke: bool = False) -> Config | None:
    """Return the resolved config of a cell, or None for published teachers."""
    return _load(cell.config, (*cell.overrides, *(SMOKE if smoke else ()))) if cell.config else None


def cell_identity(cell: Cell, smoke: bool = False) -> str:
    """Return the identity of the runs that fill a cell, or an empty string for published teachers."""
    config = cell_config(cell, smoke)
    return identity(config.node) if config else ""


def cell_command(cell: Cell, seed: int = 0) -> str:
    """Return the command that trains one run of a cell; in a table with its own teacher, after that teacher's."""
    words = [f"{command('train')} --cfg", cell.config, *cell.overrides]
    table, config = get_table(cell.table), cell_config(cell)
    if table.own_teacher and config and method_names(config.node):
        teacher = run_folder(_load(table.teacher_config(cell.column), (f"SEED={TEACHER_SEED}",)))
        words.append(f"DISTILLER.TEACHER_WEIGHTS={teacher / 'student_last.pt'}")
    return " ".join([*words, f"SEED={seed}"])


def value_rank(cell: Cell) -> int:
    """Return the rank by value: logit rows of resnet32x4 → resnet8x4, other logit rows, ablations, feature rows."""
    if cell.row.key in _FEATURE_METHODS:
        return 3
    if cell.table not in ("2", "3"):
        return 2
    return 0 if cell.column.key == "res32x4_res8x4" else 1


def _check_extra(extra: Sequence[str]) -> None:
    changed = [key for key, source in load_config(None, extra).sources.items() if source == "command line"]
    for key in changed:
        if key.startswith(_RESERVED):
            raise ConfigError(f"{key} is set by reproduce: use --seeds or --output")
        if not key.startswith(NOT_IDENTIFYING):
            allowed = "only keys such as DEVICE, DATASET.ROOT and SOLVER.PRECISION can be set"
            raise ConfigError(f"{key} would change the result, and the run would not be the table's: {allowed}")


def _finished_teachers(output: Path) -> dict[JobKey, Path]:
    """Return the folders of finished runs of plain training by identity and seed."""
    found: dict[JobKey, Path] = {}
    for path in sorted(output.glob("*/*/result.json")):
        try:
            record = finished_record(path.parent)
        except DataError:
            continue  # written by another program
        if not record["method"] and path.with_name("student_last.pt").is_file():
            found.setdefault((identity(record["config"]), record["seed"]), path.parent)
    return found


class _Planner:
    """Collects the jobs of cells, each once."""

    def __init__(self, output: Path, smoke: bool, extra: Sequence[str]) -> None:
        self.smoke, self.common = smoke, (f"LOG.PREFIX={output}", *extra)
        self.jobs: dict[JobKey, Job] = {}
        self._finished = _finished_teachers(output)

    def add(self, cell: Cell, seeds: Sequence[int]) -> bool:
        """Add the jobs of a cell; returns False if nothing has to be trained for it."""
        config = cell_config(cell, self.smoke)
        if not config:
            return False
        table, rank = get_table(cell.table), value_rank(cell)
        distills, teacher, weights = bool(method_names(config.node)), None, None
        if (distills or cell.is_teacher) and not (self.smoke or table.own_teacher):
            known = known_teacher(cell.column.teacher, config.node.DATASET.TYPE)
            weights = known.path if known else None
        if cell.is_teacher and weights:
            return False
        teacher_config = table.teacher_config(cell.column)
        if distills and not weights and teacher_config:
            teacher = self._add_job(teacher_config, (), (), TEACHER_SEED, rank=rank)
            weights = teacher.weights
        more = (f"DISTILLER.TEACHER_WEIGHTS={weights}",) if weights else ()
        for seed in [TEACHER_SEED] if cell.is_teacher else seeds:
            self._add_job(cell.config, cell.overrides, more, seed, cells=(cell.name,), teacher=teacher, rank=rank)
        return True

    def _add_job(self, config_file: str, settings: Sequence[str], more: Sequence[str], seed: int, **fields: Any) -> Job:
        overrides = (*settings, *self.common, *more, *(SMOKE if self.smoke else ()), f"SEED={seed}")
        config = _load(config_file, overrides)
        experiment = config.node.EXPERIMENT
        name = " ".join([f"{experiment.PROJECT}/{experiment.TAG}", *settings]) + f", seed {seed}"
        key, folder = (identity(config.node), seed), run_folder(config)
        if key in self._finished and not (folder / "result.json").is_file():
            # Trained in another precision, for example: a second teacher would split its students.
            folder = self._finished[key]
        job = Job(name, config.node, config_file, overrides, key, folder, self.smoke, **fields)
        if known := self.jobs.get(key):
            cells = tuple(dict.fromkeys((*known.cells, *job.cells)))
            job = dataclasses.replace(known, cells=cells, rank=min(known.rank, job.rank))
        self.jobs[key] = job
        return job


def make_plan(
    cells: Iterable[Cell],
    seeds: Sequence[int],
    output: Path,
    smoke: bool = False,
    extra: Sequence[str] = (),
    by_value: bool = False,
) -> Plan:
    """Plan the runs that fill some cells, each once, and the teachers that they need.

    Teachers come first, then all cells of a seed before the next seed.

    Args:
        cells: cells to fill.
        seeds: one run each; a teacher is trained once, with seed 0.
        output: ``LOG.PREFIX`` of all runs.
        smoke: use the short schedule.
        extra: overrides that do not change the result (device, place of the data, ...).
        by_value: order by :func:`value_rank` first.
    """
    _check_extra(extra)
    planner = _Planner(output, smoke, extra)
    published = [cell for cell in cells if not planner.add(cell, seeds)]
    jobs = list(planner.jobs.values())
    teachers = {job.teacher.key for job in jobs if job.teacher}
    jobs.sort(key=lambda job: (job.rank if by_value else 0, job.key not in teachers, job.key[1]))
    return Plan(jobs, published)


@cache
def forward_flops(model: str, dataset: str) -> float:
    """Return the floating-point operations of one image of a table's data set, counted on the meta device."""
    size = load_datasets()[dataset]
    with torch.device("meta"):
        network = build_model(model, size["classes"], variant=size["variant"]).eval()
        image = torch.empty(1, 3, size["size"], size["size"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return float(counter.get_total_flops())


def training_flops(tree: Mapping[str, Any]) -> float:
    """Return the operations of a training: three forward passes of the student and one of the teacher per image.

    The distillation losses are not counted. Returns 0 for other data sets than the tables' and for unknown networks.
    """
    student, teacher, dataset, _ = _speed_key(tree)
    try:
        flops = 3 * forward_flops(student, dataset) + (forward_flops(teacher, dataset) if teacher else 0.0)
    except (KeyError, ConfigError):
        return 0.0
    return float(tree["SOLVER"]["EPOCHS"] * load_datasets()[dataset]["images"] * flops)


def _speed_key(tree: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return student, teacher, data set and precision: runs that agree in them take equally long per epoch."""
    student, teacher = tree["DISTILLER"]["STUDENT"], tree["DISTILLER"]["TEACHER"] if method_names(tree) else ""
    return student, teacher, tree["DATASET"]["TYPE"], tree["SOLVER"]["PRECISION"]


class Estimator:
    """Estimates the time of jobs from finished runs on the same device with the same number of processes."""

    def __init__(self, entries: Iterable[Entry], device: str, processes: int = 1) -> None:
        self._epochs = defaultdict[tuple[str, ...], list[float]](list)  # seconds
        self._rates = defaultdict[str, float](float)  # operations per second, by precision
        for record in (entry.record for entry in entries):
            if (record["environment"]["device"], record.get("processes", 1)) == (device, processes):
                key, seconds = _speed_key(record["config"]), max(record["seconds"], 1e-3)
                self._epochs[key].append(seconds / record["epochs"])
                self._rates[key[-1]] = max(self._rates[key[-1]], training_flops(record["config"]) / seconds)

    def estimate(self, job: Job) -> tuple[float, str] | None:
        """Return the remaining seconds of a job and their source, or None if no finished run is comparable."""
        key, epochs = _speed_key(job.config), job.config["SOLVER"]["EPOCHS"]
        done = read_metrics(job.folder / "metrics.jsonl")
        left = max(epochs - len(done), 0)
        if done and "seconds" in done[-1]:
            return _START + left * done[-1]["seconds"] / len(done), "the run's speed so far"
        if key in self._epochs:
            return _START + left * statistics.median(self._epochs[key]), "finished runs of the same networks"
        rate, flops = self._rates[key[-1]], training_flops(job.config)
        return (_START + left / epochs * flops / rate, "operation counts") if rate and flops else None


def duration(seconds: float) -> str:
    """Return a duration such as ``42 s``, ``7 min``, ``3.5 h`` or ``8.0 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360000 else f"{seconds / 86400:.1f} days"


def counted(number: int, noun: str) -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
