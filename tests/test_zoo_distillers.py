"""The rest of mdistiller's zoo and the logit methods since the paper, against independent float64 numpy references.

The references loop where the code batches. Where they are analytic they run on complex numbers, and the imaginary part
of ``f(x + i h) / h`` is their exact gradient; for singular vectors it is a central difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from yacs.config import CfgNode

from mdistiller_norm import functional as losses
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need, Pair
from mdistiller_norm.distillers.common import unit
from mdistiller_norm.distillers.ctkd import CTKD, reverse_gradient
from mdistiller_norm.distillers.kdsvd import leading_vectors
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.types import Batch, Outputs

FEATURE = ["NST", "PKT", "SP", "VID", "KDSVD"]
LOGIT = ["DIST", "TTM", "WTTM", "NKD", "DTKD", "CTKD", "RLD"]

Arrays = Sequence[np.ndarray]

# ---------------------------------------------------------------------------------------------------- the references


def log_sum_exp(z: np.ndarray) -> Any:
    peak = z.real.max()
    return peak + np.log(np.exp(z - peak).sum())


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - log_sum_exp(z))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> Any:
    return (np.exp(log_p) * (log_p - log_q)).sum()


def kd(z_s: np.ndarray, z_t: np.ndarray) -> Any:
    return kl(z_t - log_sum_exp(z_t), z_s - log_sum_exp(z_s))


def pooled_to(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    (h, w), (rows, columns) = x.shape[-2:], size
    return x.reshape(*x.shape[:-2], rows, h // rows, columns, w // columns).mean((-3, -1))


def matched(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = (min(s.shape[-2], t.shape[-2]), min(s.shape[-1], t.shape[-1]))
    return pooled_to(s, size), pooled_to(t, size)


def length_one(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum())


def nst(students: Arrays, teachers: Arrays) -> Any:
    total: Any = 0.0
    for s, t in zip(students, teachers, strict=True):
        s, t = matched(s, t)
        for one_s, one_t in zip(s, t, strict=True):
            rows_s, rows_t = ([length_one(channel.ravel()) for channel in one] for one in (one_s, one_t))

            def mean_kernel(a: list[np.ndarray], b: list[np.ndarray]) -> Any:
                return sum((x @ y) ** 2 for x in a for y in b) / (len(a) * len(b))

            gap = mean_kernel(rows_t, rows_t) + mean_kernel(rows_s, rows_s) - 2 * mean_kernel(rows_s, rows_t)
            total = total + gap / len(s)
    return total


def pkt(students: Arrays, teachers: Arrays, eps: float = 1e-7) -> Any:
    tables = []
    for features in (students[0], teachers[0]):
        rows = [length_one(row) for row in features]
        table = np.array([[(a @ b + 1) / 2 for b in rows] for a in rows])
        tables.append(np.array([row / row.sum() for row in table]))
    s, t = tables
    return (t * np.log((t + eps) / (s + eps))).mean()


def sp(students: Arrays, teachers: Arrays) -> Any:
    tables = []
    for maps in (students[0], teachers[0]):
        rows = [one.ravel() for one in maps]
        tables.append(np.array([length_one(np.array([a @ b for b in rows])) for a in rows]))
    return ((tables[0] - tables[1]) ** 2).sum() / len(students[0]) ** 2


def vid(mean: np.ndarray, teacher: np.ndarray, log_scale: np.ndarray, eps: float = 1e-5) -> Any:
    total: Any = 0.0
    for channel, raw in enumerate(log_scale):
        variance = np.log(1 + np.exp(raw)) + eps
        error = mean[:, channel] - teacher[:, channel]
        total = total + 0.5 * (error**2 / variance + np.log(variance)).sum()
    return total / mean.size


def kdsvd(students: Arrays, teachers: Arrays, k: int) -> float:
    total, batch = 0.0, len(students[0])
    for n in range(batch):
        before = None
        for s, t in zip(students, teachers, strict=True):
            s, t = matched(s[n], t[n])
            width = t.shape[-1]
            _, sigma, v_t = np.linalg.svd(t.reshape(-1, width))
            _, _, v_s = np.linalg.svd(s.reshape(-1, width))
            weights = sigma[:k] / np.sqrt((sigma[:k] ** 2).sum())
            now = []
            for teacher_vector, weight in zip(v_t[:k], weights, strict=True):
                teacher_vector = teacher_vector * (1 if teacher_vector.sum() >= 0 else -1)
                cosines = v_s[: k + 3] @ teacher_vector
                best = np.abs(cosines).argmax()
                now.append((weight * np.sign(cosines[best]) * v_s[best], weight * teacher_vector))
            for (s_now, t_now), (s_old, t_old) in zip(now, before or [], strict=False):
                rbf_s = np.exp(-((s_now[:, None] - s_old[None, :]) ** 2) / 8)
                rbf_t = np.exp(-((t_now[:, None] - t_old[None, :]) ** 2) / 8)
                total += ((rbf_s - rbf_t) ** 2).sum() / batch
            before = now
    return total


def dist(student: np.ndarray, teacher: np.ndarray, beta: float, gamma: float, t: float) -> Any:
    p_s, p_t = (np.array([softmax(z / t) for z in side]) for side in (student, teacher))

    def distance(a: np.ndarray, b: np.ndarray) -> Any:
        total: Any = 0.0
        for x, y in zip(a, b, strict=True):
            x, y = x - x.mean(), y - y.mean()
            total = total + 1 - (x @ y) / (np.sqrt((x**2).sum()) * np.sqrt((y**2).sum()) + 1e-8)
        return total / len(a)

    return t**2 * (beta * distance(p_s, p_t) + gamma * distance(p_s.T, p_t.T))


def ttm(student: np.ndarray, teacher: np.ndarray, gamma: float, weighted: bool) -> Any:
    """Algorithm 1, by powers of probabilities."""
    total: Any = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        powers = softmax(z_t) ** gamma
        p = powers / powers.sum()
        divergence = (p * (np.log(p) - (z_s - log_sum_exp(z_s)))).sum()
        total = total + (powers.sum() if weighted else 1.0) * divergence
    return total / len(student)


def nkd(student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, gamma: float, t: float) -> Any:
    total: Any = 0.0
    for z_s, z_t, y in zip(student, teacher, targets, strict=True):
        log_s, p_t = z_s - log_sum_exp(z_s), softmax(z_t)
        rest_s, rest_t = np.delete(z_s, y) / t, np.delete(z_t, y) / t
        total = total - p_t[y] * log_s[y] - gamma * t**2 * (softmax(rest_t) * (rest_s - log_sum_exp(rest_s))).sum()
    return total / len(student)


def dtkd(student: np.ndarray, teacher: np.ndarray, alpha: float, beta: float, t: float) -> Any:
    total: Any = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        top_s, top_t = z_s[z_s.real.argmax()], z_t[z_t.real.argmax()]
        t_s, t_t = 2 * t * top_s / (top_s + top_t), 2 * t * top_t / (top_s + top_t)
        total = total + alpha * t_s * t_t * kd(z_s / t_s, z_t / t_t) + beta * t**2 * kd(z_s / t, z_t / t)
    return total / len(student)


def rld(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, alpha: float, beta: float, t: float, t_sure: float
) -> Any:
    total: Any = 0.0
    for z_s, z_t, y in zip(student, teacher, targets, strict=True):
        halves = []
        for z, one in ((z_t / t_sure, z_t.argmax()), (z_s / t_sure, y)):
            halves.append(np.array([z[one], log_sum_exp(np.delete(z, one))]) - log_sum_exp(z))
        total = total + alpha * t_sure**2 * kl(*halves)
        below = [c for c in range(len(z_t)) if z_t[c] < z_t[y]]
        if below:
            total = total + beta * t**2 * kd(z_s[below] / t, z_t[below] / t)
    return total / len(student)


def exact_gradient(function: Callable[[Arrays], Any], at: Arrays) -> list[np.ndarray]:
    step, gradients = 1e-30, []
    for position, array in enumerate(at):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            moved = [other.astype(np.complex128) for other in at]
            moved[position][index] += 1j * step
            gradient[index] = function(moved).imag / step
        gradients.append(gradient)
    return gradients


def central_gradient(function: Callable[[Arrays], float], at: Arrays) -> list[np.ndarray]:
    step, gradients = 1e-5, []
    for position, array in enumerate(at):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            sides = []
            for sign in (1, -1):
                moved = [other.copy() for other in at]
                moved[position][index] += sign * step
                sides.append(function(moved))
            gradient[index] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


def check(
    loss_of: Callable[[list[Tensor]], Tensor],
    reference: Callable[[Arrays], Any],
    at: Arrays,
    gradient: Callable[[Callable[[Arrays], Any], Arrays], list[np.ndarray]] = exact_gradient,
    tolerance: float = 1e-9,
) -> None:
    leaves = [torch.tensor(array, requires_grad=True) for array in at]
    loss = loss_of(leaves)
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    assert loss.item() == pytest.approx(float(np.real(reference(at))), rel=1e-10, abs=1e-13)
    for leaf, slope in zip(leaves, gradient(reference, at), strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad, slope, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(slope).max()))


# -------------------------------------------------------------------------------------------------- the logit losses

LogitLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOGIT_CASES: dict[str, tuple[LogitLoss, Callable[[np.ndarray, np.ndarray, np.ndarray], Any]]] = {
    "dist": (lambda s, t, y: losses.dist_loss(s, t), lambda s, t, y: dist(s, t, 1.0, 1.0, 4.0)),
    "dist_2_3": (lambda s, t, y: losses.dist_loss(s, t, 2.0, 3.0, 1.0), lambda s, t, y: dist(s, t, 2.0, 3.0, 1.0)),
    "ttm": (lambda s, t, y: losses.ttm_loss(s, t), lambda s, t, y: ttm(s, t, 0.1, False)),
    "ttm_0.4": (lambda s, t, y: losses.ttm_loss(s, t, 0.4), lambda s, t, y: ttm(s, t, 0.4, False)),
    "wttm": (lambda s, t, y: losses.wttm_loss(s, t), lambda s, t, y: ttm(s, t, 0.1, True)),
    "wttm_0.4": (lambda s, t, y: losses.wttm_loss(s, t, 0.4), lambda s, t, y: ttm(s, t, 0.4, True)),
    "nkd": (losses.nkd_loss, lambda s, t, y: nkd(s, t, y, 3.5, 3.0)),
    "nkd_imagenet": (lambda s, t, y: losses.nkd_loss(s, t, y, 1.5, 1.0), lambda s, t, y: nkd(s, t, y, 1.5, 1.0)),
    "dtkd": (lambda s, t, y: losses.dtkd_loss(s, t), lambda s, t, y: dtkd(s, t, 3.0, 1.0, 4.0)),
    "dtkd_1_0.5": (lambda s, t, y: losses.dtkd_loss(s, t, 1.0, 0.5, 2.0), lambda s, t, y: dtkd(s, t, 1.0, 0.5, 2.0)),
    "ctkd": (
        lambda s, t, y: losses.ctkd_loss(s, t, torch.tensor(3.0, dtype=s.dtype)),
        lambda s, t, y: sum(9 * kd(a / 3, b / 3) for a, b in zip(s, t, strict=True)) / len(s),
    ),
    "rld": (losses.rld_loss, lambda s, t, y: rld(s, t, y, 1.0, 8.0, 4.0, 1.0)),
    "rld_same_t": (
        lambda s, t, y: losses.rld_loss(s, t, y, 2.0, 4.0, 3.0, 3.0),
        lambda s, t, y: rld(s, t, y, 2.0, 4.0, 3.0, 3.0),
    ),
}


def draw(batch: int = 5, classes: int = 7, scale: float = 3.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.RandomState(seed)
    student, teacher = scale * rng.standard_normal((2, batch, classes))
    return student, teacher, rng.randint(0, classes, batch)


@pytest.mark.parametrize("name", LOGIT_CASES)
@pytest.mark.parametrize(("batch", "classes"), [(5, 7), (1, 6), (4, 2)])
def test_logit_loss_is_its_formula(name: str, batch: int, classes: int) -> None:
    student, teacher, targets = draw(batch, classes, seed=batch)
    teacher[:, 0] = np.abs(teacher[:, 0])  # DTKD's formula is for a largest logit that is positive
    student[:, 1] = np.abs(student[:, 1])
    loss, reference = LOGIT_CASES[name]
    check(
        lambda leaves: loss(leaves[0], torch.tensor(teacher), torch.as_tensor(targets)),
        lambda at: reference(at[0], teacher, targets),
        [student],
    )


def hard_logits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    student, teacher, _ = draw(6, 10, seed=1)
    spike = np.zeros((6, 10))
    spike[:, 3] = 1e4
    return {
        "huge": (3e3 * student, 3e3 * teacher),
        "opposed": (spike, np.roll(spike, 4, 1)),
        "negative": (-spike, spike - 1e4),
        "constant_student": (np.full_like(student, 2.5), teacher),
        "constant_teacher": (student, np.full_like(teacher, -1.5)),
        "zero": (np.zeros_like(student), np.zeros_like(teacher)),
        "near_constant": (1e-5 * student, 1e-5 * teacher),
        "equal": (teacher, teacher),
        "batch_of_one": (student[:1], teacher[:1]),
        "two_classes": (student[:, :2], teacher[:, :2]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", hard_logits())
@pytest.mark.parametrize("name", LOGIT_CASES)
def test_logit_loss_is_finite_on_hard_inputs(name: str, kind: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.tensor(array, dtype=dtype) for array in hard_logits()[kind])
    student.requires_grad_()
    loss = LOGIT_CASES[name][0](student, teacher, torch.arange(len(student)) % student.shape[1])
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e6


@pytest.mark.parametrize("name", LOGIT_CASES)
def test_logit_loss_in_lower_precision(name: str) -> None:
    student, teacher, targets = draw(8, 20, seed=2)
    half = [torch.tensor(array).bfloat16() for array in (student, teacher)]
    exact = LOGIT_CASES[name][0](half[0].double(), half[1].double(), torch.as_tensor(targets))
    for dtype in (torch.bfloat16, torch.float32):
        loss = LOGIT_CASES[name][0](half[0].to(dtype), half[1].to(dtype), torch.as_tensor(targets))
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=3e-5)


@pytest.mark.parametrize("name", ["dist", "dtkd", "ctkd"])
def test_equal_logits_lose_nothing(name: str) -> None:
    _, teacher, targets = (torch.tensor(array) for array in draw(6, 10, seed=3))
    student = teacher.clone().requires_grad_()
    loss = LOGIT_CASES[name][0](student, teacher, targets)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-4  # DIST: its 1e-8 keeps the correlation below 1
    assert gradient.abs().max() < 1e-4


def test_ttm_is_kd_where_the_temperature_is_one() -> None:
    student, teacher, _ = (torch.tensor(array) for array in draw(seed=4))
    for loss in (losses.ttm_loss(student, teacher, 1.0), losses.wttm_loss(student, teacher, 1.0)):
        torch.testing.assert_close(loss, losses.kd_loss(student, teacher, 1.0), rtol=1e-12, atol=0)


def test_wttm_weighs_an_unsure_teacher_more() -> None:
    student = torch.zeros(1, 10, dtype=torch.float64)
    sure, unsure = (s * torch.eye(10, dtype=torch.float64)[:1] for s in (20.0, 2.0))
    ratios = [losses.wttm_loss(student, z, 0.5) / losses.ttm_loss(student, z, 0.5) for z in (sure, unsure)]
    assert 1.0 < ratios[0] < ratios[1] < 10**0.5


def test_dtkd_without_a_positive_logit_is_kd() -> None:
    student, teacher, _ = (torch.tensor(-np.abs(x) - 1.0) for x in draw(seed=5))
    loss, plain = losses.dtkd_loss(student, teacher, 3.0, 1.0, 4.0), losses.kd_loss(student, teacher, 4.0)
    torch.testing.assert_close(loss, 4 * plain, rtol=1e-12, atol=0)


def test_rld_is_dkd_where_the_teacher_is_right() -> None:
    student, teacher, _ = (torch.tensor(array) for array in draw(6, 9, seed=6))
    right = teacher.argmax(1)
    refined = losses.rld_loss(student, teacher, right, 1.0, 8.0, 4.0, 4.0)
    torch.testing.assert_close(refined, losses.dkd_loss(student, teacher, right), rtol=1e-12, atol=0)
    wrong = teacher.argmin(1)  # nothing is ranked below the target: only the confidence is left
    refined = losses.rld_loss(student, teacher, wrong, 0.0, 8.0)
    assert refined.item() == 0.0


def test_nkd_weighs_the_target_by_the_teachers_confidence() -> None:
    student, teacher, targets = (torch.tensor(array) for array in draw(1, 6, seed=7))
    loss = losses.nkd_loss(student, teacher, targets, gamma=0.0)
    confidence = teacher.softmax(1)[0, targets[0]]
    torch.testing.assert_close(loss, confidence * nn.functional.cross_entropy(student, targets))


# ---------------------------------------------------------------------------------------------------------- CTKD


def test_ctkd_temperature_climbs_the_loss_by_the_curriculum() -> None:
    method = build("CTKD")
    assert isinstance(method, CTKD)
    assert method.extra_parameters() == 1
    assert method.temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    strengths = []
    for epoch in (1, 5, 10, 11, 240):
        method.begin_epoch(epoch, seed=0)
        strengths.append(method.strength.item())
    assert strengths == pytest.approx([(1 - math.cos(math.pi / 10)) / 2, 0.5, 1.0, 1.0, 1.0])

    student, teacher, _ = (torch.tensor(array).float() for array in draw(seed=8))
    theta = method.theta.detach().double().requires_grad_()
    plain = losses.ctkd_loss(student, teacher, 1 + 20 * theta.sigmoid())
    (slope,) = torch.autograd.grad(plain, theta)
    for epoch, strength in zip((5, 10), (0.5, 1.0), strict=True):
        method.begin_epoch(epoch, seed=0)
        loss = method(outputs(student), outputs(teacher), batch_of(5))
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
        (reversed_slope,) = torch.autograd.grad(loss, method.theta)
        assert reversed_slope.item() == pytest.approx(-strength * slope.item(), rel=1e-3)


def test_ctkd_temperature_trains_and_is_saved_without_its_curriculum() -> None:
    method = build("CTKD")
    method.begin_epoch(10, seed=0)
    before = method.temperature.item()
    student, teacher, _ = (torch.tensor(array).float() for array in draw(seed=9))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    first = method(outputs(student), outputs(teacher), batch_of(5))
    first.backward()
    optimizer.step()
    assert method.temperature.item() != before
    assert method(outputs(student), outputs(teacher), batch_of(5)) > first
    assert list(method.state_dict()) == ["theta"]


def test_reversed_gradient_keeps_the_value_to_the_last_bit() -> None:
    x = torch.randn(100, requires_grad=True)
    y = reverse_gradient(x, torch.tensor(0.3))
    assert torch.equal(x, y)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((100,), -0.3))


# ------------------------------------------------------------------------------------------------ the feature losses


def draw_maps(
    students: Sequence[tuple[int, ...]], teachers: Sequence[tuple[int, ...]], seed: int = 0, positive: bool = True
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.RandomState(seed)
    sides = [[rng.standard_normal(shape) for shape in shapes] for shapes in (students, teachers)]
    return tuple([np.abs(x) if positive else x for x in side] for side in sides)  # type: ignore[return-value]


SHAPES = {
    "same_size": ([(2, 4, 4, 4), (2, 5, 2, 2)], [(2, 3, 4, 4), (2, 6, 2, 2)]),
    "student_larger": ([(3, 3, 4, 4), (3, 4, 4, 4)], [(3, 3, 4, 4), (3, 5, 2, 2)]),
    "teacher_larger": ([(1, 6, 2, 2), (1, 7, 1, 2)], [(1, 8, 4, 4), (1, 9, 2, 2)]),
}


def as_tensors(arrays: Arrays) -> list[Tensor]:
    return [torch.tensor(array) for array in arrays]


@pytest.mark.parametrize("shapes", SHAPES)
def test_nst(shapes: str) -> None:
    students, teachers = draw_maps(*SHAPES[shapes], seed=10, positive=False)
    check(lambda at: losses.nst_loss(at, as_tensors(teachers)), lambda at: nst(at, teachers), students)


def test_pkt() -> None:
    (student,), (teacher,) = draw_maps([(5, 6)], [(5, 4)], seed=11, positive=False)
    check(lambda at: losses.pkt_loss(at[0], torch.tensor(teacher)), lambda at: pkt(at, [teacher]), [student])


def test_pkt_has_nothing_to_say_of_one_sample() -> None:
    student = torch.randn(1, 4, requires_grad=True)
    loss = losses.pkt_loss(student, torch.randn(1, 8))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("shapes", SHAPES)
def test_sp(shapes: str) -> None:
    students, teachers = draw_maps(*SHAPES[shapes], seed=12, positive=False)
    students, teachers = students[-1:], teachers[-1:]
    check(lambda at: losses.sp_loss(at, as_tensors(teachers)), lambda at: sp(at, teachers), students)


def test_vid() -> None:
    (mean,), (teacher,) = draw_maps([(2, 3, 2, 2)], [(2, 3, 2, 2)], seed=13, positive=False)
    log_scale = np.array([-2.0, 0.5, 4.0])
    check(
        lambda at: losses.vid_loss(at[0], torch.tensor(teacher), at[1]),
        lambda at: vid(at[0], teacher, at[1]),
        [mean, log_scale],
    )
    extreme = torch.tensor([-800.0, 0.0, 800.0])
    assert losses.vid_loss(torch.tensor(mean), torch.tensor(teacher), extreme).isfinite()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shapes", ["same_size", "student_larger"])
def test_kdsvd(shapes: str, k: int) -> None:
    students, teachers = draw_maps(*SHAPES[shapes], seed=14)
    check(
        lambda at: losses.kdsvd_loss(at, as_tensors(teachers), k),
        lambda at: kdsvd(at, teachers, k),
        students,
        central_gradient,
        tolerance=1e-6,
    )


def test_kdsvd_does_not_depend_on_the_solvers_signs() -> None:
    students, teachers = (as_tensors(side) for side in draw_maps(*SHAPES["same_size"], seed=15, positive=False))
    loss = losses.kdsvd_loss(students, teachers, 1)
    # A map and its negative have the same singular vectors up to the sign that a solver happens to choose.
    torch.testing.assert_close(losses.kdsvd_loss([-students[0], students[1]], [teachers[0], -teachers[1]], 1), loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kdsvd_gradient_is_finite_without_a_gap(dtype: torch.dtype) -> None:
    """Equal and zero singular values, where the derivative of a singular vector divides by zero."""
    equal = torch.eye(4, dtype=dtype).expand(2, 3, 4, 4).clone().requires_grad_()
    rank_one = torch.ones(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    other = torch.rand(2, 3, 4, 4, dtype=dtype)
    for student in (equal, rank_one):
        loss = losses.kdsvd_loss([student, student * 2 + other], [other, other.flip(3)], 2)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    vectors, values = leading_vectors(rank_one.detach(), 3)
    assert (values[:, 0] > 1).all()
    assert not vectors[..., 1:].any()  # not determined by the map


def test_unit_is_safe() -> None:
    x = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]], requires_grad=True)
    y = unit(x, 1)
    torch.testing.assert_close(y, torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[2].any()
    exact = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: unit(z, 1), exact)


def hard_maps() -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    shapes = [(3, 4, 8, 8), (3, 6, 4, 4)]
    students, teachers = draw_maps(shapes, shapes, seed=16)
    dead = [x.copy() for x in students]
    for x in dead:
        x[0], x[1, 1] = 0.0, 0.0  # a sample and a channel that a ReLU has shut
    return {
        "huge": ([1e4 * x for x in students], [1e4 * x for x in teachers]),
        "zero_student": ([0 * x for x in students], teachers),
        "zero_teacher": (students, [0 * x for x in teachers]),
        "constant": ([0 * x + 2.5 for x in students], [0 * x + 0.5 for x in teachers]),
        "dead": (dead, teachers),
        "equal_samples": ([x[:1].repeat(3, 0) for x in students], teachers),
        "equal": (teachers, teachers),
        "batch_of_one": ([x[:1] for x in students], [x[:1] for x in teachers]),
    }


FEATURE_LOSSES: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "nst": losses.nst_loss,
    "pkt": lambda s, t: losses.pkt_loss(s[-1].mean((2, 3)), t[-1].mean((2, 3))),
    "sp": lambda s, t: losses.sp_loss(s[-1:], t[-1:]),
    "vid": lambda s, t: losses.vid_loss(s[-1], t[-1], torch.linspace(-5, 5, 6)),
    "kdsvd": lambda s, t: losses.kdsvd_loss(s, t, 2),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", hard_maps())
@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_loss_is_finite_on_hard_inputs(name: str, kind: str, dtype: torch.dtype) -> None:
    students, teachers = ([x.to(dtype) for x in as_tensors(side)] for side in hard_maps()[kind])
    for x in students:
        x.requires_grad_()
    loss = FEATURE_LOSSES[name](students, teachers)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in students)
    if kind == "equal" and name != "vid":
        assert abs(loss.item()) < 1e-10


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_loss_in_float32_and_in_channels_last(name: str) -> None:
    students, teachers = (as_tensors(side) for side in draw_maps(*SHAPES["student_larger"], seed=17))
    if name == "vid":
        students = teachers = [torch.rand(2, 6, 4, 4, dtype=torch.float64)]
    exact = FEATURE_LOSSES[name](students, teachers)
    single = [[x.float() for x in side] for side in (students, teachers)]
    last = [[x.to(memory_format=torch.channels_last) for x in side] for side in single]
    for s, t in (single, last):
        loss = FEATURE_LOSSES[name](s, t)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["nst", "kdsvd"])
def test_maps_in_half_precision_are_averaged_in_float32(name: str) -> None:
    students, teachers = (as_tensors(side) for side in draw_maps(*SHAPES["student_larger"], seed=18))
    half = [[x.bfloat16() for x in side] for side in (students, teachers)]
    exact = FEATURE_LOSSES[name](*[[x.double() for x in side] for side in half])
    assert FEATURE_LOSSES[name](*half).item() == pytest.approx(exact.item(), rel=1e-5)


# -------------------------------------------------------------------------------------------- classes, from a config

PAIRS = [
    ("resnet32x4", "resnet8x4"),
    ("wrn_40_2", "wrn_40_1"),
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "MobileNetV2"),
    ("resnet32x4", "ShuffleV1"),
]


def outputs(logits: Tensor) -> Outputs:
    return Outputs(logits, (), (), logits)


def batch_of(size: int, device: str = "cpu") -> Batch:
    index = torch.arange(size, device=device)
    return Batch(torch.zeros(size, 3, 4, 4, device=device), index % 10, index, -torch.ones_like(index), index[0])


def small_pair() -> Pair:
    def meta(channels: Sequence[int]) -> Outputs:
        maps = tuple(torch.empty(2, c, s, s, device="meta") for c, s in zip(channels, (8, 8, 4, 4), strict=True))
        return Outputs(torch.empty(2, 10, device="meta"), maps, maps, torch.empty(2, channels[-1], device="meta"))

    return Pair(meta((4, 4, 6, 8)), meta((4, 6, 8, 8)), nn.Identity(), torch.arange(50) % 10, 10)


def like(probed: Outputs, size: int, device: str = "cpu", seed: int = 0) -> Outputs:
    torch.manual_seed(seed)

    def fill(x: Tensor) -> Tensor:
        return torch.rand(size, *x.shape[1:], device=device)

    features = tuple(fill(x) for x in probed.features)
    # Other values than the features, so that a method that takes the one for the other is found.
    return Outputs(4 * fill(probed.logits) - 1, features, tuple(x - 0.3 for x in features), fill(probed.pooled))


def leaves_of(sides: Outputs) -> list[Tensor]:
    return [x.requires_grad_() for x in (sides.logits, *sides.features, sides.pooled)]


def build(name: str, pair: Pair | None = None, **changes: Any) -> Distiller:
    node = CfgNode(DISTILLERS[name].defaults)
    for key, value in changes.items():
        node[key] = value
    return DISTILLERS[name].from_config(node, pair or small_pair())


@pytest.mark.parametrize("name", FEATURE)
def test_defaults_are_mdistillers(name: str, facts: Path) -> None:
    tree = json.loads((facts / "config_defaults.json").read_text())["NormKD"]
    assert DISTILLERS[name].defaults == tree[name]


@pytest.mark.parametrize(
    ("name", "ce_weight", "weight", "warmup"),
    [
        ("NST", 1.0, 50.0, 0),
        ("PKT", 1.0, 30000.0, 0),
        ("SP", 1.0, 3000.0, 0),
        ("VID", 1.0, 1.0, 0),
        ("KDSVD", 1.0, 1.0, 0),
        ("DIST", 1.0, 2.0, 0),
        ("TTM", 1.0, 100.0, 0),
        ("WTTM", 1.0, 3.0, 0),
        ("NKD", 1.0, 1.0, 0),
        ("DTKD", 1.0, 1.0, 20),
        ("CTKD", 0.1, 0.9, 0),
        ("RLD", 1.0, 1.0, 20),
    ],
)
def test_weights_of_the_defaults(name: str, ce_weight: float, weight: float, warmup: int) -> None:
    method = build(name)
    assert (method.ce_weight, method.weight, method.warmup) == (ce_weight, weight, warmup)


@pytest.mark.parametrize("name", FEATURE + LOGIT)
def test_class_is_its_function(name: str) -> None:
    pair, batch = small_pair(), batch_of(4)
    method, student, teacher = build(name, pair), like(pair.student, 4, seed=1), like(pair.teacher, 4, seed=2)
    s, t, y = student.logits, teacher.logits, batch.targets
    by_hand = {
        "NST": lambda: losses.nst_loss(student.features[1:], teacher.features[1:]),
        "PKT": lambda: losses.pkt_loss(student.pooled, teacher.pooled),
        "SP": lambda: losses.sp_loss(student.features[-1:], teacher.features[-1:]),
        "VID": lambda: sum(
            losses.vid_loss(regressor(a), b, scale)
            for regressor, a, b, scale in zip(
                method.regressors, student.features[1:], teacher.features[1:], method.log_scales, strict=True
            )
        ),
        "KDSVD": lambda: losses.kdsvd_loss(student.features[1:], teacher.features[1:], 1),
        "DIST": lambda: losses.dist_loss(s, t),
        "TTM": lambda: losses.ttm_loss(s, t, 0.1),
        "WTTM": lambda: losses.wttm_loss(s, t, 0.1),
        "NKD": lambda: losses.nkd_loss(s, t, y, 3.5, 3.0),
        "DTKD": lambda: losses.dtkd_loss(s, t, 3.0, 1.0, 4.0),
        "CTKD": lambda: losses.ctkd_loss(s, t, 1 + 20 * torch.sigmoid(torch.tensor(1.0))),
        "RLD": lambda: losses.rld_loss(s, t, y, 1.0, 8.0, 4.0, 1.0),
    }[name]
    torch.testing.assert_close(method(student, teacher, batch), by_hand())


Call = Callable[[Outputs, Outputs, Tensor, Any], Tensor]
WEIGHTS = {"LOSS.CE_WEIGHT": 0.37, "LOSS.KD_WEIGHT": 4.3}
FEATURE_WEIGHTS = {"LOSS.CE_WEIGHT": 0.37, "LOSS.FEAT_WEIGHT": 4.3}
RAMPED = {"CE_WEIGHT": 0.37, "WARMUP": 9}
# Every hyper-parameter at a value that no other key and no default has, and the pure function that should get them.
WIRING: dict[str, tuple[dict[str, Any], Call]] = {
    "KD": (
        WEIGHTS | {"TEMPERATURE": 2.9},
        lambda s, t, y, method: losses.kd_loss(s.logits, t.logits, temperature=2.9),
    ),
    "NormKD": (
        WEIGHTS | {"TEMPERATURE_NORM": 1.7, "STATISTIC": "range"},
        lambda s, t, y, method: losses.normkd_loss(s.logits, t.logits, t_norm=1.7, statistic="range"),
    ),
    "LSKD": (
        WEIGHTS | {"TEMPERATURE": 0.7},
        lambda s, t, y, method: losses.lskd_loss(s.logits, t.logits, base_temperature=0.7),
    ),
    "DKD": (
        RAMPED | {"ALPHA": 1.3, "BETA": 2.3, "T": 2.9},
        lambda s, t, y, method: losses.dkd_loss(s.logits, t.logits, y, alpha=1.3, beta=2.3, temperature=2.9),
    ),
    "NormKD_W_DKD": (
        RAMPED | {"ALPHA": 1.3, "BETA": 2.3, "TEMPERATURE_NORM": 1.7},
        lambda s, t, y, method: losses.norm_dkd_loss(s.logits, t.logits, y, alpha=1.3, beta=2.3, t_norm=1.7),
    ),
    "LSDKD": (
        RAMPED | {"KD_WEIGHT": 4.3, "ALPHA": 1.3, "BETA": 2.3, "TEMPERATURE": 1.7},
        lambda s, t, y, method: losses.lsdkd_loss(s.logits, t.logits, y, alpha=1.3, beta=2.3, base_temperature=1.7),
    ),
    "DIST": (
        WEIGHTS | {"TEMPERATURE": 2.9, "BETA": 1.3, "GAMMA": 2.3},
        lambda s, t, y, method: losses.dist_loss(s.logits, t.logits, beta=1.3, gamma=2.3, temperature=2.9),
    ),
    "TTM": (WEIGHTS | {"GAMMA": 0.23}, lambda s, t, y, method: losses.ttm_loss(s.logits, t.logits, gamma=0.23)),
    "WTTM": (WEIGHTS | {"GAMMA": 0.23}, lambda s, t, y, method: losses.wttm_loss(s.logits, t.logits, gamma=0.23)),
    "NKD": (
        WEIGHTS | {"TEMPERATURE": 2.9, "GAMMA": 1.3},
        lambda s, t, y, method: losses.nkd_loss(s.logits, t.logits, y, gamma=1.3, temperature=2.9),
    ),
    "DTKD": (
        RAMPED | {"ALPHA": 1.3, "BETA": 2.3, "T": 2.9},
        lambda s, t, y, method: losses.dtkd_loss(s.logits, t.logits, alpha=1.3, beta=2.3, temperature=2.9),
    ),
    "CTKD": (
        WEIGHTS | {"T_START": 1.3, "T_RANGE": 5.7, "EPOCHS": 7},
        lambda s, t, y, method: losses.ctkd_loss(
            s.logits, t.logits, temperature=1.3 + 5.7 * torch.sigmoid(torch.tensor(1.1))
        ),
    ),
    "RLD": (
        RAMPED | {"ALPHA": 1.3, "BETA": 2.3, "T": 2.9, "ALPHA_T": 1.7},
        lambda s, t, y, method: losses.rld_loss(
            s.logits, t.logits, y, alpha=1.3, beta=2.3, temperature=2.9, confidence_temperature=1.7
        ),
    ),
    "AT": (
        FEATURE_WEIGHTS | {"P": 3.5},
        lambda s, t, y, method: losses.at_loss(s.features[1:], t.features[1:], p=3.5),
    ),
    "RKD": (
        FEATURE_WEIGHTS | {"DISTANCE_WEIGHT": 1.3, "ANGLE_WEIGHT": 2.3, "PDIST.EPSILON": 0.5, "PDIST.SQUARED": True},
        lambda s, t, y, method: losses.rkd_loss(
            s.pooled, t.pooled, squared=True, eps=0.5, distance_weight=1.3, angle_weight=2.3
        ),
    ),
    "NST": (FEATURE_WEIGHTS, lambda s, t, y, method: losses.nst_loss(s.features[1:], t.features[1:])),
    "PKT": (FEATURE_WEIGHTS, lambda s, t, y, method: losses.pkt_loss(s.pooled, t.pooled)),
    "SP": (FEATURE_WEIGHTS, lambda s, t, y, method: losses.sp_loss(s.features[-1:], t.features[-1:])),
    "VID": (
        FEATURE_WEIGHTS | {"EPS": 0.7, "INIT_PRED_VAR": 2.3},
        lambda s, t, y, method: sum(
            losses.vid_loss(regressor(a), b, torch.full((b.shape[1],), 0.1 + math.log(math.expm1(2.3 - 0.7))), eps=0.7)
            for regressor, a, b in zip(method.regressors, s.features[1:], t.features[1:], strict=True)
        ),
    ),
    "KDSVD": (
        FEATURE_WEIGHTS | {"K": 3},
        lambda s, t, y, method: losses.kdsvd_loss(s.features[1:], t.features[1:], k=3),
    ),
    "FITNET": (
        FEATURE_WEIGHTS | {"HINT_LAYER": 3},
        lambda s, t, y, method: losses.hint_loss(method.regressor(s.features[3]), t.features[3]),
    ),
}


def keys_of(tree: dict[str, Any], within: str = "") -> set[str]:
    """The dotted keys of a config node, empty ones left out."""
    found = (keys_of(value, f"{key}.") if isinstance(value, dict) else {key} for key, value in tree.items())
    return {within + key for keys in found for key in keys}


@pytest.mark.parametrize("name", WIRING)
def test_every_key_reaches_its_argument(name: str) -> None:
    changes, loss = WIRING[name]
    assert keys_of(DISTILLERS[name].defaults) - {"INPUT_SIZE"} == changes.keys()  # that one is accepted, and not needed
    assert len({str(value) for value in changes.values()}) == len(changes)
    node = CfgNode(DISTILLERS[name].defaults).clone()
    node.merge_from_list([part for change in changes.items() for part in change])
    pair, batch = small_pair(), batch_of(4)
    method = DISTILLERS[name].from_config(node, pair)
    student, teacher = like(pair.student, 4, seed=1), like(pair.teacher, 4, seed=2)
    with torch.no_grad():  # away from their start, where a variance of VID's is INIT_PRED_VAR whatever EPS is
        for parameter in method.parameters():
            parameter += 0.1
    expected = loss(student, teacher, batch.targets, method)
    torch.testing.assert_close(method(student, teacher, batch), expected, rtol=1e-5, atol=0)
    wanted = [changes.get(f"LOSS.{key}", changes.get(key)) for key in ("CE_WEIGHT", "KD_WEIGHT", "FEAT_WEIGHT")]
    ce_weight, weight = wanted[0], wanted[1] or wanted[2] or 1.0
    assert (method.ce_weight, method.weight, method.warmup) == (ce_weight, weight, changes.get("WARMUP", 0))
    if name == "CTKD":
        method.begin_epoch(3, seed=0)
        assert method.strength.item() == pytest.approx((1 - math.cos(math.pi * 3 / 7)) / 2)


@pytest.mark.parametrize("name", FEATURE + LOGIT)
def test_what_it_needs_of_the_teacher_is_all_it_reads(name: str) -> None:
    pair = small_pair()
    method, student, teacher = build(name, pair), like(pair.student, 4, seed=1), like(pair.teacher, 4, seed=2)
    nothing = torch.full((), torch.nan)
    kept = teacher._replace(
        logits=teacher.logits if method.need >= Need.LOGITS else nothing,
        pooled=teacher.pooled if method.need >= Need.POOLED else nothing,
        features=teacher.features if method.need >= Need.MAPS else (),
        preacts=teacher.preacts if method.need >= Need.MAPS else (),
    )
    assert torch.equal(method(student, kept, batch_of(4)), method(student, teacher, batch_of(4)))


@pytest.mark.parametrize("name", FEATURE + LOGIT)
def test_every_pair_steps_without_a_value_on_the_host(name: str) -> None:
    """Forward and backward on tensors without values: a read on the host or a shape that hangs on values would fail."""
    for names in PAIRS:
        teacher, student = (probe(build_model(model, 100)) for model in names)
        pair = Pair(student, teacher, nn.Identity(), torch.arange(100), 100)
        with FakeTensorMode():
            method = build(name, pair)
            taught = Outputs(*(torch.utils._pytree.tree_map(torch.Tensor.detach, like(teacher, 8))))
            seen = like(student, 8)
            leaves = leaves_of(seen)
            method.begin_epoch(1, 0)
            loss = method(seen, taught, batch_of(8))
            loss.backward()
            assert loss.shape == ()
            assert any(leaf.grad is not None for leaf in leaves)
            assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize("name", FEATURE + LOGIT)
def test_loss_falls_on_fixed_inputs(name: str) -> None:
    pair, batch = small_pair(), batch_of(8)
    method, teacher = build(name, pair), like(pair.teacher, 8, seed=1)
    student = like(pair.student, 8, seed=2)
    student = student._replace(pooled=student.features[-1].mean((2, 3)))
    leaves = leaves_of(student._replace(pooled=student.pooled.detach()))
    parameters = [p for p in method.parameters() if name != "CTKD"]  # CTKD's own climbs, as it should
    optimizer = torch.optim.Adam([*leaves, *parameters], lr=0.03)
    seen = Outputs(leaves[0], tuple(leaves[1:-1]), (), leaves[-1])
    history = []
    for _ in range(60):
        loss = method(seen, teacher, batch)
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(math.isfinite(value) for value in history)
    if name in ("VID", "NKD", "RLD"):  # cross entropies and likelihoods end somewhere above or below 0
        assert history[-1] < history[0] - 0.1
    else:
        assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    ("teacher", "student", "regressors"),
    [
        ("resnet56", "resnet20", 16128),
        ("resnet32x4", "resnet8x4", 258048),
        ("vgg13", "vgg8", 1818624),
        ("resnet32x4", "ShuffleV1", 494592),
    ],
)
def test_vid_parameters(teacher: str, student: str, regressors: int) -> None:
    """As many as mdistiller counts, and one variance for each channel of the teacher's stages, which it leaves out."""
    probed = probe(build_model(teacher, 100))
    pair = Pair(probe(build_model(student, 100)), probed, nn.Identity(), torch.arange(100), 100)
    method = build("VID", pair)
    channels = sum(maps.shape[1] for maps in probed.features[1:])
    assert method.extra_parameters() == regressors + channels
    variance = nn.functional.softplus(method.state_dict()["log_scales.0"]) + 1e-5
    torch.testing.assert_close(variance, torch.full_like(variance, 5.0))


