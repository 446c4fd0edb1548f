"""From table cells to jobs: configs, teachers, order and estimated time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

from mdistiller_norm.config import Config, load_config, method_names
from mdistiller_norm.engine.checkpoint import load_into, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher import weights_hash
from mdistiller_norm.engine.teacher_file import known_teacher
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import command
from mdistiller_norm.models import build_model, count_macs
from mdistiller_norm.reproduce.ledger import NOT_IDENTIFYING, Record, finished_run, identity
from mdistiller_norm.reproduce.tables import DATASETS, TABLES, Cell
from mdistiller_norm.run_folder import run_folder

SMOKE = ("SOLVER.EPOCHS=2", "SOLVER.LR_DECAY_STAGES=[1]")
TEACHER_SEED = 0
_START = 5.0  # seconds to import PyTorch, read the data and evaluate the teacher
_FEATURE_METHODS = {"fitnet", "at", "rkd", "crd", "ofd", "reviewkd"}
_RESERVED = ("EXPERIMENT.", "LOG.PREFIX", "SEED", "DISTILLER.TEACHER_WEIGHTS")
JobKey = tuple[str, int]  # identity and seed


@dataclass(frozen=True)
class Job:
    """A training run; ``cells`` is empty for a teacher that only its students need, ``teacher`` must finish first."""

    name: str
    config: Any
    config_file: str
    overrides: tuple[str, ...]
    key: JobKey
    folder: Path
    smoke: bool
    cells: list[str] = field(default_factory=list)
    teacher: Self | None = None
    rank: int = 0  # jobs of lower ranks run first

    @property
    def weights(self) -> Path:
        return self.folder / "student_last.pt"

    @property
    def progress(self) -> str:
        done = len(read_metrics(self.folder / "metrics.jsonl"))
        return f"{done} of {self.config.SOLVER.EPOCHS} epochs done"

    def teacher_hash(self) -> str:
        # As in records; empty if the weights do not exist here.
        node, kind = self.config.DISTILLER, self.config.DATASET.TYPE
        path = Path(node.TEACHER_WEIGHTS)
        return _weights_hash(path, node.TEACHER, kind) if path.is_file() else ""


@cache
def _weights_hash(path: Path, model: str, dataset: str) -> str:
    network = build_model(
        model, DATASETS[dataset]["classes"], variant=DATASETS[dataset]["variant"]
    )
    load_into(network, load_weights(path), model)
    return weights_hash(network)[:10]


_load = cache(load_config)


def cell_config(cell: Cell, smoke: bool = False) -> Config | None:
    """Return the resolved config of a cell, or None for published teachers."""
    keys = cell.overrides + (SMOKE if smoke else ())
    return _load(cell.config, keys) if cell.config else None


def cell_identity(cell: Cell, smoke: bool = False) -> str:
    """Return the identity of the runs that fill a cell, or an empty string for published teachers."""
    config = cell_config(cell, smoke)
    return identity(config.node) if config else ""


def cell_command(cell: Cell) -> str:
    """Return the command that trains a cell with seed 0; in a table with its own teacher, after that teacher's."""
    words = [f"{command('train')} --cfg", cell.config, *cell.overrides]
    table, config = TABLES[cell.table], cell_config(cell)
    if table.own_teacher and config and method_names(config.node):
        teacher = run_folder(_load(table.teacher_config(cell.column), (f"SEED={TEACHER_SEED}",)))
        words.append(f"DISTILLER.TEACHER_WEIGHTS={teacher / 'student_last.pt'}")
    return " ".join([*words, "SEED=0"])


def value_rank(cell: Cell) -> int:
    """Return the rank by value: logit rows of resnet32x4 → resnet8x4, other logit rows, ablations, feature rows."""
    if cell.row.key in _FEATURE_METHODS:
        return 3
    if cell.table not in ("2", "3"):
        return 2
    return 0 if cell.column.key == "res32x4_res8x4" else 1


def _check_extra(extra: Sequence[str]) -> None:
    sources = load_config(None, extra).sources
    for key in (key for key, source in sources.items() if source != "default"):
        if key.startswith(_RESERVED):
            raise ConfigError(f"{key} is set by reproduce: use --seeds or --output")
        if not key.startswith(NOT_IDENTIFYING):
            raise ConfigError(f"{key} would change the result: set only keys such as DEVICE")


def _finished_teachers(output: Path) -> dict[JobKey, Path]:
    found: dict[JobKey, Path] = {}
    for path in sorted(output.glob("*/*/result.json")):
        try:
            run = finished_run(path.parent)
        except DataError:
            continue  # written by another program
        if not run.record["method"] and path.with_name("student_last.pt").is_file():
            found.setdefault(run.key, path.parent)
    return found


