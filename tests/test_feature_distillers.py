"""The feature distillers: values and gradients against float64 references written from the papers, hard inputs, pairs.

The references are plain numpy loops. Their derivative along a random direction, by central differences in float64, is
compared with the gradient of the loss.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from yacs.config import CfgNode

from mdistiller_norm import functional as losses
from mdistiller_norm.config import load_config
from mdistiller_norm.distillers import DISTILLERS, Distiller, Pair, crd
from mdistiller_norm.distillers.common import keyed_below, keyed_integers, keyed_permutation, matched_stages, pool_to
from mdistiller_norm.distillers.crd import CRD, ContrastSampler
from mdistiller_norm.distillers.fitnet import make_regressor
from mdistiller_norm.distillers.ofd import margins_of
from mdistiller_norm.distillers.reviewkd import AttentionFusion
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import Network, build_model, probe
from mdistiller_norm.types import Batch, Outputs

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("FITNET", "AT", "RKD", "CRD", "OFD", "REVIEWKD")
CIFAR_PAIRS = {
    "res56_res20": ("resnet56", "resnet20"),
    "res110_res32": ("resnet110", "resnet32"),
    "res32x4_res8x4": ("resnet32x4", "resnet8x4"),
    "wrn40_2_wrn_16_2": ("wrn_40_2", "wrn_16_2"),
    "wrn40_2_wrn_40_1": ("wrn_40_2", "wrn_40_1"),
    "vgg13_vgg8": ("vgg13", "vgg8"),
    "res32x4_shuv1": ("resnet32x4", "ShuffleV1"),
    "wrn40_2_shuv1": ("wrn_40_2", "ShuffleV1"),
    "vgg13_mv2": ("vgg13", "MobileNetV2"),
    "res50_mv2": ("ResNet50", "MobileNetV2"),
    "res32x4_shuv2": ("resnet32x4", "ShuffleV2"),
}
IMAGENET_PAIRS = (("ResNet34", "ResNet18"), ("ResNet50", "MobileNetV1"))


# ---------------------------------------------------------------------------------------------------- the references


def block_mean(maps: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Adaptive average pooling: window i of n covers [floor(i H / n), ceil((i + 1) H / n))."""
    height, width = maps.shape[-2:]
    out = np.empty((*maps.shape[:-2], rows, columns))
    for i, j in itertools.product(range(rows), range(columns)):
        window = maps[
            ...,
            i * height // rows : -(-(i + 1) * height // rows),
            j * width // columns : -(-(j + 1) * width // columns),
        ]
        out[..., i, j] = window.mean((-2, -1))
    return out


def at_reference(list_s: list[np.ndarray], list_t: list[np.ndarray], p: float) -> float:
    total = 0.0
    for s, t in zip(list_s, list_t, strict=True):
        rows, columns = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
        vectors = []
        for maps in (block_mean(s, rows, columns), block_mean(t, rows, columns)):
            energy = (np.abs(maps) ** p).mean(1).reshape(len(maps), -1)
            vectors.append(np.stack([row / np.linalg.norm(row) for row in energy]))
        total += ((vectors[0] - vectors[1]) ** 2).mean()
    return total


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd_reference(
    s: np.ndarray, t: np.ndarray, squared: bool = False, distance_weight: float = 25, angle_weight: float = 50
) -> float:
    count = len(s)

    def distances(x: np.ndarray) -> np.ndarray:
        table = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
        table = table if squared else np.sqrt(table)
        return table / (table.sum() / (count * (count - 1)))

    def cosine(x: np.ndarray, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        u, v = x[j] - x[i], x[k] - x[i]
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    d_s, d_t = distances(s), distances(t)
    distance = sum(huber(d_s[i, j] - d_t[i, j]) for i in range(count) for j in range(count)) / count**2
    triples = itertools.product(range(count), repeat=3)
    angle = sum(huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples) / count**3
    return distance_weight * distance + angle_weight * angle


def ofd_reference(source: np.ndarray, target: np.ndarray, margin: np.ndarray) -> float:
    total = 0.0
    for b, c, i, j in itertools.product(*map(range, source.shape)):
        s, t, m = source[b, c, i, j], target[b, c, i, j], margin[0, c, 0, 0]
        if t > 0:
            total += (s - t) ** 2
        else:
            total += max(s - max(t, m), 0.0) ** 2
    return total / len(source)


def hcl_reference(list_s: list[np.ndarray], list_t: list[np.ndarray]) -> float:
    total = 0.0
    for s, t in zip(list_s, list_t, strict=True):
        terms = [((s - t) ** 2).mean()]
        terms += [((block_mean(s, n, n) - block_mean(t, n, n)) ** 2).mean() for n in (4, 2, 1) if n < s.shape[2]]
        weights = [0.5**k for k in range(len(terms))]
        total += np.dot(weights, terms) / sum(weights)
    return total


def nce_reference(scores: np.ndarray, z: float, samples: int) -> float:
    """Eq. 17-18 with mdistiller's epsilon, exponentials and quotients as they are printed."""
    negatives = scores.shape[1] - 1
    noise, eps = negatives / samples, 1e-7
    p = np.exp(scores) / z
    log_d1 = np.log(p[:, 0] / (p[:, 0] + noise + eps))
    log_d0 = np.log(noise / (p[:, 1:] + noise + eps))
    return float(-(log_d1.sum() + log_d0.sum()) / len(scores))


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * scale


def agrees(loss: Callable[..., Tensor], reference: Callable[..., float], students: list[np.ndarray]) -> None:
    """Value in float64 and float32, and the derivative along a random direction."""
    inputs = [torch.tensor(array, requires_grad=True) for array in students]
    value = loss(*inputs)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(reference(*students), rel=1e-9)
    single = loss(*[torch.tensor(array, dtype=torch.float32) for array in students])
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(reference(*students), rel=1e-4)
    value.backward()
    directions, step = [draw(*array.shape, seed=99) for array in students], 1e-6
    ahead, behind = (
        reference(*[array + sign * step * way for array, way in zip(students, directions, strict=True)])
        for sign in (1, -1)
    )
    slope = sum((tensor.grad.numpy() * way).sum() for tensor, way in zip(inputs, directions, strict=True))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-5, abs=1e-8)


