"""The pure losses: values and gradients against float64 references, precision, hard inputs and identities."""

import inspect
import math
from collections import namedtuple
from functools import partial
from statistics import NormalDist

import loss_references as ref
import numpy as np
import pytest
import torch
from torch import nn

from mdistiller_norm import functional as losses
from mdistiller_norm.distillers.ofd import margins_of

MARGIN = np.array([-0.3, -1.2, -0.05])
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [((1, 6), 3.0), ((4, 2), 3.0), ((3, 5), 60.0)]  # and scales of logits
# A loss of two lists of tensors and the targets, its reference, the shapes; zero: of equal inputs.
FIELDS = "loss reference student teacher analytic positive zero"
Case = namedtuple("Case", FIELDS, defaults=(True, False, True))


def case(loss, reference, arguments=(), shapes=([(5, 7)], [(5, 7)]), **more):
    """A loss and its reference with the arguments of both; losses of single tensors read the first of each list."""
    parameters = inspect.signature(loss).parameters
    single = next(iter(parameters.values())).annotation is torch.Tensor

    def call(s, t, y):
        sides = (s[0], t[0]) if single else (s, t)
        return loss(*sides, *([y] if "targets" in parameters else []), *arguments)

    return Case(call, reference, *shapes, **more)


soft = partial(partial, ref.softened)
std = partial(soft, stat="std", scales=(2.0,))
BOTH = {"weighting": "student_teacher"}
EQUAL = [(2, 4, 4, 4), (2, 5, 2, 2)], [(2, 3, 4, 4), (2, 6, 2, 2)]
LARGER = [(3, 3, 4, 4), (3, 4, 4, 4)], [(3, 3, 4, 4), (3, 5, 2, 2)]
UNEVEN = [(3, 4, 6, 6), (3, 5, 4, 4), (3, 2, 7, 6)], [(3, 2, 6, 6), (3, 5, 2, 2), (3, 3, 3, 9)]
GRIDS = [(2, 3, 8, 8), (2, 2, 7, 7), (2, 3, 4, 4), (2, 4, 2, 2), (2, 5, 1, 1)]
MAPS, POOLED = [[(4, 3, 3, 2)]] * 2, ([(6, 5)], [(6, 7)])
PER_CHANNEL = torch.tensor(MARGIN).view(1, -1, 1, 1)
LOG_Z = torch.tensor(math.log(37.0), dtype=torch.float64)

CASES = {
    "kd": case(losses.kd_loss, ref.softened),
    "kd_several": case(losses.kd_loss, soft(scales=(1.0, 6.0, 4.0, 2.0)), [[1.0, 6.0, 4.0, 2.0]]),
    "normkd": case(losses.normkd_loss, std()),
    "normkd_max": case(partial(losses.normkd_loss, statistic="max"), soft(stat="max", scales=(0.5,)), [0.5]),
    "normkd_range": case(partial(losses.normkd_loss, statistic="range"), soft(stat="range", scales=(0.5,)), [0.5]),
    "normkd_both": case(partial(losses.normkd_loss, **BOTH), std(**BOTH)),
    "dkd": case(losses.dkd_loss, soft(scales=(1.5,), dkd=(2.0, 3.0)), [2.0, 3.0, 1.5]),
    "norm_dkd": case(losses.norm_dkd_loss, std(dkd=(1.0, 8.0)), [1.0, 8.0]),
    "lskd": case(losses.lskd_loss, std(weighting="none")),
    "lsdkd": case(losses.lsdkd_loss, std(weighting="none", dkd=(1.0, 8.0))),
    "dist": case(losses.dist_loss, partial(ref.dist, beta=2.0, gamma=3.0, t=1.5), [2.0, 3.0, 1.5]),
    "ttm": case(losses.ttm_loss, partial(ref.ttm, gamma=0.4, weighted=False), [0.4], zero=False),
    "wttm": case(losses.wttm_loss, partial(ref.ttm, gamma=0.1, weighted=True), zero=False),
    "nkd": case(losses.nkd_loss, partial(ref.nkd, gamma=3.5, t=3.0), zero=False),
    "dtkd": case(losses.dtkd_loss, partial(ref.dtkd, alpha=1.0, beta=0.5, t=2.0), [1.0, 0.5, 2.0]),
    "ctkd": case(losses.ctkd_loss, soft(scales=(3.0,)), [torch.tensor(3.0)]),
    "rld": case(
        losses.rld_loss, partial(ref.rld, alpha=2.0, beta=4.0, t=3.0, t_sure=2.0), [2.0, 4.0, 3.0, 2.0], zero=False
    ),
    "at_2": case(losses.at_loss, partial(ref.at, p=2), [2], UNEVEN, analytic=False),
    "at_3.5": case(losses.at_loss, partial(ref.at, p=3.5), [3.5], UNEVEN, analytic=False),
    "fitnet": case(losses.hint_loss, lambda s, t, y: ((s[0] - t[0]) ** 2).mean(), [], MAPS),
    "nst": case(losses.nst_loss, ref.nst, [], EQUAL),
    "nst_larger": case(losses.nst_loss, ref.nst, [], UNEVEN),
    "pkt": case(losses.pkt_loss, ref.pkt, [], POOLED),
    "sp": case(losses.sp_loss, ref.sp, [], ([(3, 4, 4, 4)], [(3, 5, 2, 2)])),
    "vid": Case(lambda s, t, y: losses.vid_loss(s[0], t[0], s[1]), ref.vid, [*MAPS[0], (3,)], MAPS[0], zero=False),
    "kdsvd_1": case(losses.kdsvd_loss, partial(ref.kdsvd, k=1), [1], LARGER, analytic=False, positive=True),
    "kdsvd_2": case(losses.kdsvd_loss, partial(ref.kdsvd, k=2), [2], LARGER, analytic=False, positive=True),
    "rkd": case(losses.rkd_loss, partial(ref.rkd, squared=False), [False], POOLED, analytic=False),
    "rkd_squared": case(losses.rkd_loss, partial(ref.rkd, squared=True), [True], POOLED, analytic=False),
    "ofd": case(losses.feat_loss, partial(ref.ofd, margin=MARGIN), [PER_CHANNEL], MAPS, analytic=False, zero=False),
    "reviewkd": case(losses.hcl_loss, ref.hcl, [], (GRIDS, GRIDS)),
    "crd": Case(lambda s, t, y: losses.nce_loss(s[0], LOG_Z, 50), partial(ref.nce, z=37.0), [(3, 9)], [], zero=False),
}  # fmt: skip
LOGITS = [name for name, case in CASES.items() if case.student == [(5, 7)]]


