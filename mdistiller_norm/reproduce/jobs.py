"""From the cells of a table to the runs that fill them: identities, teachers, costs, order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdistiller_norm.config import REMOVED, Config, default_config, leaves, load_config, method_names
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher_file import known_teacher
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import PROJECT
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce.tables import Cell, get_table, load_datasets
from mdistiller_norm.run_folder import NEUTRAL, run_folder

# A short schedule to see that everything runs; its runs have other identities than those of the tables.
SMOKE = ("SOLVER.EPOCHS=2", "SOLVER.LR_DECAY_STAGES=[1]")
TEACHER_SEED = 0
_FEATURE_METHODS = {"fitnet", "at", "rkd", "crd", "ofd", "reviewkd"}
# Keys of the config that reproduce sets itself.
_OURS = ("EXPERIMENT.", "LOG.PREFIX", "SEED", "DISTILLER.TEACHER_WEIGHTS")
# Keys that do not make it another computation: those that resuming ignores, but for the epochs, and these.
SAME = (*(key for key in NEUTRAL if key != "SOLVER.EPOCHS"), "SEED", "SOLVER.PRECISION")


class Pace(NamedTuple):
    """What the speed of training depends on most: runs that agree in it take about as long an epoch."""

    student: str
    teacher: str
    dataset: str
    precision: str


@dataclass(frozen=True)
class Job:
    """One run: a config with a seed.

    Attributes:
        name: for people and file names.
        config_file: relative to the project.
        overrides: everything on top of the file.
        seed: of the run.
        identity: see :func:`identity`.
        folder: the run folder.
        epochs: to train.
        cost: floating-point operations, see :func:`cost`.
        pace: what its time is estimated by.
        smoke: on the short schedule.
        cells: names of the cells it fills; empty for a teacher that is only needed.
        device: ``DEVICE`` that it asks for.
        teacher: the job that must be finished first.
        queue: its place in the order by value.
    """

    name: str
    config_file: str
    overrides: tuple[str, ...]
    seed: int
    identity: str
    folder: Path
    epochs: int
    cost: float
    pace: Pace
    device: str
    smoke: bool = False
    cells: tuple[str, ...] = ()
    teacher: Job | None = None
    queue: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """What makes it the same run as another: identity and seed."""
        return self.identity, self.seed

    @property
    def weights(self) -> Path:
        """Where it leaves the weights of its last epoch."""
        return self.folder / "student_last.pt"

    @property
    def arguments(self) -> list[str]:
        """Of ``tools/train.py``; they start it, or go on with it."""
        return ["--cfg", str(config_path(self.config_file)), "--resume", *self.overrides]

    @property
    def epochs_done(self) -> int:
        """Epochs that an interrupted run has behind it."""
        return len(read_metrics(self.folder / "metrics.jsonl"))


@dataclass(frozen=True)
class Plan:
    """What a set of cells needs.

    Attributes:
        jobs: a teacher comes before its students.
        published: teachers' cells that nothing trains.
    """

    jobs: tuple[Job, ...]
    published: tuple[Cell, ...]


def identity(tree: Mapping[str, Any]) -> str:
    """What a config computes, whatever the seed: two configs with the same one fill the same cell.

    Left out are keys that say where and how a run is kept or executed, the nodes of methods that are not used, and
    values equal to today's defaults (so that a record made before a key existed still counts).

    Args:
        tree: a resolved config, as a node or as it is stored in a record.
    """
    used = method_names(tree)
    defaults = dict(leaves(default_config())) | {key: default for key, (default, _) in REMOVED.items()}
    kept = {}
    for key, value in leaves(tree):
        unused = key.split(".")[0] in DISTILLERS and key.split(".")[0] not in used
        if unused or key.startswith(SAME) or (key == "DISTILLER.TEACHER" and not used):
            continue
        value = list(value) if isinstance(value, tuple) else value
        if key == "DISTILLER.TYPE":
            value = used
        if key not in defaults or value != defaults[key]:
            kept[key] = value
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


@cache
def forward_flops(model: str, dataset: str) -> float:
    """Floating-point operations of a network for one image of a data set, counted on the meta device."""
    facts = load_datasets()[dataset]
    with torch.device("meta"):
        network = build_model(model, facts.classes, variant=facts.variant).eval()
        image = torch.empty(1, 3, facts.size, facts.size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return float(counter.get_total_flops())


def pace_of(tree: Mapping[str, Any]) -> Pace:
    """What the speed of a config's run depends on most; the teacher is empty where there is none."""
    networks = tree["DISTILLER"]["STUDENT"], tree["DISTILLER"]["TEACHER"] if method_names(tree) else ""
    return Pace(*networks, tree["DATASET"]["TYPE"], tree["SOLVER"]["PRECISION"])


