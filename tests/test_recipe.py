"""Options of the optimizer, the losses and the images, and DOT, against their formulas; the figures that a run logs."""

import copy
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from short_runs import (
    RECIPE,
    assert_same_state,
    build_step,
    config,
    few_digits,
    state_of,
    train_few,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2
from torchvision.tv_tensors import Image

from mdistiller_norm.cli import execute
from mdistiller_norm.data import MemoryTrainLoader, Share, digits
from mdistiller_norm.data.mix import MixedLoader, mix
from mdistiller_norm.data.plan import ALONE
from mdistiller_norm.distillers import Distiller, Need
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.compile import compile_outputs
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.meters import TrainMeters
from mdistiller_norm.engine.optim import DOT, Schedule, build_fused, set_learning_rate
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run
from mdistiller_norm.types import Batch, Losses, Outputs


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("step", 1, [4, 8, 4, 2]),
        ("cosine", 0, [8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]),
        ("cosine", 2, [8 / 3, 16 / 3, 8, 4]),
    ],
)
def test_schedules(kind: str, warmup: int, expected: list[float]) -> None:
    schedule = Schedule(kind, 8, 4, warmup, stages=(2, 3), decay=0.5)
    assert [schedule(epoch) for epoch in range(1, 5)] == pytest.approx(expected)


def test_adamw_from_zeros_is_adamw() -> None:
    networks = [nn.Linear(3, 2, dtype=torch.float64)]
    networks.append(copy.deepcopy(networks[0]))
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizers = [
        build_fused("AdamW", networks[0].parameters(), momentum=0.9, nesterov=True, **settings),
        torch.optim.AdamW(networks[1].parameters(), fused=False, **settings),
    ]
    for _ in range(4):
        images = torch.randn(5, 3, dtype=torch.float64)
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            network(images).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(networks[0].weight, networks[1].weight, rtol=1e-12, atol=0)


