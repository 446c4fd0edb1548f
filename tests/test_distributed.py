"""Two processes against one, on the CPU, with real images: the same samples, the same weights, the same figures."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_user_error, tool
from torch import nn

from mdistiller_norm.config import load_config
from mdistiller_norm.data import Share, digits
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.optim import build_sgd
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import LiveTeacher
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run
from mdistiller_norm.types import Batch

# 1437 training samples: the last of 180 batches of 8 has 5, which two processes cannot share evenly.
STEPS, BATCH = 20, 8
PAIR = [
    "DATASET.TYPE=digits",
    "DEVICE=cpu",
    "ENGINE.COMPILE=none",
    "DISTILLER.TEACHER=resnet14",
    "DISTILLER.STUDENT=resnet8",
]
METHODS = {
    "NONE": [], "KD": [], "NormKD": [], "DKD": [], "CRD": ["CRD.NCE.K=64"], "REVIEWKD": [],
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "80"} | more


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(rank: int, world: int, port: int, *command: object) -> subprocess.Popen[str]:
    """One of several processes, as Slurm would start it."""
    who = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **who),
    )  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    try:
        return [
            (process.returncode, errors) for process in processes for _, errors in [process.communicate(timeout=300)]
        ]
    finally:
        for process in processes:
            process.kill()


def without_batch_norm(module: nn.Module) -> None:
    for child in module.modules():
        for name, part in child.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(child, name, nn.Identity())


def train_steps(method: str, folder: Path, *overrides: str, first_step: int = 0) -> dict[str, Any]:
    """The weights after some steps in float64, without batch norm, and the samples that this process saw."""
    config = [
        *PAIR, f"DISTILLER.TYPE={method}", f"LOG.PREFIX={folder}", f"SOLVER.BATCH_SIZE={BATCH}",
        f"DISTILLER.TEACHER_WEIGHTS={folder / 'teacher.pt'}", f"EXPERIMENT.NAME={method}", *METHODS[method], *overrides,
    ]  # fmt: skip
    trainer = build_run(load_config(None, config)).trainer
    step = trainer.step
    without_batch_norm(step.trainable.double())
    prepare = step.loader.prepare

    def in_float64(*raw: torch.Tensor) -> Batch:
        batch = prepare(*raw)
        return batch._replace(images=batch.images.double())

    step.loader.prepare = in_float64
    optimizer = build_sgd(step.trainable.parameters(), lr=0.002, momentum=0.9, weight_decay=1e-4, nesterov=True)
    teacher = LiveTeacher(step.teacher.network.double(), step.trainable.need) if step.teacher else None
    whole = TrainStep(
        step.loader, teacher, step.trainable, optimizer, step.meters,
        forward=distributed.wrap(step.trainable), accumulate=step.accumulate,
    )  # fmt: skip
    step.trainable.train()
    seen = []
    for number, raw in enumerate(step.loader.batches(1, first_step), first_step):
        if number == first_step + STEPS:
            break
        part = step.loader.part(number)
        seen.append(raw[0].tolist() if part.weight else [])
        whole.part = part
        whole(*raw)
    trainer.log.close()
    averages = step.meters.read(1, together=True)
    return {
        "weights": step.trainable.state_dict(),
        "seen": seen,
        "losses": averages.losses,
        "samples": averages.samples,
    }


def main(folder: Path) -> None:
    """What each of the processes runs; with no data in between but what the engine exchanges."""
    share = distributed.wanted()
    for method in METHODS:
        torch.save(train_steps(method, folder, first_step=160), folder / f"{method}_{share.rank}.pt")
    accumulated = train_steps("NormKD", folder, "SOLVER.ACCUMULATE=2", "EXPERIMENT.NAME=accumulated", first_step=160)
    torch.save(accumulated, folder / f"accumulated_{share.rank}.pt")
    torch.manual_seed(3)
    network = build_model("resnet8", 10)
    measured = evaluate(network, digits().eval_loader(7, torch.device("cpu"), share))
    torch.save(measured._asdict(), folder / f"evaluation_{share.rank}.pt")
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(share.rank)
    distributed.average_batch_norms(nn.Sequential(norm))
    assert norm.running_mean.tolist() == [0.5, 0.5]
    distributed.stop()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes left what they found."""
    folder = tmp_path_factory.mktemp("both")
    torch.manual_seed(1)
    torch.save({"model": build_model("resnet14", 10).state_dict()}, folder / "teacher.pt")
    port = free_port()
    for code, errors in finish([start(rank, 2, port, __file__, folder) for rank in range(2)]):
        assert code == 0, errors
    return folder


