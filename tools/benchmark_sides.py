"""The two sides of ``tools/benchmark.py``: this project's training step and the reference's, timed block by block."""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import pickle
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.tensorboard
from torch import Tensor, nn

from mdistiller_norm.build import build_dataset, build_device
from mdistiller_norm.config import Config
from mdistiller_norm.data import Split, TensorDataset
from mdistiller_norm.data.cifar import MEAN, STD
from mdistiller_norm.engine.runtime import keep_freed_memory
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.registry import import_plugin
from mdistiller_norm.run import build_run


def clock(device: torch.device) -> float:
    """Return the time in seconds after synchronising the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def load_images(config: Config, synthetic: int) -> tuple[TensorDataset, str]:
    """Return the data set and its description: noise in the shapes of CIFAR-100 if requested or if it is missing."""
    node = config.node.DATASET
    present = node.TYPE != "cifar100" or (Path(node.ROOT) / "cifar-100-python").is_dir()
    if present and not synthetic:
        dataset = build_dataset(config.node)
        if not isinstance(dataset, TensorDataset):
            raise ConfigError(f"DATASET.TYPE must be cifar100 or digits, got {node.TYPE}")
        return dataset, f"real {node.TYPE}, {len(dataset.train)} training images"
    count, splits = synthetic or 50_000, []
    generator = torch.Generator().manual_seed(0)
    for size in (count, count // 5):
        images = torch.randint(256, (size, 32, 32, 3), generator=generator, dtype=torch.uint8)
        splits.append(Split(images, torch.arange(size).remainder(100)))
    dataset = TensorDataset("cifar100", *splits, tuple(map(str, range(100))), MEAN, STD)
    return dataset, f"synthetic: {count} images of noise in the shapes of CIFAR-100"


class Ours:
    """A training run, one block of steps at a time; with ``replay`` each block trains on the same batches."""

    def __init__(self, config: Config, dataset: TensorDataset, replay: bool = False) -> None:
        self.seed, self.replay = config.node.SEED, replay
        few = dataset.test[:64]  # for the evaluation of the teacher
        with contextlib.redirect_stdout(StringIO()):
            run = build_run(config, dataset=replace(dataset, test=few))
            for _ in run.trainer.prefetch:  # a full teacher cache
                pass
        run.trainer.log.close()
        self.log = (run.folder.path / "worklog.txt").read_text().splitlines()
        self.step, self.run_step = run.trainer.step, run.trainer.run_step
        self.device = build_device(config.node.DEVICE)
        self.step.trainable.train()
        self._batches = self._endless()

    def _endless(self) -> Iterator[tuple[Tensor, ...]]:
        step = self.step
        for epoch in itertools.count(1):
            step.begin_epoch(epoch, self.seed)
            batches = step.with_teacher_outputs(step.loader.batches(epoch))
            yield from (batch for batch in batches if len(batch[0]) == step.loader.batch_size)

    def block(self, steps: int) -> float:
        """Train; return the seconds of a step."""
        if self.replay:
            self._batches = self._endless()
        start = clock(self.device)
        for _ in range(steps):
            self.run_step(*next(self._batches))
        return (clock(self.device) - start) / steps


def memory(config: Config, synthetic: int) -> float:
    """Return the peak memory (on the CPU: resident) of three training steps in MB; call it in a separate process."""
    for name in config.node.EXPERIMENT.PLUGINS:
        import_plugin(name)
    ours = Ours(config, load_images(config, synthetic)[0])
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which reading may have set
    ours.block(3)
    if ours.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ours.device) / 1e6
    peak = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]
    return int(peak) * 1024 / 1e6


def _module(name: str) -> Any:
    return importlib.import_module(f"mdistiller.{name}")


class _Block:
    """A train loader that times a block of full batches and then leaves the trainer's epoch by an EOFError."""

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.steps, self.seconds = 0, 0.0
        self._batches = self._endless()

    def __len__(self) -> int:
        return len(self.loader)

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from (batch for batch in self.loader if len(batch[0]) == self.loader.batch_size)

    def __iter__(self) -> Iterator[Any]:
        start = clock(self.device)
        for _ in range(self.steps):
            yield next(self._batches)
        self.seconds = clock(self.device) - start
        raise EOFError


