"""The distiller classes: config keys, pairs of networks, needs, steps without values, and CRD against a reference."""

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from yacs.config import CfgNode

from mdistiller_norm import functional as losses
from mdistiller_norm.config import leaves, load_config
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need, Pair, crd
from mdistiller_norm.distillers.common import match_stages, pool_to
from mdistiller_norm.distillers.crd import CRD, ContrastSampler
from mdistiller_norm.distillers.reviewkd import AttentionFusion
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import Network, build_model, probe
from mdistiller_norm.types import Batch, Outputs

TARGETS = torch.tensor([0] * 3 + [1] * 9 + [2] * 20 + [4])
TARGETS = TARGETS[torch.randperm(33, generator=torch.Generator().manual_seed(5))]
STUDENT = [(4, 16), (6, 16), (8, 8), (10, 4)]  # channels and size of each map
TEACHER = [(8, 16), (5, 16), (7, 8), (9, 8)]
Maps = list[tuple[int, int]]


def outputs(maps: Maps, count: int = 2, device: str = "meta", seed: int = 0) -> Outputs:
    """Random outputs with maps of these channels and sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).to(device)

    features = tuple(draw(count, channels, size, size) for channels, size in maps)
    pooled = draw(count, maps[-1][0])
    # Values of the pre-activations differ, so that a method that mistakes one for the other is found.
    return Outputs(
        4 * draw(count, 10) - 1, features, tuple(each - 0.3 for each in features), pooled
    )


def batch_of(count: int) -> Batch:
    index = torch.arange(count)
    return Batch(torch.zeros(count, 3, 4, 4), TARGETS[index], index, index, torch.tensor(0))


def make_pair(
    student: Maps = STUDENT, teacher: Maps = TEACHER, widths: Sequence[int] | None = None
) -> Pair:
    """Return a pair; ``widths`` are those of the teacher's batch norms, none as of a wrapped network."""
    if widths is None:
        widths = [channels for channels, _ in teacher[1:]]
    norms = [None, *map(nn.BatchNorm2d, widths)] if widths else []
    network: Any = SimpleNamespace(norms_before_relu=lambda: norms)
    return Pair(outputs(student), outputs(teacher), network, TARGETS, 5)


def build(
    name: str, pair: Pair | None = None, changes: dict[str, Any] | None = None
) -> Distiller:
    """Build a method from its defaults, with changes by dotted key."""
    node = CfgNode(copy.deepcopy(DISTILLERS[name].defaults))
    settings = ({"NCE.K": 7} if name == "CRD" else {}) | (changes or {})
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = node
        for part in sections:
            section = section[part]
        section[last] = value
    return DISTILLERS[name].from_config(node, pair or make_pair())


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("KD", "TEMPERATURE", "[4.0, .nan]", "KD.TEMPERATURE"),
        ("NormKD", "STATISTIC", "rang", "range"),
        ("TTM", "GAMMA", 0.0, "TTM.GAMMA must be > 0"),
        ("REVIEWKD", "WARMUP_EPOCHS", -1, "WARMUP_EPOCHS must be >= 0"),
        ("AT", "P", 0, "AT.P"),
        ("VID", "EPS", 0.0, r"VID\.EPS must be in \(0, 5\.0\)"),
        ("KDSVD", "K", 5, "6x16x16, 8x8x8, 10x4x4 and 5x16x16, 7x8x8, 9x8x8"),
        ("OFD", "CONNECTOR.KERNEL_SIZE", 2, "OFD.CONNECTOR.KERNEL_SIZE must be odd"),
        ("FITNET", "HINT_LAYER", 4, r"HINT_LAYER must be in 0\.\.3, got 4"),
        ("REVIEWKD", "IN_CHANNELS", [6, 8, 10, 11], r"IN_CHANNELS must be \[6, 8, 10, 10\]"),
        ("REVIEWKD", "OUT_SHAPES", [1, 8, 8, 32], r"OUT_SHAPES must be \[1, 8, 8, 16\]"),
        ("CRD", "FEAT.STUDENT_DIM", 64, "STUDENT_DIM must be 10"),
        ("CRD", "NCE.K", 14, "CRD.NCE.K must be <= 13"),
        ("CRD", "MODE", "loose", "CRD.MODE must be exact or relax"),
    ],
)
def test_bad_values(name: str, key: str, value: Any, words: str) -> None:
    overrides = [f"DISTILLER.TYPE={name}", "CRD.NCE.K=7", f"{name}.{key}={value}"]
    with pytest.raises(ConfigError, match=words):
        DISTILLERS[name].from_config(
            load_config(None, overrides, ["CRD"]).node[name], make_pair()
        )