class _Planner:
    def __init__(self, output: Path, smoke: bool, extra: Sequence[str]) -> None:
        self.smoke, self.common = smoke, (f"LOG.PREFIX={output}", *extra)
        self.jobs: dict[JobKey, Job] = {}
        self._finished = _finished_teachers(output)

    def add(self, cell: Cell, seeds: Sequence[int], rank: int) -> None:
        """Add the jobs of a cell, and its teacher's if no weights are known."""
        config, table = cell_config(cell, self.smoke), TABLES[cell.table]
        is_teacher, teacher, weights = cell.row.key == "teacher", None, None
        distilled = config is not None and bool(method_names(config.node))
        if (is_teacher or distilled) and not (self.smoke or table.own_teacher):
            known = known_teacher(cell.column.teacher, table.dataset)
            weights = known.path if known else None
        if not config or (is_teacher and weights):
            return  # published weights
        if table.teacher and distilled and not weights:
            teacher = self._add_job(
                table.teacher_config(cell.column), (), (), TEACHER_SEED, rank=rank
            )
            weights = teacher.weights
        more = (f"DISTILLER.TEACHER_WEIGHTS={weights}",) if weights else ()
        for seed in [TEACHER_SEED] if is_teacher else seeds:
            job = self._add_job(
                cell.config, cell.overrides, more, seed, teacher=teacher, rank=rank
            )
            job.cells.append(cell.name)

    def _add_job(
        self, file: str, settings: Sequence[str], more: Sequence[str], seed: int, **fields: Any
    ) -> Job:
        smoke = SMOKE if self.smoke else ()
        overrides = (*settings, *self.common, *more, *smoke, f"SEED={seed}")
        config = _load(file, overrides)
        experiment = config.node.EXPERIMENT
        name = " ".join([f"[seed {seed}] {experiment.PROJECT}/{experiment.TAG}", *settings])
        key, folder = (identity(config.node), seed), run_folder(config)
        if key in self._finished and not (folder / "result.json").is_file():
            folder = self._finished[key]  # in another precision: the students need one teacher
        job = Job(name, config.node, file, overrides, key, folder, self.smoke, **fields)
        return self.jobs.setdefault(key, job)


def make_plan(
    cells: Sequence[Cell],
    seeds: Sequence[int],
    output: Path,
    smoke: bool,
    extra: Sequence[str],
    queue: bool,
) -> list[Job]:
    """Plan the runs that fill some cells, each once, and the teachers that they need.

    Teachers come first, then all cells of a seed before the next seed; ``queue`` sorts by :func:`value_rank` before.
    """
    _check_extra(extra)
    planner = _Planner(output, smoke, extra)
    for cell in sorted(cells, key=value_rank) if queue else cells:
        planner.add(cell, seeds, value_rank(cell) if queue else 0)
    jobs = planner.jobs.values()
    teachers = {job.teacher.key for job in jobs if job.teacher}
    return sorted(jobs, key=lambda job: (job.rank, job.key not in teachers, job.key[1]))


@cache
def forward_flops(model: str, dataset: str) -> float:
    """Return the floating-point operations of one image of a table's data set."""
    size = DATASETS[dataset]
    network = build_model(model, size["classes"], variant=size["variant"])
    return 2.0 * count_macs(network, (size["size"], size["size"]))


def training_flops(tree: Mapping[str, Any]) -> float:
    """Return the operations of three forward passes of the student and one of the teacher per image; 0 if unknown."""
    student, teacher, dataset, _ = _speed_key(tree)
    try:
        flops = sum(forward_flops(model, dataset) for model in [student] * 3 + [teacher] if model)
    except (KeyError, ConfigError):
        return 0.0
    return float(tree["SOLVER"]["EPOCHS"] * DATASETS[dataset]["images"] * flops)


def _speed_key(tree: Mapping[str, Any]) -> tuple[str, str, str, str]:
    # Runs that agree in these take equally long per epoch.
    node = tree["DISTILLER"]
    teacher = node["TEACHER"] if method_names(tree) else ""
    return node["STUDENT"], teacher, tree["DATASET"]["TYPE"], tree["SOLVER"]["PRECISION"]


def estimate(job: Job, finished: Sequence[Record]) -> tuple[float, str] | None:
    """Return the remaining seconds of a job and their source, or None without ``finished`` runs on such a device."""
    key, epochs = _speed_key(job.config), job.config["SOLVER"]["EPOCHS"]
    done = read_metrics(job.folder / "metrics.jsonl")
    left = max(epochs - len(done), 0)
    if done and "seconds" in done[-1]:
        return _START + left * done[-1]["seconds"] / len(done), "the run's speed so far"
    same = [run for run in finished if _speed_key(run["config"]) == key]
    if same:  # machines of one name differ in speed
        run = max(same, key=itemgetter("at"))
        seconds = left * run["seconds"] / run["epochs"]
        return _START + seconds, "the latest run of these networks"
    others = [run for run in finished if _speed_key(run["config"])[-1] == key[-1]]
    rates = [training_flops(run["config"]) / max(run["seconds"], 1e-3) for run in others]
    rate = max(rates, default=0) or math.inf
    seconds = training_flops(job.config) * left / epochs / rate
    return (_START + seconds, "operation counts") if seconds else None


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
