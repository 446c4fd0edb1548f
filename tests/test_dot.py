"""DOT's update against its formula in numpy, with parameters that both losses reach, or only one."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from mdistiller_norm.distillers import Distiller, Need
from mdistiller_norm.engine.compile import compile_outputs
from mdistiller_norm.engine.optim import DOT, set_learning_rate
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.models import build_model
from mdistiller_norm.types import Batch, Outputs

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
    both, task, own = (rng.standard_normal(shape) for shape in ((INPUTS, CLASSES), CLASSES, CLASSES))
    trainable = Trainable(Student(both, task), {"REGRESSION": Regression(own)})
    parameters = {key.split(".")[-1]: each.detach().numpy() for key, each in trainable.named_parameters()}
    velocities = {name: [np.zeros_like(parameters[name]) for _ in UPDATES[name]] for name in UPDATES}
    optimizer = None
    for rate in RATES:
        images, features = rng.standard_normal((BATCH, INPUTS)), rng.standard_normal((BATCH, CLASSES))
        targets = rng.randint(0, CLASSES, BATCH)
        batch = Batch(torch.tensor(images), torch.as_tensor(targets), index, index, torch.tensor(0))
        outputs = Outputs(torch.zeros(BATCH, CLASSES), (), (), torch.tensor(features))
        if not optimizer:
            teacher = SimpleNamespace(network=SimpleNamespace(outputs=lambda _, outputs=outputs: outputs))
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
            results.append(torch.autograd.grad(logits.square().sum(), parameters, retain_graph=True))
            results.append(torch.autograd.grad(logits[:, 0].sum(), parameters))
    for expected, found in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(found, expected)
