"""Build a run from its config, and train it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import yaml

from mdistiller_norm.build import (
    PRECISIONS,
    Log,
    build_dataset,
    build_device,
    build_distillers,
    build_loader,
    build_precision,
    build_step,
    build_student,
    build_teacher,
    build_teacher_runner,
    capture_network,
    capture_step,
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
from mdistiller_norm.engine.trainer import Intervals, Provenance, Trainer
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.models.base import Network
from mdistiller_norm.run_folder import RunFolder


class Run(NamedTuple):
    """A run that is ready to train.

    Attributes:
        trainer: trains it.
        folder: stores it; close ``trainer.log`` to unlock it.
        facts: content of ``result.json`` without the accuracies.
    """

    trainer: Trainer
    folder: RunFolder
    facts: Record


def build_run(config: Config, resume: bool = False, command: str = "", dataset: Dataset | None = None) -> Run:
    """Build a training run; all input is checked before the first step.

    Args:
        config: resolved.
        resume: continue from ``latest.pt`` in the run folder, if it exists.
        command: command line, for the record.
        dataset: an open data set to use instead of ``DATASET.TYPE``.
    """
    cfg = config.node
    methods = method_names(cfg)
    device = build_device(cfg.DEVICE)
    if device.type == "cuda":
        choose_cuda_kernels(cfg.ENGINE.DETERMINISTIC)
    share = distributed.start(device, cfg.SOLVER.TIMEOUT)
    autocast, warning = build_precision(cfg.SOLVER.PRECISION, device)
    if isinstance(dataset, TensorDataset):
        dataset.check()
    dataset = dataset or build_dataset(cfg)
    trained = build_teacher(cfg, dataset) if methods else None
    student = build_student(cfg.DISTILLER.STUDENT, dataset, cfg.SEED)
    distillers = build_distillers(cfg, student, trained[0], dataset) if trained else {}
    if share.rank:
        torch.manual_seed(cfg.SEED + share.rank)  # processes differ in dropout, not in the initial weights

    folder = RunFolder.open(config, resume, share.rank)
    log = folder.log.line
    if warning:
        log(f"warning: {warning}")
    test = dataset.eval_loader(cfg.DATASET.TEST.BATCH_SIZE, device, share)
    loader = build_loader(dataset, cfg.SOLVER.BATCH_SIZE, cfg.SEED, device, share, cfg.SOLVER.ACCUMULATE, log)
    steps = cfg.SOLVER.EPOCHS * loader.steps
    steps_left = steps - folder.steps_done
    to_compile, reason = choose(cfg.ENGINE.COMPILE, device, steps if steps_left else 0)
    if reason and (methods or cfg.ENGINE.COMPILE == "all"):
        log(reason)
    teacher, teacher_facts = None, Record()
    if trained:
        placed(trained[0], device)
        compiled = to_compile in ("teacher", "all")
        teacher, teacher_facts = prepare_teacher(
            cfg, trained, distillers, loader, test, dataset.image_size, autocast, compiled, steps_left, log
        )
    step = build_step(cfg, student, distillers, loader, teacher, autocast, device, to_compile == "all", log)
    schedule = StepSchedule(cfg.SOLVER.LR, tuple(cfg.SOLVER.LR_DECAY_STAGES), cfg.SOLVER.LR_DECAY_RATE)
    intervals = Intervals(cfg.LOG.TENSORBOARD_FREQ, cfg.LOG.CHECKPOINT_STEPS, cfg.LOG.SAVE_CHECKPOINT_FREQ)
    facts = _facts(cfg, dataset, distillers, teacher_facts, device, PRECISIONS[autocast])
    trainer = Trainer(
        step, schedule, test, cfg.SOLVER.EPOCHS, folder.path, folder.log, _provenance(cfg, dataset, facts), intervals,
        capture_step(step, cfg.ENGINE.CUDA_GRAPH, log), capture_network(student, test, cfg.ENGINE.CUDA_GRAPH, log),
    )  # fmt: skip
    folder.restore(trainer, config)
    if isinstance(teacher, CachedTeacher) and cfg.DISTILLER.TEACHER_CACHE == "full":
        epochs = range(trainer.epoch, cfg.SOLVER.EPOCHS + 1)
        trainer.prefetch = teacher.fill(loader.batches(epoch) for epoch in epochs)
    _log_summary(cfg, dataset, student, loader.steps, facts, log)
    return Run(trainer, folder, facts | {"command": command})


def prepare_teacher(
    cfg: Any,
    trained: tuple[Network, TeacherFile],
    distillers: Mapping[str, Distiller],
    loader: TrainLoader,
    test: EvalLoader,
    image_size: tuple[int, int],
    autocast: torch.dtype | None,
    compiled: bool,
    steps_left: int,
    log: Log,
) -> tuple[Teacher, Record]:
    """Evaluate the teacher; return it as a step uses it, with its record."""
    network, file = trained
    facts = check_teacher(network, file, test, log)
    cached = "" if cfg.DISTILLER.TEACHER_CACHE == "off" else cfg.DISTILLER.TEACHER_CACHE_PRECISION
    teacher = build_teacher_runner(network, distillers, loader, image_size, file.path, autocast, compiled, cached, log)
    facts["hash"] = teacher.hash
    if isinstance(teacher, CachedTeacher):
        facts["cache"] = cached
        log(teacher.check_space(steps_left))
    return teacher, facts


def check_teacher(network: Network, file: TeacherFile, test: EvalLoader, log: Log) -> Record:
    """Evaluate the teacher before training; log its accuracy, and warnings if it is lower than expected."""
    measured = evaluate(network, test)
    if not math.isfinite(measured.loss):
        raise CheckpointError(f"the teacher {file.path} computes NaN or infinite logits: it diverged or is damaged")
    log(f"teacher {network.name} from {file.path}: test top-1 {measured.top1:.2f}, top-5 {measured.top5:.2f}")
    if file.warning:
        log(f"warning: {file.warning}")
    chance = 100 / network.num_classes
    if file.top1 is not None and measured.top1 < file.top1 - 1:
        log(f"warning: the teacher's top-1 {measured.top1:.2f} is far below its stated {file.top1:.2f}")
    elif measured.top1 < chance + min(chance, (100 - chance) / 10):
        log(f"warning: the teacher's top-1 {measured.top1:.2f} is about chance: its weights or the data are wrong")
    return {"name": network.name, "file": str(file.path), "top1": measured.top1, "top5": measured.top5}


def _log_summary(cfg: Any, dataset: Dataset, student: Network, steps: int, facts: Record, log: Log) -> None:
    parameters = sum(parameter.numel() for parameter in student.parameters())
    log(
        f"{'+'.join(facts['method']) or 'plain training'}: {student.name} on {dataset.name}, {len(dataset.targets)} "
        f"images, {steps} steps per epoch, {parameters:,} parameters and {facts['extra_parameters']:,} extra parameters"
    )
    if cfg.DATASET.VAL_SPLIT:
        log(f"the test split is {cfg.DATASET.VAL_SPLIT:g} of each class of the training images (DATASET.VAL_SPLIT)")


def _facts(
    cfg: Any,
    dataset: Dataset,
    distillers: Mapping[str, Distiller],
    teacher: Record,
    device: torch.device,
    precision: str,
) -> Record:
    return {
        "method": list(distillers), "student": cfg.DISTILLER.STUDENT, "teacher": teacher or None,
        "dataset": dataset.name, "seed": cfg.SEED, "epochs": cfg.SOLVER.EPOCHS,
        "extra_parameters": sum(method.extra_parameters() for method in distillers.values()),
        "precision": precision, "processes": distributed.wanted().world, "data": dataset.fingerprint(),
        "config": yaml.safe_load(dump(cfg)), "environment": environment(device),
    }  # fmt: skip


def _provenance(cfg: Any, dataset: Dataset, facts: Record) -> Provenance:
    teacher = facts["teacher"] or {}
    about = {
        "name": cfg.DISTILLER.STUDENT, "variant": dataset.variant, "num_classes": len(dataset.classes),
        "classes": list(dataset.classes), "dataset": dataset.name, "mean": list(dataset.mean), "std": list(dataset.std),
        "image_size": list(dataset.image_size), "type": cfg.DATASET.TYPE, "resize": cfg.DATASET.RESIZE,
        "seed": cfg.SEED, "plugins": list(cfg.EXPERIMENT.PLUGINS),
    }  # fmt: skip
    identity = {
        "teacher": teacher.get("hash", ""), "data": facts["data"], "precision": facts["precision"],
        "precision of the teacher's answers": "fp16" if teacher.get("cache") == "fp16" else "as computed",
    }  # fmt: skip
    return Provenance(about, identity, facts["environment"] | {key: facts[key] for key in ("precision", "processes")})


def train(config: Config, resume: bool = False, command: Sequence[str] = ()) -> Record:
    """Train a run from the start, or from its saved state, to the end.

    Args:
        config: resolved.
        resume: continue from ``latest.pt`` in the run folder, if it exists.
        command: words of the command line, for the record.

    Returns:
        Content of ``result.json``: ``last`` and ``best`` (epoch, top1, top5, loss) and the facts of the run.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGUSR1; the state is saved.
    """
    with distributed.collective_errors():
        trainer, folder, facts = build_run(config, resume, shlex.join(command))
        log, teacher = folder.log.line, trainer.step.teacher
        try:
            if trainer.finished:
                log(f"{folder.path} is finished: nothing left to train")
                teacher = None
            else:
                folder.start(facts["environment"])
            result = folder.write_result(facts | trainer.fit())
            if isinstance(teacher, CachedTeacher):
                log(teacher.summary())
            last, best = result["last"], result["best"]
            log(
                f"done: last top-1 {last['top1']:.2f}, best top-1 {best['top1']:.2f} (epoch {best['epoch']}); weights, "
                f"metrics.jsonl, result.json and tensorboard/ are in {folder.path}"
            )
        finally:
            folder.log.close()
    distributed.stop()
    return result