def test_the_norm_of_a_clipped_gradient(tmp_path: Path) -> None:
    plain = [
        "SOLVER.MOMENTUM=0",
        "SOLVER.NESTEROV=false",
        "SOLVER.WEIGHT_DECAY=0",
        "SOLVER.LR=0.5",
    ]
    step = build_step(tmp_path, "step", "SOLVER.CLIP_GRAD=0.01", *plain)
    parameters = list(step.trainable.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    step(*next(step.loader.batches(1)))
    changes = [old - new.detach() for old, new in zip(before, parameters, strict=True)]
    assert float(nn.utils.get_total_norm(changes)) == pytest.approx(0.5 * 0.01, rel=1e-4)


def test_class_probabilities_and_label_smoothing() -> None:
    student, images = (
        build_model("resnet8", 3).double(),
        torch.randn(4, 3, 8, 8, dtype=torch.float64),
    )
    probabilities, index = torch.rand(4, 3, dtype=torch.float64).softmax(1), torch.arange(4)
    trainable = Trainable(student, label_smoothing=0.3)
    losses = trainable(Batch(images, probabilities, index, index, index[0]), None, torch.ones(1))
    smooth = 0.7 * probabilities + 0.1
    expected = -(smooth * losses.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.total, expected)
    meters = TrainMeters(["ce"])
    meters.update(
        Losses(losses.total, losses.parts, probabilities.flip(0)), probabilities, True, True
    )
    hits = (probabilities.flip(0).argmax(1) == probabilities.argmax(1)).double().mean()
    assert meters.read(1).top1 == pytest.approx(100 * float(hits))


def test_averaged_weights_are_evaluated_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(config(tmp_path, "run", "SOLVER.EMA=0.75", epochs=1))
    student, run_step = run.trainer.step.trainable.student, run.trainer.run_step
    expected = {name: value.clone() for name, value in student.state_dict().items()}

    def averaged(*raw: torch.Tensor) -> None:
        run_step(*raw)
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value

    run.trainer.run_step = averaged
    result = run.trainer.fit()
    run.trainer.log.close()
    folder = tmp_path / "distill" / "run"
    for name in ("student_last.pt", "student_best.pt"):
        content = load(folder / name)
        assert content["about"]["ema"] == 0.75
        for key, value in content["model"].items():
            if value.is_floating_point():
                torch.testing.assert_close(value, expected[key], msg=key)
    assert "| EMA test top-1 " in (folder / "worklog.txt").read_text()
    for name in ("student_last.pt", "latest.pt"):
        capsys.readouterr()
        execute(["eval", "-c", str(folder / name)])
        assert f"top-1 {result['last']['top1']:6.2f}" in capsys.readouterr().out


def test_gradient_norms_are_logged_and_do_not_change_the_run(
    tmp_path: Path, teacher: str
) -> None:
    common = ["DISTILLER.TYPE=NormKD", teacher]
    for name, more in (("plain", []), ("norms", ["LOG.GRAD_NORMS=true"])):
        train_few(tmp_path, name, *common, *more)
    states = [state_of(tmp_path, name)["trainable"] for name in ("plain", "norms")]
    assert_same_state(*states)
    records = read_metrics(tmp_path / "distill" / "norms" / "metrics.jsonl")
    assert all(
        record[f"grad_norm_{name}"] > 0 for record in records for name in ("ce", "distill")
    )
    step = build_step(tmp_path, "step", *common, "SOLVER.BATCH_SIZE=8", dataset=few_digits(44))
    step.begin_epoch(1, 0)
    step.optimizer.param_groups[0]["lr"] = 0.0
    norms = step.gradient_norms(*next(step.loader.batches(1)))
    assert norms["grad_norm_ce"] == records[0]["grad_norm_ce"]
    step.loss_weights[1] = 0.0
    step(*next(step.loader.batches(1)))
    total = nn.utils.get_total_norm([p.grad for p in step.trainable.student.parameters()])
    assert float(total) == pytest.approx(norms["grad_norm_ce"], rel=1e-4)


def test_tensorboard_has_one_entry_of_three_groups(tmp_path: Path) -> None:
    train_few(tmp_path, "run", "LOG.TENSORBOARD_FREQ=4", *RECIPE)
    folder = tmp_path / "distill" / "run" / "tensorboard"
    assert all(path.is_file() for path in folder.iterdir())
    events = EventAccumulator(str(folder)).Reload()
    steps = {
        tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert steps["train/loss_ce"] == steps["train/loss_total"] == [4, 8, 12]
    for tag in ("epoch/test_top1", "epoch/lr", "epoch/grad_norm_ce", "speed/images_per_second"):
        assert steps[tag] == [1, 2], tag
    assert {tag.split("/")[0] for tag in steps} == {"train", "epoch", "speed"}
    assert [event.value for event in events.Scalars("epoch/lr")] == pytest.approx([0.0005, 0.001])


def test_a_cosine_is_not_continued_with_another_length(tmp_path: Path) -> None:
    train_few(tmp_path, "run", "SOLVER.SCHEDULE=cosine", epochs=1)
    with pytest.raises(ConfigError, match=r"other values of SOLVER\.EPOCHS"):
        train_few(tmp_path, "run", "SOLVER.SCHEDULE=cosine", resume=True)


CPU = torch.device("cpu")


def loader(mixup: float, cutmix: float, seed: int = 0, share: Share = ALONE) -> MixedLoader:
    return MixedLoader(MemoryTrainLoader(digits(), 240, seed, share), mixup, cutmix, 10, CPU)


def test_mixed_images_and_targets_equal_torchvisions() -> None:
    images, targets, rest = (
        torch.randn(5, 3, 8, 10),
        torch.tensor([1, 0, 2, 2, 1]),
        torch.zeros(()),
    )
    batch = Batch(images, targets, rest, rest, rest)
    common = {"labels": targets, "batch_size": 5}
    cut = {"box": (2, 0, 6, 4), "lam_adjusted": 0.8}
    for drawn, transform, parameters in (
        ([0, 0, 1, 1, 0.3], v2.MixUp(num_classes=3), {"lam": 0.3}),
        ([-0.1, 0.2, 0.5, 0.6, 0], v2.CutMix(num_classes=3), cut),
    ):
        mixed = mix(batch, torch.tensor(drawn), 3)
        for ours, whole in ((mixed.images, Image(images)), (mixed.targets, targets)):
            theirs = transform.transform(whole, common | parameters)
            torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor))


def test_mixing_does_not_synchronise() -> None:
    with FakeTensorMode():  # raises where a value is read
        images = torch.empty(4, 3, 8, 8, device="cuda")
        targets = torch.empty(4, dtype=torch.int64, device="cuda")
        mixed = mix(Batch(images, *[targets] * 4), torch.empty(5, device="cuda"), 3)
        assert mixed.targets.shape == (4, 3)


def test_draws_are_distributed_and_a_function_of_seed_epoch_step_and_rank() -> None:
    drawn = torch.cat([loader(0.4, 1.0, seed)._draw(1) for seed in range(300)])
    top, left, bottom, right, weight = drawn.T
    cut = weight == 0
    assert cut.float().mean() == pytest.approx(0.5, abs=0.05)
    area = (bottom - top) * (right - left)
    assert area[cut].mean() == pytest.approx(0.5, abs=0.05)  # a uniform distribution
    assert weight[~cut].var() == pytest.approx(0.25 / 1.8, abs=0.02)  # beta(0.4, 0.4)
    assert (area[~cut] == 1).all()
    assert (loader(0.4, 0)._draw(1)[:, 4] > 0).all()
    assert (loader(0, 0.4)._draw(1)[:, 4] == 0).all()
    first = loader(1, 1)
    whole = list(first.batches(2))
    for resumed, expected in zip(loader(1, 1).batches(2, 4), whole[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))
    assert not torch.equal(first._draw(1), first._draw(2))
    assert not torch.equal(first._draw(1), loader(1, 1, share=Share(1, 2))._draw(1))