# ------------------------------------------------------------------------------------------------- the pure functions


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_at_loss(p: float) -> None:
    students = [draw(3, 4, 6, 6), draw(3, 5, 4, 4), draw(3, 2, 7, 6)]
    teachers = [draw(3, 2, 6, 6, seed=1), draw(3, 5, 2, 2, seed=1), draw(3, 3, 3, 9, seed=1)]
    given = [torch.tensor(t) for t in teachers]
    agrees(
        lambda *s: losses.at_loss(s, [t.to(s[0].dtype) for t in given], p),
        lambda *s: at_reference(list(s), teachers, p),
        students,
    )


def test_at_loss_depends_on_no_scale() -> None:
    s, t = torch.tensor(draw(2, 3, 4, 4)).float(), torch.tensor(draw(2, 5, 4, 4)).float()
    value = losses.at_loss([s], [t])
    for scale in (1e-12, 1e12):
        assert losses.at_loss([s * scale], [t]).item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("squared", [False, True])
def test_rkd_loss(squared: bool) -> None:
    teacher = draw(6, 7, seed=1)
    agrees(
        lambda s: losses.rkd_loss(s, torch.tensor(teacher, dtype=s.dtype), squared, distance_weight=3, angle_weight=7),
        lambda s: rkd_reference(s, teacher, squared, 3, 7),
        [draw(6, 5)],
    )


def test_rkd_default_weights_are_the_papers() -> None:
    s, t = draw(5, 3), draw(5, 4, seed=1)
    value = losses.rkd_loss(torch.tensor(s), torch.tensor(t))
    assert value.item() == pytest.approx(rkd_reference(s, t, False, 25, 50), rel=1e-9)


def test_rkd_loses_nothing_to_a_common_offset() -> None:
    s, t = torch.tensor(draw(8, 16)).float(), torch.tensor(draw(8, 16, seed=1)).float()
    s = (s + 1e3).requires_grad_()  # rounded once, then exact for both
    exact = s.detach().double().requires_grad_()
    losses.rkd_loss(s, t).backward()
    value = losses.rkd_loss(exact - 1e3, t.double())
    value.backward()
    assert losses.rkd_loss(s, t).item() == pytest.approx(value.item(), rel=1e-5)
    torch.testing.assert_close(s.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


def test_rkd_equal_samples_have_no_gradient_between_them() -> None:
    s = torch.tensor(draw(6, 4)).float()
    s[3] = s[1]
    s.requires_grad_()
    losses.rkd_loss(s, torch.tensor(draw(6, 4, seed=1)).float()).backward()
    others = s.grad[[0, 2, 4, 5]].norm(dim=1).max()
    assert s.grad.isfinite().all()
    assert s.grad.norm(dim=1).max() < 10 * others


def test_feat_loss() -> None:
    margin = -np.abs(draw(1, 3, 1, 1, seed=2))
    target = draw(4, 3, 3, 2, seed=1)
    agrees(
        lambda s: losses.feat_loss(s, torch.tensor(target, dtype=s.dtype), torch.tensor(margin)),
        lambda s: ofd_reference(s, target, margin),
        [draw(4, 3, 3, 2)],
    )


def test_hcl_loss() -> None:
    shapes = [(2, 3, 8, 8), (2, 2, 7, 7), (2, 3, 4, 4), (2, 4, 2, 2), (2, 5, 1, 1)]
    teachers = [draw(*shape, seed=1) for shape in shapes]
    given = [torch.tensor(t) for t in teachers]
    agrees(
        lambda *s: losses.hcl_loss(s, [t.to(s[0].dtype) for t in given]),
        lambda *s: hcl_reference(list(s), teachers),
        [draw(*shape) for shape in shapes],
    )


def test_hint_loss() -> None:
    teacher = draw(2, 3, 4, 4, seed=1)
    agrees(
        lambda s: losses.hint_loss(s, torch.tensor(teacher, dtype=s.dtype)),
        lambda s: float(((s - teacher) ** 2).mean()),
        [draw(2, 3, 4, 4)],
    )


def test_nce_loss_and_the_slope_taken_by_hand() -> None:
    scores, z, samples = draw(3, 9, scale=4.0), 37.0, 50
    log_z = torch.tensor(math.log(z), dtype=torch.float64)
    agrees(
        lambda s: losses.nce_loss(s, log_z.to(s.dtype), samples),
        lambda s: nce_reference(s, z, samples),
        [scores],
    )
    leaf = torch.tensor(scores, requires_grad=True)
    losses.nce_loss(leaf, log_z, samples).backward()
    torch.testing.assert_close(crd.nce_slope(leaf.detach(), log_z, samples), leaf.grad)


def test_nce_loss_of_half_precision_is_computed_in_float32() -> None:
    scores = torch.tensor(draw(3, 9, scale=4.0)).bfloat16()
    value = losses.nce_loss(scores, torch.tensor(3.0), 50)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(losses.nce_loss(scores.double(), torch.tensor(3.0), 50).item(), rel=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (2, 4), (1, 1), (16, 8)])
