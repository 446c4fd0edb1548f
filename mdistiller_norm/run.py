"""Runs: everything that one needs, put together from its config and, where it goes on, from the state of its folder."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from mdistiller_norm.build import (
    PRECISIONS,
    Say,
    build_dataset,
    build_device,
    build_distillers,
    build_precision,
    build_step,
    build_student,
    build_teacher,
    build_teacher_runner,
    build_train_loader,
    fastest,
    fastest_test,
    placed,
)
from mdistiller_norm.config import Config, dump, method_names
from mdistiller_norm.data import Dataset, EvalLoader, TensorDataset, TrainLoader
from mdistiller_norm.distillers import Distiller
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.compile import choose
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.logger import Record, environment
from mdistiller_norm.engine.optim import StepSchedule
from mdistiller_norm.engine.runtime import choose_cuda_kernels
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.engine.teacher_file import TeacherFile
from mdistiller_norm.engine.trainer import Trainer
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.files import write_json
from mdistiller_norm.models.base import Network
from mdistiller_norm.run_folder import RESULT, check_identity, keep_config, open_folder, refuse_to_overwrite


class Run(NamedTuple):
    """A run, ready to start.

    Attributes:
        trainer: call ``fit`` on it.
        folder: where it writes.
        result: what ``result.json`` will say besides the accuracies.
        finished: nothing is left to train.
    """

    trainer: Trainer
    folder: Path
    result: Record
    finished: bool


def _check_teacher(network: Network, file: TeacherFile, name: str, test: EvalLoader, say: Say) -> Record:
    """Evaluate the teacher once, so that a wrong one is seen before the training."""
    measured = evaluate(network, test)
    if not math.isfinite(measured.loss):
        raise CheckpointError(f"the teacher {file.path} gives NaN or infinite logits: it diverged, or is damaged")
    say(f"teacher {name} from {file.path}: test top-1 {measured.top1:.2f}, top-5 {measured.top5:.2f}")
    if file.warning:
        say(f"warning: {file.warning}")
    seen, chance = f"warning: the teacher reaches {measured.top1:.2f} top-1", 100 / network.num_classes
    if file.top1 is not None and measured.top1 < file.top1 - 1:
        say(f"{seen}, far below the {file.top1:.2f} stated for it")
    elif measured.top1 < chance + min(chance, (100 - chance) / 10):
        say(f"{seen}, about chance: its weights or the data are wrong")
    return {"name": name, "file": str(file.path), "top1": measured.top1, "top5": measured.top5}


def _about(cfg: Any, dataset: Dataset) -> Record:
    """What a student's file says of it besides the weights."""
    return {
        "name": cfg.DISTILLER.STUDENT, "variant": dataset.variant, "num_classes": len(dataset.classes),
        "classes": list(dataset.classes), "dataset": dataset.name, "mean": list(dataset.mean), "std": list(dataset.std),
        "image_size": list(dataset.image_size), "type": cfg.DATASET.TYPE, "resize": cfg.DATASET.RESIZE,
        "seed": cfg.SEED, "plugins": list(cfg.EXPERIMENT.PLUGINS),
    }  # fmt: skip


