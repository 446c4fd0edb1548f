"""From a config to the objects that run: the only code below ``config.py`` that sees the YACS node."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from mdistiller_norm.config import Config, differences, dump, load_config
from mdistiller_norm.data import (
    DATASETS,
    Dataset,
    EvalLoader,
    ImageOptions,
    MemoryTrainLoader,
    Share,
    TensorDataset,
    TrainLoader,
)  # fmt: skip
from mdistiller_norm.data.image_folder import data_root
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need, Pair
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import TeacherFile, find_teacher, load, load_into, load_weights
from mdistiller_norm.engine.compile import choose, compile_teacher
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.graph import CapturedStep
from mdistiller_norm.engine.logger import Record, RunLog, SilentLog, environment
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.optim import StepSchedule, build_sgd
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import LiveTeacher, Teacher
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.engine.trainer import Trainer, write_json
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Outputs

# Keys that do not change what is computed, only where it is kept, shown or run.
NEUTRAL = (
    "EXPERIMENT.", "LOG.", "DATASET.ROOT", "DATASET.NUM_WORKERS", "DATASET.MAX_BROKEN", "DATASET.TEST.", "DEVICE",
    "SOLVER.EPOCHS", "SOLVER.TIMEOUT", "SOLVER.TRIALS",
    "ENGINE.", "DISTILLER.TEACHER_CACHE", "DISTILLER.TEACHER_WEIGHTS",  # the teacher's hash is compared instead
)  # fmt: skip
LATEST = "latest.pt"
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def method_names(cfg: Any) -> list[str]:
    """The distillers that ``DISTILLER.TYPE`` names; none for plain training."""
    types = [cfg.DISTILLER.TYPE] if isinstance(cfg.DISTILLER.TYPE, str) else list(cfg.DISTILLER.TYPE)
    return [name for name in types if name != "NONE"]


def build_device(cfg: Any) -> torch.device:
    """The device of ``DEVICE``; ``auto`` is CUDA where there is one.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    if cfg.DEVICE == "auto":
        return distributed.local_device() if torch.cuda.is_available() else torch.device("cpu")
    if cfg.DEVICE == "cuda" and torch.cuda.is_available():
        return distributed.local_device()
    try:
        device = torch.device(cfg.DEVICE)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"DEVICE {cfg.DEVICE!r} cannot be used here ({str(error).splitlines()[0]}): choose auto, cpu or cuda"
        ) from error
    return device


