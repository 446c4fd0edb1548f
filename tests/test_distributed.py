"""Training with two processes against one, on the CPU: the same samples, the same weights, the same figures."""

import atexit
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_user_error, wait_for
from torch import nn

from mdistiller_norm.cli import main
from mdistiller_norm.config import load_config
from mdistiller_norm.data import Share, digits
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.optim import build_fused
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run
from mdistiller_norm.types import Batch

# 1437 training samples: the last of 180 batches of 8 has 5, which two processes cannot share evenly.
STEPS, FIRST, BATCH = 20, 160, 8
PAIR = [
    "DATASET.TYPE=digits", "DEVICE=cpu", "ENGINE.COMPILE=none", "DISTILLER.TEACHER=resnet14",
    "DISTILLER.STUDENT=resnet8",
]  # fmt: skip
CLIPPED = ["SOLVER.CLIP_GRAD=0.5", "SOLVER.EMA=0.9"]
METHODS = {"NONE": [], "NormKD": CLIPPED, "CRD": ["CRD.NCE.K=64"], "REVIEWKD": []}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_pair(
    folder: Path, function: Callable[..., object], *arguments: object
) -> list[Process]:
    """Fork two processes that train together, as Slurm would start them; their output goes to the folder."""
    port = str(free_port())

    def run(rank: str) -> None:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank
        )
        atexit._clear()
        for name in ("stdout", "stderr"):
            setattr(sys, name, (folder / f"{name}_{rank}").open("w"))
        function(*arguments)

    fork = multiprocessing.get_context("fork")
    pair: list[Process] = [
        fork.Process(target=run, args=(rank,), daemon=True) for rank in ("0", "1")
    ]
    for process in pair:
        process.start()
    return pair


def finish(processes: list[Process], folder: Path) -> list[subprocess.CompletedProcess[str]]:
    for process in processes:
        process.join(timeout=300)
    outputs = [
        [(folder / f"{name}_{rank}").read_text() for name in ("stdout", "stderr")]
        for rank in (0, 1)
    ]
    return [
        subprocess.CompletedProcess([], process.exitcode, *output)
        for process, output in zip(processes, outputs, strict=False)
    ]


def without_batch_norm(module: nn.Module) -> None:
    for child in module.modules():
        for name, part in child.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(child, name, nn.Identity())


