"""Is the captured step the eager step? Checks that only a GPU can answer, in one command."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mdistiller_norm.cli import ArgumentParser, check_output
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.data import TensorDataset, digits
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.graph import CapturedNetwork
from mdistiller_norm.engine.logger import environment
from mdistiller_norm.engine.trainer import Trainer
from mdistiller_norm.errors import ConfigError, first_line
from mdistiller_norm.files import write_json
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: what was asked.
        passed: the answer.
        detail: the figures behind it.
    """

    name: str
    passed: bool
    detail: str


def _config(folder: Path, name: str, *overrides: str) -> Config:
    common = [
        "DATASET.TYPE=digits", "DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8", f"LOG.PREFIX={folder}",
        f"DISTILLER.TEACHER_WEIGHTS={folder / 'teacher.pth'}", "SOLVER.NESTEROV=true", "DEVICE=cuda",
        "ENGINE.COMPILE=none", "ENGINE.DETERMINISTIC=true", f"EXPERIMENT.NAME={name}",
    ]  # fmt: skip
    return load_config(None, [*common, *overrides])


def _trainer(folder: Path, name: str, dataset: TensorDataset, *overrides: str) -> Trainer:
    return build_run(_config(folder, name, *overrides), dataset=dataset).trainer


def _run(trainer: Trainer, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train that many steps over as many epochs as they take; the final state and the losses."""
    loader, losses, done, epoch = trainer.step.loader, [], 0, 1
    while done < steps:
        trainer.step.begin_epoch(epoch, trainer.seed)
        trainer.step.trainable.train()
        for raw in trainer.step.feed(loader.batches(epoch)):
            before = trainer.step.meters.sums.clone()
            trainer.run_step(*raw)
            losses.append(float((trainer.step.meters.sums - before).sum()) / len(raw[0]))
            done += 1
            if done == steps:
                break
        epoch += 1
    trainer.log.close()
    return {key: value.clone() for key, value in trainer.step.trainable.state_dict().items()}, losses


def _compare(folder: Path, dataset: TensorDataset, steps: int, method: str, *overrides: str) -> Check:
    results = {}
    for graph in ("off", "on"):
        name = ",".join((method, *overrides, graph))
        trainer = _trainer(folder, name, dataset, f"DISTILLER.TYPE={method}", f"ENGINE.CUDA_GRAPH={graph}", *overrides)
        results[graph] = _run(trainer, steps)
    (eager, eager_losses), (captured, captured_losses) = results["off"], results["on"]
    different = [key for key in eager if not torch.equal(eager[key], captured[key])]
    gap = max(abs(a - b) for a, b in zip(eager_losses, captured_losses, strict=True))
    detail = f"{steps} steps, {len(different)} of {len(eager)} tensors differ, largest difference of a loss {gap:.3g}"
    refused = [line for line in (trainer.folder / "worklog.txt").read_text().splitlines() if "no CUDA graph" in line]
    detail += "".join(f"; {line}" for line in refused)
    return Check(
        f"captured equals eager: {method} {' '.join(overrides)}".strip(), not different and not refused, detail
    )


def _evaluation(folder: Path, dataset: TensorDataset, precision: str) -> Check:
    """The captured evaluation against the eager one, before and after the weights changed."""
    more = ("DISTILLER.TYPE=NONE", "ENGINE.CUDA_GRAPH=on", f"SOLVER.PRECISION={precision}")
    trainer = _trainer(folder, f"evaluation_{precision}", dataset, *more)
    trainable, seen = trainer.step.trainable, []
    for _ in range(2):
        forms = (trainable.student, trainer.run_test)  # nothing folded: equal to the bit
        seen.append([evaluate(trainable.student, trainer.test, trainable.autocast, form)[:3] for form in forms])
        _run(trainer, 20)
    captured = isinstance(trainer.run_test, CapturedNetwork)
    equal = captured and all(eager == graph for eager, graph in seen)
    name = f"captured evaluation equals eager: {precision}"
    return Check(name, equal, f"top-1, top-5, loss by eager and captured: {seen}")


def _step_time(folder: Path, dataset: TensorDataset, graph: str) -> float:
    more = ("DISTILLER.TYPE=NormKD", f"ENGINE.CUDA_GRAPH={graph}", "ENGINE.DETERMINISTIC=false")
    trainer = _trainer(folder, f"time{graph}", dataset, *more)
    raws = list(trainer.step.feed(trainer.step.loader.batches(1)))[:20]
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for raw in raws:
            trainer.run_step(*raw)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(raws) * 1000)
    trainer.log.close()
    return statistics.median(times[2:])


def _faster(folder: Path, dataset: TensorDataset) -> Check:
    eager, captured = (_step_time(folder, dataset, graph) for graph in ("off", "on"))
    line = f"median ms a step, resnet14 -> resnet8, batch 64: eager {eager:.2f}, captured {captured:.2f}"
    return Check("a captured step is faster", captured < eager, line)


def check_gpu(steps: int = 200) -> Iterator[Check]:
    """Run all checks on the first CUDA device, in deterministic mode, one after another; one that breaks has failed.

    Args:
        steps: of each comparison.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dataset = digits()
    methods = (
        ("NONE",), ("KD",), ("NormKD",), ("DKD",), ("NormKD_W_DKD",), ("NormKD", "SOLVER.PRECISION=bf16"),
        ("NormKD", "SOLVER.PRECISION=fp16"), ("NormKD", "DISTILLER.TEACHER_CACHE=lazy"), ("FITNET",), ("RKD",),
        ("CRD", "CRD.NCE.K=128"), ("REVIEWKD",), ("AT",), ("OFD", "OFD.TEACHER_TRAIN_MODE=true"),
        ("NormKD", "SOLVER.TRAINER=dot"), ("NormKD", "SOLVER.ACCUMULATE=2"), ("NormKD", "ENGINE.COMPILE=all"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(1)
        torch.save({"model": build_model("resnet14", 10).state_dict()}, folder / "teacher.pth")
        checks: dict[str, Callable[[], Check]] = {
            " ".join(method): partial(_compare, folder, dataset, steps, *method) for method in methods
        }
        checks["time of a step"] = partial(_faster, folder, dataset)
        for precision in ("fp32", "bf16"):
            checks[f"evaluation in {precision}"] = partial(_evaluation, folder, dataset, precision)
        for what, check in checks.items():
            try:
                yield check()
            except Exception as error:  # whatever it is, the others are still to be asked
                yield Check(what, False, f"{type(error).__name__}: {first_line(error)}")


def main(arguments: Sequence[str]) -> int:
    """``tools/gpu_check.py``: prints PASS and FAIL lines; 1 if anything failed.

    Raises:
        ConfigError: there is no CUDA device.
    """
    parser = ArgumentParser(prog="tools/gpu_check.py", description="Check the fast path on a GPU.")
    parser.add_argument("--json", type=Path, help="write the answers to this file")
    parser.add_argument("--steps", type=int, default=200, help="steps of each comparison")
    options = parser.parse_args(arguments)
    check_output("--json", options.json)
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {options.steps}")
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here: run this on a machine with a GPU")
    checks = []
    for check in check_gpu(options.steps):
        print(f"{'PASS' if check.passed else 'FAIL'} {check.name}: {check.detail}", flush=True)
        checks.append(check)
    if options.json:
        content: dict[str, Any] = {
            "environment": environment(torch.device("cuda")),
            "checks": [vars(check) for check in checks],
        }
        write_json(content, options.json)
    return 0 if all(check.passed for check in checks) else 1