RATES, MOMENTUM, DELTA, DECAY, WEIGHTS = (0.3, 0.3, 0.05), 0.7, 0.2, 0.11, (0.6, 1.7)
BATCH, INPUTS, CLASSES = 5, 3, 4
# For each parameter: its losses (0 task, 1 distillation) with the momentum and the weight decay of their gradients.
UPDATES = {
    "both": ((0, MOMENTUM - DELTA, DECAY), (1, MOMENTUM + DELTA, 0.0)),
    "task": ((0, MOMENTUM, DECAY),),
    "own": ((1, MOMENTUM, DECAY),),
}


class Student(nn.Module):
    """``logits = images @ both * task``; the distillation reads ``images @ both``."""

    def __init__(self, both: np.ndarray, task: np.ndarray) -> None:
        super().__init__()
        self.both, self.task = nn.Parameter(torch.tensor(both)), nn.Parameter(torch.tensor(task))

    def outputs(self, images: Tensor) -> Outputs:
        pooled = images @ self.both
        return Outputs(pooled * self.task, (), (), pooled)


class Regression(Distiller):
    need = Need.POOLED

    def __init__(self, own: np.ndarray) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.tensor(own))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return (student.pooled * self.own - teacher.pooled).square().mean()


def gradients(
    theta: dict[str, np.ndarray], images: np.ndarray, targets: np.ndarray, features: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradients of the weighted cross entropy and of the weighted regression."""
    pooled = images @ theta["both"]
    exponentials = np.exp(pooled * theta["task"])
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    slope = WEIGHTS[0] * (probabilities - np.eye(CLASSES)[targets]) / BATCH
    task = {"both": images.T @ (slope * theta["task"]), "task": (slope * pooled).sum(0)}
    slope = WEIGHTS[1] * 2 * (pooled * theta["own"] - features) / pooled.size
    distill = {"both": images.T @ (slope * theta["own"]), "own": (slope * pooled).sum(0)}
    return task, distill


@pytest.mark.parametrize("nesterov", [False, True])
def test_dot_computes_its_formula(nesterov: bool) -> None:
    rng = np.random.RandomState(0)
    index, weights = torch.arange(BATCH), torch.tensor(WEIGHTS, dtype=torch.float64)
    both, task, own = (
        rng.standard_normal(shape) for shape in ((INPUTS, CLASSES), CLASSES, CLASSES)
    )
    trainable = Trainable(Student(both, task), {"REGRESSION": Regression(own)})
    named = trainable.named_parameters()
    parameters = {key.split(".")[-1]: each.detach().numpy() for key, each in named}
    velocities = {
        name: [np.zeros_like(parameters[name]) for _ in UPDATES[name]] for name in UPDATES
    }
    optimizer = None
    for rate in RATES:
        images, features = (
            rng.standard_normal((BATCH, INPUTS)),
            rng.standard_normal((BATCH, CLASSES)),
        )
        targets = rng.randint(0, CLASSES, BATCH)
        batch = Batch(
            torch.tensor(images), torch.as_tensor(targets), index, index, torch.tensor(0)
        )
        outputs = Outputs(torch.zeros(BATCH, CLASSES), (), (), torch.tensor(features))
        if not optimizer:
            network = SimpleNamespace(outputs=lambda _, outputs=outputs: outputs)
            teacher = SimpleNamespace(network=network)
            sgd = {"lr": rate, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": nesterov}
            optimizer = DOT(trainable, batch, teacher, DELTA, **sgd)
        expected = {name: value.copy() for name, value in parameters.items()}
        slopes = gradients(expected, images, targets, features)
        for name, updates in UPDATES.items():
            decayed = parameters[name].copy()
            for velocity, (loss, momentum, decay) in zip(velocities[name], updates, strict=True):
                pull = slopes[loss][name] + decay * decayed
                velocity[:] = momentum * velocity + pull
                expected[name] -= rate * (pull + momentum * velocity if nesterov else velocity)
        set_learning_rate(optimizer.param_groups, rate)
        optimizer.backward(trainable(batch, outputs, weights).parts)
        optimizer.step()
        for name, value in expected.items():
            np.testing.assert_allclose(parameters[name], value, rtol=1e-12, atol=1e-13)


def test_a_compiled_student_can_be_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its backward pass was compiled by a run without DOT, as a program from the cache on disk may be."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images, eager = torch.randn(2, 3, 8, 8), build_model("resnet8", 4)
    network = copy.deepcopy(eager)
    with functorch.patch(donated_buffer=True):  # the default, which other tests need
        forward = compile_outputs(network.outputs, "student", pytest.fail, twice=True)
        forward(images).logits.sum().backward()
        results = []
        for student, run in ((eager, eager.outputs), (network, forward)):
            logits, parameters = run(images).logits, list(student.parameters())
            results.append(
                torch.autograd.grad(logits.square().sum(), parameters, retain_graph=True)
            )
            results.append(torch.autograd.grad(logits[:, 0].sum(), parameters))
    for expected, found in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found, expected)