def build_run(config: Config, resume: bool = False, command: str = "", dataset: Dataset | None = None) -> Run:
    """Everything a training run needs, checked before the first step.

    Args:
        config: resolved.
        resume: go on from the run folder's ``latest.pt``, if there is one.
        command: the command line, for the record.
        dataset: in place of the one that ``DATASET.TYPE`` names.

    Raises:
        UserError: anything about config, data, weights, device or run folder that cannot work.
    """
    cfg = config.node
    device = build_device(cfg)
    if device.type == "cuda":
        choose_cuda_kernels(cfg.ENGINE.DETERMINISTIC)
    share = distributed.start(device, cfg.SOLVER.TIMEOUT)
    autocast, warning = build_precision(cfg, device)
    if isinstance(dataset, TensorDataset):
        dataset.check()  # as one that is opened here was
    dataset = dataset or build_dataset(cfg)
    taught_by = build_teacher(cfg, dataset) if method_names(cfg) else None
    student = build_student(cfg, dataset)
    distillers = build_distillers(cfg, student, taught_by[0], dataset) if taught_by else {}
    if share.rank:  # from here on it draws the dropout of a plugin's network, each process's own; the weights are alike
        torch.manual_seed(cfg.SEED + share.rank)
    if distributed.is_first():
        refuse_to_overwrite(config, resume)
    folder, state, log = open_folder(config, resume, share)
    if warning:
        log.line(f"warning: {warning}")
    test = dataset.eval_loader(cfg.DATASET.TEST.BATCH_SIZE, device, share)
    loader = build_train_loader(cfg, dataset, device, share, log.line)
    left = cfg.SOLVER.EPOCHS * loader.steps - (state["total_steps"] if state else 0)
    steps = cfg.SOLVER.EPOCHS * loader.steps if left else 0
    to_compile, reason = choose(cfg.ENGINE.COMPILE, device, steps)
    if reason and (taught_by or cfg.ENGINE.COMPILE == "all"):
        log.line(reason)
    teacher: Teacher | None = None
    taught: Record = {}
    if taught_by:
        teacher, taught = _put_to_work(
            cfg, taught_by, distillers, dataset, loader, test, autocast,
            to_compile in ("teacher", "all"), left, log.line,
        )  # fmt: skip
    identity = {
        "teacher": taught.get("hash", ""), "data": dataset.fingerprint(), "precision": PRECISIONS[autocast],
        "precision of the teacher's answers": "fp16" if taught.get("cache") == "fp16" else "as computed",
    }  # fmt: skip
    surroundings = environment(device)
    where = surroundings | {"precision": PRECISIONS[autocast], "processes": distributed.wanted().world}
    step = build_step(cfg, student, distillers, loader, teacher, autocast, to_compile == "all", log.line)
    trainer = Trainer(
        step=step,
        schedule=StepSchedule(cfg.SOLVER.LR, tuple(cfg.SOLVER.LR_DECAY_STAGES), cfg.SOLVER.LR_DECAY_RATE),
        test=test, epochs=cfg.SOLVER.EPOCHS, seed=cfg.SEED, folder=folder, log=log,
        about=_about(cfg, dataset), identity=identity, where=where,
        save_every=cfg.LOG.SAVE_CHECKPOINT_FREQ, log_every=cfg.LOG.TENSORBOARD_FREQ,
        checkpoint_steps=cfg.LOG.CHECKPOINT_STEPS, run_step=fastest(cfg, step, log.line),
        run_test=fastest_test(cfg, student, test, log.line),
    )  # fmt: skip
    if state:
        _load_state(trainer, state, folder)
    names = method_names(cfg)
    extra = sum(method.extra_parameters() for method in distillers.values())
    parameters = sum(p.numel() for p in student.parameters())
    log.line(
        f"{'+'.join(names) or 'plain training'}: {cfg.DISTILLER.STUDENT} on {dataset.name}, {len(dataset.targets)} "
        f"images, {loader.steps} steps an epoch, {parameters:,} parameters and {extra:,} extra"
    )
    if cfg.DATASET.VAL_SPLIT:
        log.line(
            f"what is called test here is held out of the training images: {cfg.DATASET.VAL_SPLIT:g} of each class "
            "(DATASET.VAL_SPLIT)"
        )
    result = {
        "method": names, "student": cfg.DISTILLER.STUDENT, "teacher": taught or None, "dataset": dataset.name,
        "seed": cfg.SEED, "epochs": cfg.SOLVER.EPOCHS, "extra_parameters": extra, "command": command,
        "precision": where["precision"], "processes": where["processes"], "data": identity["data"],
        "config": yaml.safe_load(dump(cfg)), "environment": surroundings,
    }  # fmt: skip
    finished = trainer.epoch > cfg.SOLVER.EPOCHS
    if state and not finished and distributed.is_first():
        keep_config(cfg, folder)  # not before it was clear that the state is of this run
    if isinstance(teacher, CachedTeacher) and cfg.DISTILLER.TEACHER_CACHE == "full":
        trainer.ahead = teacher.fill(loader.batches(epoch) for epoch in range(trainer.epoch, cfg.SOLVER.EPOCHS + 1))
    return Run(trainer, folder, result, finished)


