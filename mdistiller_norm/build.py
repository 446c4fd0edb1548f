"""Build the parts of a run from its config."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mdistiller_norm.config import method_names
from mdistiller_norm.data import (
    Dataset,
    ImageOptions,
    MemoryTrainLoader,
    TensorDataset,
    open_dataset,
)
from mdistiller_norm.data.base import EvalLoader, TrainLoader
from mdistiller_norm.data.folder import ImageDataset
from mdistiller_norm.data.mix import MixedLoader
from mdistiller_norm.data.plan import Share, smallest_micro_batch
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need, Pair, build_distiller
from mdistiller_norm.engine import checkpoint, distributed, teacher_file
from mdistiller_norm.engine.compile import compile_outputs
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.optim import DOT, build_fused
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError, first_line
from mdistiller_norm.files import command, find_config
from mdistiller_norm.models import Network, build_model, has_weights, probe
from mdistiller_norm.models.external import Size
from mdistiller_norm.models.preprocessed import Preprocessed, differences

Log = Callable[[str], None]
Methods = Mapping[str, Distiller]  # by name
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {dtype: name for name, dtype in _DTYPES.items()}  # names of autocast dtypes


def build_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA if available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return distributed.local_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"DEVICE {name} cannot be used: {first_line(error)}") from error
    if device.type == "cuda" and distributed.process_share().world > 1:
        raise ConfigError(f"DEVICE must be cuda with several processes, got {name}")
    return device


def build_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the autocast dtype and a warning: None (fp32) with a warning where a CPU would emulate the dtype."""
    dtype = _DTYPES[name]
    if device.type == "cpu" and dtype is not None:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if dtype is torch.float16 or not native:
            return None, f"this processor has no fast {name}: using fp32"
    return dtype, ""


def build_execution(cfg: Any) -> tuple[torch.device, torch.dtype | None, str]:
    """Set up the device; return it and :func:`build_precision`; check the settings that depend on both."""
    solver, world = cfg.SOLVER, distributed.process_share().world
    device = build_device(cfg.DEVICE)
    autocast, warning = build_precision(solver.PRECISION, device)
    if solver.SYNC_BN and device.type != "cuda":
        raise ConfigError(f"SOLVER.SYNC_BN requires a GPU, got {device}")
    if solver.BATCH_SIZE % (world * solver.ACCUMULATE):
        raise ConfigError(
            f"SOLVER.BATCH_SIZE {solver.BATCH_SIZE} must be a multiple of {world} processes x "
            f"SOLVER.ACCUMULATE {solver.ACCUMULATE}"
        )
    conflicts = {
        "DISTILLER.TYPE NONE": cfg.DISTILLER.TYPE == "NONE", "SOLVER.PRECISION fp16": autocast is torch.float16,
        "SOLVER.TYPE AdamW": solver.TYPE == "AdamW", "SOLVER.CLIP_GRAD": solver.CLIP_GRAD > 0,
        f"SOLVER.ACCUMULATE {solver.ACCUMULATE}": solver.ACCUMULATE > 1, f"{world} processes": world > 1,
    }  # fmt: skip
    found = [name for name, present in conflicts.items() if present]
    if solver.TRAINER.endswith("dot") and found:
        raise ConfigError(f"SOLVER.TRAINER {solver.TRAINER} does not support {', '.join(found)}")
    return device, autocast, warning


def build_dataset(cfg: Any) -> Dataset:
    """Open the data set."""
    data = cfg.DATASET
    images = ImageOptions(
        size=data.IMAGE_SIZE, resize=data.RESIZE, crop_scale=tuple(data.CROP_SCALE), mean=tuple(data.MEAN),
        std=tuple(data.STD), classes=tuple(data.CLASSES), variant=data.VARIANT, workers=data.NUM_WORKERS,
        max_broken=data.MAX_BROKEN, val_split=data.VAL_SPLIT, subset=data.SUBSET, randaugment=data.RANDAUGMENT,
    )  # fmt: skip
    return open_dataset(data.TYPE, Path(data.ROOT), images)


def check_data(
    cfg: Any, dataset: Dataset, student: Network, methods: Methods, share: Share
) -> None:
    """Check that augmentation and batch size fit the networks and methods, and without a teacher the test images."""
    data, batch_size, samples = cfg.DATASET, cfg.SOLVER.BATCH_SIZE, len(dataset.targets)
    mixing = [f"DATASET.{key}" for key in ("MIXUP", "CUTMIX") if data[key]]
    hard = [name for name, method in methods.items() if method.needs_labels]
    if mixing and hard:
        raise ConfigError(f"{mixing[0]} cannot be used with {hard[0]}: an image needs one class")
    used = mixing + ["DATASET.RANDAUGMENT"] * bool(data.RANDAUGMENT)
    if used and cfg.DISTILLER.TEACHER_CACHE != "off":
        raise ConfigError(f"{used[0]} cannot be used with DISTILLER.TEACHER_CACHE")
    if data.RANDAUGMENT and isinstance(dataset, TensorDataset):
        raise ConfigError(
            f"DATASET.RANDAUGMENT requires image files, {dataset.name} is in memory"
        )
    if not methods and (broken := dataset.unreadable(train=False, share=share)):
        raise DataError(f"the test image {broken[0]} cannot be read: repair or remove it")
    if smallest_micro_batch(samples, batch_size, share, cfg.SOLVER.ACCUMULATE) > 1:
        return
    shadow = copy.deepcopy(student).to("meta").train()
    try:
        with torch.no_grad():
            shadow(torch.empty(1, 3, *dataset.image_size, device="meta"))
    except ValueError as error:
        raise ConfigError(
            f"SOLVER.BATCH_SIZE {batch_size} leaves one of the {samples} images for a micro-batch, too few for "
            f"a batch norm of {student.name}"
        ) from error