def build_precision(cfg: Any, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype of ``SOLVER.PRECISION``, and a warning where the processor would emulate it."""
    dtype = _DTYPES[cfg.SOLVER.PRECISION]
    if device.type == "cpu" and dtype is not None:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if dtype is torch.float16 or not native:
            return None, f"this processor has no fast {cfg.SOLVER.PRECISION}: training in fp32 instead"
    return dtype, ""


def build_dataset(cfg: Any) -> Dataset:
    """The data set of ``DATASET.TYPE``; with ``DATASET.VAL_SPLIT`` part of its training split is the test split.

    Raises:
        UserError: the data are missing or broken, or cannot be split.
    """
    data = cfg.DATASET
    options = ImageOptions(
        size=data.IMAGE_SIZE, resize=data.RESIZE, crop_scale=tuple(data.CROP_SCALE), mean=tuple(data.MEAN),
        std=tuple(data.STD), classes=tuple(data.CLASSES), variant=data.VARIANT, workers=data.NUM_WORKERS,
        max_broken=data.MAX_BROKEN, decode=data.DECODE,
    )  # fmt: skip
    dataset = DATASETS[data.TYPE](Path(data.ROOT), options)
    if not data.VAL_SPLIT:
        return dataset
    if not isinstance(dataset, TensorDataset):
        raise ConfigError(f"DATASET.VAL_SPLIT is for data sets in memory, not for {data.TYPE}: split its folders")
    return dataset.hold_out(data.VAL_SPLIT)


def build_student(cfg: Any, dataset: Dataset) -> Network:
    """The student with its initial weights, a function of ``SEED`` alone."""
    torch.manual_seed(cfg.SEED)
    return build_model(cfg.DISTILLER.STUDENT, len(dataset.classes), variant=dataset.variant)


def train_command(cfg: Any, model: str) -> str:
    """The command that trains this network as a teacher."""
    if cfg.DATASET.TYPE == "digits":
        return f"python tools/train.py --cfg configs/digits/vanilla_{model}.yaml"
    return f"python tools/train.py --cfg configs/{cfg.DATASET.TYPE}/vanilla/{model}.yaml"


def build_teacher(cfg: Any, dataset: Dataset) -> tuple[Network, TeacherFile]:
    """The teacher with its trained weights.

    Raises:
        CheckpointError: its weights are missing (says what trains them) or do not fit.
    """
    name = cfg.DISTILLER.TEACHER
    network = build_model(name, len(dataset.classes), variant=dataset.variant)
    runs, command = Path(cfg.LOG.PREFIX), train_command(cfg, name)
    file = find_teacher(name, dataset.name, cfg.DISTILLER.TEACHER_WEIGHTS, runs, command)
    weights = load_weights(file.path)
    trained_on = weights.about.get("dataset", dataset.name)
    if trained_on != dataset.name:
        raise CheckpointError(f"{file.path} was trained on {trained_on}, not on {dataset.name}")
    load_into(network, weights, f"{name} with {len(dataset.classes)} classes")
    return network, file


def build_distillers(cfg: Any, student: Network, teacher: Network, dataset: Dataset) -> dict[str, Distiller]:
    """The methods of ``DISTILLER.TYPE`` for this pair of networks, by name."""
    size = dataset.image_size
    pair = Pair(probe(student, size), probe(teacher, size), teacher, dataset.targets, len(dataset.classes))
    return {name: DISTILLERS[name].from_config(cfg[name], pair) for name in method_names(cfg)}


def build_teacher_runner(
    cfg: Any,
    network: Network,
    distillers: Mapping[str, Distiller],
    loader: TrainLoader,
    checkpoint: Path,
    image_size: tuple[int, int],
    autocast: torch.dtype | None,
    compiled: bool,
    log: RunLog,
) -> Teacher:
    """The teacher as a step uses it: run in every step, or its answers kept in a cache."""
    need = max(method.need for method in distillers.values())
    train_mode = any(method.teacher_in_train_mode for method in distillers.values())

    def compiler(module: nn.Module) -> Callable[[Tensor], Outputs]:
        device = next(network.parameters()).device
        example = torch.zeros(loader.batch_size, 3, *image_size, device=device)
        return compile_teacher(module, example.to(memory_format=torch.channels_last), log.line)

    live = LiveTeacher(network, need, autocast, train_mode, compiler if compiled else None)
    if cfg.DISTILLER.TEACHER_CACHE == "off":
        return live
    if need > Need.POOLED:
        readers = [name for name, method in distillers.items() if method.need > Need.POOLED]
        log.line(f"no teacher cache: {' and '.join(readers)} reads the teacher's maps, which are too large to keep")
        return live
    if not isinstance(loader, MemoryTrainLoader):
        log.line(f"no teacher cache: the augmentation of {cfg.DATASET.TYPE} has no finite number of views")
        return live
    pooled = probe(network, image_size).pooled.shape[1]
    precision = cfg.DISTILLER.TEACHER_CACHE_PRECISION
    return CachedTeacher(live, loader, checkpoint, loader.fingerprint(), network.num_classes, pooled, precision)


def _captured(cfg: Any, step: TrainStep, device: torch.device, log: RunLog) -> Callable[..., None] | None:
    """The step as a CUDA graph, where it can be one."""
    why = ""
    if device.type != "cuda":
        why = "there is no CUDA device" if cfg.ENGINE.CUDA_GRAPH == "on" else "off"
    elif slow := [name for name, method in step.trainable.distillers.items() if not method.capturable]:
        why = f"{' and '.join(slow)} waits for the host in every step"
    elif distributed.together():
        why = "several processes exchange gradients in it"
    elif step.scaler is not None:
        why = "SOLVER.PRECISION fp16 skips steps whose gradients overflow"
    elif not isinstance(step.loader, MemoryTrainLoader):
        why = "the images of this data set come from the host"
    if cfg.ENGINE.CUDA_GRAPH == "off" or why:
        if why not in ("", "off"):
            log.line(f"no CUDA graph: {why}")
        return None
    return CapturedStep(step)


def build_optimizer(
    cfg: Any, trainable: Trainable, loader: TrainLoader, teacher: Teacher | None
) -> torch.optim.Optimizer | DOT:
    """SGD, or DOT's two where ``SOLVER.TRAINER`` says so.

    Raises:
        ConfigError: DOT without a teacher, with fp16, whose gradients need a scale, or on several processes.
    """
    solver = cfg.SOLVER
    sgd = {
        "lr": solver.LR, "momentum": solver.MOMENTUM, "weight_decay": solver.WEIGHT_DECAY, "nesterov": solver.NESTEROV,
    }  # fmt: skip
    if not solver.TRAINER.endswith("dot"):
        return build_sgd(trainable.parameters(), **sgd)
    if teacher is None or trainable.autocast is torch.float16:
        why = "a distillation loss: DISTILLER.TYPE is NONE" if teacher is None else "SOLVER.PRECISION fp32 or bf16"
        raise ConfigError(f"SOLVER.TRAINER {solver.TRAINER} needs {why}")
    if distributed.together() or solver.ACCUMULATE > 1:
        raise ConfigError(f"SOLVER.TRAINER {solver.TRAINER} trains on one process, and with SOLVER.ACCUMULATE 1")
    batch = loader.prepare(*next(loader.batches(1)))
    return DOT(trainable, batch, teacher, solver.DOT.DELTA, **sgd)


def build_train_loader(cfg: Any, dataset: Dataset, device: torch.device, share: Share, log: RunLog) -> TrainLoader:
    """Training batches of ``SOLVER.BATCH_SIZE`` over all processes.

    Raises:
        ConfigError: they cannot be shared out, or ``SOLVER.ACCUMULATE`` does not divide a share.
    """
    size, parts = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    loader = dataset.train_loader(size, cfg.SEED, device, share, warn=lambda text: log.line(f"warning: {text}"))
    if loader.batch_size % parts:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE {size} over {share.world} processes is {loader.batch_size} images each, which "
            f"SOLVER.ACCUMULATE {parts} does not divide"
        )
    return loader


def build_step(
    cfg: Any,
    student: Network,
    distillers: Mapping[str, Distiller],
    loader: TrainLoader,
    teacher: Teacher | None,
    autocast: torch.dtype | None,
    compiled: bool,
) -> TrainStep:
    """The training step of a student and its methods, on the loader's device."""
    device = build_device(cfg)
    ce_weight = max((method.ce_weight for method in distillers.values()), default=1.0)
    trainable = Trainable(_on(student, device), distillers, ce_weight, autocast).to(device)
    if cfg.SOLVER.SYNC_BN:
        distributed.synchronise_batch_norms(trainable, device)
    if compiled:
        student.outputs = torch.compile(student.outputs, dynamic=False)  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler(device.type) if autocast is torch.float16 else None
    optimizer = build_optimizer(cfg, trainable, loader, teacher)
    meters = TrainMeters(trainable.loss_names).to(device)
    wrapped = distributed.wrap(trainable)
    return TrainStep(loader, teacher, trainable, optimizer, meters, scaler, wrapped, cfg.SOLVER.ACCUMULATE)


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


def run_folder(config: Config) -> Path:
    """``LOG.PREFIX/EXPERIMENT.PROJECT/(NAME or TAG)``, with what the command line changed about the computation."""
    cfg = config.node
    name = cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG
    if not cfg.EXPERIMENT.NAME:
        for key, source in config.sources.items():
            if source == "command line" and not key.startswith(NEUTRAL):
                value = cfg
                for part in key.split("."):
                    value = value[part]
                name += "," + f"{key}={value}".replace("/", "_").replace(" ", "")
    return Path(str(cfg.LOG.PREFIX), str(cfg.EXPERIMENT.PROJECT), name)


def _matters(key: str, cfg: Any) -> bool:
    """Whether another value of that key makes another computation; the nodes of unused methods do not."""
    section = key.split(".")[0]
    return not key.startswith(NEUTRAL) and (section not in DISTILLERS or section in method_names(cfg))


def open_folder(config: Config, resume: bool) -> tuple[Path, dict[str, Any] | None, str]:
    """Make the run folder, or find the state to go on from.

    Returns:
        The folder, the state of ``latest.pt`` or None, and a line for the log.

    Raises:
        ConfigError: it holds a run already and ``resume`` is off, or a run of another config.
    """
    folder = run_folder(config)
    latest, saved = folder / LATEST, folder / "config.yaml"
    if saved.exists() and not resume:
        raise ConfigError(
            f"{folder} holds a run already: --resume goes on with it, EXPERIMENT.NAME or EXPERIMENT.TAG starts another"
        )
    if latest.exists():
        changed = [key for key in differences(load_config(saved).node, config.node) if _matters(key, config.node)]
        if changed:
            raise ConfigError(f"{folder} was run with other values of {', '.join(changed)}: it cannot be resumed so")
        state = load(latest)
        return folder, state, f"resuming {folder} at epoch {state['epoch']}, step {state['steps_done'] + 1}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved.write_text(dump(config.node))
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be written ({error}): set LOG.PREFIX") from error
    return folder, None, f"nothing to resume in {folder}: starting" if resume else f"run folder {folder}"


def start_wandb(cfg: Any, folder: Path) -> str:
    """Mirror what TensorBoard gets to Weights & Biases; returns a warning where it is not installed."""
    try:
        import wandb
    except ImportError:
        return "LOG.WANDB is true and wandb is not installed (pip install 'mdistiller_norm[wandb]'): going on without"
    wandb.init(
        project=cfg.EXPERIMENT.PROJECT, name=folder.name, dir=str(folder), config=yaml.safe_load(dump(cfg)),
        tags=cfg.EXPERIMENT.TAG.split(","), sync_tensorboard=True,
    )  # fmt: skip
    return ""


def _open_run(config: Config, resume: bool, share: Share) -> tuple[Path, dict[str, Any] | None, RunLog]:
    """The run folder, the state to go on from, and the log. The folder is made by the first process of several."""
    opened = open_folder(config, resume or distributed.restarted()) if distributed.is_first() else None
    resumed = distributed.agree(int(opened is not None and opened[1] is not None))
    if opened is None:
        folder = run_folder(config)
        return folder, load(folder / LATEST) if resumed else None, SilentLog(share.rank)
    folder, state, opening = opened
    first = (state["epoch"], state["total_steps"] + 1) if state else (1, 0)
    warning = start_wandb(config.node, folder) if config.node.LOG.WANDB else ""
    log = RunLog(folder, *first)
    log.line(opening)
    if warning:
        log.line(f"warning: {warning}")
    return folder, state, log


def _check_teacher(network: Network, file: TeacherFile, name: str, test: EvalLoader, log: RunLog) -> Record:
    """Evaluate the teacher once, so that a wrong one is seen before the training."""
    measured = evaluate(network, test)
    log.line(f"teacher {name} from {file.path}: test top-1 {measured.top1:.2f}, top-5 {measured.top5:.2f}")
    seen = f"warning: the teacher reaches {measured.top1:.2f} top-1"
    if file.top1 is not None and measured.top1 < file.top1 - 1:
        log.line(f"{seen}, far below the {file.top1:.2f} of its manifest entry")
    elif measured.top1 < 200 / network.num_classes:
        log.line(f"{seen}, about chance: its weights or the data are wrong")
    return {"name": name, "file": str(file.path), "top1": measured.top1, "top5": measured.top5}


def _about(cfg: Any, dataset: Dataset) -> Record:
    """What a student's file says of it besides the weights."""
    return {
        "name": cfg.DISTILLER.STUDENT, "variant": dataset.variant, "num_classes": len(dataset.classes),
        "classes": list(dataset.classes), "dataset": dataset.name, "mean": list(dataset.mean), "std": list(dataset.std),
        "image_size": list(dataset.image_size), "type": cfg.DATASET.TYPE, "resize": cfg.DATASET.RESIZE,
        "seed": cfg.SEED,
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
    share = distributed.start(device, cfg.SOLVER.TIMEOUT)
    autocast, precision_warning = build_precision(cfg, device)
    dataset = dataset or build_dataset(cfg)
    student = build_student(cfg, dataset)
    names, teacher, taught, distillers = method_names(cfg), None, {}, {}
    if names:
        teacher_network, file = build_teacher(cfg, dataset)
        distillers = build_distillers(cfg, student, teacher_network, dataset)
    folder, state, log = _open_run(config, resume, share)
    if precision_warning:
        log.line(f"warning: {precision_warning}")
    test = dataset.eval_loader(cfg.DATASET.TEST.BATCH_SIZE, device, share)
    loader = build_train_loader(cfg, dataset, device, share, log)
    left = cfg.SOLVER.EPOCHS * loader.steps
    left -= state["total_steps"] if state else 0
    to_compile, reason = choose(cfg.ENGINE.COMPILE, device, left)
    if names:
        taught = _check_teacher(_on(teacher_network, device), file, cfg.DISTILLER.TEACHER, test, log)
        if reason:
            log.line(reason)
        teacher = build_teacher_runner(
            cfg, teacher_network, distillers, loader, file.path, dataset.image_size, autocast,
            to_compile in ("teacher", "all"), log,
        )  # fmt: skip
        taught["hash"] = teacher.hash
        if isinstance(teacher, CachedTeacher):
            log.line(teacher.check_space(left))
    step = build_step(cfg, student, distillers, loader, teacher, autocast, to_compile == "all")
    trainer = Trainer(
        step=step,
        schedule=StepSchedule(cfg.SOLVER.LR, tuple(cfg.SOLVER.LR_DECAY_STAGES), cfg.SOLVER.LR_DECAY_RATE),
        test=test, epochs=cfg.SOLVER.EPOCHS, seed=cfg.SEED, folder=folder, log=log, about=_about(cfg, dataset),
        identity={"teacher": taught.get("hash", "")}, save_every=cfg.LOG.SAVE_CHECKPOINT_FREQ,
        log_every=cfg.LOG.TENSORBOARD_FREQ, checkpoint_steps=cfg.LOG.CHECKPOINT_STEPS,
        run_step=_captured(cfg, step, device, log),
    )  # fmt: skip
    if state:
        if state["identity"] != trainer.identity:
            raise ConfigError(f"{folder} was run with another teacher: it cannot be resumed with {taught['file']}")
        trainer.load_state(state)
    if isinstance(teacher, CachedTeacher) and cfg.DISTILLER.TEACHER_CACHE == "full":
        epochs = range(trainer.epoch, cfg.SOLVER.EPOCHS + 1)
        trainer.ahead = teacher.fill(chain.from_iterable(loader.batches(epoch) for epoch in epochs), left)
    extra = sum(method.extra_parameters() for method in distillers.values())
    log.line(
        f"{'+'.join(names) or 'plain training'}: {cfg.DISTILLER.STUDENT} on {dataset.name}, {len(dataset.targets)} "
        f"images, {loader.steps} steps an epoch, {sum(p.numel() for p in student.parameters()):,} parameters and "
        f"{extra:,} extra"
    )
    result = {
        "method": names, "student": cfg.DISTILLER.STUDENT, "teacher": taught or None, "dataset": dataset.name,
        "seed": cfg.SEED, "epochs": cfg.SOLVER.EPOCHS, "extra_parameters": extra, "command": command,
        "processes": share.world, "config": yaml.safe_load(dump(cfg)), "environment": environment(device),
    }  # fmt: skip
    return Run(trainer, folder, result, trainer.epoch > cfg.SOLVER.EPOCHS)


def open_checkpoint(
    path: str | Path, model: str = "", kind: str = "", root: Path = Path("data")
) -> tuple[Network, Dataset]:
    """The network of a weights file, and the data set it was trained on.

    Args:
        path: any of the files that :func:`~mdistiller_norm.engine.checkpoint.load_weights` reads.
        model: its name; a ``student_*.pt`` knows it.
        kind: of the data set; a ``student_*.pt`` knows it, else cifar100.
        root: folder of the data sets.

    Raises:
        UserError: the file, the name or the data cannot be used, or do not fit each other.
    """
    weights = load_weights(path)
    about = weights.about
    name = model or about.get("name", "")
    if not name:
        raise ConfigError(f"{path} does not say what network it is: add -m, for example -m resnet20")
    known: dict[str, Any] = {key: about[key] for key in ("resize", "variant") if key in about}
    known |= {key: tuple(about[key]) for key in ("mean", "std", "classes") if key in about}
    images = ImageOptions(size=about.get("image_size", [ImageOptions.size])[0], train=False, **known)
    opener = DATASETS[kind or about.get("type", about.get("dataset", "cifar100"))]
    dataset = opener(data_root(root, about.get("dataset", "")), images)
    network = build_model(name, len(dataset.classes), variant=dataset.variant)
    load_into(network, weights, f"{name} with {len(dataset.classes)} classes")
    return network, dataset


def _on(network: Network, device: torch.device) -> Network:
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


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
    with distributed.watched():
        run = build_run(config, resume, shlex.join(command or []))
        log = run.trainer.log
        try:
            if distributed.is_first():
                write_json(run.result["environment"], run.folder / "environment.json")
            if run.finished:
                log.line(f"{run.folder} is finished already: nothing left to train")
            result = run.result | run.trainer.fit()
        finally:
            log.close()
    if distributed.is_first():
        write_json(result, run.folder / "result.json")
    distributed.stop()
    last, best = result["last"], result["best"]
    log.line(
        f"done: last top-1 {last['top1']:.2f}, best top-1 {best['top1']:.2f} (epoch {best['epoch']}); "
        f"weights, metrics.jsonl, result.json and tensorboard/ are in {run.folder}"
    )
    return result