def cost(tree: Mapping[str, Any]) -> float:
    """Floating-point operations of a run's training: three forward passes of the student and one of the teacher.

    What the distillation losses cost besides is left out. 0 for a data set that no table uses, and for networks of a
    plugin.
    """
    networks, dataset = pace_of(tree), tree["DATASET"]["TYPE"]
    if dataset not in load_datasets():
        return 0.0
    try:
        image = 3 * forward_flops(networks.student, dataset)
        image += forward_flops(networks.teacher, dataset) if networks.teacher else 0.0
    except ConfigError:
        return 0.0
    return float(tree["SOLVER"]["EPOCHS"]) * load_datasets()[dataset].images * image


def config_path(config_file: str) -> Path:
    """A config file of the project, from here or from the project's folder."""
    return Path(config_file) if Path(config_file).is_file() else PROJECT / config_file


@cache
def _load(config_file: str, overrides: tuple[str, ...]) -> Config:
    return load_config(config_path(config_file), overrides)


def cell_config(cell: Cell, smoke: bool = False) -> Config | None:
    """The resolved config of a cell, or None where nothing trains it.

    Raises:
        ConfigError: the file or an override of the cell is wrong.
    """
    return _load(cell.config, (*cell.overrides, *(SMOKE if smoke else ()))) if cell.config else None


def cell_identity(cell: Cell, smoke: bool = False) -> str | None:
    """The identity of the runs that fill a cell, or None where nothing trains it."""
    config = cell_config(cell, smoke)
    return identity(config.node) if config else None


def cell_command(cell: Cell, seed: int = 0) -> str:
    """The command that makes one run of a cell, to copy; where its table has a teacher of its own, after that one's."""
    words = ["python tools/train.py --cfg", cell.config, *cell.overrides]
    table, config = get_table(cell.table), cell_config(cell)
    if table.own_teacher and config and method_names(config.node):
        teacher = run_folder(_load(table.teacher_config(cell.column), (f"SEED={TEACHER_SEED}",)))
        words.append(f"DISTILLER.TEACHER_WEIGHTS={teacher / 'student_last.pt'}")
    return " ".join([*words, f"SEED={seed}"])


def queue_rank(cell: Cell) -> int:
    """Place in the order by value: logit rows of resnet32x4 → resnet8x4, other logit rows, ablations, feature rows."""
    if cell.row.key in _FEATURE_METHODS:
        return 3
    if cell.table not in ("2", "3"):
        return 2
    return 0 if cell.column.key == "res32x4_res8x4" else 1


def _check_extra(extra: Sequence[str]) -> None:
    """Refuse overrides that would make other runs than those of the table."""
    for key, source in load_config(None, extra).sources.items():
        if source == "command line" and key.startswith(_OURS):
            raise ConfigError(f"{key} is set by reproduce itself: see --seeds and --output")
        if source == "command line" and not key.startswith(SAME):
            raise ConfigError(
                f"{key} would change what is computed, and the runs would not be the table's: only keys like DEVICE, "
                "DATASET.ROOT, SOLVER.PRECISION can be set here"
            )


def _job(
    config_file: str, common: Sequence[str], seed: int, smoke: bool, settings: Sequence[str] = (), **fields: Any
) -> Job:
    overrides = (*settings, *common, *(SMOKE if smoke else ()), f"SEED={seed}")
    config = _load(config_file, overrides)
    words = [f"{config.node.EXPERIMENT.PROJECT}/{config.node.EXPERIMENT.TAG}", *settings]
    name = f"{' '.join(words)}, seed {seed}"
    return Job(
        name=name, config_file=config_file, overrides=overrides, seed=seed, identity=identity(config.node),
        folder=run_folder(config), epochs=config.node.SOLVER.EPOCHS, cost=cost(config.node), pace=pace_of(config.node),
        device=config.node.DEVICE, smoke=smoke, **fields,
    )  # fmt: skip


