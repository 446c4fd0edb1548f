"""The folder of a run: its path, its lock and its saved state."""

import fcntl
import json
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from operator import getitem
from pathlib import Path
from typing import IO, Any

import yaml

from mdistiller_norm.config import OVERRIDES, Config, default_config, dump, method_names
from mdistiller_norm.config_keys import TextLoader, read_settings
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import LATEST, PREVIOUS, load
from mdistiller_norm.engine.logger import Record, RunLog, start_wandb
from mdistiller_norm.engine.trainer import Trainer
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.files import open_lock, write_json, write_text

# Keys that do not change the computation; hashes of data and teacher and the precision in use are compared instead.
NEUTRAL = (
    "EXPERIMENT.",
    "LOG.",
    "DATASET.ROOT",
    "DATASET.NUM_WORKERS",
    "DATASET.MAX_BROKEN",
    "DATASET.TEST.",
    "DEVICE",
    "SOLVER.EPOCHS",
    "SOLVER.TIMEOUT",
    "ENGINE.",
    "DISTILLER.TEACHER_CACHE",
    "DISTILLER.TEACHER_WEIGHTS",
)
CONFIG, RESULT = "config.yaml", "result.json"
_LOCK = ".lock"
_STATE_KEYS = {
    "trainable",
    "optimizer",
    "meters",
    "identity",
    "epoch",
    "steps_done",
    "total_steps",
}


def run_folder(config: Config) -> Path:
    """Return ``LOG.PREFIX/EXPERIMENT.PROJECT/(NAME or TAG)``.

    Overrides of the computation are appended to the TAG; beyond 255 bytes, a hash replaces the end.
    """
    cfg = config.node
    name = cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    for key, source in config.sources.items():
        value = reduce(getitem, key.split("."), cfg)
        from_command = source in OVERRIDES and not _is_neutral(key, cfg)
        if (from_command and not cfg.EXPERIMENT.NAME) or (key == "DATASET.SUBSET" and value):
            name += "," + f"{key}={value}".replace("/", "_").replace(" ", "")
    name = name.encode(errors="backslashreplace").decode()  # TensorBoard requires UTF-8
    if len(name.encode()) > 255 and not cfg.EXPERIMENT.NAME:
        start = name.encode()[:200].decode(errors="ignore")
        name = f"{start}...{sha256(name.encode()).hexdigest()[:8]}"
    return Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT, name)


def _is_neutral(key: str, cfg: Any) -> bool:
    if key == "DISTILLER.TEACHER_CACHE_PRECISION":  # rounds the teacher's outputs
        return bool(cfg.DISTILLER.TEACHER_CACHE == "off")
    if key == "SOLVER.EPOCHS":  # the period of a cosine
        return bool(cfg.SOLVER.SCHEDULE == "step")
    section = key.split(".")[0]
    return key.startswith(NEUTRAL) or (section in DISTILLERS and section not in method_names(cfg))


@dataclass
class RunFolder:
    """The folder of a run, locked by the first process until the log is closed."""

    path: Path
    config: Config
    state: Record | None  # content of latest.pt until it is restored, None for a new run
    log: RunLog  # writes to the folder in the first process

    @classmethod
    def open(cls, config: Config, resume: bool) -> "RunFolder":
        """Create the folder of a new run or load the state of one to resume. A collective operation."""
        path = run_folder(config)
        folder = _open_first(path, config, resume) if distributed.is_first() else None
        resumed = distributed.all_reduce_max(int(folder is not None and folder.state is not None))
        return folder or cls(path, config, load(path / LATEST) if resumed else None, RunLog(None))

    def restore(self, trainer: Trainer) -> None:
        """Load the saved state, if any, into the trainer, and store the config."""
        if self.state:
            saved, now = self.state["identity"], trainer.provenance.identity
            names = [name for name, value in saved.items() if value != now.get(name, value)]
            if changed := [
                f"{name} ({saved[name][:12]}, now {now[name][:12]})" for name in names
            ]:
                raise ConfigError(
                    f"{self.path} cannot be resumed with another {', '.join(changed)}"
                )
            try:
                trainer.load_state(self.state)
            except (RuntimeError, ValueError, LookupError) as error:
                problem = f"does not fit this run ({str(error).splitlines()[-1].strip()})"
                raise CheckpointError(f"the state in {self.path} {problem}") from error
            self.state = None  # frees its memory
        if not trainer.finished and distributed.is_first():
            write_text(self.config.yaml, self.path / CONFIG)

    def start(self, environment: Record) -> None:
        if distributed.is_first():
            (self.path / RESULT).unlink(missing_ok=True)  # of an earlier, shorter run
            write_json(environment, self.path / "environment.json")

    def write_result(self, result: Record) -> Record:
        """Write ``result.json`` unless it has the same accuracies; return its content."""
        # The stored result may be missing or damaged.
        with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            stored = json.loads((self.path / RESULT).read_text(encoding="utf-8"))
            if all(stored[key] == result[key] for key in ("last", "best")):
                return dict(stored)
        if distributed.is_first():
            write_json(result, self.path / RESULT)
        return result


