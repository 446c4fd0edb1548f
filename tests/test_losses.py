"""The pure losses: values and gradients against float64 references, precision, hard inputs and identities."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import loss_references as ref
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mdistiller_norm import functional as losses
from mdistiller_norm.distillers.kdsvd import leading_vectors
from mdistiller_norm.distillers.ofd import margins_of

Tensors = list[Tensor]
Shapes = list[tuple[int, ...]]
MARGIN = np.array([-0.3, -1.2, -0.05])
HALF = [torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """A loss of lists of student and teacher tensors and the targets, its reference, and the shapes of its inputs."""

    loss: Callable[[Tensors, Tensors, Tensor], Tensor]
    reference: ref.Reference
    student: Shapes
    teacher: Shapes
    analytic: bool = True
    positive: bool = False
    zero: bool = True  # for equal inputs


def logit(
    loss: Callable[..., Tensor], reference: Callable[..., Any], *arguments: Any, **more: Any
) -> Case:
    """A loss of logits and its reference with the arguments of both."""
    takes_targets = "targets" in inspect.signature(loss).parameters

    def call(s: Tensors, t: Tensors, y: Tensor) -> Tensor:
        return loss(s[0], t[0], *([y] if takes_targets else []), *arguments)

    return Case(call, reference, [(5, 7)], [(5, 7)], **more)


STD = partial(ref.softened, "std")
EQUAL = [(2, 4, 4, 4), (2, 5, 2, 2)], [(2, 3, 4, 4), (2, 6, 2, 2)]
LARGER = [(3, 3, 4, 4), (3, 4, 4, 4)], [(3, 3, 4, 4), (3, 5, 2, 2)]
UNEVEN = [(3, 4, 6, 6), (3, 5, 4, 4), (3, 2, 7, 6)], [(3, 2, 6, 6), (3, 5, 2, 2), (3, 3, 3, 9)]
GRIDS = [(2, 3, 8, 8), (2, 2, 7, 7), (2, 3, 4, 4), (2, 4, 2, 2), (2, 5, 1, 1)]
ONE_MAP = [(4, 3, 3, 2)]

CASES = {
    "kd": logit(losses.kd_loss, ref.softened()),
    "kd_several": logit(losses.kd_loss, ref.softened(scales=(1.0, 6.0, 4.0, 2.0)), [1.0, 6.0, 4.0, 2.0]),
    "normkd": logit(losses.normkd_loss, STD((2.0,))),
    "normkd_max": logit(partial(losses.normkd_loss, statistic="max"), ref.softened("max", (0.5,)), 0.5),
    "normkd_range": logit(partial(losses.normkd_loss, statistic="range"), ref.softened("range", (0.5,)), 0.5),
    "normkd_student_teacher": logit(
        partial(losses.normkd_loss, weighting="student_teacher"), STD((2.0,), weighting="student_teacher"), 2.0
    ),
    "dkd": logit(losses.dkd_loss, ref.softened(dkd=(1.0, 8.0))),
    "dkd_2_3": logit(losses.dkd_loss, ref.softened(scales=(1.5,), dkd=(2.0, 3.0)), 2.0, 3.0, 1.5),
    "norm_dkd": logit(losses.norm_dkd_loss, STD((2.0,), dkd=(1.0, 8.0)), 1.0, 8.0),
    "lskd": logit(losses.lskd_loss, STD((2.0,), weighting="none")),
    "lsdkd": logit(losses.lsdkd_loss, STD((2.0,), weighting="none", dkd=(1.0, 8.0))),
    "dist": logit(losses.dist_loss, partial(ref.dist, beta=1.0, gamma=1.0, t=4.0)),
    "dist_2_3": logit(losses.dist_loss, partial(ref.dist, beta=2.0, gamma=3.0, t=1.0), 2.0, 3.0, 1.0),
    "ttm": logit(losses.ttm_loss, partial(ref.ttm, gamma=0.1, weighted=False), zero=False),
    "ttm_0.4": logit(losses.ttm_loss, partial(ref.ttm, gamma=0.4, weighted=False), 0.4, zero=False),
    "wttm": logit(losses.wttm_loss, partial(ref.ttm, gamma=0.1, weighted=True), zero=False),
    "nkd": logit(losses.nkd_loss, partial(ref.nkd, gamma=3.5, t=3.0), zero=False),
    "dtkd": logit(losses.dtkd_loss, partial(ref.dtkd, alpha=3.0, beta=1.0, t=4.0)),
    "dtkd_1_0.5": logit(losses.dtkd_loss, partial(ref.dtkd, alpha=1.0, beta=0.5, t=2.0), 1.0, 0.5, 2.0),
    "ctkd": Case(
        lambda s, t, y: losses.ctkd_loss(s[0], t[0], s[0].new_tensor(3.0)),
        ref.softened(scales=(3.0,)), [(5, 7)], [(5, 7)],
    ),
    "rld": logit(losses.rld_loss, partial(ref.rld, alpha=1.0, beta=8.0, t=4.0, t_sure=1.0), zero=False),
    "rld_2_4": logit(
        losses.rld_loss, partial(ref.rld, alpha=2.0, beta=4.0, t=3.0, t_sure=2.0), 2.0, 4.0, 3.0, 2.0, zero=False
    ),
    **{
        f"at_{p}": Case(lambda s, t, y, p=p: losses.at_loss(s, t, p), partial(ref.at, p=p), *UNEVEN, analytic=False)
        for p in (2, 3.5)
    },
    "fitnet": Case(lambda s, t, y: losses.hint_loss(s[0], t[0]), ref.hint, ONE_MAP, ONE_MAP),
    "nst": Case(lambda s, t, y: losses.nst_loss(s, t), ref.nst, *EQUAL),
    "nst_larger": Case(lambda s, t, y: losses.nst_loss(s, t), ref.nst, *UNEVEN),
    "pkt": Case(lambda s, t, y: losses.pkt_loss(s[0], t[0]), ref.pkt, [(5, 6)], [(5, 4)]),
    "sp": Case(lambda s, t, y: losses.sp_loss(s, t), ref.sp, [(3, 4, 4, 4)], [(3, 5, 2, 2)]),
    "vid": Case(lambda s, t, y: losses.vid_loss(s[0], t[0], s[1]), ref.vid, [(4, 3, 3, 2), (3,)], ONE_MAP, zero=False),
    **{
        f"kdsvd_{k}": Case(
            lambda s, t, y, k=k: losses.kdsvd_loss(s, t, k), partial(ref.kdsvd, k=k), *LARGER, analytic=False,
            positive=True,
        )
        for k in (1, 2)
    },
    **{
        f"rkd_{squared}": Case(
            lambda s, t, y, squared=squared: losses.rkd_loss(s[0], t[0], squared),
            partial(ref.rkd, squared=squared, distance_weight=25.0, angle_weight=50.0), [(6, 5)], [(6, 7)],
            analytic=False,
        )
        for squared in (False, True)
    },
    "ofd": Case(
        lambda s, t, y: losses.feat_loss(s[0], t[0], torch.tensor(MARGIN).view(1, -1, 1, 1)),
        partial(ref.ofd, margin=MARGIN), ONE_MAP, ONE_MAP, analytic=False, zero=False,
    ),
    "reviewkd": Case(lambda s, t, y: losses.hcl_loss(s, t), ref.hcl, GRIDS, GRIDS),
    "crd": Case(
        lambda s, t, y: losses.nce_loss(s[0], torch.tensor(math.log(37.0), dtype=torch.float64), 50),
        partial(ref.nce, z=37.0, samples=50), [(3, 9)], [], zero=False,
    ),
}  # fmt: skip
LOGITS = [name for name, case in CASES.items() if case.student == [(5, 7)]]
Inputs = tuple[list[np.ndarray], list[np.ndarray], np.ndarray]


def draw(
    name: str, seed: int = 0, shape: tuple[int, int] | None = None, scale: float = 3.0
) -> Inputs:
    """Random inputs of a case; ``shape`` replaces that of logits."""
    case, rng = CASES[name], np.random.RandomState(seed)
    sides = [
        [rng.standard_normal(shape or size) for size in sizes]
        for sizes in (case.student, case.teacher)
    ]
    if case.positive:
        sides = [[np.abs(x) for x in side] for side in sides]
    if name in LOGITS:
        sides = [[scale * x for x in side] for side in sides]
        for column, side in enumerate(sides):  # DTKD's formula requires a positive largest logit
            side[0][:, column] = np.abs(side[0][:, column])
    count = len(sides[0][0])
    classes = sides[0][0].shape[1]
    return sides[0], sides[1], rng.randint(0, classes, count)


def evaluate(
    name: str, inputs: Inputs, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensors]:
    """Loss and gradients with respect to the student's tensors."""
    students, teachers, targets = inputs
    leaves = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in students]
    fixed = [torch.tensor(x, dtype=dtype) for x in teachers]
    loss = CASES[name].loss(leaves, fixed, torch.as_tensor(targets))
    loss.backward()
    assert loss.shape == ()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == expected or name in ("crd", "ofd")
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(
    ("name", "shape", "scale"),
    [(name, None, 3.0) for name in CASES]
    + [
        (name, *more)
        for name in LOGITS
        for more in (((1, 6), 3.0), ((4, 2), 3.0), ((3, 5), 60.0))
    ],
)
def test_value_and_gradient(name: str, shape: tuple[int, int] | None, scale: float) -> None:
    students, teachers, targets = inputs = draw(name, seed=len(name), shape=shape, scale=scale)
    case = CASES[name]
    loss, gradients = evaluate(name, inputs)
    expected = np.real(case.reference(students, teachers, targets))
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    rel, small = (1e-8, 1e-10) if case.analytic else (1e-5, 1e-7)
    for seed in (1, 2):
        rng = np.random.RandomState(seed)
        direction = [rng.standard_normal(x.shape) for x in students]
        function = partial(case.reference, teachers=teachers, targets=targets)
        slope = ref.derivative(function, students, direction, case.analytic)
        found = sum(
            (grad.numpy() * d).sum() for grad, d in zip(gradients, direction, strict=True)
        )
        assert found == pytest.approx(slope, rel=rel, abs=small)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", CASES)
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    students, teachers, targets = draw(name, seed=3)
    # Inputs that the type can represent, so that only the arithmetic and the rounding of the gradient differ.
    students, teachers = (
        [torch.tensor(x).to(dtype).double().numpy() for x in s] for s in (students, teachers)
    )
    exact, slopes = evaluate(name, (students, teachers, targets))
    loss, gradients = evaluate(name, (students, teachers, targets), dtype)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-7)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient.dtype == dtype
        allowed = max(torch.finfo(dtype).eps, 1e-4) * slope.abs().max()
        assert (gradient.double() - slope).abs().max() <= allowed