def build_loaders(
    cfg: Any, dataset: Dataset, device: torch.device, share: Share, log: Log
) -> tuple[TrainLoader, EvalLoader]:
    """Return the loaders of this process's training and test images."""
    data = cfg.DATASET
    loader = dataset.train_loader(cfg.SOLVER.BATCH_SIZE, cfg.SEED, device, share)
    if share.rank == 0:  # the other processes print the warnings about their images
        loader.warn = lambda text: log(f"warning: {text}")
    if data.MIXUP or data.CUTMIX:
        loader = MixedLoader(loader, data.MIXUP, data.CUTMIX, len(dataset.classes), device)
    return loader, dataset.eval_loader(data.TEST.BATCH_SIZE, device, share)


def placed(network: Network, device: torch.device) -> Network:
    """Move a network to the device, in channels-last memory format."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _network(role: str, name: str, dataset: Dataset, size: Size) -> Network:
    count, variant = len(dataset.classes), dataset.variant
    pretrained = size is None or (role == "STUDENT" and has_weights(name))
    try:
        network = build_model(
            name, count, variant=variant, image_size=size, pretrained=pretrained
        )
        if size:  # None: the size of the pretrained weights
            probe(network, size)
        return network
    except ConfigError as error:
        raise ConfigError(f"DISTILLER.{role}: {error}") from error


def build_student(name: str, dataset: Dataset, seed: int) -> Network:
    """Return the student with its initial weights: a function of the seed, or pretrained if its name selects them."""
    torch.manual_seed(seed)
    return _network("STUDENT", name, dataset, dataset.image_size)


def train_command(kind: str, model: str) -> str:
    """Return the command that trains a network as a teacher on a data set of that ``DATASET.TYPE``."""
    file = f"configs/{kind}/vanilla{'_' if kind == 'digits' else '/'}{model}.yaml"
    other = f"FILE DISTILLER.TYPE NONE DISTILLER.STUDENT {model}"
    return f"{command('train')} --cfg {file if find_config(file).is_file() else other}"


def build_teacher(cfg: Any, dataset: Dataset) -> tuple[Network, teacher_file.TeacherFile]:
    """Return the teacher with its trained weights, which converts the images if these expect others."""
    name, weights_from = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS
    runs, command = Path(cfg.LOG.PREFIX), train_command(cfg.DATASET.TYPE, name)
    size, classes, warnings = dataset.image_size, dataset.classes, []
    network = _network("TEACHER", name, dataset, None if weights_from == "pretrained" else size)
    if weights_from == "pretrained":
        file = teacher_file.pretrained_teacher(network, classes, runs, command)
        about = network.pretrained
    else:
        keys = ("CLASSES", "IMAGE_SIZE", "MEAN", "STD", "VAL_SPLIT", "SUBSET")
        data = {key: cfg.DATASET[key] for key in keys}
        file = teacher_file.find_teacher(
            name, dataset.name, weights_from, runs, command, cfg.SOLVER.EPOCHS, data
        )
        weights = checkpoint.load_weights(file.path)
        warnings = [file.warning]
        about = file.images or weights.about  # torchvision's weights have no metadata
        if (trained_on := about.get("dataset", dataset.name)) != dataset.name:
            warnings.append(f"{file.path} was trained on {trained_on}, not on {dataset.name}")
            same_classes = list(about.get("classes", ())) == list(classes)
            # The folder of the images may have been renamed.
            if not (same_classes and isinstance(dataset, ImageDataset)):
                raise CheckpointError(warnings[-1])
        if (trained_size := tuple(about.get("image_size") or size)) != size:
            network = _network("TEACHER", name, dataset, trained_size)
        checkpoint.load_into(network, weights, f"{name} with {len(classes)} classes")
        teacher_file.check_classes(weights, classes)
    seen = {"image_size": size, "mean": dataset.mean, "std": dataset.std}
    if different := differences(about, seen):
        network = Preprocessed(network, about, seen)
        images = ", ".join(
            f"{key} {list(about[key])} (here {list(seen[key])})" for key in different
        )
        trained = f"{file.path} was trained on images with another {images}"
        warnings.append(f"{trained}: the images are converted for it")
    return network, replace(file, warning="; ".join(filter(None, warnings)))


def build_distillers(
    cfg: Any, student: Network, teacher: Network, targets: torch.Tensor, size: tuple[int, int]
) -> Methods:
    """Return the methods of ``DISTILLER.TYPE`` by name, for training images of those classes and that size."""
    shapes = [probe(network, size) for network in (student, teacher)]
    pair = Pair(shapes[0], shapes[1], teacher, targets, student.num_classes)
    lacking = (
        student.name if not shapes[0].features else "" if shapes[1].features else teacher.name
    )
    distillers = {}
    for name in method_names(cfg):
        if lacking and DISTILLERS[name].need is Need.MAPS:
            others = ", ".join(other for other, cls in DISTILLERS.items() if cls.need < Need.MAPS)
            problem = f"{name} requires feature maps, which {lacking} lacks"
            raise ConfigError(f"{problem}; without maps: {others}")
        distillers[name] = build_distiller(name, cfg, pair)
    if not any(method.ce_weight or method.weight for method in distillers.values()):
        names = " and ".join(distillers)
        raise ConfigError(f"{names}: CE_WEIGHT and the other weights must not all be 0")
    return distillers


def build_teacher_runner(
    cfg: Any,
    trained: tuple[Network, teacher_file.TeacherFile],
    distillers: Methods,
    loader: TrainLoader,
    test: EvalLoader,
    image_size: tuple[int, int],
    autocast: torch.dtype | None,
    device: torch.device,
    compiled: bool,
    log: Log,
) -> tuple[Teacher, dict[str, Any]]:
    """Evaluate the teacher; return it as a step uses it, run in every step or cached, with a record of it."""
    network, file = placed(trained[0], device), trained[1]
    cache = "" if cfg.DISTILLER.TEACHER_CACHE == "off" else cfg.DISTILLER.TEACHER_CACHE_PRECISION
    if cache and (reason := _no_cache_reason(distillers, loader)):
        log(f"no teacher cache: {reason}")
        cache = ""
    pooled = probe(network, image_size).pooled.shape[1]
    record = teacher_file.check_teacher(network, file, test, log)
    compiler = (
        partial(compile_outputs, name="teacher", warn=log, freezing=True) if compiled else None
    )
    arguments = (
        network, max(method.need for method in distillers.values()), autocast,
        any(method.teacher_in_train_mode for method in distillers.values()), compiler,
    )  # fmt: skip
    if not cache or not isinstance(loader, MemoryTrainLoader):
        live = Teacher(*arguments)
        return live, record | {"hash": live.hash}
    teacher = CachedTeacher(
        loader, file.cache_path(Path(cfg.LOG.PREFIX)), pooled, cache, *arguments
    )
    teacher.check_outputs()
    if line := teacher.hold_on_device():
        log(line)
    log(teacher.summary())
    return teacher, record | {"hash": teacher.hash, "cache": cache}


def _no_cache_reason(distillers: Methods, loader: TrainLoader) -> str:
    for name, method in distillers.items():
        if method.need > Need.POOLED:
            return f"{name} requires the teacher's maps, which are too large to store"
        if method.teacher_in_train_mode:
            return f"{name} runs the teacher in training mode, where its outputs depend on the whole batch"
    if not isinstance(loader, MemoryTrainLoader):
        return "the augmentation of this data set has no finite number of views"
    return ""


def build_step(
    cfg: Any,
    student: Network,
    distillers: Methods,
    loader: TrainLoader,
    teacher: Teacher | None,
    autocast: torch.dtype | None,
    device: torch.device,
    compiled: bool,
    log: Log,
) -> TrainStep:
    """Return the training step of a student and its methods."""
    solver = cfg.SOLVER
    trainable = Trainable(
        placed(student, device), distillers, autocast, solver.LABEL_SMOOTHING, solver.EMA
    ).to(device)
    if solver.SYNC_BN and distributed.together():
        distributed.synchronise_batch_norms(trainable)
    settings = {
        "lr": solver.LR, "momentum": solver.MOMENTUM, "weight_decay": solver.WEIGHT_DECAY, "nesterov": solver.NESTEROV,
    }  # fmt: skip
    optimizer: torch.optim.Optimizer | DOT
    if teacher is not None and solver.TRAINER.endswith("dot"):
        # DOT copies the student, before it is compiled.
        batch = loader.prepare(*next(loader.batches(1)))
        optimizer = DOT(trainable, batch, teacher, solver.DOT.DELTA, **settings)
    else:
        optimizer = build_fused(solver.TYPE, trainable.parameters(), **settings)
    if compiled:
        twice = isinstance(optimizer, DOT)
        trainable.forward_student = compile_outputs(student.outputs, "student", log, twice)
    return TrainStep(
        loader, teacher, trainable, optimizer, TrainMeters(trainable.loss_names).to(device),
        torch.amp.GradScaler(device.type, enabled=autocast is torch.float16), distributed.wrap(trainable),
        solver.ACCUMULATE, solver.CLIP_GRAD,
    )  # fmt: skip