STEMS = make_pair(STUDENT[:1], TEACHER[:1])


@pytest.mark.parametrize(
    ("name", "pair", "words"),
    [
        (
            "FITNET",
            make_pair([(4, 16), (6, 8), (8, 3)], [(8, 16), (5, 16), (7, 8)]),
            r"\[3, 3\].*\[8, 8\]",
        ),
        *((name, STEMS, "4x16x16.*8x16x16") for name in ("AT", "NST", "VID", "KDSVD", "OFD")),
        ("REVIEWKD", make_pair(STUDENT, TEACHER[:1]), "teacher requires a stage"),
        ("OFD", make_pair(widths=(5, 7, 3)), "no norm of 9 channels"),
        ("OFD", make_pair(widths=()), "no norm of 5 channels"),
    ],
)
def test_pairs_that_do_not_work(name: str, pair: Pair, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, pair)


Call = Callable[[Outputs, Outputs, Tensor, Any], Tensor]
KD_WEIGHTS = {"WARMUP": 9, "LOSS.CE_WEIGHT": 0.37, "LOSS.KD_WEIGHT": 4.3}
FEATURE_WEIGHTS = {"WARMUP": 9, "LOSS.CE_WEIGHT": 0.37, "LOSS.FEAT_WEIGHT": 4.3}
WEIGHT_KEYS = (
    "CE_WEIGHT",
    "KD_WEIGHT",
    "FEAT_WEIGHT",
    "REVIEWKD_WEIGHT",
    "WARMUP",
    "WARMUP_EPOCHS",
)
UNUSED = ("INPUT_SIZE", "MAX_MID_CHANNEL", "LOSS")


def vid_by_hand(s: Outputs, t: Outputs, y: Tensor, method: Any) -> Tensor:
    # Parameters are moved by 0.1, see below.
    start = 0.1 + math.log(math.expm1(2.3 - 0.7))
    pairs = zip(method.regressors, s.features[1:], t.features[1:], strict=True)
    pooled = [(regressor(a), pool_to(b, a.shape[2:])) for regressor, a, b in pairs]
    return sum(
        losses.vid_loss(a, b, torch.full((b.shape[1],), start), eps=0.7) for a, b in pooled
    )


def ofd_by_hand(s: Outputs, t: Outputs, y: Tensor, method: Any) -> Tensor:
    total = torch.zeros(())
    for stage, weight in ((1, 1 / 4), (2, 1 / 2), (3, 1.0)):
        source = method.connectors[stage - 1](s.preacts[stage])
        assert source.shape[2:] == s.preacts[stage].shape[2:]
        margin = torch.full((1, source.shape[1], 1, 1), -math.sqrt(2 / math.pi))  # of N(0, 1)
        total = total + weight * losses.feat_loss(
            source, pool_to(t.preacts[stage], source.shape[2:]), margin
        )
    return total


def review_by_hand(s: Outputs, t: Outputs, y: Tensor, method: Any) -> Tensor:
    first, second, third, last = method.fusions
    out3, deeper = last(s.pooled[:, :, None, None], None, (1, 1))
    out2, deeper = third(s.preacts[3], deeper, (8, 8))
    out1, deeper = second(s.preacts[2], deeper, (8, 8))
    out0, deeper = first(s.preacts[1], deeper, (16, 16))
    return losses.hcl_loss([out0, out1, out2, out3], [*t.preacts[1:], t.pooled[:, :, None, None]])


def crd_by_hand(s: Outputs, t: Outputs, y: Tensor, method: Any) -> Tensor:
    indices = torch.arange(len(y))
    chosen = ContrastSampler(TARGETS, 5, 6, relaxed=True)(y, indices, torch.tensor(0))
    reference = ReferenceCRD(method, momentum=0.8, temperature=0.2)
    loss = reference(s.pooled, t.pooled, chosen, indices).float()
    assert method.student_memory.shape == method.teacher_memory.shape == (33, 11)
    return loss