def draw(name, seed, shape=None, scale=3.0):
    """Random inputs of a case; ``shape`` replaces that of logits."""
    case, rng = CASES[name], np.random.RandomState(seed)
    both = (case.student, case.teacher)
    sides = [[rng.standard_normal(shape or size) for size in sizes] for sizes in both]
    if case.positive:
        sides = [[np.abs(x) for x in side] for side in sides]
    if name in LOGITS:
        sides = [[scale * x for x in side] for side in sides]
        for column, side in enumerate(sides):  # DTKD's formula requires a positive largest logit
            side[0][:, column] = np.abs(side[0][:, column])
    count, classes = sides[0][0].shape[:2]
    return *sides, rng.randint(0, classes, count)


def evaluate(name, inputs, dtype=torch.float64):
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
    [(name, None, 3.0) for name in CASES] + [(name, *more) for name in LOGITS for more in SHAPES],
)
def test_value_and_gradient(name, shape, scale):
    students, teachers, targets = inputs = draw(name, len(name), shape, scale)
    loss, gradients = evaluate(name, inputs)
    analytic = CASES[name].analytic

    def value(x):
        return CASES[name].reference(x, teachers, targets)

    assert loss.item() == pytest.approx(np.real(value(students)), rel=1e-9, abs=1e-12)
    rel, small = (1e-8, 1e-10) if analytic else (1e-5, 1e-7)
    for seed in (1, 2):
        rng = np.random.RandomState(seed)
        direction = [rng.standard_normal(x.shape) for x in students]
        slope = ref.derivative(value, students, direction, analytic)
        products = [(g.numpy() * d).sum() for g, d in zip(gradients, direction, strict=True)]
        assert sum(products) == pytest.approx(slope, rel=rel, abs=small)


@pytest.mark.parametrize("dtype", TYPES[1:])
@pytest.mark.parametrize("name", CASES)
def test_lower_precision(name, dtype):
    *sides, targets = draw(name, seed=3)
    # Inputs that the type can represent, so that only the arithmetic and the rounding of the gradient differ.
    sides = [[torch.tensor(x).to(dtype).double().numpy() for x in side] for side in sides]
    exact, slopes = evaluate(name, (*sides, targets))
    loss, gradients = evaluate(name, (*sides, targets), dtype)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-7)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient.dtype == dtype
        allowed = max(torch.finfo(dtype).eps, 1e-4) * slope.abs().max()
        assert (gradient.double() - slope).abs().max() <= allowed


def spike(x, sign, column):
    x = 1e-3 * x  # no ties, at which the range has no gradient
    x[:, column] = sign * 1e4
    return x