def train_steps(method: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Return the weights after some steps in float64, without batch norm, and the samples of this process."""
    config = [
        *PAIR, f"DISTILLER.TYPE={method}", f"LOG.PREFIX={folder}", f"SOLVER.BATCH_SIZE={BATCH}",
        f"DISTILLER.TEACHER_WEIGHTS={folder / 'teacher.pt'}", f"EXPERIMENT.NAME={method}", *METHODS[method], *overrides,
    ]  # fmt: skip
    trainer = build_run(load_config(None, config)).trainer
    trainer.log.close()
    step = trainer.step
    without_batch_norm(step.trainable.double())
    prepare = step.loader.prepare

    def in_float64(*raw: torch.Tensor) -> Batch:
        batch = prepare(*raw)
        return batch._replace(images=batch.images.double())

    step.loader.prepare = in_float64
    optimizer = build_fused(
        "SGD", step.trainable.parameters(), 0.002, 1e-4, momentum=0.9, nesterov=True
    )
    teacher = (
        Teacher(step.teacher.network.double(), step.trainable.need) if step.teacher else None
    )
    whole = TrainStep(
        step.loader, teacher, step.trainable, optimizer, step.meters,
        forward=distributed.wrap(step.trainable), accumulate=step.accumulate,
        clip_grad=step.clip_grad,
    )  # fmt: skip
    step.trainable.train()
    seen = []
    for number, raw in zip(
        range(FIRST, FIRST + STEPS), step.loader.batches(1, FIRST), strict=False
    ):
        whole.part = step.loader.part(number)
        seen.append(raw[0].tolist() if whole.part.weight else [])
        whole(*raw)
    averages = step.meters.read(1, together=True)
    return {"weights": step.trainable.state_dict(), "seen": seen, **averages._asdict()}


def train_and_evaluate(folder: Path) -> None:
    """Save the results of one of two processes."""
    share = distributed.process_share()
    for method in METHODS:
        torch.save(train_steps(method, folder), folder / f"{method}_{share.rank}.pt")
    accumulated = train_steps(
        "NormKD", folder, "SOLVER.ACCUMULATE=2", "EXPERIMENT.NAME=accumulated"
    )
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
    distributed.exit_process(0)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("both")
    torch.manual_seed(1)
    torch.save({"model": build_model("resnet14", 10).state_dict()}, folder / "teacher.pt")
    pair = start_pair(folder, train_and_evaluate, folder)
    assert [done.stderr for done in finish(pair, folder) if done.returncode] == []
    return folder


@pytest.fixture(scope="module")
def alone(both: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Results of one process, computed once for each method."""

    @cache
    def run(method: str, *overrides: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "teacher.pt").write_bytes((both / "teacher.pt").read_bytes())
        return train_steps(method, folder, *overrides)

    return run


def assert_same_training(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["samples"] == expected["samples"] == 19 * BATCH + 5
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for key, weights in expected["weights"].items():
        torch.testing.assert_close(
            result["weights"][key],
            weights,
            rtol=0,
            atol=1e-9,
            msg=lambda text, key=key: f"{key}: {text}",
        )


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(
    both: Path, alone: Callable[..., dict[str, Any]], method: str
) -> None:
    single = alone(method)
    one, two = (torch.load(both / f"{method}_{rank}.pt") for rank in range(2))
    assert [a + b for a, b in zip(one["seen"], two["seen"], strict=True)] == single["seen"]
    assert [len(step) for step in one["seen"]][-2:] == [4, 3]
    assert_same_training(one, single)
    for key, weights in one["weights"].items():
        assert torch.equal(two["weights"][key], weights), key


def test_accumulated_gradients_give_the_same_update(
    both: Path, alone: Callable[..., dict[str, Any]]
) -> None:
    for rank in range(2):
        assert_same_training(torch.load(both / f"accumulated_{rank}.pt"), alone("NormKD"))
    for method in ("NormKD", "REVIEWKD"):
        assert_same_training(alone(method, "SOLVER.ACCUMULATE=4"), alone(method))


def test_several_processes_evaluate_every_image_once(both: Path) -> None:
    torch.manual_seed(3)
    expected = evaluate(build_model("resnet8", 10), digits().eval_loader(7, torch.device("cpu")))
    data = digits()
    parts = [list(data.eval_loader(50, torch.device("cpu"), Share(rank, 7))) for rank in range(7)]
    assert torch.equal(
        torch.cat([targets for part in parts for _, targets in part]), data.test.targets
    )
    for rank in range(2):
        found = torch.load(both / f"evaluation_{rank}.pt")
        assert (found["top1"], found["top5"], found["samples"]) == (
            expected.top1,
            expected.top5,
            360,
        )
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert torch.equal(found["per_class"], expected.per_class)


# Whole runs


def start_runs(folder: Path, *overrides: str, epochs: int = 100) -> list[Process]:
    command = [
        "train", "--cfg", "digits/vanilla_resnet8", "DEVICE=cpu", f"LOG.PREFIX={folder}", "EXPERIMENT.NAME=run",
        f"SOLVER.EPOCHS={epochs}", "SOLVER.LR_DECAY_STAGES=[]", "SOLVER.BATCH_SIZE=48", "LOG.CHECKPOINT_STEPS=4",
        *overrides,
    ]  # fmt: skip
    return start_pair(folder, main, command)


def wait_for_state(folder: Path, process: Process) -> None:
    wait_for(lambda: (folder / "digits/run/latest.pt").exists() or not process.is_alive())
    assert process.is_alive()


@pytest.mark.slow
def test_two_processes_train_several_networks_after_each_other(tmp_path: Path) -> None:
    networks = [
        "--teacher",
        "resnet8",
        "--student",
        "resnet8",
        "--train-teacher",
        "--student-alone",
    ]
    keys = [f"LOG.PREFIX={tmp_path}", "DATASET.SUBSET=100", "DEVICE=cpu"]
    command = ["distill", "--data", "digits", *networks, "--epochs", "1", *keys]
    pair = finish(start_pair(tmp_path, main, command), tmp_path)
    assert [done.stderr for done in pair if done.returncode] == []
    assert sum(done.stdout.count("student alone") for done in pair) == 1  # of the first process
    results = list(tmp_path.glob("digits/*/result.json"))
    assert [json.loads(path.read_text())["processes"] for path in results] == [2, 2, 2]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    processes = start_runs(tmp_path)
    wait_for_state(tmp_path, processes[0])
    os.kill(processes[1].pid, signal.SIGUSR1)
    for done in finish(processes, tmp_path):
        assert done.returncode == 128 + signal.SIGUSR1, done.stderr
        assert "--resume" in done.stderr
    state = load(tmp_path / "digits/run/latest.pt")
    assert int(state["meters"]["samples"]) in (48 * state["steps_done"], 0)


def test_a_removed_run_folder_is_one_line_of_each_process(tmp_path: Path) -> None:
    processes = start_runs(tmp_path)
    wait_for_state(tmp_path, processes[0])
    shutil.rmtree(tmp_path / "digits")
    first, second = finish(processes, tmp_path)
    assert_user_error(first, "digits/run", "No such file or directory")
    assert_user_error(second, "process 1 of 2")


@pytest.mark.slow
def test_the_error_names_a_process_that_hangs(tmp_path: Path) -> None:
    processes = start_runs(tmp_path, "SOLVER.TIMEOUT=4")
    wait_for_state(tmp_path, processes[0])
    os.kill(processes[1].pid, signal.SIGSTOP)
    (done,) = finish(processes[:1], tmp_path)
    processes[1].kill()
    assert_user_error(done, "process 0 of 2 timed out waiting for process 1", "--resume")


OWN_STUDENT = """
import torch
from mdistiller_norm import models


class Own(models.Network):
    def __init__(self, num_classes, unread):
        super().__init__(num_classes)
        self.inner, self.drop, self.steps = models.build_model("resnet8", num_classes), torch.nn.Dropout(0.5), 0
        if unread:
            self.unread = torch.nn.Linear(4, 4)

    def outputs(self, images):
        outputs = self.inner.outputs(images)
        logits = self.drop(outputs.logits)
        self.steps += self.training
        if self.training and self.steps == 1:
            torch.save(logits != 0, f"FOLDER/mask_{torch.distributed.get_rank()}.pt")
        if self.steps == 3 and torch.distributed.get_rank() == 1:
            logits = logits * float("nan")
        return outputs._replace(logits=logits)

    def norms_before_relu(self):
        return self.inner.norms_before_relu()


models.register("breaking")(lambda num_classes: Own(num_classes, unread=False))
models.register("unread")(lambda num_classes: Own(num_classes, unread=True))
"""


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (
            "breaking",
            ("the loss ce became NaN or infinite in epoch 1, step 3", "lower SOLVER.LR"),
        ),
        ("unread", ("takes no part in the loss", "remove it")),
    ],
)
def test_all_processes_report_an_error_of_one(
    tmp_path: Path, student: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "own.py").write_text(OWN_STUDENT.replace("FOLDER", str(tmp_path)))
    own = [f"EXPERIMENT.PLUGINS={tmp_path / 'own.py'}", f"DISTILLER.STUDENT={student}"]
    own += ["SOLVER.BATCH_SIZE=240", "LOG.TENSORBOARD_FREQ=1"]
    for done in finish(start_runs(tmp_path, *own, epochs=1), tmp_path):
        assert_user_error(done, *words)
    one, two = (torch.load(tmp_path / f"mask_{rank}.pt") for rank in range(2))
    assert one.shape == two.shape
    assert not torch.equal(one, two), "the processes must drop different activations"