def _finished(output: Path) -> dict[tuple[str, int], Path]:
    """The folders of finished runs of plain training, by identity and seed."""
    from mdistiller_norm.reproduce.ledger import finished_record  # which needs this module

    found: dict[tuple[str, int], Path] = {}
    for path in sorted(output.glob("*/*/result.json")):
        try:
            record = finished_record(path.parent)
        except DataError:
            continue  # of another tool, or being written
        if not record["method"] and path.with_name("student_last.pt").is_file():
            found.setdefault((identity(record["config"]), record["seed"]), path.parent)
    return found


def make_plan(
    cells: Iterable[Cell], seeds: Sequence[int], *, output: Path, smoke: bool = False, extra: Sequence[str] = (),
    by_value: bool = False,
) -> Plan:  # fmt: skip
    """The runs that fill some cells, each once, and the teachers they need.

    Args:
        cells: to fill.
        seeds: a run each; a teacher has one, with seed 0.
        output: ``LOG.PREFIX`` of all runs.
        smoke: the short schedule.
        extra: overrides of how the runs are executed (device, place of the data).
        by_value: most wanted first, instead of in the order of the cells. All cells of a seed (by value: all that are
            equally wanted) come before the next seed.

    Raises:
        ConfigError: a config file or override is wrong.
        CheckpointError: the manifest names weights that are missing, or others.
    """
    _check_extra(extra)
    common = (f"LOG.PREFIX={output}", *extra)
    jobs: dict[tuple[str, int], Job] = {}
    published: list[Cell] = []
    finished = _finished(output)

    def add(job: Job) -> Job:
        known = jobs.get(job.key)
        if known:
            cells_of_both = tuple(dict.fromkeys((*known.cells, *job.cells)))
            job = dataclasses.replace(known, cells=cells_of_both, queue=min(known.queue, job.queue))
        elif job.key in finished and not (job.folder / "result.json").is_file():
            # In another precision, say, which the folder's name tells: a second teacher would split its students.
            job = dataclasses.replace(job, folder=finished[job.key])
        jobs[job.key] = job
        return job

    for cell in cells:
        config = cell_config(cell, smoke)
        if not config:
            published.append(cell)
            continue
        table, rank, weights, teacher = get_table(cell.table), queue_rank(cell), None, None
        teacher_config = table.teacher_config(cell.column)
        if (cell.is_teacher or method_names(config.node)) and not (smoke or table.own_teacher):
            known = known_teacher(cell.column.teacher, config.node.DATASET.TYPE)
            weights = known.path if known else None
        if cell.is_teacher and weights:
            published.append(cell)
            continue
        if method_names(config.node) and not weights and teacher_config:
            teacher = add(_job(teacher_config, common, TEACHER_SEED, smoke, queue=rank))
            weights = teacher.weights
        overrides = (*common, *([f"DISTILLER.TEACHER_WEIGHTS={weights}"] if weights else []))
        for seed in [TEACHER_SEED] if cell.is_teacher else seeds:
            fills = {"cells": (cell.name,), "teacher": teacher, "queue": rank}
            add(_job(cell.config, overrides, seed, smoke, cell.overrides, **fills))
    return Plan(_in_order(jobs, by_value), tuple(published))


def _in_order(jobs: Mapping[tuple[str, int], Job], by_value: bool) -> tuple[Job, ...]:
    """Teachers first, then seed by seed, within a seed as they were made; by value so for each rank after the other."""
    order = list(jobs)
    needed = {job.teacher.key for job in jobs.values() if job.teacher}

    def place(key: tuple[str, int]) -> tuple[int, bool, int, int]:
        job = jobs[key]
        return job.queue if by_value else 0, key not in needed, job.seed, order.index(key)

    return tuple(jobs[key] for key in sorted(order, key=place))