# Methods with modules: hyper-parameters with values that no other key and no default has, and the loss by hand.
WIRING: dict[str, tuple[dict[str, Any], Call]] = {
    "CTKD": (
        KD_WEIGHTS | {"T_START": 1.3, "T_RANGE": 5.7, "EPOCHS": 7},
        lambda s, t, y, method: losses.ctkd_loss(s.logits, t.logits, 1.3 + 5.7 * torch.tensor(1.1).sigmoid()),
    ),
    "VID": (FEATURE_WEIGHTS | {"EPS": 0.7, "INIT_PRED_VAR": 2.3}, vid_by_hand),
    "FITNET": (
        FEATURE_WEIGHTS | {"HINT_LAYER": 3},
        lambda s, t, y, method: losses.hint_loss(method.regressor(s.features[3]), t.features[3]),
    ),
    "OFD": (FEATURE_WEIGHTS | {"CONNECTOR.KERNEL_SIZE": 3, "TEACHER_TRAIN_MODE": True}, ofd_by_hand),
    "REVIEWKD": (
        {"CE_WEIGHT": 0.37, "REVIEWKD_WEIGHT": 4.3, "WARMUP_EPOCHS": 9, "STU_PREACT": True, "SHAPES": [1, 4, 8, 16]}
        | {"OUT_SHAPES": [1, 8, 8, 16], "IN_CHANNELS": [6, 8, 10, 10], "OUT_CHANNELS": [5, 7, 9, 9]},
        review_by_hand,
    ),
    "CRD": (
        FEATURE_WEIGHTS | {"MODE": "relax", "FEAT.DIM": 11, "FEAT.STUDENT_DIM": 10, "FEAT.TEACHER_DIM": 9}
        | {"NCE.K": 6, "NCE.MOMENTUM": 0.8, "NCE.TEMPERATURE": 0.2},
        crd_by_hand,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIRING)
def test_every_key_of_a_method_with_modules_reaches_it(name: str) -> None:
    changes, loss = WIRING[name]
    assert {
        key for key, _ in leaves(DISTILLERS[name].defaults) if key not in UNUSED
    } == changes.keys()
    method, batch = build(name, changes=changes), batch_of(4)
    student, teacher = outputs(STUDENT, 4, "cpu", seed=1), outputs(TEACHER, 4, "cpu", seed=2)
    with torch.no_grad():  # at the start, a variance of VID is INIT_PRED_VAR for any EPS
        for parameter in method.parameters():
            parameter += 0.1
    expected = loss(student, teacher, batch.targets, method)
    torch.testing.assert_close(method(student, teacher, batch), expected, rtol=1e-5, atol=0)
    assert (method.ce_weight, method.weight, method.warmup) == (0.37, 4.3, 9)
    assert [method.ramp(epoch) for epoch in (3, 9, 10)] == [1 / 3, 1.0, 1.0]
    assert method.teacher_in_train_mode is (name == "OFD")


@pytest.mark.parametrize(
    "name", [name for name, cls in DISTILLERS.items() if hasattr(cls, "loss")]
)
def test_every_key_of_a_method_is_an_argument_of_its_loss(name: str) -> None:
    cls = DISTILLERS[name]
    names = [key for key, _ in leaves(cls.defaults)]
    keys = [key for key in names if key.split(".")[-1] not in (*WEIGHT_KEYS, *UNUSED)]
    assert set(keys) == set(cls.arguments.values())
    others = {"K": 3, "STATISTIC": "range", "WEIGHTING": "none", "PDIST.SQUARED": True}
    values = {key: others.get(key, 1.3 + number) for number, key in enumerate(keys)}
    method, batch = build(name, changes=values | {"WARMUP": 9}), batch_of(4)
    assert method.settings == {argument: values[key] for argument, key in cls.arguments.items()}
    assert method.warmup == 9
    student, teacher = outputs(STUDENT, 4, "cpu", seed=1), outputs(TEACHER, 4, "cpu", seed=2)
    assert method(student, teacher, batch).isfinite()


def test_stages_are_matched_from_the_deepest() -> None:
    student, teacher = outputs(STUDENT).features, outputs(TEACHER[:3]).features
    matched_s, matched_t = match_stages(student, teacher)
    assert (matched_s, matched_t) == (student[2:], teacher[1:])


@pytest.mark.parametrize("name", DISTILLERS)
def test_needs_are_all_that_it_reads(name: str) -> None:
    method = build(name).eval()
    student, teacher, batch = (
        outputs(STUDENT, 4, "cpu", 1),
        outputs(TEACHER, 4, "cpu", 2),
        batch_of(4),
    )
    nothing = torch.full((), torch.nan)
    kept = teacher._replace(
        logits=teacher.logits if method.need >= Need.LOGITS else nothing,
        pooled=teacher.pooled if method.need >= Need.POOLED else nothing,
        features=teacher.features if method.need >= Need.MAPS else (),
        preacts=teacher.preacts if method.need >= Need.MAPS else (),
    )
    assert torch.equal(method(student, kept, batch), method(student, teacher, batch))


@pytest.mark.parametrize("maps", [TEACHER, [(4, 2), (6, 2), (8, 1), (10, 1)]])
@pytest.mark.parametrize("name", DISTILLERS)
def test_a_batch_of_one_trains(name: str, maps: Maps) -> None:
    method = build(name, make_pair(maps, maps)).train()
    leaves = tree_map(torch.Tensor.requires_grad_, outputs(maps, 1, "cpu", 1))
    loss = method(leaves, outputs(maps, 1, "cpu", 2), batch_of(1))
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in tree_leaves(leaves))


