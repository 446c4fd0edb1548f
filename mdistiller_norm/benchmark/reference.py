"""The other side: a checkout in mdistiller's layout, driven through its own training loop.

Nothing of it is copied. Its package is imported from where it lies; its models, distiller, config, data set, loaders
and trainer are its own. From here it gets hyper-parameters, weights and images, and what a machine without CUDA or
without tensorboardX needs to run it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from yacs.config import CfgNode

from mdistiller_norm.benchmark.timing import clock
from mdistiller_norm.data import Split, TensorDataset
from mdistiller_norm.engine.runtime import freed_memory_as_usual
from mdistiller_norm.errors import ConfigError, first_line
from mdistiller_norm.models import build_model, probe

PACKAGE = "mdistiller"


def load_package(path: Path) -> None:
    """Make ``import mdistiller`` mean the checkout at ``path``.

    Raises:
        ConfigError: there is none, it cannot be imported, or another one is loaded already.
    """
    if not (path / PACKAGE / "__init__.py").is_file():
        raise ConfigError(f"--against {path}: there is no {path / PACKAGE}/__init__.py, it must be mdistiller's layout")
    try:
        importlib.import_module("tensorboardX")
    except ImportError:
        substitute = types.ModuleType("tensorboardX")
        substitute.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        sys.modules["tensorboardX"] = substitute
    if str(path.resolve()) not in sys.path:
        sys.path.insert(0, str(path.resolve()))
    try:
        for name in ("engine.cfg", "engine.utils", "engine", "models", "dataset", "distillers"):
            module = importlib.import_module(f"{PACKAGE}.{name}")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--against {path}: its package cannot be imported ({error})") from error
    if path.resolve() not in Path(str(module.__file__)).resolve().parents:
        raise ConfigError(f"--against {path}: {PACKAGE} is imported from {module.__file__} already")


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def write_cifar(dataset: TensorDataset, root: Path) -> None:
    """Write a data set in the format of ``cifar-100-python``."""
    folder = root / "cifar-100-python"
    folder.mkdir()

    def write(name: str, content: Mapping[str, Any]) -> None:
        (folder / name).write_bytes(pickle.dumps(content))

    def write_split(name: str, split: Split) -> None:
        pixels = split.images.permute(0, 3, 1, 2).reshape(len(split), -1).numpy()
        write(name, {"data": pixels, "fine_labels": split.targets.tolist()})

    write_split("train", dataset.train)
    write_split("test", dataset.test)
    write("meta", {"fine_label_names": list(dataset.classes)})


class _BlockDone(Exception):  # noqa: N818 - not an error
    """The steps of a block are over: leaves the trainer's epoch before its evaluation and checkpoints."""


