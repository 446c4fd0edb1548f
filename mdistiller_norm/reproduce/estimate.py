"""How long a run will take: by its own pace, by finished runs, by trying its networks, or by its operations."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mdistiller_norm.build import build_precision, placed
from mdistiller_norm.engine.graph import CapturedStep
from mdistiller_norm.engine.logger import environment, read_metrics
from mdistiller_norm.engine.runtime import choose_cuda_kernels
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce.jobs import Job, Pace, cost, forward_flops, pace_of
from mdistiller_norm.reproduce.ledger import Entry
from mdistiller_norm.reproduce.tables import load_datasets

_START = 5.0  # seconds to import PyTorch, read the data and check the teacher
_BATCH = 64  # images of a step in a trial
_LARGE = 5e12  # operations of a run that is long enough to show a device's throughput


class Estimate(NamedTuple):
    """Seconds of a job, and what they were taken from."""

    seconds: float
    source: str


class Estimator:
    """How long jobs will take on this machine, their start included.

    Args:
        entries: finished runs; those of this machine's device and of as many processes count.
        device: that trains.
        processes: of each job.
    """

    def __init__(self, entries: Iterable[Entry], device: torch.device, processes: int = 1) -> None:
        self.device, self.processes = device, processes
        name = environment(device)["device"]
        self._same: dict[str, list[float]] = {}  # seconds of an epoch, by what is computed,
        self._alike: dict[Pace, list[float]] = {}  # by what is trained on what,
        self._rates: dict[str, float] = {}  # and operations a second, by precision
        for entry in entries:
            record = entry.record
            if record["environment"].get("device") != name or record.get("processes", 1) != processes:
                continue
            pace, seconds = pace_of(record["config"]), record["seconds"] / record["epochs"]
            self._same.setdefault(f"{entry.identity} {pace.precision}", []).append(seconds)
            self._alike.setdefault(pace, []).append(seconds)
            operations = cost(record["config"])
            if operations > _LARGE:
                rate = operations / record["seconds"]
                self._rates[pace.precision] = max(rate, self._rates.get(pace.precision, 0.0))
        self._measured_rates = set(self._rates)
        self._trials: dict[tuple[str, str, str, bool], float] = {}

    def of(self, job: Job) -> Estimate:
        """The time that a job has still to go."""
        done = read_metrics(job.folder / "metrics.jsonl")
        left = max(job.epochs - len(done), 0)
        marks = [0.0, *(seconds for each in done if isinstance(seconds := each.get("seconds"), int | float))]
        if len(marks) > 1:  # not so in damaged lines
            late = [after - before for before, after in pairwise(marks[-10:])]  # a pause long ago says nothing
            return Estimate(_START + left * statistics.median(late), "its own pace so far")
        same = self._same.get(f"{job.identity} {job.pace.precision}")
        if same:
            return Estimate(_START + left * statistics.median(same), "finished runs of other seeds")
        alike = self._alike.get(job.pace)
        if alike:
            return Estimate(_START + left * statistics.median(alike), "finished runs of the same networks")
        if self.device.type == "cuda" and (tried := self._tried(job.pace)):
            # On GPUs each process has one of its own; on the processor they share the cores that one would use.
            return Estimate(_START + left * tried / self.processes, "a short trial of its networks")
        precision = job.pace.precision
        if precision not in self._rates:
            self._rates[precision] = trial_rate(self.device, precision)
        where = "finished runs" if precision in self._measured_rates else "a short trial"
        source = f"operations counted, at the {precision} pace of {where}"
        return Estimate(_START + left / job.epochs * job.cost / self._rates[precision], source)

    def _tried(self, pace: Pace) -> float:
        """Seconds of an epoch, student's steps and teacher's passes; 0 where the networks or the data are not known.

        A GPU's time depends on the number of layers more than on operations: another network's pace says little.
        """
        facts = load_datasets().get(pace.dataset)
        if not facts:
            return 0.0
        taken = [self._trial(pace.student, pace, trained=True)]
        if pace.teacher:
            taken.append(self._trial(pace.teacher, pace, trained=False))
        return sum(taken) * facts.images / _BATCH if all(taken) else 0.0

    def _trial(self, name: str, pace: Pace, trained: bool) -> float:
        key = (name, pace.dataset, pace.precision, trained)
        if key not in self._trials:
            try:
                self._trials[key] = trial_seconds(name, pace.dataset, pace.precision, trained, self.device)
            except (ConfigError, RuntimeError):  # a network of a plugin; or no memory for it
                self._trials[key] = 0.0
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # for the runs, which are other processes
        return self._trials[key]

    def total(self, jobs: Sequence[Job]) -> Estimate:
        """All of them one after another; the sources with their counts, the most frequent first."""
        estimates = [self.of(job) for job in jobs]
        counts = Counter(estimate.source for estimate in estimates).most_common()
        sources = "; ".join(f"from {source}" if len(counts) == 1 else f"{n} from {source}" for source, n in counts)
        return Estimate(sum(estimate.seconds for estimate in estimates), sources)


class _Trial:
    """Passes of a network on random images, as a step that can be captured."""

    def __init__(self, name: str, dataset: str, precision: str, trained: bool, device: torch.device) -> None:
        facts = load_datasets()[dataset]
        network = build_model(name, facts.classes, variant=facts.variant).train(trained)
        self.network = placed(network, device)
        shape = (_BATCH, 3, facts.size, facts.size)
        self.images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
        self.targets = torch.zeros(_BATCH, dtype=torch.int64, device=device)
        self.dtype, _ = build_precision(precision, device)  # as a run would have it
        self.trained, self.device = trained, device

    def __call__(self, *raw: Tensor) -> None:
        (images,) = raw
        self.network.zero_grad(set_to_none=True)
        cast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)
        with cast, torch.set_grad_enabled(self.trained):
            loss = F.cross_entropy(self.network(images), self.targets)
        if self.trained:
            torch.autograd.backward(loss)

    def state_tensors(self) -> list[Tensor]:
        return list(self.network.buffers())

    def seconds(self, at_most: int) -> float:
        """Of the fastest tenth of the passes: what else the machine does at this moment slows the others."""
        step: Callable[..., None] = self
        if self.device.type == "cuda":  # as a run would have it
            choose_cuda_kernels(deterministic=False)
            step = CapturedStep(self, lambda _: None)
        taken: list[float] = []
        end = time.perf_counter() + 2
        while len(taken) < 5 or (time.perf_counter() < end and len(taken) < at_most):
            start = time.perf_counter()
            step(self.images)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken.append(time.perf_counter() - start)
        return statistics.fmean(sorted(taken)[: max(len(taken) // 10, 1)])


def trial_seconds(name: str, dataset: str, precision: str, trained: bool, device: torch.device) -> float:
    """Seconds that a network takes for a batch of 64 images.

    Args:
        name: of the network.
        dataset: ``DATASET.TYPE``, of a table.
        precision: ``SOLVER.PRECISION``; what the device has no fast kernels for is tried in fp32, as it is trained.
        trained: forward and backward, as a student; or forward only, as a teacher.
        device: to be tried.

    Raises:
        ConfigError: there is no such network.
        RuntimeError: the device has no room for it.
    """
    return _Trial(name, dataset, precision, trained, device).seconds(50)


def trial_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second in the fastest steps of training a resnet20 on random images.

    Args:
        device: to be tried.
        precision: see :func:`trial_seconds`.
    """
    seconds = _Trial("resnet20", "cifar100", precision, True, device).seconds(200)
    return 3 * _BATCH * forward_flops("resnet20", "cifar100") / seconds


def clock(seconds: float) -> str:
    """A duration for people: ``42 s``, ``7 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360000 else f"{seconds / 86400:.1f} days"
