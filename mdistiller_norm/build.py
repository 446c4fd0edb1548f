"""From a config to the objects that run; what is in ``engine``, ``data`` and ``models`` takes explicit arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller_norm.config import default_config, method_names
from mdistiller_norm.data import (
    DATASETS,
    Dataset,
    EvalLoader,
    ImageOptions,
    MemoryEvalLoader,
    MemoryTrainLoader,
    Share,
    TensorDataset,
    TrainLoader,
    open_dataset,
)  # fmt: skip
from mdistiller_norm.data.image_folder import ImageDataset, data_root
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need, Pair
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import load_into, load_weights
from mdistiller_norm.engine.compile import compile_student, compile_teacher
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.graph import CapturedNetwork, CapturedStep
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.optim import build_sgd
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import LiveTeacher, Teacher
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.engine.teacher_file import TeacherFile, check_preprocessing, find_teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.errors import CheckpointError, ConfigError, first_line
from mdistiller_norm.files import PROJECT
from mdistiller_norm.models import VARIANTS, build_model, probe
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Outputs

Say = Callable[[str], None]
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {dtype: name for name, dtype in _DTYPES.items()}  # what an autocast dtype is called


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
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"DEVICE {cfg.DEVICE!r} cannot be used here ({first_line(error)}): choose auto, cpu or cuda"
        ) from error
    if device.type == "cuda" and distributed.wanted().world > 1:
        raise ConfigError(f"DEVICE {cfg.DEVICE} puts all processes on one GPU: choose cuda, which gives each its own")
    return device


def build_precision(cfg: Any, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype of ``SOLVER.PRECISION``, and a warning: None with one where a processor would emulate it.

    A GPU is taken to have it.
    """
    dtype = _DTYPES[cfg.SOLVER.PRECISION]
    if device.type == "cpu" and dtype is not None:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if dtype is torch.float16 or not native:
            return None, f"this processor has no fast {cfg.SOLVER.PRECISION}: fp32 is taken instead"
    return dtype, ""