class _Block:
    """A train loader that ends the epoch after a block, and times it from the wait for the first batch on.

    Its loader goes on where the last block ended, short batches left out.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.steps, self.seconds = 0, 0.0
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        start, done = clock(self.device), 0
        while done < self.steps:
            for batch in self._batches:
                if len(batch[0]) == self.loader.batch_size:
                    yield batch
                    done += 1
                    if done == self.steps:
                        break
            else:
                self._batches = iter(self.loader)
        self.seconds = clock(self.device) - start
        raise _BlockDone


class Reference:
    """The reference's trainer, a block of steps at a time.

    Args:
        path: the checkout.
        cfg: our config node; where the reference has the same key it gets our value (ReviewKD's shapes too: its
            defaults are those of resnet32x4 -> resnet8x4, for another pair set REVIEWKD's keys).
        data: the folder that holds ``cifar-100-python``.
        weights: state dicts of the networks by role, ``student`` and ``teacher``: both sides start from the same ones.
        folder: for its output.
        device: where it runs.

    Raises:
        ConfigError: it lacks the method or a network, or cannot run on this device or data set.
    """

    def __init__(
        self, path: Path, cfg: Any, data: Path, weights: Mapping[str, Mapping[str, Tensor]], folder: Path,
        device: torch.device,
    ) -> None:  # fmt: skip
        method = cfg.DISTILLER.TYPE
        if cfg.DATASET.TYPE != "cifar100":
            raise ConfigError(f"--against needs DATASET.TYPE cifar100, not {cfg.DATASET.TYPE}: its loop reads that")
        if device.type == "cpu" and torch.cuda.is_available():
            raise ConfigError("--against with DEVICE cpu needs a hidden GPU: set CUDA_VISIBLE_DEVICES to nothing")
        load_package(path)
        known = _module("distillers").distiller_dict
        if method not in known:
            raise ConfigError(f"--against {path} has no method {method}: --methods can be {', '.join(sorted(known))}")
        self.device = device
        self._null = open(os.devnull, "w")  # noqa: SIM115 - its progress bars hold on to it
        node = self._config(cfg, folder)
        with self._patched(data):
            train, self._test, count, classes = _module("dataset").get_dataset(node)
            networks = {}
            for role, name in (("student", node.DISTILLER.STUDENT), ("teacher", node.DISTILLER.TEACHER)):
                models = _module("models").cifar_model_dict
                if name not in models:
                    raise ConfigError(f"--against {path} has no CIFAR model {name}")
                networks[role] = models[name][0](num_classes=classes)
                try:
                    networks[role].load_state_dict(weights[role])
                except RuntimeError as error:
                    reason = str(error).splitlines()[1].strip()
                    raise ConfigError(f"--against {path}: its {name} is another network ({reason})") from error
            more = (count,) if method == "CRD" else ()
            distiller = known[method](networks["student"], networks["teacher"], node, *more)
            self._distiller = nn.DataParallel(distiller.cuda())
            self._block = _Block(train, device)
            make = _module("engine").trainer_dict[node.SOLVER.TRAINER]
            self._trainer = make("reference", self._distiller, self._block, self._test, node)

    @staticmethod
    def _config(cfg: Any, folder: Path) -> Any:
        """The reference's config: its defaults, and our values of all keys that both have."""
        node = _module("engine.cfg").CFG.clone()
        node.defrost()
        _copy_shared(cfg, node)
        if cfg.DISTILLER.TYPE == "CRD":  # ours finds these out, and its defaults fit one pair
            for role in ("STUDENT", "TEACHER"):
                network = build_model(cfg.DISTILLER[role], 2)
                node.CRD.FEAT[f"{role}_DIM"] = probe(network).pooled.shape[1]
        node.SOLVER.TRAINER = "crd" if cfg.DISTILLER.TYPE == "CRD" else "base"
        node.LOG.PREFIX, node.LOG.WANDB = str(folder), False
        return node

    @contextlib.contextmanager
    def _patched(self, data: Path | None = None) -> Iterator[None]:
        """What its code needs while it runs: no CUDA where there is none, our data, and no progress bar on screen.

        And what is its own: the C library's way with freed memory, which our tools change for their process.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(freed_memory_as_usual())
            stack.enter_context(contextlib.redirect_stderr(self._null))
            stack.enter_context(contextlib.redirect_stdout(self._null))
            stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            torch.backends.cudnn.benchmark = True  # as its tools/train.py has it
            if self.device.type == "cpu":
                for kind in (Tensor, nn.Module):
                    stack.enter_context(patch.object(kind, "cuda", lambda self, *_, **__: self))
            if data:
                # Any order of CIFAR-100's images will do: torchvision's checksums know one.
                stack.enter_context(
                    patch.object(
                        torchvision.datasets.cifar, "check_integrity", lambda file, md5=None: os.path.isfile(file)
                    )
                )
                stack.enter_context(
                    patch.object(_module("dataset.cifar100"), "get_data_folder", lambda: str(data), create=True)
                )
            yield

    def block(self, steps: int) -> float:
        """Train; returns the seconds a step."""
        self._block.steps = steps
        try:
            with self._patched(), contextlib.suppress(_BlockDone):
                self._trainer.train_epoch(1)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise ConfigError(f"--against: a training step of the reference failed ({reason})") from error
        time.sleep(0.5)  # its workers fill their queue now, and not on the other side's time
        return self._block.seconds / steps

    def images_per_second(self) -> float:
        """Of its evaluation of the whole test split."""
        with self._patched():
            start = clock(self.device)
            _module("engine.utils").validate(self._test, self._distiller)
            seconds = clock(self.device) - start
        return len(self._test.dataset) / seconds

    def close(self) -> None:
        """Stop its workers."""
        self._block = None  # type: ignore[assignment]
        self._trainer = None
        self._null.close()


def _copy_shared(source: CfgNode, target: CfgNode) -> None:
    """Write the values of keys that both trees have from ``source`` to ``target``."""
    for key in {*source} & {*target}:
        if isinstance(target[key], CfgNode) and isinstance(source[key], CfgNode):
            _copy_shared(source[key], target[key])
        else:
            target[key] = source[key]
