"""The command ``train``: build a run from its config, and train it."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import yaml

from mdistiller_norm import build
from mdistiller_norm.config import Config, load_config, show
from mdistiller_norm.data import Dataset
from mdistiller_norm.distillers import Distiller
from mdistiller_norm.engine import distributed, graph, optim, runtime, teacher_cache
from mdistiller_norm.engine.compile import choose
from mdistiller_norm.engine.logger import Record, environment
from mdistiller_norm.engine.trainer import Intervals, Provenance, Trainer
from mdistiller_norm.pack_shards import list_unreadable
from mdistiller_norm.run_folder import RunFolder


def main(options: argparse.Namespace) -> int:
    """Train, or with the options show the config or check the data."""
    plugins: Any = "refuse" if options.no_plugins else "skip" if options.show else "import"
    config = load_config(options.cfg, options.overrides, plugins=plugins)
    if options.show:
        print(show(config))
    elif options.check_data:
        return 2 if list_unreadable(build.build_dataset(config.node)) else 0
    else:
        launcher = ["python"]
        if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun
            nodes = os.environ["GROUP_WORLD_SIZE"]
            where = ["--standalone"] if nodes == "1" else ["--nnodes", nodes]
            launcher = ["torchrun", *where, "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
        train(config, options.resume, [*launcher, *options.command])
    return 0


class Run(NamedTuple):
    """A run that is ready to train."""

    trainer: Trainer
    folder: RunFolder  # locked until ``trainer.log`` is closed
    facts: Record  # content of ``result.json`` without the accuracies


def build_run(config: Config, resume: bool = False, dataset: Dataset | None = None) -> Run:
    """Build a training run; all input is checked before the first step.

    With ``resume``, continue from ``latest.pt`` in the run folder, if it exists. ``dataset`` replaces ``DATASET.TYPE``.
    """
    cfg, solver = config.node, config.node.SOLVER
    device, autocast, warning = build.build_execution(cfg)
    dataset = dataset or build.build_dataset(cfg)
    trained = build.build_teacher(cfg, dataset) if cfg.DISTILLER.TYPE != "NONE" else None
    student = build.build_student(cfg.DISTILLER.STUDENT, dataset, cfg.SEED)
    targets, size = dataset.targets, dataset.image_size
    distillers = (
        build.build_distillers(cfg, student, trained[0], targets, size) if trained else {}
    )
    runtime.choose_cuda_kernels(device, cfg.ENGINE.DETERMINISTIC)
    share = distributed.start(device, solver.TIMEOUT)
    if share.rank:  # processes differ in dropout, not in the initial weights
        torch.manual_seed(cfg.SEED + share.rank)
    build.check_data(cfg, dataset, student, distillers, share)
    folder = RunFolder.open(config, resume)
    log = folder.log.line
    if warning:
        log(f"warning: {warning}")
    if dataset.hidden:
        log(f"warning: {dataset.hidden} images are left out: their names begin with a dot")
    loader, test = build.build_loaders(cfg, dataset, device, share, log)
    steps = solver.EPOCHS * loader.steps
    done = folder.state["total_steps"] if folder.state else 0
    to_compile, reason = choose(cfg.ENGINE.COMPILE, device, steps if done < steps else 0)
    if reason and (trained or cfg.ENGINE.COMPILE == "all"):
        log(reason)
    versions = environment(device)
    teacher, teacher_record = build.build_teacher_runner(
        cfg, trained, distillers, loader, test, size, autocast, device, to_compile != "none", log
    ) if trained else (None, {})  # fmt: skip
    facts, provenance = _records(config, dataset, distillers, teacher_record, autocast, versions)
    log(
        f"{'+'.join(distillers) or 'plain training'}: {student.name} on {dataset.name}, {len(targets)} images, "
        f"{loader.steps} steps per epoch, {sum(p.numel() for p in student.parameters()):,} parameters and "
        f"{facts['extra_parameters']:,} extra parameters"
    )
    step = build.build_step(
        cfg, student, distillers, loader, teacher, autocast, device, to_compile == "all", log
    )
    capture = cfg.ENGINE.CUDA_GRAPH
    trainer = Trainer(
        step, optim.Schedule(
            solver.SCHEDULE, solver.LR, solver.EPOCHS, solver.WARMUP_EPOCHS, tuple(solver.LR_DECAY_STAGES),
            solver.LR_DECAY_RATE,
        ), test, folder.path, folder.log, provenance,
        Intervals(cfg.LOG.TENSORBOARD_FREQ, cfg.LOG.CHECKPOINT_STEPS, cfg.LOG.SAVE_CHECKPOINT_FREQ, cfg.LOG.GRAD_NORMS),
        graph.capture_step(step, capture, log), graph.capture_network(step.trainable.evaluated, test, capture, log),
    )  # fmt: skip
    folder.restore(trainer)
    if isinstance(teacher, teacher_cache.CachedTeacher) and cfg.DISTILLER.TEACHER_CACHE == "full":
        epochs = range(trainer.epoch, solver.EPOCHS + 1)
        trainer.prefetch = teacher.fill(map(loader.batches, epochs))
    return Run(trainer, folder, facts)


def _records(
    config: Config, dataset: Dataset, methods: Mapping[str, Distiller], teacher: Record,
    autocast: torch.dtype | None, versions: Record,
) -> tuple[Record, Provenance]:  # fmt: skip
    cfg = config.node
    facts = {
        "method": list(methods), "student": cfg.DISTILLER.STUDENT, "teacher": teacher or None,
        "dataset": dataset.name, "data": dataset.fingerprint(), "seed": cfg.SEED, "epochs": cfg.SOLVER.EPOCHS,
        "extra_parameters": sum(method.extra_parameters() for method in methods.values()),
        "precision": build.PRECISIONS[autocast], "processes": distributed.process_share().world,
        "environment": versions, "config": yaml.safe_load(config.yaml),
    }  # fmt: skip
    about = dataset.metadata() | {
        "name": cfg.DISTILLER.STUDENT, "num_classes": len(dataset.classes), "type": cfg.DATASET.TYPE,
        "val_split": cfg.DATASET.VAL_SPLIT, "seed": cfg.SEED, "plugins": list(cfg.EXPERIMENT.PLUGINS),
    }  # fmt: skip
    about |= {"ema": cfg.SOLVER.EMA} if cfg.SOLVER.EMA else {}
    identity = {
        "teacher": teacher.get("hash", ""), "data": facts["data"], "precision": facts["precision"],
        "precision of the teacher's answers": "fp16" if teacher.get("cache") == "fp16" else "as computed",
    }  # fmt: skip
    machine = versions | {key: facts[key] for key in ("precision", "processes")}
    return facts, Provenance(about, identity, machine)


def train(
    config: Config,
    resume: bool = False,
    command: Sequence[str] = (),
    dataset: Dataset | None = None,
) -> Record:
    """Train a run, with the arguments of :func:`build_run`; return the content of ``result.json``.

    ``command`` is the command line that it records.

    Raises:
        Interrupted: on SIGINT, SIGTERM or SIGUSR1; the state is saved.
    """
    with distributed.collective_errors():
        trainer, folder, facts = build_run(config, resume, dataset)
        log, teacher = folder.log.line, trainer.step.teacher
        try:
            if trainer.finished:
                log(f"{folder.path} is finished: nothing left to train")
            else:
                folder.start(facts["environment"])
            result = folder.write_result(facts | {"command": shlex.join(command)} | trainer.fit())
            if isinstance(teacher, teacher_cache.CachedTeacher):
                log(teacher.summary())
            last, best = result["last"], result["best"]
            log(
                f"done: last top-1 {last['top1']:.2f}, best top-1 {best['top1']:.2f} (epoch {best['epoch']}); weights, "
                f"metrics.jsonl, result.json and tensorboard/ are in {folder.path}"
            )
        finally:
            folder.log.close()
    return result