class Reference:
    """The trainer of a checkout in mdistiller's layout, one block of steps at a time.

    It receives our hyper-parameters, images (``data`` contains ``cifar-100-python``) and state dicts of both networks.
    """

    def __init__(
        self, cfg: Any, data: Path, weights: list[Any], folder: Path, device: torch.device
    ) -> None:
        self.device = device
        self._null = open(os.devnull, "w")  # noqa: SIM115 - its progress bars keep it
        method, node = cfg.DISTILLER.TYPE, _reference_config(cfg, folder)
        known, models = _module("distillers").distiller_dict, _module("models").cifar_model_dict
        names = [node.DISTILLER.STUDENT, node.DISTILLER.TEACHER]
        if method not in known or not models.keys() >= {*names}:
            pair = " and ".join(names)
            raise ConfigError(f"--against: the reference has no {method} with {pair}")
        with self._patched(data):
            train, self._test, count, classes = _module("dataset").get_dataset(node)
            networks = [models[name][0](num_classes=classes) for name in names]
            for network, state in zip(networks, weights, strict=True):
                network.load_state_dict(state)
            distiller = known[method](*networks, node, *((count,) if method == "CRD" else ()))
            self._distiller = nn.DataParallel(distiller.cuda())
            self._block = _Block(train, device)
            trainer = _module("engine").trainer_dict[node.SOLVER.TRAINER]
            self._trainer = trainer("reference", self._distiller, self._block, self._test, node)

    @staticmethod
    def load_package(path: Path) -> None:
        """Make ``import mdistiller`` import the checkout at ``path``."""
        package = path / "mdistiller"
        if not (package / "__init__.py").is_file():
            raise ConfigError(f"--against {path} must have mdistiller's layout, with {package}")
        if importlib.util.find_spec("tensorboardX") is None:
            sys.modules["tensorboardX"] = torch.utils.tensorboard  # it has the same SummaryWriter
        sys.path.insert(0, str(path.resolve()))

    @contextlib.contextmanager
    def _patched(self, data: Path | None = None) -> Iterator[None]:
        """Replace CUDA, the data folder and the output of its code while it runs; keep its allocator settings."""
        output = contextlib.redirect_stderr(self._null), contextlib.redirect_stdout(self._null)
        # The cuDNN settings are those of its train.py.
        contexts: list[Any] = [*output, torch.backends.cudnn.flags(enabled=True, benchmark=True)]
        if self.device.type == "cpu":
            for kind in (Tensor, nn.Module):
                contexts.append(patch.object(kind, "cuda", lambda self, *_, **__: self))
        if data:  # the checksums are those of the original files
            contexts.append(
                patch("torchvision.datasets.cifar.check_integrity", return_value=True)
            )
            folder = "mdistiller.dataset.cifar100.get_data_folder"
            contexts.append(patch(folder, return_value=str(data), create=True))
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
                mallopt = ctypes.CDLL("libc.so.6").mallopt
                # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: the largest of the defaults.
                mallopt(-3, 32 * 2**20)
                mallopt(-1, 64 * 2**20)
            stack.callback(keep_freed_memory)
            for context in contexts:
                stack.enter_context(context)
            yield

    def block(self, steps: int) -> float:
        """Train; return the seconds of a step."""
        self._block.steps = steps
        with self._patched(), contextlib.suppress(EOFError):
            self._trainer.train_epoch(1)
        time.sleep(0.5)  # its workers fill their queue now and not during our block
        return self._block.seconds / steps

    def images_per_second(self) -> float:
        """Evaluate the whole test split with its function; return images per second."""
        with self._patched():
            start = clock(self.device)
            _module("engine.utils").validate(self._test, self._distiller)
            return len(self._test.dataset) / (clock(self.device) - start)


def _reference_config(cfg: Any, folder: Path) -> Any:
    """Return the reference's config: its defaults with our values of the keys that both have."""

    def copy_shared(source: Any, target: Any) -> None:
        for key in {*source} & {*target}:
            if isinstance(target[key], dict) and isinstance(source[key], dict):
                copy_shared(source[key], target[key])
            else:
                target[key] = source[key]

    node = _module("engine.cfg").CFG.clone()
    node.defrost()
    copy_shared(cfg, node)
    if cfg.DISTILLER.TYPE == "CRD":  # its default dimensions fit one pair only
        for role in ("STUDENT", "TEACHER"):
            pooled = probe(build_model(cfg.DISTILLER[role], 2)).pooled
            node.CRD.FEAT[f"{role}_DIM"] = pooled.shape[1]
    node.SOLVER.TRAINER = "crd" if cfg.DISTILLER.TYPE == "CRD" else "base"
    node.LOG.PREFIX, node.LOG.WANDB = str(folder), False
    return node


def write_cifar(dataset: TensorDataset, root: Path) -> None:
    """Write a data set in the format of ``cifar-100-python``."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        pixels = split.images.permute(0, 3, 1, 2).reshape(len(split), -1).numpy()
        content = {"data": pixels, "fine_labels": split.targets.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list(dataset.classes)}))
