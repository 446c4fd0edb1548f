"""The folder of a run: where it is, whose it is, and the state in it to go on from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml
from yacs.config import CfgNode

from mdistiller_norm.config import Config, differences, dump, load_config, method_names
from mdistiller_norm.data import Share
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.logger import TENSORBOARD, Record, RunLog, SilentLog
from mdistiller_norm.errors import CheckpointError, ConfigError, first_line
from mdistiller_norm.files import write_text

# Keys that do not change what is computed, only where it is kept, shown or run. Of the data and the teacher a hash is
# compared instead, and of the precision what came of it on the machine.
NEUTRAL = (
    "EXPERIMENT.", "LOG.", "DATASET.ROOT", "DATASET.NUM_WORKERS", "DATASET.MAX_BROKEN", "DATASET.TEST.", "DEVICE",
    "SOLVER.EPOCHS", "SOLVER.TIMEOUT", "SOLVER.TRIALS", "ENGINE.", "DISTILLER.TEACHER_CACHE",
    "DISTILLER.TEACHER_WEIGHTS",
)  # fmt: skip
LATEST, CONFIG, RESULT = "latest.pt", "config.yaml", "result.json"
_LOCK = ".lock"
# What a state must have, with the types.
_STATE: dict[str, type | tuple[type, ...]] = {
    "trainable": dict, "optimizer": dict, "meters": dict, "identity": dict, "epoch": int, "steps_done": int,
    "total_steps": int,
}  # fmt: skip


class Opened(NamedTuple):
    """A run folder that this process may write to.

    Attributes:
        folder: its path.
        state: of ``latest.pt``, or None.
        log: of the run; closing it gives the folder free.
    """

    folder: Path
    state: Record | None
    log: RunLog


def run_folder(config: Config) -> Path:
    """``LOG.PREFIX/EXPERIMENT.PROJECT/(NAME or TAG)``, with what the command line changed about the computation."""
    cfg = config.node
    name = cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    if not cfg.EXPERIMENT.NAME:
        for key, source in config.sources.items():
            if source == "command line" and not _neutral(key, cfg):
                value = cfg
                for part in key.split("."):
                    value = value[part]
                name += "," + f"{key}={value}".replace("/", "_").replace(" ", "")
    return Path(str(cfg.LOG.PREFIX), str(cfg.EXPERIMENT.PROJECT), name)


def _neutral(key: str, cfg: Any) -> bool:
    if key == "DISTILLER.TEACHER_CACHE_PRECISION":  # rounds what the student is taught
        return bool(cfg.DISTILLER.TEACHER_CACHE == "off")
    return key.startswith(NEUTRAL)


def _matters(key: str, cfg: Any) -> bool:
    """Whether another value of that key makes another computation; the nodes of unused methods do not."""
    section = key.split(".")[0]
    return not _neutral(key, cfg) and (section not in DISTILLERS or section in method_names(cfg))


def refuse_to_overwrite(config: Config, resume: bool) -> None:
    """Raise ConfigError where a run has saved something already and is not to be resumed."""
    folder = run_folder(config)
    there = any(os.path.exists(folder / name) for name in (LATEST, RESULT))  # False for impossible names, too
    if there and not _goes_on(folder, resume):
        raise ConfigError(
            f"{folder} holds a run already: --resume goes on with it, EXPERIMENT.NAME or EXPERIMENT.TAG starts another"
        )


def _goes_on(folder: Path, resume: bool) -> bool:
    """Whether what is there is gone on with: as asked, or begun by the launcher that started this process again."""
    if resume or not distributed.restarted():
        return resume
    try:
        return (folder / _LOCK).read_text() == distributed.launcher()
    except (OSError, ValueError):
        return False


def open_folder(config: Config, resume: bool, share: Share) -> Opened:
    """Make the run folder, or find the state to go on from. The first process of several does so for all.

    Args:
        config: of the run.
        resume: go on from ``latest.pt``, if there is one.
        share: this process among those that train together.

    Raises:
        ConfigError: it holds a run of another config; another process trains in it; it cannot be written.
        CheckpointError: ``latest.pt`` is broken.
    """
    opened = _open_alone(config, resume) if distributed.is_first() else None
    resumed = distributed.all_reduce_max(int(opened is not None and opened.state is not None))
    if opened:
        return opened
    folder = run_folder(config)
    return Opened(folder, load(folder / LATEST) if resumed else None, SilentLog(share.rank))


def _open_alone(config: Config, resume: bool) -> Opened:
    folder = run_folder(config)
    with ExitStack() as held:  # and given free where anything here fails
        held.enter_context(_lock(folder))
        opened = _open_locked(folder, config, resume, held)
        opened.log.held = held.pop_all()
    return opened


def _open_locked(folder: Path, config: Config, resume: bool, held: ExitStack) -> Opened:
    state = None
    if (folder / LATEST).exists():
        state = _state_of(folder, config)
        opening = f"resuming {folder} at epoch {state['epoch']}, step {state['steps_done'] + 1}"
    elif (folder / RESULT).exists():
        raise ConfigError(
            f"{folder} holds the result of a run and no {LATEST} to go on from: EXPERIMENT.NAME starts another"
        )
    else:
        opening = f"nothing to resume in {folder}: starting" if resume else f"run folder {folder}"
    if not state:
        keep_config(config.node, folder)
    warning = _start_wandb(config.node, folder, held) if config.node.LOG.WANDB else ""  # it sees later writers only
    try:
        first = (state["epoch"], state["total_steps"] + 1) if state else (1, 0)
        log = RunLog(folder, first_epoch=first[0], first_step=first[1])
    except OSError as error:
        raise _unwritable(folder, error) from error
    log.line(opening)
    if warning:
        log.line(f"warning: {warning}")
    return Opened(folder, state, log)


def keep_config(node: CfgNode, folder: Path) -> None:
    """Write the config of the run in a folder.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_text(dump(node), folder / CONFIG)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the run folder {folder} cannot be written ({error.strerror}): make room, or set LOG.PREFIX or EXPERIMENT.NAME"
    )