def test_pool_to_is_adaptive_pooling(size: tuple[int, int]) -> None:
    maps = draw(2, 3, 8, 8)
    np.testing.assert_allclose(pool_to(torch.tensor(maps), size), block_mean(maps, *size), rtol=1e-12)


HARD = {
    "huge": lambda *shape: torch.randn(shape) * 1e4,
    "tiny": lambda *shape: torch.randn(shape) * 1e-20,
    "zero": lambda *shape: torch.zeros(shape),
    "constant": lambda *shape: torch.full(shape, 1e4),
    "equal samples": lambda *shape: torch.randn(1, *shape[1:]).repeat(shape[0], *[1] * (len(shape) - 1)),
    "fp16": lambda *shape: (torch.randn(shape) * 3e4).clamp(-6e4, 6e4).half(),
    "bf16": lambda *shape: torch.randn(shape).bfloat16(),
    "batch of one": lambda *shape: torch.randn(1, *shape[1:]),
}
PURE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "at": (lambda s, t: losses.at_loss([s], [t]), (4, 3, 4, 4)),
    "rkd": (losses.rkd_loss, (4, 8)),
    "ofd": (lambda s, t: losses.feat_loss(s, t, torch.full((1, 3, 1, 1), -0.5)), (4, 3, 4, 4)),
    "reviewkd": (lambda s, t: losses.hcl_loss([s], [t]), (4, 3, 4, 4)),
    "fitnet": (losses.hint_loss, (4, 3, 4, 4)),
}


@pytest.mark.parametrize("name", PURE)
@pytest.mark.parametrize("kind_t", HARD)
@pytest.mark.parametrize("kind_s", HARD)
def test_hard_inputs_give_finite_float32(name: str, kind_s: str, kind_t: str) -> None:
    loss, shape = PURE[name]
    student, teacher = HARD[kind_s](*shape), HARD[kind_t](*shape)
    if "batch of one" in (kind_s, kind_t):
        student, teacher = student[:1], teacher[:1]
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    if kind_s != "fp16":  # A gradient past 65504 has no float16; autocast never asks for one.
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["at", "rkd", "reviewkd", "fitnet"])
@pytest.mark.parametrize("kind", HARD)
def test_a_student_equal_to_its_teacher_has_no_loss(name: str, kind: str) -> None:
    loss, shape = PURE[name]
    features = HARD[kind](*shape)
    student = features.clone().requires_grad_()
    value = loss(student, features)
    value.backward()
    assert value.item() == 0
    assert not student.grad.any()


def test_rkd_of_one_sample_is_zero() -> None:
    one = torch.randn(1, 8, requires_grad=True)
    value = losses.rkd_loss(one, torch.randn(1, 8))
    value.backward()
    assert value.item() == 0
    assert not one.grad.any()


