"""Runs: everything that one needs, put together from its config and, where it goes on, from the state of its folder."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
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
    initial_seed,
    placed,
)
from mdistiller_norm.config import Config, dump, method_names
from mdistiller_norm.data import Dataset, EvalLoader, Share, TensorDataset, TrainLoader
from mdistiller_norm.distillers import Distiller
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.compile import choose
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.logger import Record, RunLog, environment
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
        "seed": initial_seed(cfg), "plugins": list(cfg.EXPERIMENT.PLUGINS),
    }  # fmt: skip


class _Shared(NamedTuple):
    """What runs that are built together have in common.

    Attributes:
        dataset: trained on.
        loader: of its training batches.
        test: of what is evaluated.
        teacher: None for plain training.
        taught: what the records say of the teacher.
        autocast: the networks' dtype, None for float32.
        compile_students: with ENGINE.COMPILE all.
        identity: what the config does not name and what yet decides what is computed.
    """

    dataset: Dataset
    loader: TrainLoader
    test: EvalLoader
    teacher: Teacher | None
    taught: Record
    autocast: torch.dtype | None
    compile_students: bool
    identity: dict[str, str]


class _Learner(NamedTuple):
    """What is one run's own: a student with its methods, and its folder."""

    config: Config
    student: Network
    distillers: dict[str, Distiller]
    folder: Path
    state: Record | None
    log: RunLog


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
    (run,) = build_runs([config], resume, command, dataset)
    return run


def build_runs(
    configs: Sequence[Config], resume: bool = False, command: str = "", dataset: Dataset | None = None
) -> list[Run]:
    """Runs with one data set, one loader and one teacher between them.

    Args:
        configs: differ in ``SOLVER.INIT_SEED`` and in where they write, in nothing else.
        resume: see :func:`build_run`, as the next two.
        command: for the records.
        dataset: in place of the configs' own.

    Raises:
        UserError: see :func:`build_run`.
    """
    cfg = configs[0].node
    device = build_device(cfg)
    if device.type == "cuda":
        choose_cuda_kernels(cfg.ENGINE.DETERMINISTIC)
    share = distributed.start(device, cfg.SOLVER.TIMEOUT)
    autocast, warning = build_precision(cfg, device)
    if isinstance(dataset, TensorDataset):
        dataset.check()  # as one that is opened here was
    dataset = dataset or build_dataset(cfg)
    taught_by = build_teacher(cfg, dataset) if method_names(cfg) else None
    networks = [_networks(config.node, dataset, taught_by) for config in configs]
    if share.rank:  # from here on it draws the dropout of a plugin's network, each process's own; the weights are alike
        torch.manual_seed(initial_seed(cfg) + share.rank)
    learners = _open(configs, networks, resume, share)

    def say(text: str) -> None:
        for number, learner in enumerate(learners):
            learner.log.line(text, aside=number > 0)

    if warning:
        say(f"warning: {warning}")
    test = dataset.eval_loader(cfg.DATASET.TEST.BATCH_SIZE, device, share)
    loader = build_train_loader(cfg, dataset, device, share, say)
    left = max(_steps_left(learner, loader) for learner in learners)
    steps = cfg.SOLVER.EPOCHS * loader.steps if left else 0
    to_compile, reason = choose(cfg.ENGINE.COMPILE, device, steps)
    if reason and (taught_by or cfg.ENGINE.COMPILE == "all"):
        say(reason)
    teacher: Teacher | None = None
    taught: Record = {}
    if taught_by:
        teacher, taught = _put_to_work(
            cfg, taught_by, learners[0].distillers, dataset, loader, test, autocast,
            to_compile in ("teacher", "all"), left, say,
        )  # fmt: skip
    identity = {
        "teacher": taught.get("hash", ""), "data": dataset.fingerprint(), "precision": PRECISIONS[autocast],
        "precision of the teacher's answers": "fp16" if taught.get("cache") == "fp16" else "as computed",
    }  # fmt: skip
    shared = _Shared(dataset, loader, test, teacher, taught, autocast, to_compile == "all", identity)
    runs = [_build(learner, shared, command, leads=number == 0) for number, learner in enumerate(learners)]
    if isinstance(teacher, CachedTeacher) and cfg.DISTILLER.TEACHER_CACHE == "full":
        epochs = range(min(run.trainer.epoch for run in runs), cfg.SOLVER.EPOCHS + 1)
        runs[0].trainer.ahead = teacher.fill(loader.batches(epoch) for epoch in epochs)
    return runs


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


