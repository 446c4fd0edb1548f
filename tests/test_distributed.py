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
from functools import cache, partial

import pytest
import torch
from conftest import assert_user_error, wait_for
from short_runs import assert_same_state
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

# 1437 training samples: the last of 180 batches of 8 has 5, which two processes cannot share evenly.
STEPS, FIRST, BATCH = 12, 168, 8
METHODS = {"NormKD": ["SOLVER.CLIP_GRAD=0.5", "SOLVER.EMA=0.9"], "CRD": ["CRD.NCE.K=64"]}


def start_pair(folder, function, *arguments):
    """Fork two processes that train together, as Slurm would start them; their output goes to the folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])

    def run(rank):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        os.environ.update(place, RANK=rank, LOCAL_RANK=rank)
        atexit._clear()
        for name in ("stdout", "stderr"):
            setattr(sys, name, (folder / f"{name}_{rank}").open("w"))
        function(*arguments)

    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(target=run, args=(rank,), daemon=True) for rank in "01"]
    for process in pair:
        process.start()
    return pair


def finish(processes, folder):
    done = []
    for rank, process in enumerate(processes):
        process.join(timeout=300)
        output = [(folder / f"{name}_{rank}").read_text() for name in ("stdout", "stderr")]
        done.append(subprocess.CompletedProcess([], process.exitcode, *output))
    return done


def train_steps(teacher_file, method, *overrides):
    """Return the weights after some steps in float64, with fixed batch norm, and the samples of this process."""
    name = "_".join([method, *overrides, str(distributed.process_share().world)])
    settings = (
        f"DATASET.TYPE=digits DEVICE=cpu ENGINE.COMPILE=none DISTILLER.TEACHER=resnet14 DISTILLER.STUDENT=resnet8 "
        f"DISTILLER.TYPE={method} DISTILLER.TEACHER_WEIGHTS={teacher_file} SOLVER.BATCH_SIZE={BATCH} "
        f"LOG.PREFIX={teacher_file.parent} EXPERIMENT.NAME={name}"
    )
    config = load_config(None, [*settings.split(), *METHODS[method], *overrides])
    step = build_run(config).trainer.step
    step.trainable.double().train()
    for module in step.trainable.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    prepare = step.loader.prepare

    def in_float64(*raw):
        batch = prepare(*raw)
        return batch._replace(images=batch.images.double())

    step.loader.prepare = in_float64
    parameters = step.trainable.parameters()
    optimizer = build_fused("SGD", parameters, 0.002, 1e-4, momentum=0.9, nesterov=True)
    whole = TrainStep(
        step.loader, Teacher(step.teacher.network.double(), step.trainable.need), step.trainable, optimizer,
        step.meters, forward=distributed.wrap(step.trainable), accumulate=step.accumulate, clip_grad=step.clip_grad,
    )  # fmt: skip
    seen = []
    numbers = range(FIRST, FIRST + STEPS)
    for number, raw in zip(numbers, step.loader.batches(1, FIRST), strict=False):
        whole.part = step.loader.part(number)
        seen.append(raw[0].tolist() if whole.part.weight else [])
        whole(*raw)
    averages = step.meters.read(1, together=True)
    return {"weights": step.trainable.state_dict(), "seen": seen, **averages._asdict()}


def evaluated(share):
    torch.manual_seed(3)
    loader = digits().eval_loader(7, torch.device("cpu"), share)
    return evaluate(build_model("resnet8", 10), loader)._asdict()


def train_and_evaluate(teacher_file):
    share = distributed.process_share()
    results = {method: train_steps(teacher_file, method) for method in METHODS}
    results["accumulated"] = train_steps(teacher_file, "NormKD", "SOLVER.ACCUMULATE=2")
    results["evaluation"] = evaluated(share)
    torch.save(results, teacher_file.with_name(f"results_{share.rank}.pt"))
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(share.rank)
    distributed.average_batch_norms(nn.Sequential(norm))
    assert norm.running_mean.tolist() == [0.5, 0.5]
    distributed.stop()
    distributed.exit_process(0)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("both") / "teacher.pt"
    torch.manual_seed(1)
    torch.save({"model": build_model("resnet14", 10).state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def both(teacher_file):
    folder = teacher_file.parent
    pair = start_pair(folder, train_and_evaluate, teacher_file)
    assert [done.stderr for done in finish(pair, folder) if done.returncode] == []
    return [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(teacher_file):
    return cache(partial(train_steps, teacher_file))


def assert_same_training(result, expected):
    assert result["samples"] == expected["samples"] == (STEPS - 1) * BATCH + 5
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    weights = (results["weights"] for results in (result, expected))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one(both, alone, method):
    single, (one, two) = alone(method), (results[method] for results in both)
    assert [a + b for a, b in zip(one["seen"], two["seen"], strict=True)] == single["seen"]
    assert [len(step) for step in one["seen"]][-2:] == [4, 3]
    assert_same_training(one, single)
    assert_same_state(one["weights"], two["weights"])


def test_accumulated_gradients_give_the_same_update(both, alone):
    for results in both:
        assert_same_training(results["accumulated"], alone("NormKD"))
    assert_same_training(alone("NormKD", "SOLVER.ACCUMULATE=4"), alone("NormKD"))


def test_several_processes_evaluate_every_image_once(both):
    data, device = digits(), torch.device("cpu")
    parts = [list(data.eval_loader(50, device, Share(rank, 7))) for rank in range(7)]
    targets = torch.cat([targets for part in parts for _, targets in part])
    assert torch.equal(targets, data.test.targets)
    expected = evaluated(Share())
    for found in (results["evaluation"] for results in both):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert torch.equal(found["per_class"], expected["per_class"])
        for key in ("top1", "top5", "samples"):
            assert found[key] == expected[key]


def start_runs(folder, *overrides, until_saved=True):
    command = (
        f"train --cfg digits/vanilla_resnet8 DEVICE=cpu LOG.PREFIX={folder} EXPERIMENT.NAME=run SOLVER.EPOCHS=100 "
        "SOLVER.LR_DECAY_STAGES=[] SOLVER.BATCH_SIZE=48 LOG.CHECKPOINT_STEPS=4"
    )
    pair = start_pair(folder, main, [*command.split(), *overrides])
    if until_saved:
        latest = folder / "digits" / "run" / "latest.pt"
        wait_for(lambda: latest.exists() or not pair[0].is_alive())
        assert pair[0].is_alive()
    return pair


@pytest.mark.slow
def test_two_processes_train_several_networks_after_each_other(tmp_path):
    networks = "--teacher resnet8 --student resnet8 --train-teacher --student-alone"
    keys = f"LOG.PREFIX={tmp_path} DATASET.SUBSET=100 DEVICE=cpu"
    command = f"distill --data digits {networks} --epochs 1 {keys}".split()
    pair = finish(start_pair(tmp_path, main, command), tmp_path)
    assert [done.stderr for done in pair if done.returncode] == []
    results = list(tmp_path.glob("digits/*/result.json"))
    assert [json.loads(path.read_text())["processes"] for path in results] == [2, 2, 2]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    processes = start_runs(tmp_path)
    os.kill(processes[1].pid, signal.SIGUSR1)
    for done in finish(processes, tmp_path):
        assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    state = load(tmp_path / "digits/run/latest.pt")
    assert int(state["meters"]["samples"]) in (48 * state["steps_done"], 0)


def test_a_removed_run_folder_is_one_line_of_each_process(tmp_path):
    processes = start_runs(tmp_path)
    shutil.rmtree(tmp_path / "digits")
    first, second = finish(processes, tmp_path)
    assert_user_error(first, "digits/run", "No such file or directory")
    assert_user_error(second, "process 1 of 2")


@pytest.mark.slow
def test_the_error_names_a_process_that_hangs(tmp_path):
    first, second = start_runs(tmp_path, "SOLVER.TIMEOUT=4")
    os.kill(second.pid, signal.SIGSTOP)
    (done,) = finish([first], tmp_path)
    second.kill()
    assert_user_error(done, "process 0 of 2 timed out waiting for process 1", "--resume")


OWN_STUDENT = """
import torch
from mdistiller_norm import models


