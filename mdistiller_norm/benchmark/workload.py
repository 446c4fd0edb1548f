"""Our side: runs built as ``tools/train.py`` builds them, timed block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mdistiller_norm.benchmark.timing import Record, clock
from mdistiller_norm.build import build_dataset, build_device, train_command
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.data import MemoryTrainLoader, Split, TensorDataset
from mdistiller_norm.data.cifar import MEAN, STD
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.teacher_file import find_teacher
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.files import PROJECT
from mdistiller_norm.models import build_model
from mdistiller_norm.plugins import import_plugin
from mdistiller_norm.run import Run, build_run

# Folders of configs/cifar100 that are not called as the method in lower case.
_FOLDERS = {"NormKD_W_DKD": "dkd_normkd"}


def method_folder(method: str) -> str:
    """Its folder in ``configs/cifar100``."""
    return _FOLDERS.get(method, method.lower())


def method_config(pair: str, cfg: str, method: str, overrides: list[str], others: Sequence[str] = ()) -> Config:
    """The config of a method: the pair's own file in ``configs/cifar100``, or ``cfg`` with another method.

    The overrides may set keys of the ``others`` that are measured with it.

    Raises:
        ConfigError: there is no such file, or an override cannot be used.
    """
    if cfg:
        return load_config(cfg, [*overrides, f"DISTILLER.TYPE={method}"], others)
    file = PROJECT / "configs" / "cifar100" / method_folder(method) / f"{pair}.yaml"
    return load_config(file, overrides, others)


def load_images(config: Config, synthetic: int) -> tuple[TensorDataset, str]:
    """The data set of the config, or noise of CIFAR-100's shapes where that is not on disk.

    Args:
        config: whose ``DATASET`` is meant.
        synthetic: that many training images of noise in any case; 0 for real ones.

    Returns:
        The data set, and what it is in words.

    Raises:
        ConfigError: its images are not held in memory.
        DataError: it is there and broken.
    """
    node = config.node.DATASET
    if not synthetic and (node.TYPE != "cifar100" or (Path(node.ROOT) / "cifar-100-python").is_dir()):
        dataset = build_dataset(config.node)
        if not isinstance(dataset, TensorDataset):
            raise ConfigError(f"DATASET.TYPE {node.TYPE} is not held in memory: this times cifar100 and digits")
        return dataset, f"real {node.TYPE}, {len(dataset.train)} training images"
    count = synthetic or 50_000
    generator = torch.Generator().manual_seed(0)

    def noise(n: int) -> Split:
        return Split(
            torch.randint(256, (n, 32, 32, 3), generator=generator, dtype=torch.uint8), torch.arange(n).remainder(100)
        )

    classes = tuple(f"class {number}" for number in range(100))
    dataset = TensorDataset("cifar100", noise(count), noise(max(count // 5, 1)), classes, MEAN, STD)
    return dataset, f"synthetic: {count} images of noise in the shapes of CIFAR-100"


def teacher_weights(config: Config, dataset: TensorDataset, choice: str, folder: Path) -> tuple[Path, str]:
    """The file of the teacher's weights, and what they are in words.

    Args:
        config: names the teacher.
        dataset: what it classifies.
        choice: a file; ``random``; or empty, for what a training run would take, and random weights if that is none.
        folder: where random weights are written.

    Raises:
        CheckpointError: the file that was asked for is not there.
    """
    node = config.node
    asked = "" if choice == "random" else choice or node.DISTILLER.TEACHER_WEIGHTS
    if choice != "random":
        try:
            path = find_teacher(
                node.DISTILLER.TEACHER, dataset.name, asked, Path(node.LOG.PREFIX),
                train_command(node.DATASET.TYPE, node.DISTILLER.TEACHER),
            ).path  # fmt: skip
            return path, str(path)
        except CheckpointError:
            if asked:
                raise
    torch.manual_seed(0)
    network = build_model(node.DISTILLER.TEACHER, len(dataset.classes), variant=dataset.variant)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what it sees
    loader = MemoryTrainLoader(dataset, 64, seed=0)
    with torch.no_grad():  # else 50 layers without normalisation let the activations overflow
        network.train()(loader.prepare(*next(loader.batches(1))).images)
    path = folder / f"{node.DISTILLER.TEACHER}_random.pth"
    torch.save({"model": network.state_dict()}, path)
    return path, "random (no weights found)" if choice != "random" else "random"


class Ours:
    """A training run that goes on block by block.

    Args:
        config: of the run.
        dataset: to train on; evaluated on a few of its test images only.
        replay: every block has the same batches, so that after one of them a lazy teacher cache holds all it needs.
    """

    def __init__(self, config: Config, dataset: TensorDataset, replay: bool = False) -> None:
        self.config, self.replay = config, replay
        self.classes, self.variant = len(dataset.classes), dataset.variant
        few = Split(dataset.test.images[:64], dataset.test.targets[:64])
        with contextlib.redirect_stdout(StringIO()):  # what it prints is in its log
            self.run: Run = build_run(config, dataset=replace(dataset, test=few))
            for _ in self.run.trainer.ahead:  # a full teacher cache
                pass
        self.run.trainer.log.close()
        self.log = (self.run.folder / "worklog.txt").read_text().splitlines()
        self.step = self.run.trainer.step
        self.step.trainable.train()
        self.device = build_device(config.node)
        self._epoch = 0
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self.step.begin_epoch(epoch, self.config.node.SEED)
        self._batches = self.step.feed(self.step.loader.batches(epoch))

    def next_batch(self) -> tuple[Tensor, ...]:
        """What names the next full batch."""
        while True:
            for raw in self._batches:
                if len(raw[0]) == self.step.loader.batch_size:
                    return raw
            self._begin(self._epoch + 1)

    def block(self, steps: int) -> float:
        """Train; returns the seconds a step."""
        if self.replay or not self._epoch:
            self._begin(1)
        start = clock(self.device)
        for _ in range(steps):
            self.run.trainer.run_step(*self.next_batch())
        return (clock(self.device) - start) / steps

    def parts(self) -> dict[str, float] | None:
        """Train one step piece by piece; returns the seconds of each, None where the step cannot be taken apart."""
        step, trainable = self.step, self.step.trainable
        if isinstance(step.optimizer, DOT) or step.scaler:
            return None
        times = [clock(self.device)]

        def lap() -> None:
            times.append(clock(self.device))

        raw = self.next_batch()
        extra = step.teacher.extra if step.teacher else 0
        batch = step.loader.prepare(*raw[: len(raw) - extra])
        lap()
        taught = step.teacher(batch, *raw[len(raw) - extra :]) if step.teacher else None
        lap()
        student = trainable.student_outputs(batch.images)
        lap()
        total = trainable.losses(student, batch, taught, step.factors).total
        lap()
        step.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        lap()
        step.optimizer.step()
        lap()
        names = ("data", "teacher", "student", "loss", "backward", "optimizer")
        return {name: b - a for name, (a, b) in zip(names, pairwise(times), strict=True)}

    def gflop(self) -> float:
        """Billions of floating-point operations a step with a live teacher, if any, counted while running one."""
        node, ours = self.config.node.DISTILLER, self.step.trainable
        student, teacher = (
            build_model(name, self.classes, variant=self.variant).to(self.device)
            for name in (node.STUDENT, node.TEACHER)
        )
        trainable = Trainable(
            student, deepcopy(dict(zip(ours.distillers, ours.methods(), strict=True))), ours.ce_weight
        )
        batch = self.step.loader.prepare(*next(self.step.loader.batches(1)))
        with FlopCounterMode(display=False) as counter:
            with torch.no_grad():
                taught = teacher.outputs(batch.images) if self.step.teacher else None
            trainable(batch, taught, self.step.factors).total.backward()
        return float(counter.get_total_flops()) / 1e9

    def extra_parameters(self) -> int:
        """Parameters that the methods add."""
        return sum(method.extra_parameters() for method in self.step.trainable.methods())


def memory(config: Config, synthetic: int, steps: int) -> Record:
    """Peak memory of a few training steps; to be called in a process of its own.

    Returns:
        ``peak`` and ``growth`` in MB (10^6 bytes), see the package; None where this system does not tell.
    """
    for name in config.node.EXPERIMENT.PLUGINS:
        import_plugin(name)
    dataset, _ = load_images(config, synthetic)
    before = _resident("VmRSS")
    ours = Ours(config, dataset)
    del dataset
    with contextlib.suppress(OSError):  # the peak so far may have been reading the data: count again from now
        Path("/proc/self/clear_refs").write_text("5")
    if ours.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ours.device)
    ours.block(steps)
    if ours.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(ours.device) / 1e6
        return {"peak": peak, "growth": peak}
    highest = _resident("VmHWM")
    return {"peak": highest, "growth": None if highest is None or before is None else highest - before}


def _resident(field: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:")), None)