# Changes of the student's and of the teacher's inputs.
HARD = {
    "huge": (lambda x: 1e4 * x / np.abs(x).max(), lambda x: 1e4 * x / np.abs(x).max()),
    "tiny": (lambda x: 1e-9 * x, lambda x: 1e-9 * x),
    "near_constant": (lambda x: 1e-4 * x, lambda x: 1e-4 * x),
    "zero": (np.zeros_like, np.zeros_like),
    "constant_student": (lambda x: np.full_like(x, 2.5), np.copy),
    "constant_teacher": (np.copy, lambda x: np.full_like(x, 1.5)),
    "equal_samples": (lambda x: np.repeat(x[:1], len(x), 0), np.copy),
    "dead_samples": (lambda x: np.concatenate([0 * x[:2], x[2:]]), np.copy),
    "batch_of_one": (lambda x: x[:1] if x.ndim > 1 else x, lambda x: x[:1]),
}
HARD_LOGITS = {
    "opposed": (lambda x: spike(x, 1, 3), lambda x: spike(x, 1, 5)),
    "negative": (lambda x: spike(x, -1, 3), lambda x: spike(x, 1, 3)),
    "offset": (lambda x: x + 1e4, lambda x: x - 1e4),
}
# The reference divides by the sum of the largest logits of both sides, or by the spread of constant rows.
UNDEFINED = {
    "dtkd": ("zero", "constant_student", "negative", "offset", "dead_samples"),
    "dist": ("tiny", "equal_samples", "dead_samples"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CASES for kind in HARD]
    + [(name, kind) for name in LOGITS for kind in HARD_LOGITS],
)
def test_hard_inputs(name, kind):
    *sides, targets = draw(name, seed=11)
    changes = (HARD | HARD_LOGITS)[kind]
    sides = [[change(x) for x in side] for change, side in zip(changes, sides, strict=True)]
    inputs = (*sides, targets[: len(sides[0][0])])
    for dtype in TYPES:
        loss, gradients = evaluate(name, inputs, dtype)
        assert loss.isfinite()
        # A gradient above 65504 has no float16; under autocast, no loss gets a float16 input.
        assert dtype == torch.float16 or all(gradient.isfinite().all() for gradient in gradients)
    if name in LOGITS and kind not in UNDEFINED.get(name.split("_")[0], ()):
        size = max(np.abs(x).max() for side in sides for x in side)
        expected = np.real(CASES[name].reference(*inputs))
        allowed = 1e-9 * max(1.0, size) ** 2
        assert evaluate(name, inputs)[0].item() == pytest.approx(expected, rel=1e-9, abs=allowed)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.zero])
def test_equal_inputs_have_no_loss_and_no_gradient(name):
    students, _, targets = draw(name, seed=15)
    for dtype in (torch.float64, torch.float32):
        loss, gradients = evaluate(name, (students, [x.copy() for x in students], targets), dtype)
        near = name.startswith(("dist", "nst", "pkt", "sp", "kdsvd"))  # rounding; 1e-8 in DIST
        most, allowed = (1e-4, 1e-4) if near else (0.0, 2000 * torch.finfo(dtype).eps)
        assert abs(loss.item()) <= most
        assert all(gradient.abs().max() <= allowed for gradient in gradients)


def test_kdsvd_gradient_is_finite_for_equal_and_zero_singular_values():
    other = torch.rand(2, 3, 4, 4)
    for maps in (torch.eye(4).expand(2, 3, 4, 4), torch.ones(2, 3, 4, 4)):
        student = maps.clone().requires_grad_()
        loss = losses.kdsvd_loss([student, student * 2 + other], [other, other.flip(3)], 2)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_margins_are_means_of_negative_values():
    means = [0.3, -2.0, 5.0, 0.0, 0.9, -0.4, 0.4]
    deviations = [0.7, -0.5, 1.0, 1.3, 0.3, 0.0, 0.0]
    norm = nn.BatchNorm2d(7)
    norm.load_state_dict({"bias": torch.tensor(means), "weight": torch.tensor(deviations)}, False)
    margins = margins_of(norm)
    assert margins.shape == (1, 7, 1, 1)
    for margin, mean, deviation in zip(margins.flatten(), means, np.abs(deviations), strict=True):
        expected = min(mean, 0.0)
        if deviation:
            normal = NormalDist(mean, deviation)
            probability = normal.cdf(0)
            negative = mean - deviation**2 * normal.pdf(0) / probability
            expected = negative if probability > 0.001 else -3 * deviation
        assert margin.item() == pytest.approx(expected, rel=1e-4)