def spike(x: np.ndarray, sign: float, column: int) -> np.ndarray:
    x = 1e-3 * x  # no ties, at which the range has no gradient
    x[:, column] = sign * 1e4
    return x


Change = Callable[[np.ndarray], np.ndarray]
SAME: Change = np.copy
# Changes of the student's and of the teacher's inputs.
HARD: dict[str, tuple[Change, Change]] = {
    "huge": (lambda x: 1e4 * x / np.abs(x).max(), lambda x: 1e4 * x / np.abs(x).max()),
    "tiny": (lambda x: 1e-9 * x, lambda x: 1e-9 * x),
    "near_constant": (lambda x: 1e-4 * x, lambda x: 1e-4 * x),
    "zero": (np.zeros_like, np.zeros_like),
    "constant_student": (lambda x: np.full_like(x, 2.5), SAME),
    "constant_teacher": (SAME, lambda x: np.full_like(x, 1.5)),
    "equal_samples": (lambda x: np.repeat(x[:1], len(x), 0), SAME),
    "dead_samples": (lambda x: np.concatenate([0 * x[:2], x[2:]]), SAME),
    "batch_of_one": (lambda x: x[:1] if x.ndim > 1 else x, lambda x: x[:1]),
}
HARD_LOGITS: dict[str, tuple[Change, Change]] = {
    "opposed": (lambda x: spike(x, 1, 3), lambda x: spike(x, 1, 5)),
    "negative": (lambda x: spike(x, -1, 3), lambda x: spike(x, 1, 3)),
    "offset": (lambda x: x + 1e4, lambda x: x - 1e4),
}
# The reference divides by the sum of the largest logits of both sides, or by the spread of constant rows.
UNDEFINED = [
    ("dtkd", kind) for kind in ("zero", "constant_student", "negative", "offset", "dead_samples")
]
UNDEFINED += [("dist", kind) for kind in ("tiny", "equal_samples", "dead_samples")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CASES for kind in HARD]
    + [(name, kind) for name in LOGITS for kind in HARD_LOGITS],
)
def test_hard_inputs(name: str, kind: str) -> None:
    students, teachers, targets = draw(name, seed=11)
    change_student, change_teacher = (HARD | HARD_LOGITS)[kind]
    students, teachers = (
        [change_student(x) for x in students],
        [change_teacher(x) for x in teachers],
    )
    inputs = (students, teachers, targets[: len(students[0])])
    for dtype in (torch.float64, torch.float32, *HALF):
        loss, gradients = evaluate(name, inputs, dtype)
        assert loss.isfinite()
        # A gradient above 65504 has no float16; under autocast, no loss gets a float16 input.
        assert dtype == torch.float16 or all(gradient.isfinite().all() for gradient in gradients)
    if name in LOGITS and (name.split("_")[0], kind) not in UNDEFINED:
        size = max(np.abs(x).max() for side in inputs[:2] for x in side)
        expected = np.real(CASES[name].reference(*inputs))
        allowed = 1e-9 * max(1.0, size) ** 2
        assert evaluate(name, inputs)[0].item() == pytest.approx(expected, rel=1e-9, abs=allowed)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero])