def _open_first(path: Path, config: Config, resume: bool) -> RunFolder:
    cfg, state, warnings = config.node, None, [""]
    # os.path.exists returns False if the name is too long.
    exists = any(os.path.exists(path / name) for name in (LATEST, PREVIOUS, RESULT))
    if exists and not (resume or _was_restarted(path)):
        raise ConfigError(f"{path} holds a run: add --resume, or set another EXPERIMENT.NAME")
    try:
        with ExitStack() as resources:
            resources.enter_context(_lock(path))
            if exists:
                state, warnings[0] = _load_state(path, config)
            if cfg.LOG.WANDB:  # before the log opens TensorBoard's writers, which it patches
                names = (cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.TAG)
                warnings.append(start_wandb(path, *names, yaml.safe_load(config.yaml), resources))
            first_epoch, first_step = (
                (state["epoch"], state["total_steps"] + 1) if state else (1, 0)
            )
            log = RunLog(path, first_epoch, first_step)
            log.held = resources.pop_all()
    except OSError as error:
        problem = f"cannot be written ({error.strerror}): set LOG.PREFIX or EXPERIMENT.NAME"
        raise ConfigError(f"the run folder {path} {problem}") from error
    if state:
        log.line(f"resuming {path} at epoch {state['epoch']}, step {state['steps_done'] + 1}")
    else:
        log.line(f"nothing to resume in {path}: starting" if resume else f"run folder {path}")
    for warning in filter(None, warnings):
        log.line(f"warning: {warning}")
    return RunFolder(path, config, state, log)


def _was_restarted(path: Path) -> bool:
    with suppress(OSError, ValueError):
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        return restarted and (path / _LOCK).read_text() == distributed.launcher()
    return False


def _lock(path: Path) -> IO[str]:
    path.mkdir(parents=True, exist_ok=True)
    lock = open_lock(path / _LOCK)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader workers
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise ConfigError(
            f"another process is training in {path}: set EXPERIMENT.NAME"
        ) from error
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    print(distributed.launcher(), end="", file=lock, flush=True)
    return lock


def _load_state(path: Path, config: Config) -> tuple[Record, str]:
    cfg, stored = config.node, read_settings(path / CONFIG)
    defaults = yaml.load(dump(default_config()), TextLoader)
    current = yaml.load(config.yaml, TextLoader)
    different = [key for key, text in current.items() if stored.get(key, defaults[key]) != text]
    if changed := [key for key in different if not _is_neutral(key, cfg)]:
        raise ConfigError(f"{path} cannot be resumed with other values of {', '.join(changed)}")
    problems = []
    for name in (LATEST, PREVIOUS):
        try:
            state = load(path / name)
            if isinstance(state, dict) and state.keys() >= _STATE_KEYS:
                break
            problems.append(f"{path / name} is not the state of a run")
        except CheckpointError as error:
            problems.append(str(error))
    else:
        raise CheckpointError(problems[0])
    if (done := state["epoch"] - 1) > (epochs := cfg.SOLVER.EPOCHS):
        raise ConfigError(f"SOLVER.EPOCHS must be >= {done}, the epochs of {path}, got {epochs}")
    if not problems:
        return state, ""
    (path / PREVIOUS).replace(path / LATEST)  # read by the other processes
    return state, f"{problems[0]}: resuming from {PREVIOUS} at epoch {state['epoch']}"
