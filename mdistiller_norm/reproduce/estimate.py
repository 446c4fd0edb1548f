"""How long a run will take: from runs measured on this device, else from its operations and a short trial."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch
from torch.nn import functional as F

from mdistiller_norm.engine.logger import environment
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce.jobs import Job, cost, forward_flops
from mdistiller_norm.reproduce.ledger import Entry

_START = 5.0  # seconds to import PyTorch, read the data and check the teacher


class Estimator:
    """Seconds of a job on this machine, its start included.

    Args:
        entries: finished runs; those of this machine's device count.
        device: that trains.
    """

    def __init__(self, entries: Iterable[Entry], device: torch.device) -> None:
        self.device = device
        name = environment(device)["device"]
        here = [entry for entry in entries if entry.record["environment"].get("device") == name]
        self._measured: dict[str, list[float]] = {}
        rates = []
        for entry in here:
            self._measured.setdefault(entry.identity, []).append(entry.record["seconds"])
            if operations := cost(entry.record["config"]):
                rates.append(operations / entry.record["seconds"])
        self._rate = statistics.median(rates) if rates else 0.0
        self.source = "runs measured on this device" if rates else "operations counted, and a trial of a second"

    def seconds(self, job: Job) -> float:
        """Of the epochs that a job has left."""
        left = 1 - min(job.epochs_done, job.epochs) / job.epochs
        if job.identity in self._measured:
            return _START + left * statistics.median(self._measured[job.identity])
        self._rate = self._rate or trial_rate(self.device)
        return _START + left * job.cost / self._rate


def trial_rate(device: torch.device) -> float:
    """Floating-point operations a second of training resnet20 on random images for about a second."""
    network = build_model("resnet20", 100).to(device)
    images = torch.randn(64, 3, 32, 32, device=device)
    targets = torch.zeros(64, dtype=torch.int64, device=device)
    start, steps = 0.0, 0
    for step in range(1000):
        if step == 2:  # after the warm-up
            start = time.perf_counter()
        torch.autograd.backward(F.cross_entropy(network(images), targets))
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps = step - 1
        if step > 2 and time.perf_counter() - start > 1:
            break
    return 3 * 64 * steps * forward_flops("resnet20", "cifar100") / (time.perf_counter() - start)


def clock(seconds: float) -> str:
    """A duration for people: ``42 s``, ``7 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360000 else f"{seconds / 86400:.1f} days"