def test_equal_inputs_have_no_loss_and_no_gradient(name: str) -> None:
    students, _, targets = draw(name, seed=15)
    for dtype in (torch.float64, torch.float32):
        loss, gradients = evaluate(name, (students, [x.copy() for x in students], targets), dtype)
        near = name.startswith(("dist", "nst", "pkt", "sp", "kdsvd"))  # rounding; 1e-8 in DIST
        assert abs(loss.item()) <= (1e-4 if near else 0.0)
        allowed = 1e-4 if near else 2000 * torch.finfo(dtype).eps
        assert all(gradient.abs().max() <= allowed for gradient in gradients)


@pytest.mark.parametrize("name", ["kd", "norm_dkd", "dist", "ttm", "rld"])
@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 1), (3, 1)), ((5, 7), (5, 6)), ((7,), (7,))]
)
def test_shapes_of_logits_are_checked(name, student, teacher):
    targets = torch.zeros(student[0], dtype=torch.long)
    with pytest.raises(ValueError, match=r"of the same shape \[B, C\] with C >= 2"):
        CASES[name].loss([torch.ones(student)], [torch.ones(teacher)], targets)


def test_rkd_is_exact_for_a_common_offset() -> None:
    s, t = torch.randn(8, 16), torch.randn(8, 16)
    s = (s + 1e3).requires_grad_()  # rounded once, then exact for both
    exact = s.detach().double().requires_grad_()
    value, expected = losses.rkd_loss(s, t), losses.rkd_loss(exact - 1e3, t.double())
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