def test_vid_starts_from_a_variance_of_any_size() -> None:
    for wanted in (1e-4, 1e9):
        scale = build("VID", INIT_PRED_VAR=wanted).state_dict()["log_scales.0"]
        assert (nn.functional.softplus(scale) + 1e-5).tolist() == pytest.approx([wanted] * len(scale), rel=1e-5)


def test_vid_variances_train_and_are_saved() -> None:
    pair = small_pair()
    method, student, teacher = build("VID", pair), like(pair.student, 4, seed=1), like(pair.teacher, 4, seed=2)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    method(student, teacher, batch_of(4)).backward()
    optimizer.step()
    after = method.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    fresh = build("VID", pair)
    fresh.load_state_dict(after)
    assert torch.equal(fresh(student, teacher, batch_of(4)), method(student, teacher, batch_of(4)))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or not asked for by -m cuda")
@pytest.mark.parametrize("name", [name for name in FEATURE + LOGIT if name != "KDSVD"])
def test_step_replays_as_a_cuda_graph(name: str) -> None:
    pair = small_pair()
    method, batch = build(name, pair).cuda(), batch_of(8, "cuda")
    method.begin_epoch(10, 0)
    student, teacher = like(pair.student, 8, "cuda", seed=1), like(pair.teacher, 8, "cuda", seed=2)
    leaves = leaves_of(student)

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = method(student, teacher, batch)
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            eager = step()
        gradient = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, eager)
    replayed = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for one, other in zip(replayed, gradient, strict=True):
        torch.testing.assert_close(one, other)
