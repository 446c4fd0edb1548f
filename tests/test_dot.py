"""DOT's update against its formula in numpy: a float64 toy whose parameters are reached by both losses or by one."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from mdistiller_norm.build import build_optimizer
from mdistiller_norm.config import load_config
from mdistiller_norm.distillers import Distiller, Need
from mdistiller_norm.engine.compile import compile_student
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.optim import set_learning_rate
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.models import build_model
from mdistiller_norm.types import Batch, Outputs

RATES, MOMENTUM, DELTA, DECAY, FACTORS = (0.3, 0.3, 0.05), 0.7, 0.2, 0.11, (0.6, 1.7)
BATCH, INPUTS, CLASSES = 5, 3, 4
# Of each parameter: the loss (0 the task's, 1 the distillation's), the momentum and the weight decay of its gradients.
UPDATES = {
    "both": ((0, MOMENTUM - DELTA, DECAY), (1, MOMENTUM + DELTA, 0.0)),
    "task": ((0, MOMENTUM, DECAY),),
    "own": ((1, MOMENTUM, DECAY),),
}


class Student(nn.Module):
    """``logits = images @ both * task``, and what the distillation reads is not multiplied by ``task``."""

    def __init__(self, both: np.ndarray, task: np.ndarray) -> None:
        super().__init__()
        self.both, self.task = nn.Parameter(torch.tensor(both)), nn.Parameter(torch.tensor(task))

    def outputs(self, images: Tensor) -> Outputs:
        pooled = images @ self.both
        return Outputs(pooled * self.task, (), (), pooled)


class Regression(Distiller):
    """Mean squared difference of the pooled features, the student's times ``own``."""

    need = Need.POOLED

    def __init__(self, own: np.ndarray) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.tensor(own))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        return (student.pooled * self.own - teacher.pooled).square().mean()


def gradients(
    theta: dict[str, np.ndarray], images: np.ndarray, targets: np.ndarray, taught: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of the weighted cross entropy and of the weighted regression, by hand."""
    pooled = images @ theta["both"]
    exponentials = np.exp(pooled * theta["task"])
    slope = FACTORS[0] * (exponentials / exponentials.sum(1, keepdims=True) - np.eye(CLASSES)[targets]) / BATCH
    task = {"both": images.T @ (slope * theta["task"]), "task": (slope * pooled).sum(0)}
    slope = FACTORS[1] * 2 * (pooled * theta["own"] - taught) / pooled.size
    distill = {"both": images.T @ (slope * theta["own"]), "own": (slope * pooled).sum(0)}
    return task, distill


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", UPDATES)
def test_dot_is_its_formula(name: str, nesterov: bool) -> None:
    rng = np.random.RandomState(0)
    start = [rng.standard_normal(shape) for shape in ((INPUTS, CLASSES), CLASSES, CLASSES)]
    batches = [
        (rng.standard_normal((BATCH, INPUTS)), rng.randint(0, CLASSES, BATCH), rng.standard_normal((BATCH, CLASSES)))
        for _ in RATES
    ]

    def prepare(images: np.ndarray, targets: np.ndarray, _: Any) -> Batch:
        index = torch.arange(BATCH)
        return Batch(torch.tensor(images), torch.as_tensor(targets), index, index, torch.tensor(0))

    def taught(features: np.ndarray) -> Outputs:
        return Outputs(torch.zeros(BATCH, CLASSES), (), (), torch.tensor(features))

    trainable = Trainable(Student(*start[:2]), {"REGRESSION": Regression(start[2])})
    parameters = {key.split(".")[-1]: parameter.detach().numpy() for key, parameter in trainable.named_parameters()}
    loader = SimpleNamespace(prepare=prepare, batches=lambda epoch: iter(batches))
    teacher = SimpleNamespace(network=SimpleNamespace(outputs=lambda images: taught(batches[0][2])))
    settings = {"TRAINER": "dot", "DOT.DELTA": DELTA, "LR": RATES[0], "NESTEROV": nesterov}
    settings |= {"MOMENTUM": MOMENTUM, "WEIGHT_DECAY": DECAY}
    cfg = load_config(None, [f"SOLVER.{key}={value}" for key, value in settings.items()]).node
    optimizer = build_optimizer(cfg, trainable, loader, teacher)
    assert isinstance(optimizer, DOT)

    factors = torch.tensor(FACTORS, dtype=torch.float64)
    velocities = [np.zeros_like(parameters[name]) for _ in UPDATES[name]]
    for rate, (images, targets, features) in zip(RATES, batches, strict=True):
        # From where the others are: whatever moves them wrongly is no error of this one.
        slopes, expected = gradients(parameters, images, targets, features), parameters[name].copy()
        for velocity, (loss, momentum, decay) in zip(velocities, UPDATES[name], strict=True):
            pull = slopes[loss][name] + decay * parameters[name]
            velocity[:] = momentum * velocity + pull
            expected -= rate * (pull + momentum * velocity if nesterov else velocity)

        set_learning_rate(optimizer.param_groups, rate)
        optimizer.step(trainable(prepare(images, targets, None), taught(features), factors).parts)
        np.testing.assert_allclose(parameters[name], expected, rtol=1e-12, atol=1e-13)


def test_a_compiled_student_can_be_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its backward pass was compiled by a run that did so once, as one from the cache on disk may be."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    images, eager = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), build_model("resnet8", 4)
    network = copy.deepcopy(eager)
    with functorch.patch(donated_buffer=True):  # as it is by default, and will be for other tests
        passes = compile_student(network, pytest.fail, twice=True)
        passes(images).logits.sum().backward()
        results = []
        for student, run in ((eager, eager.outputs), (network, passes)):
            outputs, parameters = run(images), list(student.parameters())
            for loss, keep in ((outputs.logits.square().sum(), True), (outputs.logits[:, 0].sum(), False)):
                results.append(torch.autograd.grad(loss, parameters, retain_graph=keep))
    for expected, found in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found, expected)