def _lock(folder: Path) -> IO[str]:
    """Make the folder, and keep other processes out of it while the file that is returned is open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a")
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: loader workers do not inherit it
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise ConfigError(
            f"another process is training in {folder}: wait for it, or start another run with EXPERIMENT.NAME"
        ) from error
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    lock.write(distributed.launcher())
    lock.flush()
    return lock


def _state_of(folder: Path, config: Config) -> Record:
    """The state of ``latest.pt``, if it is one and of a run of this config."""
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{folder} holds {LATEST} and no {CONFIG} to say what run it is of: put it back")
    # With the plugins that are loaded already: they may have moved since.
    before = load_config(folder / CONFIG, [f"EXPERIMENT.PLUGINS={config.node.EXPERIMENT.PLUGINS}"])
    changed = [key for key in differences(before.node, config.node) if _matters(key, config.node)]
    if changed:
        raise ConfigError(f"{folder} was run with other values of {', '.join(changed)}: it cannot be resumed so")
    try:
        state: Record = load(folder / LATEST)
    except CheckpointError as error:
        best = folder / "best.pt"
        advice = f"; {best} is an earlier state: copy it over it" if best.exists() else ""
        raise CheckpointError(f"{error}{advice}") from error
    if not isinstance(state, Mapping) or not all(isinstance(state.get(key), kind) for key, kind in _STATE.items()):
        raise CheckpointError(f"{folder / LATEST} is not the state of a run: put the right one back, or start another")
    done = state["epoch"] - 1
    if done > config.node.SOLVER.EPOCHS:
        raise ConfigError(
            f"{folder} has {done} epochs behind it already: SOLVER.EPOCHS {config.node.SOLVER.EPOCHS} is too few"
        )
    return state


def check_identity(folder: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with what is not named by the config and yet decides what is computed.

    Args:
        folder: of the run.
        saved: hashes and words by name, of the state.
        now: of the run that is to go on; names that the state does not know are not compared.

    Raises:
        ConfigError: names what differs.
    """
    other = [name for name in saved if saved[name] != now.get(name, saved[name])]
    if other:
        details = ", ".join(
            f"{name} ({saved[name]}, now {now[name]})" if name.startswith("precision") else name for name in other
        )
        raise ConfigError(f"{folder} was run with another {details}: it cannot be resumed so")


def _start_wandb(cfg: Any, folder: Path, held: ExitStack) -> str:
    """Mirror what TensorBoard will get to Weights & Biases; returns a warning where that is not possible."""
    try:
        import wandb
    except ImportError:
        return "LOG.WANDB is true and wandb is not installed (python -m pip install wandb): going on without"
    if wandb.run is not None:
        return f"LOG.WANDB is for one run of a process, and {wandb.run.name} is mirrored already: going on without"
    wandb.tensorboard.patch(root_logdir=str(folder / TENSORBOARD))
    held.callback(wandb.tensorboard.unpatch)
    try:
        wandb.init(
            project=cfg.EXPERIMENT.PROJECT, name=folder.name, dir=str(folder), config=yaml.safe_load(dump(cfg)),
            tags=cfg.EXPERIMENT.TAG.split(","),
        )  # fmt: skip
    except wandb.Error as error:
        return f"LOG.WANDB is true and wandb does not start ({first_line(error)}): going on without"
    held.callback(wandb.finish)
    return ""