class Own(models.Network):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.inner, self.drop, self.steps = models.build_model("resnet8", num_classes), torch.nn.Dropout(0.5), 0

    def outputs(self, images):
        outputs = self.inner.outputs(images)
        logits = self.drop(outputs.logits)
        self.steps += self.training
        if self.training and self.steps == 1:
            torch.save(logits != 0, f"FOLDER/mask_{torch.distributed.get_rank()}.pt")
        if self.steps == 3 and torch.distributed.get_rank() == 1:
            logits = logits * float("nan")
        return outputs._replace(logits=logits)


models.register("breaking")(Own)
"""


def test_all_processes_report_an_error_of_one(tmp_path):
    (tmp_path / "own.py").write_text(OWN_STUDENT.replace("FOLDER", str(tmp_path)))
    own = [f"EXPERIMENT.PLUGINS={tmp_path / 'own.py'}", "DISTILLER.STUDENT=breaking"]
    frequent = ["SOLVER.BATCH_SIZE=240", "LOG.TENSORBOARD_FREQ=1"]
    for done in finish(start_runs(tmp_path, *own, *frequent, until_saved=False), tmp_path):
        assert_user_error(done, "loss ce became NaN or infinite in epoch 1, step 3")
    one, two = (torch.load(tmp_path / f"mask_{rank}.pt") for rank in range(2))
    assert not torch.equal(one, two), "the processes must drop different activations"