def test_kdsvd_does_not_depend_on_the_signs_of_the_solver() -> None:
    students, teachers, _ = draw("nst", seed=15)
    s, t = ([torch.tensor(x) for x in side] for side in (students, teachers))
    loss = losses.kdsvd_loss(s, t, 1)
    # A map and its negative have the same singular vectors up to the sign.
    torch.testing.assert_close(losses.kdsvd_loss([-s[0], s[1]], [t[0], -t[1]], 1), loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kdsvd_gradient_is_finite_for_equal_and_zero_singular_values(dtype: torch.dtype) -> None:
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
    assert not vectors[..., 1:].any()  # the map does not determine them


def test_margins_are_means_of_negative_values() -> None:
    means = [0.3, -2.0, 5.0, 0.0, 0.9, -0.4, 0.0, 0.4]
    deviations = [0.7, -0.5, 1.0, 1.3, 0.3, 0.0, 0.0, 0.0]
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor(means))
        norm.weight.copy_(torch.tensor(deviations))
    margins = margins_of(norm)
    assert margins.shape == (1, 8, 1, 1)
    for margin, mean, deviation in zip(margins.flatten(), means, np.abs(deviations), strict=True):
        expected = min(mean, 0.0)
        if deviation:
            x = np.linspace(min(mean, 0) - 12 * deviation, 0, 400_001)
            density = np.exp(-(((x - mean) / deviation) ** 2) / 2)
            probability = density.mean() * -x[0] / (deviation * math.sqrt(2 * math.pi))
            expected = (
                (x * density).sum() / density.sum() if probability > 0.001 else -3 * deviation
            )
        assert margin.item() == pytest.approx(expected, rel=1e-4)