CONFIGS = ROOT / "configs" / "cifar100"
IMAGENET_PAIRS = [("ResNet34", "ResNet18"), ("ResNet50", "MobileNetV1")]


@functools.cache
def network(name: str, variant: str) -> tuple[Network, Outputs]:
    with torch.device("meta"):
        built = build_model(name, 100 if variant == "cifar" else 1000, variant=variant)
    return built, probe(built, (32, 32) if variant == "cifar" else (224, 224))


def real_pair(teacher: str, student: str, variant: str = "cifar") -> Pair:
    built, outputs_t = network(teacher, variant)
    targets = torch.arange(50_000 if variant == "cifar" else 20_000) % 100
    return Pair(network(student, variant)[1], outputs_t, built, targets, 100)


def step_without_values(method: Distiller, pair: Pair, count: int = 5) -> None:
    """Forward and backward on fake tensors, which raise for host synchronisation and data-dependent shapes."""

    def trained(size: Sequence[int]) -> Tensor:
        return torch.empty(size, requires_grad=True)

    with FakeTensorMode() as mode:
        state = {name: mode.from_tensor(buffer) for name, buffer in method.named_buffers()}
        parameters = {name: trained(each.shape) for name, each in method.named_parameters()}
        student = tree_map(lambda x: trained((count, *x.shape[1:])), pair.student)
        teacher = tree_map(lambda x: torch.empty(count, *x.shape[1:]), pair.teacher)
        index = torch.empty(count, dtype=torch.int64)
        batch = Batch(torch.empty(count, 3, 8, 8), index, index, index, index[0])
        loss = torch.func.functional_call(method, state | parameters, (student, teacher, batch))
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(parameter.grad is not None for parameter in parameters.values())
        assert any(leaf.grad is not None for leaf in tree_leaves(student))


@pytest.mark.parametrize(
    "name", [name for name, cls in DISTILLERS.items() if cls.need > Need.LOGITS]
)
def test_steps_of_all_pairs_do_not_synchronise(name: str) -> None:
    """The pairs of the paper's tables, with the shipped configs of the feature methods."""
    for at in sorted((CONFIGS / "at").glob("*.yaml")):
        path = CONFIGS / name.lower() / at.name
        cfg = load_config(path if path.exists() else at).node
        pair = real_pair(cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT)
        step_without_values(DISTILLERS[name].from_config(cfg[name], pair), pair)
    for teacher, student in IMAGENET_PAIRS:
        pair = real_pair(teacher, student, "imagenet")
        step_without_values(build(name, pair), pair)