@pytest.fixture(scope="module")
def alone(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What one process finds with a method; run once for each."""

    @cache
    def run(method: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "teacher.pt").write_bytes((both / "teacher.pt").read_bytes())
        return train_steps(method, folder, first_step=160)

    return run


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(both: Path, alone: Callable[[str], dict[str, Any]], method: str) -> None:
    single = alone(method)
    one, two = (torch.load(both / f"{method}_{rank}.pt") for rank in range(2))
    # The samples, in their order, the last batch of 5 included.
    assert [a + b for a, b in zip(one["seen"], two["seen"], strict=True)] == single["seen"]
    assert [len(step) for step in one["seen"]][-2:] == [4, 3]
    assert one["samples"] == two["samples"] == single["samples"] == 19 * BATCH + 5
    assert one["losses"] == two["losses"] == pytest.approx(single["losses"], rel=1e-5)
    for key, weights in single["weights"].items():
        assert torch.equal(one["weights"][key], two["weights"][key]), key
        torch.testing.assert_close(one["weights"][key], weights, rtol=0, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def test_two_processes_that_accumulate_train_as_one_that_does_not(both: Path) -> None:
    for rank in range(2):
        whole, parts = (torch.load(both / f"{name}_{rank}.pt") for name in ("NormKD", "accumulated"))
        assert parts["samples"] == whole["samples"]
        for key, weights in whole["weights"].items():
            torch.testing.assert_close(parts["weights"][key], weights, rtol=0, atol=1e-9)


def test_several_processes_evaluate_every_image_once(both: Path) -> None:
    torch.manual_seed(3)
    alone = evaluate(build_model("resnet8", 10), digits().eval_loader(7, torch.device("cpu")))
    for rank in range(2):
        found = torch.load(both / f"evaluation_{rank}.pt")
        assert (found["top1"], found["top5"], found["samples"]) == (alone.top1, alone.top5, 360)
        assert found["loss"] == pytest.approx(alone.loss, rel=1e-6)
        assert torch.equal(found["per_class"], alone.per_class)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_the_test_split_are_disjoint_and_whole(world: int) -> None:
    data = digits()
    parts = [list(data.eval_loader(50, torch.device("cpu"), Share(rank, world))) for rank in range(world)]
    assert torch.equal(torch.cat([targets for part in parts for _, targets in part]), data.test.targets)
    assert len(data.eval_loader(50, torch.device("cpu"), Share(0, world))) == 360


@pytest.mark.parametrize("method", ["KD", "NormKD", "DKD", "REVIEWKD"])
def test_accumulation_gives_the_same_update(
    both: Path, alone: Callable[[str], dict[str, Any]], tmp_path: Path, method: str
) -> None:
    (tmp_path / "teacher.pt").write_bytes((both / "teacher.pt").read_bytes())
    parts, whole = train_steps(method, tmp_path, "SOLVER.ACCUMULATE=4", first_step=160), alone(method)
    assert parts["samples"] == whole["samples"]
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for key, weights in whole["weights"].items():
        torch.testing.assert_close(parts["weights"][key], weights, rtol=0, atol=1e-9)


def test_what_cannot_be_divided_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = [*PAIR, f"LOG.PREFIX={tmp_path}"]
    with pytest.raises(ConfigError, match=r"SOLVER\.ACCUMULATE 7 does not divide"):
        build_run(load_config(None, [*common, "SOLVER.ACCUMULATE=7"]))
    data = digits()
    with pytest.raises(ConfigError, match=r"SOLVER\.BATCH_SIZE 64 cannot be split evenly over 3"):
        data.train_loader(64, 0, torch.device("cpu"), Share(0, 3))
    with pytest.raises(ConfigError, match=r"SOLVER\.SYNC_BN needs CUDA"):
        build_run(load_config(None, [*common, "SOLVER.SYNC_BN=true", "EXPERIMENT.NAME=sync"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK must be less than WORLD_SIZE, got 2 and 2"):
        distributed.wanted()


# Whole runs


def run_arguments(folder: Path, name: str, *overrides: str, epochs: int = 2) -> list[str]:
    return [
        "--cfg", "configs/digits/vanilla_resnet8.yaml", "DEVICE=cpu", f"LOG.PREFIX={folder}", f"EXPERIMENT.NAME={name}",
        f"SOLVER.EPOCHS={epochs}", "SOLVER.BATCH_SIZE=48", "LOG.CHECKPOINT_STEPS=4", *overrides,
    ]  # fmt: skip


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "--max-restarts", "1", "--monitor-interval", "0.2", "tools/train.py", *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The children of torchrun that train."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"tools/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_a_killed_worker_costs_no_bit(tmp_path: Path) -> None:
    port = free_port()
    whole = [start(rank, 2, port, "tools/train.py", *run_arguments(tmp_path, "whole", epochs=1)) for rank in range(2)]
    for code, errors in finish(whole):
        assert code == 0, errors
    process = torchrun(*run_arguments(tmp_path, "killed", epochs=1))
    wait_for(tmp_path / "digits" / "killed" / "latest.pt", process)  # the first comes in mid-epoch
    os.kill(workers(process)[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "resuming" in output
    ends = []
    for folder in (tmp_path / "digits" / name for name in ("whole", "killed")):
        ends.append(load(folder / "latest.pt")["trainable"])
        assert [record["epoch"] for record in read_metrics(folder / "metrics.jsonl")] == [1]
        assert json.loads((folder / "result.json").read_text())["processes"] == 2
    for key, weights in ends[0].items():
        assert torch.equal(ends[1][key], weights), key
    # What two processes left, one goes on with.
    done = tool("train", "--resume", *run_arguments(tmp_path, "killed"))
    assert "at epoch 2, step 1" in done.stdout


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "digits" / "run"
    arguments = run_arguments(tmp_path, "run", epochs=100)
    processes = [start(rank, 2, port, "tools/train.py", *arguments) for rank in range(2)]
    wait_for(folder / "latest.pt", processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    for code, errors in finish(processes):
        assert code == 128 + signal.SIGUSR1, errors
        assert "--resume" in errors
    state = load(folder / "latest.pt")
    assert int(state["meters"]["samples"]) in (48 * state["steps_done"], 0)


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tmp_path: Path) -> None:
    port = free_port()
    arguments = run_arguments(tmp_path, "run", "SOLVER.TIMEOUT=8", epochs=100)
    processes = [start(rank, 2, port, "tools/train.py", *arguments) for rank in range(2)]
    wait_for(tmp_path / "digits" / "run" / "latest.pt", processes[0])
    processes[1].send_signal(signal.SIGSTOP)
    _, errors = processes[0].communicate(timeout=120)
    finish(processes[1:]) if processes[1].kill() else processes[1].wait(60)
    done = subprocess.CompletedProcess([], processes[0].returncode, "", errors)
    assert_user_error(done, "process 0 of 2 timed out waiting for process 1", "--resume")


OWN_STUDENT = """
import torch
from mdistiller_norm import models


class Own(models.Network):
    def __init__(self, num_classes, unread=False, breaks=False):
        super().__init__(num_classes)
        self.inner, self.drop, self.shown = models.build_model("resnet8", num_classes), torch.nn.Dropout(0.5), False
        self.breaks, self.steps = breaks, 0
        if unread:
            self.unread = torch.nn.Linear(4, 4)

    def outputs(self, images):
        outputs = self.inner.outputs(images)
        logits = self.drop(outputs.logits)
        self.steps += self.training
        if self.breaks and self.steps == 3 and torch.distributed.get_rank() == 1:
            logits = logits * float("nan")
        if self.training and not self.shown:
            self.shown = True
            torch.save(logits != 0, f"mask_{torch.distributed.get_rank()}.pt")
        return outputs._replace(logits=logits)

    def norms_before_relu(self):
        return self.inner.norms_before_relu()


models.register("dropping")(lambda num_classes: Own(num_classes))
models.register("breaking")(lambda num_classes: Own(num_classes, breaks=True))
models.register("unread")(lambda num_classes: Own(num_classes, unread=True))
"""


def own_students(folder: Path, student: str) -> list[tuple[int, str]]:
    """Two processes that train a plugin's network for an epoch: exit code and stderr of each."""
    (folder / "own.py").write_text(OWN_STUDENT.replace("mask_", f"{folder}/mask_"))
    own = [f"EXPERIMENT.PLUGINS={folder / 'own.py'}", f"DISTILLER.STUDENT={student}"]
    own += ["SOLVER.BATCH_SIZE=240", "LOG.TENSORBOARD_FREQ=1"]
    port, arguments = free_port(), run_arguments(folder, student, *own, epochs=1)
    return finish([start(rank, 2, port, "tools/train.py", *arguments) for rank in range(2)])


@pytest.mark.slow
def test_processes_drop_other_activations(tmp_path: Path) -> None:
    for code, errors in own_students(tmp_path, "dropping"):
        assert code == 0, errors
    one, two = (torch.load(tmp_path / f"mask_{rank}.pt") for rank in range(2))
    assert one.shape == two.shape
    assert not torch.equal(one, two)


@pytest.mark.slow
def test_a_parameter_that_no_loss_reaches_is_one_line(tmp_path: Path) -> None:
    for code, errors in own_students(tmp_path, "unread"):
        assert_user_error(subprocess.CompletedProcess([], code, "", errors), "takes no part in the loss", "remove it")


@pytest.mark.slow
def test_a_loss_that_one_process_alone_loses_is_told_by_all(tmp_path: Path) -> None:
    """It reaches the other's weights by the gradients, and that one's loss a step later."""
    for code, errors in own_students(tmp_path, "breaking"):
        done = subprocess.CompletedProcess([], code, "", errors)
        assert_user_error(done, "the loss ce became NaN or infinite in epoch 1, step 3", "lower SOLVER.LR")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    distributed.exit_process(0)