def _load_state(trainer: Trainer, state: Record, folder: Path) -> None:
    check_identity(folder, state["identity"], trainer.identity)
    try:
        trainer.load_state(state)
    except (RuntimeError, ValueError, LookupError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"the state in {folder} does not fit this run ({reason}): a network or method of a plugin has "
            "changed, or the state is damaged"
        ) from error


def _put_to_work(
    cfg: Any, taught_by: tuple[Network, TeacherFile], distillers: dict[str, Distiller], dataset: Dataset,
    loader: TrainLoader, test: EvalLoader, autocast: torch.dtype | None, compiled: bool, steps_left: int, say: Say,
) -> tuple[Teacher, Record]:  # fmt: skip
    """The teacher in the form that trains, measured on the test split, and what a record says of it."""
    network, file = placed(taught_by[0], build_device(cfg)), taught_by[1]
    facts = _check_teacher(network, file, cfg.DISTILLER.TEACHER, test, say)
    teacher = build_teacher_runner(
        cfg, network, distillers, loader, file.path, dataset.image_size, autocast, compiled, say
    )
    facts["hash"] = teacher.hash
    if isinstance(teacher, CachedTeacher):
        facts["cache"] = cfg.DISTILLER.TEACHER_CACHE_PRECISION
        say(teacher.check_space(steps_left))
    return teacher, facts


def train(config: Config, resume: bool = False, command: list[str] | None = None) -> Record:
    """Run a config from its start, or from where it stopped, to its end.

    Args:
        config: resolved.
        resume: go on from the run folder's ``latest.pt``, if there is one.
        command: the words of the command line, for the record.

    Returns:
        What ``result.json`` in the run folder holds: ``last`` and ``best`` (epoch, top1, top5, loss), and what was run.

    Raises:
        UserError: see :func:`build_run`; NonFiniteLossError in training; LostProcessError with several processes.
        Interrupted: on SIGINT, SIGTERM or SIGUSR1, after the state was saved.
    """
    with distributed.collective_errors():
        run = build_run(config, resume, shlex.join(command or []))
        try:
            begin(run)
            run.trainer.fit()
            result = finish(run)
        finally:
            run.trainer.log.close()
    distributed.stop()
    return result


def begin(run: Run) -> None:
    """Write down where it runs, or say that nothing is left to do."""
    if run.finished:
        run.trainer.log.line(f"{run.folder} is finished already: nothing left to train")
    elif distributed.is_first():
        (run.folder / RESULT).unlink(missing_ok=True)  # of fewer epochs: the weights will be others
        write_json(run.result["environment"], run.folder / "environment.json")


def finish(run: Run) -> Record:
    """Write ``result.json`` of a run that reached its end; returns what it holds.

    One that was finished before keeps its own, which says where and when it was trained.
    """
    result = run.result | run.trainer.summary()
    kept = _kept(run.folder / RESULT) if run.finished else {}
    if all(kept.get(key) == result[key] for key in ("last", "best")):
        result = kept
    elif distributed.is_first():
        write_json(result, run.folder / RESULT)
    teacher = run.trainer.step.teacher
    if isinstance(teacher, CachedTeacher) and not run.finished:
        run.trainer.log.line(teacher.summary())
    last, best = result["last"], result["best"]
    run.trainer.log.line(
        f"done: last top-1 {last['top1']:.2f}, best top-1 {best['top1']:.2f} (epoch {best['epoch']}); "
        f"weights, metrics.jsonl, result.json and tensorboard/ are in {run.folder}"
    )
    return result


def _kept(path: Path) -> Record:
    """What a ``result.json`` holds; nothing where it is not there or damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return result if isinstance(result, dict) else {}