def test_step_of_crd_with_gathered_rows_does_not_synchronise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crd, "DENSE_SAMPLES", 0)
    pair = real_pair("resnet56", "resnet20")
    step_without_values(build("CRD", pair, {"MODE": "relax"}), pair)


def test_curriculum_of_ctkd() -> None:
    method = build("CTKD", changes={"EPOCHS": 10})
    assert list(method.state_dict()) == ["theta"]
    student, teacher = outputs(STUDENT, 5, "cpu", 1), outputs(TEACHER, 5, "cpu", 2)
    theta = torch.ones((), requires_grad=True)
    plain = losses.ctkd_loss(student.logits, teacher.logits, 1 + 20 * theta.sigmoid())
    (slope,) = torch.autograd.grad(plain, theta)
    for epoch, strength in (
        (1, (1 - math.cos(math.pi / 10)) / 2),
        (5, 0.5),
        (10, 1.0),
        (240, 1.0),
    ):
        method.begin_epoch(epoch, seed=0)
        loss = method(student, teacher, batch_of(5))
        (reversed_slope,) = torch.autograd.grad(loss, list(method.parameters()))
        torch.testing.assert_close(loss, plain)
        assert reversed_slope.item() == pytest.approx(-strength * slope.item(), rel=1e-3)


def test_fusion_of_reviewkd() -> None:
    fusion = AttentionFusion(3, 4, 5, fuse=True).double().eval()
    for module in fusion.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x, deeper = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 4, 2, 2).double()
    state = fusion.state_dict()

    def norm(maps: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{name}.1.{key}"][:, None, None] for key in keys)
        return (maps - mean) / (var + 1e-5).sqrt() * weight + bias

    this = norm(torch.einsum("bchw,dc->bdhw", x, state["inner.0.weight"][:, :, 0, 0]), "inner")
    upsampled = deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weight = state["attention.weight"][:, :, 0, 0]
    attention = torch.einsum("bchw,dc->bdhw", torch.cat([this, upsampled], 1), weight)
    attention = 1 / (1 + torch.exp(-(attention + state["attention.bias"][:, None, None])))
    mixed = this * attention[:, :1] + upsampled * attention[:, 1:]
    mixed = mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)
    out, passed = fusion(x, deeper, (8, 8))
    torch.testing.assert_close(
        out, norm(F.conv2d(mixed, state["outer.0.weight"], padding=1), "outer")
    )
    torch.testing.assert_close(passed, mixed)


def test_extra_parameters_are_the_references(facts: Path) -> None:
    """All counts of the reference, which includes five scalars for CRD and omits the variances of VID."""
    rows = json.loads((facts / "distiller_pairs.json").read_text())["rows"]
    rows = [row for row in rows if row["dataset"] == "cifar100" and row.get("forward") == "ok"]
    methods = ("FITNET", "AT", "RKD", "CRD", "OFD", "REVIEWKD", "VID")
    rows = [row for row in rows if row["method"] in methods]
    assert len(rows) >= 60
    for row in rows:
        pair = real_pair(row["teacher"], row["student"])
        expected = row["extra_parameters_reported_by_peer"]
        if row["method"] == "CRD":
            expected -= 5
        if row["method"] == "VID":
            expected += sum(maps.shape[1] for maps in pair.teacher.features[1:])
        with torch.device("meta"):
            method = build(row["method"], pair)
        assert method.extra_parameters() == expected, row


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("negatives", [1, 13])
def test_negatives_are_distinct_and_of_other_classes(negatives: int, relaxed: bool) -> None:
    sampler = ContrastSampler(TARGETS, 5, negatives, relaxed)
    everyone = torch.arange(33)
    for key in range(100):
        chosen = sampler(TARGETS, everyone, torch.tensor(key))
        assert chosen.shape == (33, 1 + negatives)
        assert (TARGETS[chosen[:, 0]] == TARGETS).all()
        assert relaxed or chosen[:, 0].equal(everyone)
        assert (TARGETS[chosen[:, 1:]] != TARGETS[:, None]).all()
        assert all(len(set(row)) == 1 + negatives for row in chosen.tolist())
        assert chosen.equal(sampler(TARGETS, everyone, torch.tensor(key)))
    assert not chosen.equal(sampler(TARGETS, everyone, torch.tensor(1000)))


