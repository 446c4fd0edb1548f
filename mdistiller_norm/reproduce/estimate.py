"""How long a run will take: by its own pace, by finished runs of the same networks, or by its operations."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mdistiller_norm.builders import build_precision
from mdistiller_norm.config import default_config
from mdistiller_norm.engine.logger import environment, read_metrics
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce.jobs import Job, Pace, cost, forward_flops, pace_of
from mdistiller_norm.reproduce.ledger import Entry

_START = 5.0  # seconds to import PyTorch, read the data and check the teacher
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

    def of(self, job: Job) -> Estimate:
        """The time that a job has still to go."""
        done = read_metrics(job.folder / "metrics.jsonl")
        left = max(job.epochs - len(done), 0)
        if done and isinstance(spent := done[-1].get("seconds"), int | float):  # not so in a damaged line
            return Estimate(_START + left * spent / len(done), "its own pace so far")
        same = self._same.get(f"{job.identity} {job.pace.precision}")
        if same:
            return Estimate(_START + left * statistics.median(same), "finished runs of other seeds")
        alike = self._alike.get(job.pace)
        if alike:
            return Estimate(_START + left * statistics.median(alike), "finished runs of the same networks")
        precision = job.pace.precision
        if precision not in self._rates:
            # On GPUs each process has one of its own; on the processor they share the cores that one would use.
            self._rates[precision] = trial_rate(self.device, precision) * (
                self.processes if self.device.type == "cuda" else 1
            )
        where = "finished runs" if precision in self._measured_rates else "a short trial"
        source = f"operations counted, at the {precision} pace of {where}"
        return Estimate(_START + left / job.epochs * job.cost / self._rates[precision], source)

    def total(self, jobs: Sequence[Job]) -> Estimate:
        """All of them one after another; the sources with their counts, the most frequent first."""
        estimates = [self.of(job) for job in jobs]
        counts = Counter(estimate.source for estimate in estimates).most_common()
        sources = "; ".join(f"from {source}" if len(counts) == 1 else f"{n} from {source}" for source, n in counts)
        return Estimate(sum(estimate.seconds for estimate in estimates), sources)


def trial_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second in the fastest steps of training a resnet20 on random images.

    Args:
        device: to be tried.
        precision: ``SOLVER.PRECISION``; what the device has no fast kernels for is tried in fp32, as it is trained.
    """
    network = build_model("resnet20", 100).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(64, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    targets = torch.zeros(64, dtype=torch.int64, device=device)
    cfg = default_config()
    cfg.SOLVER.PRECISION = precision
    dtype, _ = build_precision(cfg, device)  # as a run would have it
    steps: list[float] = []
    end = time.perf_counter() + 2
    while len(steps) < 5 or (time.perf_counter() < end and len(steps) < 200):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(network(images), targets)
        torch.autograd.backward(loss)
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
    # The fastest tenth: what else the machine does at this moment slows the others.
    fastest = statistics.fmean(sorted(steps)[: max(len(steps) // 10, 1)])
    return 3 * 64 * forward_flops("resnet20", "cifar100") / fastest


def clock(seconds: float) -> str:
    """A duration for people: ``42 s``, ``7 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360000 else f"{seconds / 86400:.1f} days"