def _networks(
    cfg: Any, dataset: Dataset, taught_by: tuple[Network, TeacherFile] | None
) -> tuple[Network, dict[str, Distiller]]:
    """A student and its methods, as the seed of the initial weights has them."""
    student = build_student(cfg, dataset)
    return student, build_distillers(cfg, student, taught_by[0], dataset) if taught_by else {}


def _open(
    configs: Sequence[Config], networks: Sequence[tuple[Network, dict[str, Distiller]]], resume: bool, share: Share
) -> list[_Learner]:
    """The runs with their folders; none is made where one of them is refused."""
    if distributed.is_first():
        for config in configs:
            refuse_to_overwrite(config, resume)
    learners = []
    for config, (student, distillers) in zip(configs, networks, strict=True):
        label = f"[seed {initial_seed(config.node)}] " if len(configs) > 1 else ""
        learners.append(_Learner(config, student, distillers, *open_folder(config, resume, share, label)))
    return learners


def _steps_left(learner: _Learner, loader: TrainLoader) -> int:
    done: int = learner.state["total_steps"] if learner.state else 0
    left: int = learner.config.node.SOLVER.EPOCHS * loader.steps - done
    return left


def _build(learner: _Learner, shared: _Shared, command: str, leads: bool) -> Run:
    """One of the runs; the one that leads shows its progress."""
    cfg, log, dataset, taught = learner.config.node, learner.log, shared.dataset, shared.taught
    surroundings = environment(build_device(cfg))
    where = surroundings | {"precision": PRECISIONS[shared.autocast], "processes": distributed.wanted().world}
    step = build_step(
        cfg, learner.student, learner.distillers, shared.loader, shared.teacher, shared.autocast,
        shared.compile_students, log.line,
    )  # fmt: skip
    trainer = Trainer(
        step=step,
        schedule=StepSchedule(cfg.SOLVER.LR, tuple(cfg.SOLVER.LR_DECAY_STAGES), cfg.SOLVER.LR_DECAY_RATE),
        test=shared.test, epochs=cfg.SOLVER.EPOCHS, seed=cfg.SEED, folder=learner.folder, log=log,
        about=_about(cfg, dataset), identity=shared.identity, where=where,
        save_every=cfg.LOG.SAVE_CHECKPOINT_FREQ, log_every=cfg.LOG.TENSORBOARD_FREQ,
        checkpoint_steps=cfg.LOG.CHECKPOINT_STEPS, run_step=fastest(cfg, step, step, log.line),
        run_test=fastest_test(cfg, learner.student, shared.test, log.line), show_progress=leads,
    )  # fmt: skip
    if learner.state:
        check_identity(learner.folder, learner.state["identity"], trainer.identity)
        try:
            trainer.load_state(learner.state)
        except (RuntimeError, ValueError, LookupError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(
                f"the state in {learner.folder} does not fit this run ({reason}): a network or method of a plugin has "
                "changed, or the state is damaged"
            ) from error
    names = method_names(cfg)
    extra = sum(method.extra_parameters() for method in learner.distillers.values())
    parameters = sum(p.numel() for p in learner.student.parameters())
    log.line(
        f"{'+'.join(names) or 'plain training'}: {cfg.DISTILLER.STUDENT} on {dataset.name}, {len(dataset.targets)} "
        f"images, {shared.loader.steps} steps an epoch, {parameters:,} parameters and {extra:,} extra"
    )
    if cfg.DATASET.VAL_SPLIT:
        log.line(
            f"what is called test here is held out of the training images: {cfg.DATASET.VAL_SPLIT:g} of each class "
            "(DATASET.VAL_SPLIT)"
        )
    result = {
        "method": names, "student": cfg.DISTILLER.STUDENT, "teacher": taught or None, "dataset": dataset.name,
        "seed": initial_seed(cfg), "epochs": cfg.SOLVER.EPOCHS, "extra_parameters": extra, "command": command,
        "precision": where["precision"], "processes": where["processes"], "data": shared.identity["data"],
        "config": yaml.safe_load(dump(cfg)), "environment": surroundings,
    }  # fmt: skip
    finished = trainer.epoch > cfg.SOLVER.EPOCHS
    if learner.state and not finished and distributed.is_first():
        keep_config(cfg, learner.folder)  # not before it was clear that the state is of this run
    return Run(trainer, learner.folder, result, finished)


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