def test_negatives_and_relaxed_positives_are_uniform() -> None:
    sampler, draws = ContrastSampler(TARGETS, 5, 5, relaxed=True), 2000
    same, others = torch.nonzero(TARGETS == 1).flatten(), torch.nonzero(TARGETS != 1).flatten()
    index = same[:1]
    chosen = torch.cat(
        [sampler(TARGETS[index], index, torch.tensor(key)) for key in range(draws)]
    )
    for counts, members, rate in (
        (chosen[:, 0].bincount(minlength=33), same, 1 / 9),
        (chosen[:, 1:].flatten().bincount(minlength=33), others, 5 / 24),
    ):
        allowed = 5 * math.sqrt(draws * rate * (1 - rate))
        assert ((counts[members] - draws * rate).abs() < allowed).all()
        assert counts.sum() == counts[members].sum()


def make_crd(relaxed: bool = False) -> CRD:
    sampler = ContrastSampler(TARGETS, 5, 7, relaxed)
    return CRD([6, 10], sampler, dim=8, momentum=0.8, temperature=0.2).double()


def crd_batch(indices: list[int], key: int, seed: int = 0) -> tuple[Outputs, Outputs, Batch]:
    index, count = torch.tensor(indices), len(indices)
    rng = np.random.default_rng(seed)
    student = torch.tensor(rng.standard_normal((count, 6)), requires_grad=True)
    teacher = torch.tensor(rng.standard_normal((count, 10)))
    views = torch.full((count,), -1)
    batch = Batch(torch.empty(count), TARGETS[index], index, views, torch.tensor(key))
    empty = torch.empty(0)
    return Outputs(empty, (), (), student), Outputs(empty, (), (), teacher), batch


class ReferenceCRD:
    """CRD with gathered rows, exponentials and autograd (section 3 of the paper), in RepDistiller's order."""

    def __init__(self, method: CRD, momentum: float, temperature: float) -> None:
        self.memory_s, self.memory_t = (
            method.student_memory.clone(),
            method.teacher_memory.clone(),
        )
        self.momentum, self.temperature = momentum, temperature
        self.z: list[Tensor] = []
        self.method = copy.deepcopy(method)

    def __call__(
        self, student: Tensor, teacher: Tensor, chosen: Tensor, indices: Tensor
    ) -> Tensor:
        samples, total = len(self.memory_s), torch.zeros((), dtype=torch.float64)
        method, embedded = self.method, []
        for linear, pooled in ((method.embed_student, student), (method.embed_teacher, teacher)):
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


@pytest.mark.parametrize(("dense", "relaxed"), [(True, False), (False, True)])
def test_steps_equal_the_reference(dense, relaxed, monkeypatch):
    if not dense:
        monkeypatch.setattr(crd, "DENSE_SAMPLES", 0)
        monkeypatch.setattr(crd, "CHUNK", 2 * 8 * 8)  # two anchors at a time
    method = make_crd(relaxed)
    reference = ReferenceCRD(method, momentum=0.8, temperature=0.2)
    for step in range(3):
        student, teacher, batch = crd_batch([4, 9, 30, 0, 17], key=11 + step, seed=10 * step)
        again = student.pooled.detach().clone().requires_grad_()
        chosen = method.sampler(batch.targets, batch.indices, batch.key)
        assert chosen[:, 0].equal(batch.indices) != relaxed
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


def test_the_first_of_two_equal_samples_updates_the_memory() -> None:
    student, teacher, batch = crd_batch([8, 5, 8], key=0)
    twice, once = make_crd(), make_crd()
    once.load_state_dict(twice.state_dict())
    twice(student, teacher, batch)
    first_two = [out._replace(pooled=out.pooled[:2]) for out in (student, teacher)]
    once(*first_two, Batch(*(field[:2] if field.ndim else field for field in batch)))
    torch.testing.assert_close(twice.student_memory, once.student_memory)
    torch.testing.assert_close(twice.teacher_memory, once.teacher_memory)