def placed(network: Network, device: torch.device) -> Network:
    """The network on its device, in the memory layout that is fast there."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def image_options(cfg: Any) -> ImageOptions:
    """How image files are read."""
    data = cfg.DATASET
    return ImageOptions(
        size=data.IMAGE_SIZE, resize=data.RESIZE, crop_scale=tuple(data.CROP_SCALE), mean=tuple(data.MEAN),
        std=tuple(data.STD), classes=tuple(data.CLASSES), variant=data.VARIANT, workers=data.NUM_WORKERS,
        max_broken=data.MAX_BROKEN,
    )  # fmt: skip


def build_dataset(cfg: Any) -> Dataset:
    """The data set of ``DATASET.TYPE``; with ``DATASET.VAL_SPLIT`` part of its training split is the test split.

    Raises:
        UserError: the data are missing or broken, or cannot be split.
    """
    data = cfg.DATASET
    dataset = open_dataset(data.TYPE, Path(data.ROOT), image_options(cfg))
    if not data.VAL_SPLIT:
        return dataset
    if not isinstance(dataset, TensorDataset):
        raise ConfigError(f"DATASET.VAL_SPLIT is for data sets in memory, not for {data.TYPE}: split its folders")
    return dataset.hold_out(data.VAL_SPLIT)


def build_student(cfg: Any, dataset: Dataset) -> Network:
    """The student with its initial weights, a function of ``SEED`` alone.

    Raises:
        ConfigError: there is no such network, or it cannot take the data set's images.
    """
    torch.manual_seed(cfg.SEED)
    student = build_model(cfg.DISTILLER.STUDENT, len(dataset.classes), variant=dataset.variant)
    probe(student, dataset.image_size)
    return student


def train_command(kind: str, model: str) -> str:
    """The command that trains this network as a teacher, on a data set of that ``DATASET.TYPE``."""
    file = Path("configs", kind, f"vanilla_{model}.yaml" if kind == "digits" else f"vanilla/{model}.yaml")
    if (PROJECT / file).is_file():
        return f"python tools/train.py --cfg {file}"
    return f"python tools/train.py --cfg FILE DISTILLER.TYPE NONE DISTILLER.STUDENT {model}"


def build_teacher(cfg: Any, dataset: Dataset) -> tuple[Network, TeacherFile]:
    """The teacher with its trained weights.

    Raises:
        CheckpointError: its weights are missing (says what trains them) or do not fit.
    """
    name = cfg.DISTILLER.TEACHER
    network = build_model(name, len(dataset.classes), variant=dataset.variant)
    runs, command = Path(cfg.LOG.PREFIX), train_command(cfg.DATASET.TYPE, name)
    data = {key: cfg.DATASET[key] for key in ("CLASSES", "IMAGE_SIZE", "MEAN", "STD")}
    file = find_teacher(name, dataset.name, cfg.DISTILLER.TEACHER_WEIGHTS, runs, command, cfg.SOLVER.EPOCHS, data)
    weights = load_weights(file.path)
    trained_on, renamed = weights.about.get("dataset", dataset.name), ""
    if trained_on != dataset.name:
        renamed = f"{file.path} was trained on {trained_on}, not on {dataset.name}"
        if not isinstance(dataset, ImageDataset) or list(weights.about.get("classes", ())) != list(dataset.classes):
            raise CheckpointError(renamed)  # else the name, which is that of its folder, may be another one now
    load_into(network, weights, f"{name} with {len(dataset.classes)} classes")
    seen = {"image_size": dataset.image_size, "mean": dataset.mean, "std": dataset.std}
    doubts = [file.warning, renamed, check_preprocessing(weights, dataset.classes, seen)]
    return network, replace(file, warning="; ".join(filter(None, doubts)))


def build_distillers(cfg: Any, student: Network, teacher: Network, dataset: Dataset) -> dict[str, Distiller]:
    """The methods of ``DISTILLER.TYPE`` for this pair of networks, by name.

    Raises:
        ConfigError: a method does not work for them.
    """
    size = dataset.image_size
    pair = Pair(probe(student, size), probe(teacher, size), teacher, dataset.targets, len(dataset.classes))
    for name in method_names(cfg):
        for network, outputs in ((student, pair.student), (teacher, pair.teacher)):
            if DISTILLERS[name].need is Need.MAPS and not outputs.features:
                raise ConfigError(f"{name} reads maps, and {network.name} shows none: name its features, or choose KD")
    return {name: _build_distiller(name, cfg, pair) for name in method_names(cfg)}


def _build_distiller(name: str, cfg: Any, pair: Pair) -> Distiller:
    try:
        method = DISTILLERS[name].from_config(cfg.get(name, CfgNode()), pair)  # no node: a method without keys
    except ConfigError as error:
        if str(error).startswith(name):
            raise
        raise ConfigError(f"{name}: {error}") from error
    if not isinstance(method, Distiller):
        raise ConfigError(f"{name}: its from_config gives a {type(method).__name__}, not the method")
    return method


def build_teacher_runner(
    cfg: Any,
    network: Network,
    distillers: Mapping[str, Distiller],
    loader: TrainLoader,
    checkpoint: Path,
    image_size: tuple[int, int],
    autocast: torch.dtype | None,
    compiled: bool,
    say: Say,
) -> Teacher:
    """The teacher as a step uses it: run in every step, or its answers kept in a cache."""
    need = max(method.need for method in distillers.values())
    train_mode = any(method.teacher_in_train_mode for method in distillers.values())

    device = next(network.parameters()).device

    def live(batch_size: int) -> LiveTeacher:
        if not compiled:
            return LiveTeacher(network, need, autocast, train_mode)
        # Made here: in inference mode, where it is compiled for, this would be a tensor of another kind than the
        # batches are, and everything would be compiled once more in the first step.
        example = torch.zeros(batch_size, 3, *image_size, device=device).to(memory_format=torch.channels_last)

        def compiler(module: nn.Module) -> Callable[[Tensor], Outputs]:
            return compile_teacher(module, example, say)

        return LiveTeacher(network, need, autocast, train_mode, compiler)

    if cfg.DISTILLER.TEACHER_CACHE == "off":
        return live(loader.batch_size)
    if need > Need.POOLED:
        readers = [name for name, method in distillers.items() if method.need > Need.POOLED]
        say(f"no teacher cache: {' and '.join(readers)} reads the teacher's maps, which are too large to keep")
        return live(loader.batch_size)
    if train_mode:
        users = [name for name, method in distillers.items() if method.teacher_in_train_mode]
        say(f"no teacher cache: {' and '.join(users)} has the teacher's answers depend on the batch they are given in")
        return live(loader.batch_size)
    if not isinstance(loader, MemoryTrainLoader):
        say(f"no teacher cache: the augmentation of {cfg.DATASET.TYPE} has no finite number of views")
        return live(loader.batch_size)
    pooled = probe(network, image_size).pooled.shape[1]
    precision = cfg.DISTILLER.TEACHER_CACHE_PRECISION
    runs = live(CachedTeacher.batch_size(loader, device))
    cached = CachedTeacher(runs, loader, checkpoint, loader.fingerprint(), network.num_classes, pooled, precision)
    cached.check_answers()
    if line := cached.hold_on_device():
        say(line)
    return cached


def fastest(cfg: Any, step: TrainStep, say: Say) -> Callable[..., None]:
    """A step as a CUDA graph, where it can be one; else as it is."""
    device, why = step.factors.device, ""
    if device.type != "cuda":
        why = "there is no CUDA device" if cfg.ENGINE.CUDA_GRAPH == "on" else "off"
    elif slow := [name for name, method in step.trainable.distillers.items() if not method.capturable]:
        why = f"{' and '.join(slow)} waits for the host in every step"
    elif distributed.together():
        why = "several processes exchange gradients in it"
    elif not isinstance(step.loader, MemoryTrainLoader):
        why = "the images of this data set come from the host"
    if cfg.ENGINE.CUDA_GRAPH == "off" or why:
        if why not in ("", "off"):
            say(f"no CUDA graph: {why}")
        return step
    return CapturedStep(step, say)


def fastest_test(cfg: Any, network: Network, test: EvalLoader, say: Say) -> Callable[[Tensor], Tensor] | None:
    """The network as CUDA graphs for evaluation, where the images lie on a CUDA device; else None."""
    device = next(network.parameters()).device
    held = isinstance(test, MemoryEvalLoader)
    return CapturedNetwork(network, say) if cfg.ENGINE.CUDA_GRAPH != "off" and device.type == "cuda" and held else None


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


def build_train_loader(cfg: Any, dataset: Dataset, device: torch.device, share: Share, say: Say) -> TrainLoader:
    """Training batches of ``SOLVER.BATCH_SIZE`` over all processes.

    Raises:
        ConfigError: they cannot be shared out, or ``SOLVER.ACCUMULATE`` does not divide a share.
    """
    size, parts = cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE
    if share.rank == 0:
        for warning in _doubtful(cfg, dataset):
            say(f"warning: {warning}")
    loader = dataset.train_loader(size, cfg.SEED, device, share, warn=lambda text: say(f"warning: {text}"))
    if loader.batch_size % parts:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE {size} over {share.world} processes is {loader.batch_size} images each, which "
            f"SOLVER.ACCUMULATE {parts} does not divide"
        )
    return loader


def _doubtful(cfg: Any, dataset: Dataset) -> list[str]:
    """Settings that this data set makes nothing of, or hardly what was meant, a line each."""
    size, images = cfg.SOLVER.BATCH_SIZE, len(dataset.targets)
    lines = []
    if size > images:
        lines.append(f"SOLVER.BATCH_SIZE {size} is more than the {images} training images: an epoch is one step of all")
    if isinstance(dataset, TensorDataset):
        asked, defaults = cfg.DATASET, default_config().DATASET
        seen = {  # a plugin may have heeded these
            "IMAGE_SIZE": dataset.image_size[0], "MEAN": dataset.mean, "STD": dataset.std, "CLASSES": dataset.classes,
            "VARIANT": dataset.variant, "RESIZE": None, "CROP_SCALE": None,
        }  # fmt: skip
        for key, value in seen.items():
            typed = tuple(asked[key]) if isinstance(asked[key], list) else asked[key]
            if asked[key] != defaults[key] and typed != value:
                lines.append(f"DATASET.{key} has no effect on {dataset.name}, which is held in memory")
    elif isinstance(dataset, ImageDataset) and 2 * cfg.DATASET.IMAGE_SIZE < cfg.DATASET.RESIZE:
        size, resize = cfg.DATASET.IMAGE_SIZE, cfg.DATASET.RESIZE
        lines.append(
            f"DATASET.RESIZE {resize} with IMAGE_SIZE {size}: of a test image no more than the middle "
            f"{(size / resize) ** 2:.0%} is seen; usual would be {round(size * 8 / 7)}"
        )
    return lines


def build_step(
    cfg: Any,
    student: Network,
    distillers: Mapping[str, Distiller],
    loader: TrainLoader,
    teacher: Teacher | None,
    autocast: torch.dtype | None,
    compiled: bool,
    say: Say,
) -> TrainStep:
    """The training step of a student and its methods, on the loader's device."""
    device = build_device(cfg)
    ce_weight = max((method.ce_weight for method in distillers.values()), default=1.0)
    trainable = Trainable(placed(student, device), distillers, ce_weight, autocast).to(device)
    if cfg.SOLVER.SYNC_BN:
        distributed.synchronise_batch_norms(trainable, device)
    scaler = torch.amp.GradScaler(device.type) if autocast is torch.float16 else None
    optimizer = build_optimizer(cfg, trainable, loader, teacher)  # DOT copies it: before compiling
    if compiled:
        trainable.passes = compile_student(student, say, twice=isinstance(optimizer, DOT))
    meters = TrainMeters(trainable.loss_names).to(device)
    wrapped = distributed.wrap(trainable)
    return TrainStep(loader, teacher, trainable, optimizer, meters, scaler, wrapped, cfg.SOLVER.ACCUMULATE)