def test_margins_are_means_of_negative_values() -> None:
    norm = nn.BatchNorm2d(5)
    means, deviations = [0.3, -2.0, 5.0, 0.0, 0.9], [0.7, -0.5, 1.0, 1.3, 0.3]
    with torch.no_grad():
        norm.bias.copy_(torch.tensor(means))
        norm.weight.copy_(torch.tensor(deviations))
    margins = margins_of(norm)
    assert margins.shape == (1, 5, 1, 1)
    for margin, mean, deviation in zip(margins.flatten().tolist(), means, deviations, strict=True):
        spread = abs(deviation)
        x = np.linspace(min(mean, 0) - 12 * spread, 0, 4_000_001)
        density = np.exp(-(((x - mean) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
        probability = density.mean() * -x[0]
        expected = (x * density).sum() / density.sum() if probability > 0.001 else -3 * spread
        assert margin == pytest.approx(expected, rel=1e-5)


def test_margins_of_a_batch_norm_without_spread() -> None:
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(torch.tensor([-0.4, 0.0, 0.4]))
    torch.testing.assert_close(margins_of(norm).flatten(), torch.tensor([-0.4, 0.0, 0.0]))


# ------------------------------------------------------------------------------------------------- keyed random numbers


def splitmix64(state: int, count: int) -> list[int]:
    numbers, low = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & low
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & low
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & low
        numbers.append(z ^ (z >> 31))
    return numbers


def test_keyed_integers_are_splitmix64() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # its authors' test vector
    gamma = 0x9E3779B97F4A7C15
    for key in (0, 1, -7, 2**62 - 1):
        (start,) = splitmix64((key - gamma) % 2**64, 1)
        drawn = keyed_integers(torch.tensor(key), torch.arange(1, 6)).tolist()
        assert [number % 2**64 for number in drawn] == splitmix64(start, 5)


def test_keyed_numbers_are_spread_evenly() -> None:
    drawn = keyed_below(torch.tensor(3), torch.arange(70_000), torch.tensor(7))
    counts = drawn.bincount(minlength=7).double()
    assert len(counts) == 7
    assert ((counts - 10_000).abs() < 5 * math.sqrt(10_000 * 6 / 7)).all()
    order = keyed_permutation(torch.tensor(3), 1000)
    assert order.sort().values.equal(torch.arange(1000))
    assert not order.equal(keyed_permutation(torch.tensor(4), 1000))
    correlation = np.corrcoef(order.numpy(), keyed_permutation(torch.tensor(4), 1000).numpy())[0, 1]
    assert abs(correlation) < 0.15


# ----------------------------------------------------------------------------------------------------------------- CRD

UNEQUAL = torch.tensor([0] * 3 + [1] * 9 + [2] * 20 + [4])  # no class 3
UNEQUAL = UNEQUAL[torch.randperm(33, generator=torch.Generator().manual_seed(5))]


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("negatives", [1, 5, 13])
def test_negatives_are_distinct_and_of_other_classes(negatives: int, relaxed: bool) -> None:
    sampler = ContrastSampler(UNEQUAL, 5, negatives, relaxed)
    everyone = torch.arange(33)
    for key in range(200):
        chosen = sampler(UNEQUAL, everyone, torch.tensor(key))
        assert chosen.shape == (33, 1 + negatives)
        assert (UNEQUAL[chosen[:, 0]] == UNEQUAL).all()
        assert relaxed or chosen[:, 0].equal(everyone)
        assert (UNEQUAL[chosen[:, 1:]] != UNEQUAL[:, None]).all()
        assert all(len(set(row)) == 1 + negatives for row in chosen.tolist())
        assert chosen.equal(sampler(UNEQUAL, everyone, torch.tensor(key)))
    assert not chosen.equal(sampler(UNEQUAL, everyone, torch.tensor(1000)))


def test_negatives_and_relaxed_positives_are_uniform() -> None:
    sampler, draws = ContrastSampler(UNEQUAL, 5, 5, relaxed=True), 4000
    own, others = torch.nonzero(UNEQUAL == 1).flatten(), torch.nonzero(UNEQUAL != 1).flatten()
    index = own[:1]
    chosen = torch.cat([sampler(UNEQUAL[index], index, torch.tensor(key)) for key in range(draws)])
    pairs = torch.zeros(33, 33)
    for counts, members, rate in (
        (chosen[:, 0].bincount(minlength=33), own, 1 / 9),
        (chosen[:, 1:].flatten().bincount(minlength=33), others, 5 / 24),
    ):
        allowed = 5 * math.sqrt(draws * rate * (1 - rate))
        assert ((counts[members] - draws * rate).abs() < allowed).all()
        assert counts.sum() == counts[members].sum()
    # Which of them come together is random too: every pair of others, at the rate of subsets of five.
    for row in chosen[:, 1:].tolist():
        for a, b in itertools.combinations(sorted(row), 2):
            pairs[a, b] += 1
    rate = (5 * 4) / (24 * 23)
    together = torch.stack([pairs[min(a, b), max(a, b)] for a, b in itertools.combinations(others.tolist(), 2)])
    assert ((together - draws * rate).abs() < 6 * math.sqrt(draws * rate)).all()


def test_all_negatives_can_be_drawn_and_not_one_more() -> None:
    chosen = ContrastSampler(UNEQUAL, 5, 13)(UNEQUAL, torch.arange(33), torch.tensor(0))
    biggest = torch.nonzero(UNEQUAL == 2)[0, 0]
    assert sorted(chosen[biggest, 1:].tolist()) == torch.nonzero(UNEQUAL != 2).flatten().tolist()
    with pytest.raises(ConfigError, match=r"CRD.NCE.K must be <= 13"):
        ContrastSampler(UNEQUAL, 5, 14)


def make_crd(relaxed: bool = False, **arguments: Any) -> CRD:
    return CRD(
        [6, 10], ContrastSampler(UNEQUAL, 5, 7, relaxed), **{"dim": 8, "momentum": 0.5, "temperature": 0.07} | arguments
    ).double()


def crd_batch(indices: list[int], key: int, seed: int = 0) -> tuple[Outputs, Outputs, Batch]:
    index, count = torch.tensor(indices), len(indices)
    student = torch.tensor(draw(count, 6, seed=seed), requires_grad=True)
    teacher = torch.tensor(draw(count, 10, seed=seed + 1))
    batch = Batch(torch.empty(count), UNEQUAL[index], index, torch.full((count,), -1), torch.tensor(key))
    empty = torch.empty(0)
    return Outputs(empty, (), (), student), Outputs(empty, (), (), teacher), batch


class ReferenceCRD:
    """CRD with gathered rows, exponentials and autograd: section 3 of the paper, as RepDistiller orders it."""

    def __init__(self, method: CRD, momentum: float, temperature: float) -> None:
        self.memory_s, self.memory_t = method.student_memory.clone(), method.teacher_memory.clone()
        self.momentum, self.temperature = momentum, temperature
        self.z: list[Tensor] = []
        self.method = copy.deepcopy(method)

    def __call__(self, student: Tensor, teacher: Tensor, chosen: Tensor, indices: Tensor) -> Tensor:
        samples, total = len(self.memory_s), torch.zeros((), dtype=torch.float64)
        embedded = []
        for linear, pooled in ((self.method.embed_student, student), (self.method.embed_teacher, teacher)):
            v = pooled @ linear.weight.T + linear.bias
            embedded.append(v / v.square().sum(1, keepdim=True).sqrt())
        exponentials = [
            torch.exp(torch.einsum("bd,bkd->bk", v, memory[chosen]) / self.temperature)
            for v, memory in zip(embedded, (self.memory_t, self.memory_s), strict=True)
        ]
        self.z = self.z or [e.detach().mean() * samples for e in exponentials]
        for e, z in zip(exponentials, self.z, strict=True):
            p, noise = e / z, (chosen.shape[1] - 1) / samples
            posterior = p / (p + noise + 1e-7)
            rejected = noise / (p + noise + 1e-7)
            total = total - (posterior[:, 0].log().sum() + rejected[:, 1:].log().sum()) / len(p)
        with torch.no_grad():
            for v, memory in zip(embedded, (self.memory_s, self.memory_t), strict=True):
                for row, index in zip(v, indices.tolist(), strict=True):
                    new = self.momentum * memory[index] + (1 - self.momentum) * row
                    memory[index] = new / new.square().sum().sqrt()
        return total


@pytest.mark.parametrize(("momentum", "temperature"), [(0.5, 0.07), (0.8, 0.2)])
@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("dense", [True, False])
def test_crd_steps(
    dense: bool, relaxed: bool, momentum: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not dense:
        monkeypatch.setattr(crd, "DENSE_SAMPLES", 0)
        monkeypatch.setattr(crd, "CHUNK", 2 * 8 * 8)  # two anchors at a time
    method = make_crd(relaxed, momentum=momentum, temperature=temperature)
    reference = ReferenceCRD(method, momentum, temperature)
    for step in range(3):
        student, teacher, batch = crd_batch([4, 9, 30, 0, 17], key=11 + step, seed=10 * step)
        again = student.pooled.detach().clone().requires_grad_()
        chosen = method.sampler(batch.targets, batch.indices, batch.key)
        assert chosen[:, 0].equal(batch.indices) != relaxed  # the memory is the samples' own, whatever their positives
        expected = reference(again, teacher.pooled, chosen, batch.indices)
        value = method(student, teacher, batch)
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        value.backward()
        expected.backward()
        torch.testing.assert_close(student.pooled.grad, again.grad)
        for ours, theirs in zip(method.parameters(), reference.method.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(method.student_memory, reference.memory_s)
        torch.testing.assert_close(method.teacher_memory, reference.memory_t)
        torch.testing.assert_close(method.log_z.exp(), torch.stack(reference.z))


def test_crd_evaluation_changes_nothing() -> None:
    method = make_crd()
    before = copy.deepcopy(method.state_dict())
    value = method.eval()(*crd_batch([1, 2, 3], key=0))
    assert value.isfinite()
    for name, tensor in method.state_dict().items():
        assert tensor.equal(before[name]), name


def test_crd_of_a_sample_that_comes_twice_keeps_its_first_embedding() -> None:
    student, teacher, batch = crd_batch([8, 5, 8], key=0)
    twice, once = make_crd(), make_crd()
    once.load_state_dict(twice.state_dict())
    twice(student, teacher, batch)
    first_two = [out._replace(pooled=out.pooled[:2]) for out in (student, teacher)]
    once(*first_two, Batch(*(field[:2] if field.ndim else field for field in batch)))
    torch.testing.assert_close(twice.student_memory, once.student_memory)
    torch.testing.assert_close(twice.teacher_memory, once.teacher_memory)


def test_crd_is_saved_whole_and_goes_on_bit_equal() -> None:
    method = make_crd()
    assert {"student_memory", "teacher_memory", "log_z"} < set(method.state_dict())
    assert not any(name.startswith("sampler") for name in method.state_dict())
    method(*crd_batch([1, 2, 3], key=0))
    resumed = make_crd()
    resumed.load_state_dict(method.state_dict())
    following = crd_batch([3, 4, 5], key=1, seed=3)
    assert method(*following).equal(resumed(*following))
    assert method.student_memory.equal(resumed.student_memory)


@pytest.mark.parametrize("kind", ["huge", "zero", "constant", "equal samples", "fp16", "batch of one"])
def test_crd_of_hard_inputs_is_finite(kind: str) -> None:
    method = CRD([6, 10], ContrastSampler(UNEQUAL, 5, 7), dim=8, momentum=0.5, temperature=0.01)
    student = HARD[kind](4, 6).float().requires_grad_()
    teacher = HARD[kind](4, 10).float()
    index = torch.arange(len(student))
    batch = Batch(torch.empty(0), UNEQUAL[index], index, index, torch.tensor(0))
    for _ in range(2):
        value = method(Outputs(index, (), (), student), Outputs(index, (), (), teacher), batch)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert method.student_memory.isfinite().all()


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    method, values = make_crd(), []
    for step, (student, teacher, batch) in enumerate(_shared_batches()):
        half = slice(3 * rank, 3 * rank + 3)
        parts = [out._replace(pooled=out.pooled[half]) for out in (student, teacher)]
        values.append(method(*parts, Batch(*(field[half] if field.ndim else field for field in batch))).detach())
        assert step < 2
    torch.save({"values": values, **method.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _shared_batches() -> list[tuple[Outputs, Outputs, Batch]]:
    return [crd_batch([1, 4, 9, 16, 25, 30], key=5), crd_batch([30, 1, 2, 3, 5, 8], key=6, seed=7)]


def test_crd_in_two_processes_is_crd_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    method = make_crd()
    values = [method(*batch).detach() for batch in _shared_batches()]
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, tensor in method.state_dict().items():
        assert halves[0][name].equal(halves[1][name]), name
        torch.testing.assert_close(halves[0][name], tensor)
    for whole, *parts in zip(values, halves[0]["values"], halves[1]["values"], strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(), whole)


# --------------------------------------------------------------------------------------------- other methods' modules


@pytest.mark.parametrize(
    ("student", "teacher", "parameters"),
    [
        ((4, 8, 8), (5, 8, 8), 4 * 5),
        ((4, 16, 16), (5, 8, 8), 4 * 5 * 9),
        ((4, 4, 4), (5, 8, 8), 4 * 5 * 16),
        ((4, 9, 10), (5, 7, 7), 4 * 5 * 3 * 4),
    ],
)
def test_regressor_fits_the_teachers_map(student: tuple[int, ...], teacher: tuple[int, ...], parameters: int) -> None:
    source, target = torch.randn(2, *student), torch.randn(2, *teacher)
    regressor = make_regressor(source, target)
    assert regressor(source).shape == target.shape
    assert sum(p.numel() for p in regressor.parameters()) == parameters + 5 + 10  # bias, batch norm


def test_fusion_is_the_papers() -> None:
    fusion = AttentionFusion(3, 4, 5, fuse=True).double().eval()
    for module in fusion.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x, deeper = torch.tensor(draw(2, 3, 4, 4)), torch.tensor(draw(2, 4, 2, 2, seed=1))
    state = fusion.state_dict()

    def norm(maps: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{name}.1.{key}"][:, None, None] for key in keys)
        return (maps - mean) / (var + 1e-5).sqrt() * weight + bias

    own = norm(torch.einsum("bchw,dc->bdhw", x, state["inner.0.weight"][:, :, 0, 0]), "inner")
    upsampled = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    attention = torch.einsum("bchw,dc->bdhw", torch.cat([own, upsampled], 1), state["attention.weight"][:, :, 0, 0])
    attention = 1 / (1 + torch.exp(-(attention + state["attention.bias"][:, None, None])))
    mixed = own * attention[:, :1] + upsampled * attention[:, 1:]
    mixed = mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = norm(F.conv2d(mixed, state["outer.0.weight"], padding=1), "outer")
    out, passed = fusion(x, deeper, (8, 8))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(passed, mixed)


def outputs(shapes: list[tuple[int, int]], pooled: int, count: int = 2, device: str = "meta") -> Outputs:
    """Random outputs with maps of these channels and sizes."""
    maps = tuple(torch.randn(count, channels, size, size, device=device) for channels, size in shapes)
    logits, features = torch.randn(count, 10, device=device), torch.randn(count, pooled, device=device)
    return Outputs(logits, maps, tuple(single - 0.3 for single in maps), features)


class FakeTeacher(nn.Module):
    """Batch norms of given widths, None for the stem."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)

    def norms_before_relu(self) -> tuple[nn.Module | None, ...]:
        return (None, *self.norms)


STUDENT, TEACHER = [(4, 16), (6, 16), (8, 8), (10, 4)], [(8, 16), (5, 16), (7, 8), (9, 8)]


def make_pair(student: list[tuple[int, int]] = STUDENT, teacher: list[tuple[int, int]] = TEACHER) -> Pair:
    network = FakeTeacher([channels for channels, _ in teacher[1:]])
    return Pair(outputs(student, student[-1][0]), outputs(teacher, teacher[-1][0]), network, UNEQUAL, 5)


def build(name: str, pair: Pair, **changes: Any) -> Distiller:
    """The method from its defaults; ``changes`` by dotted key with __ for the dot."""
    node = CfgNode(copy.deepcopy(DISTILLERS[name].defaults))
    if name == "CRD":
        node.NCE.K = 7
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = node
        for part in sections:
            section = section[part]
        section[last] = value
    return DISTILLERS[name].from_config(node, pair)


def real(count: int = 4) -> tuple[Outputs, Outputs, Batch]:
    index = torch.arange(count)
    batch = Batch(torch.empty(0), UNEQUAL[index], index, index, torch.tensor(0))
    return outputs(STUDENT, 10, count, "cpu"), outputs(TEACHER, 9, count, "cpu"), batch


def test_at_compares_the_stages() -> None:
    student, teacher, batch = real()
    expected = losses.at_loss(student.features[1:], teacher.features[1:], 2)
    assert build("AT", make_pair())(student, teacher, batch).equal(expected)


def test_rkd_compares_pooled_features() -> None:
    student, teacher, batch = real()
    method = build("RKD", make_pair(), DISTANCE_WEIGHT=2, PDIST__SQUARED=True)
    expected = losses.rkd_loss(student.pooled, teacher.pooled, True, 1e-12, 2, 50)
    assert method(student, teacher, batch).equal(expected)


def test_ofd_weighs_stages_by_halves_and_averages_the_teachers_maps() -> None:
    student, teacher, batch = real()
    method = build("OFD", make_pair())
    assert method.teacher_in_train_mode is False
    assert build("OFD", make_pair(), TEACHER_TRAIN_MODE=True).teacher_in_train_mode is True
    expected = 0.0
    for stage, weight in ((1, 1 / 4), (2, 1 / 2), (3, 1.0)):
        source = method.connectors[stage - 1](student.preacts[stage]).detach().double().numpy()
        target = block_mean(teacher.preacts[stage].double().numpy(), *source.shape[2:])
        margin = -math.sqrt(2 / math.pi) * np.ones((1, source.shape[1], 1, 1))  # of N(0, 1)
        expected += weight * ofd_reference(source, target, margin)
    assert method(student, teacher, batch).item() == pytest.approx(expected, rel=1e-5)


def test_ofd_keys_reach_their_arguments() -> None:
    student, teacher, batch = real()
    keys = {"LOSS__CE_WEIGHT": 0.37, "LOSS__FEAT_WEIGHT": 4.3, "CONNECTOR__KERNEL_SIZE": 3}
    method = build("OFD", make_pair(), **keys)
    assert (method.ce_weight, method.weight) == (0.37, 4.3)
    for (channels, _), (targets, _), connector in zip(STUDENT[1:], TEACHER[1:], method.connectors, strict=True):
        assert connector[0].weight.shape == (targets, channels, 3, 3)
    for connector, source in zip(method.connectors, student.preacts[1:], strict=True):
        assert connector(source).shape[2:] == source.shape[2:]
    assert method(student, teacher, batch).isfinite()


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_crd_keys_reach_their_arguments(mode: str) -> None:
    student, teacher, batch = real()
    keys = {"NCE__K": 5, "NCE__MOMENTUM": 0.8, "NCE__TEMPERATURE": 0.2, "FEAT__DIM": 11, "MODE": mode}
    method = build("CRD", make_pair(), **keys, LOSS__CE_WEIGHT=0.37, LOSS__FEAT_WEIGHT=4.3)
    assert (method.ce_weight, method.weight) == (0.37, 4.3)
    assert method.student_memory.shape == method.teacher_memory.shape == (33, 11)
    sampler = ContrastSampler(UNEQUAL, 5, 5, relaxed=mode == "relax")
    reference = ReferenceCRD(method, momentum=0.8, temperature=0.2)
    for key in (torch.tensor(3), torch.tensor(4)):
        chosen = sampler(batch.targets, batch.indices, key)
        expected = reference(student.pooled, teacher.pooled, chosen, batch.indices)
        torch.testing.assert_close(method(student, teacher, batch._replace(key=key)).double(), expected)
        torch.testing.assert_close(method.student_memory, reference.memory_s)
        torch.testing.assert_close(method.teacher_memory, reference.memory_t)


def test_reviewkd_fuses_from_deep_to_shallow() -> None:
    student, teacher, batch = real()
    for preact in (False, True):
        method = build("REVIEWKD", make_pair(), STU_PREACT=preact)
        maps = student.preacts if preact else student.features
        first, second, third, last = method.fusions
        out3, deeper = last(student.pooled[:, :, None, None], None, (1, 1))
        out2, deeper = third(maps[3], deeper, (8, 8))
        out1, deeper = second(maps[2], deeper, (8, 8))
        out0, deeper = first(maps[1], deeper, (16, 16))
        expected = losses.hcl_loss([out0, out1, out2, out3], [*teacher.preacts[1:], teacher.pooled[:, :, None, None]])
        torch.testing.assert_close(method(student, teacher, batch), expected)
        assert method.warmup == 20
        assert method.ramp(5) == 0.25


def test_matching_leaves_out_stems_and_the_shallow_end() -> None:
    student, teacher = outputs(STUDENT, 1).features, outputs(TEACHER[:3], 1).features
    matched_s, matched_t = matched_stages(student, teacher)
    assert matched_s == student[2:]
    assert matched_t == teacher[1:]


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_trains(name: str) -> None:
    method = build(name, make_pair())
    student, teacher, batch = real(count=1)
    leaf = student._replace(
        features=tuple(m.requires_grad_() for m in student.features), pooled=student.pooled.requires_grad_()
    )
    value = method(leaf, teacher, batch)
    assert value.isfinite()
    if value.requires_grad and name != "OFD":
        value.backward()
        assert all(tensor.grad is None or tensor.grad.isfinite().all() for tensor in (*leaf.features, leaf.pooled))


# -------------------------------------------------------------------------------------------------- configs and errors


# ------------------------------------------------------------------------------------------------------ real networks


_NETWORKS: dict[tuple[str, str], Network] = {}


def network(name: str, variant: str) -> Network:
    if (name, variant) not in _NETWORKS:
        with torch.device("meta"):
            _NETWORKS[name, variant] = build_model(name, 100 if variant == "cifar" else 1000, variant=variant)
    return _NETWORKS[name, variant]


def real_pair(teacher: str, student: str, variant: str = "cifar") -> Pair:
    size = (32, 32) if variant == "cifar" else (224, 224)
    targets = torch.arange(50_000 if variant == "cifar" else 20_000) % 100
    taught, teaching = network(student, variant), network(teacher, variant)
    return Pair(probe(taught, size), probe(teaching, size), teaching, targets, 100)


def run_without_values(method: Distiller, pair: Pair, count: int = 5) -> None:
    """Forward and backward on tensors without values: fails at any host sync and any shape that depends on data."""
    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(buffer) for name, buffer in method.named_buffers()}
        parameters = {name: torch.empty(p.shape, requires_grad=True) for name, p in method.named_parameters()}

        def like(known: Outputs, grad: bool) -> Outputs:
            def make(tensor: Tensor) -> Tensor:
                return torch.empty(count, *tensor.shape[1:], requires_grad=grad)

            features, preacts = tuple(map(make, known.features)), tuple(map(make, known.preacts))
            return Outputs(make(known.logits), features, preacts, make(known.pooled))

        student, teacher = like(pair.student, True), like(pair.teacher, False)
        index = torch.empty(count, dtype=torch.int64)
        batch = Batch(torch.empty(count, 3, 8, 8), index, index, index, torch.empty((), dtype=torch.int64))
        value = torch.func.functional_call(method, state | parameters, (student, teacher, batch))
        assert value.shape == ()
        assert value.dtype == torch.float32
        value.backward()
        assert all(parameter.grad is not None for parameter in parameters.values())
        maps = (*student.features, *student.preacts, student.pooled)
        assert any(tensor.grad is not None for tensor in maps)


@pytest.mark.parametrize("file", CIFAR_PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_every_config_builds_and_runs_without_a_host_sync(name: str, file: str) -> None:
    cfg = load_config(ROOT / "configs" / "cifar100" / name.lower() / f"{file}.yaml").node
    teacher, student = CIFAR_PAIRS[file]
    assert (name, teacher, student) == (cfg.DISTILLER.TYPE, cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT)
    pair = real_pair(teacher, student)
    method = DISTILLERS[name].from_config(cfg[name], pair)
    assert method.ce_weight == 1
    run_without_values(method, pair)


@pytest.mark.parametrize(("teacher", "student"), IMAGENET_PAIRS)
@pytest.mark.parametrize("name", METHODS)
def test_imagenet_pairs_build_and_run_without_a_host_sync(name: str, teacher: str, student: str) -> None:
    pair = real_pair(teacher, student, "imagenet")
    method = build(name, pair)
    run_without_values(method, pair)


def test_crd_with_gathered_rows_runs_without_a_host_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crd, "DENSE_SAMPLES", 0)
    pair = real_pair("resnet56", "resnet20")
    run_without_values(build("CRD", pair, MODE="relax"), pair)


def test_extra_parameters_are_the_references(facts: Path) -> None:
    """Every count that the reference reports for a pair on which it runs; CRD's includes five scalars besides."""
    rows = json.loads((facts / "distiller_pairs.json").read_text())["rows"]
    checked = 0
    for row in rows:
        if row["method"] not in METHODS or row["dataset"] != "cifar100" or row.get("forward") != "ok":
            continue
        pair = real_pair(row["teacher"], row["student"])
        with torch.device("meta"):
            method = build(row["method"], pair)
        scalars = 5 if row["method"] == "CRD" else 0
        assert method.extra_parameters() == row["extra_parameters_reported_by_peer"] - scalars, row
        checked += 1
    assert checked >= 60


def test_extra_parameters_of_table_9() -> None:
    pair = real_pair("resnet32x4", "resnet8x4")
    expected = {"FITNET": 16_768, "AT": 0, "RKD": 0, "OFD": 86_912, "CRD": 12_865_792, "REVIEWKD": 1_808_774}
    assert {name: build(name, pair).extra_parameters() for name in METHODS} == expected


def test_mdistillers_imagenet_shapes_are_accepted() -> None:
    for teacher, student in IMAGENET_PAIRS:
        wide = {"ResNet34": [64, 128, 256, 512, 512], "ResNet50": [256, 512, 1024, 2048, 2048]}[teacher]
        narrow = {"ResNet18": [64, 128, 256, 512, 512], "MobileNetV1": [128, 256, 512, 1024, 1024]}[student]
        shapes = [1, 7, 14, 28, 56]
        pair = real_pair(teacher, student, "imagenet")
        typed = {"SHAPES": shapes, "OUT_SHAPES": shapes, "IN_CHANNELS": narrow, "OUT_CHANNELS": wide}
        method = build("REVIEWKD", pair, STU_PREACT=True, MAX_MID_CHANNEL=256, **typed)
        assert method.extra_parameters() == {"ResNet18": 7_552_904, "MobileNetV1": 28_664_328}[student]