def open_checkpoint(
    path: str | Path, model: str = "", kind: str = "", root: Path = Path("data"), dataset: Dataset | None = None
) -> tuple[Network, Dataset]:
    """The network of a weights file, and the data set it was trained on.

    Args:
        path: any of the files that :func:`~mdistiller_norm.engine.checkpoint.load_weights` reads.
        model: its name; a ``student_*.pt`` knows it.
        kind: of the data set; a ``student_*.pt`` knows it, else cifar100.
        root: folder of the data sets.
        dataset: an opened one, whatever the file says of its own.

    Raises:
        UserError: the file, the name or the data cannot be used, or do not fit each other.
    """
    weights = load_weights(path)
    about = weights.about
    name = model or about.get("name", "")
    if not name:
        raise ConfigError(f"{path} does not say what network it is: add -m, for example -m resnet20")
    kind = kind or about.get("type", about.get("dataset", "cifar100"))
    known_data = dataset is not None or kind in DATASETS
    if about.get("plugins") and not (known_data and name in chain(*VARIANTS.values())):
        wanted = " ".join(about["plugins"])
        raise CheckpointError(f"{path} is of {name} on {kind}, which a plugin brings: add --plugin {wanted}")
    if dataset is None:
        known: dict[str, Any] = {key: about[key] for key in ("resize", "variant") if key in about}
        known |= {key: tuple(about[key]) for key in ("mean", "std", "classes") if key in about}
        images = ImageOptions(size=about.get("image_size", [ImageOptions.size])[0], train=False, **known)
        dataset = open_dataset(kind, data_root(root, about.get("dataset", "")), images)
    network = build_model(name, len(dataset.classes), variant=dataset.variant)
    load_into(network, weights, f"{name} with {len(dataset.classes)} classes")
    return network, dataset
