"""The distiller classes: config keys, pairs of networks, needs, steps without values, and CRD against a reference."""

import copy
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from mdistiller_norm import functional as losses
from mdistiller_norm.config import leaves, load_config
from mdistiller_norm.distillers import DISTILLERS, Need, Pair, crd
from mdistiller_norm.distillers.common import match_stages, pool_to
from mdistiller_norm.distillers.crd import CRD, ContrastSampler
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.types import Batch, Outputs

TARGETS = torch.tensor([0] * 3 + [1] * 9 + [2] * 20 + [4])
TARGETS = TARGETS[torch.randperm(33, generator=torch.Generator().manual_seed(5))]
STUDENT = [(4, 16), (6, 16), (8, 8), (10, 4)]  # channels and size of each map
TEACHER = [(8, 16), (5, 16), (7, 8), (9, 8)]
EVERY = pytest.mark.parametrize("name", DISTILLERS)


def outputs(maps, count=2, seed=0):
    draw = functools.partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    features = tuple(draw(count, channels, size, size) for channels, size in maps)
    # Values of the pre-activations differ, so that a method that mistakes one for the other is found.
    preacts = tuple(each - 0.3 for each in features)
    return Outputs(4 * draw(count, 10) - 1, features, preacts, draw(count, maps[-1][0]))


def inputs(count=4, student=STUDENT, teacher=TEACHER):
    index = torch.arange(count)
    batch = Batch(torch.zeros(count, 3, 4, 4), TARGETS[index], index, index, torch.tensor(0))
    return outputs(student, count, 1), outputs(teacher, count, 2), batch


def make_pair(student=STUDENT, teacher=TEACHER, widths=None, norm=nn.BatchNorm2d):
    """Return a pair; ``widths`` are those of the teacher's batch norms, none as of a wrapped network."""
    if widths is None:
        widths = [channels for channels, _ in teacher[1:]]
    norms = [None, *map(norm, widths)] if widths else []
    network = SimpleNamespace(norms_before_relu=lambda: norms)
    pair = tree_map(lambda x: x.to("meta"), (outputs(student), outputs(teacher)))
    return Pair(*pair, network, TARGETS, 5)


def build(name, pair=None, changes=""):
    """Build a method with changes ``KEY=VALUE KEY=VALUE`` of its defaults."""
    overrides = [f"{name}.{change}" for change in changes.split()]
    cfg = load_config(None, [f"DISTILLER.TYPE={name}", "CRD.NCE.K=7", *overrides], ["CRD"])
    return DISTILLERS[name].from_config(cfg.node[name], pair or make_pair())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("KD", "TEMPERATURE=[4.0,.nan]", "KD.TEMPERATURE"),
        ("NormKD", "STATISTIC=rang", "range"),
        ("TTM", "GAMMA=0.0", "TTM.GAMMA must be > 0"),
        ("REVIEWKD", "WARMUP_EPOCHS=-1", "WARMUP_EPOCHS must be >= 0"),
        ("AT", "P=0", "AT.P"),
        ("VID", "EPS=0.0", r"VID\.EPS must be in \(0, 5\.0\)"),
        ("KDSVD", "K=5", "6x16x16, 8x8x8, 10x4x4 and 5x16x16, 7x8x8, 9x8x8"),
        ("OFD", "CONNECTOR.KERNEL_SIZE=2", "OFD.CONNECTOR.KERNEL_SIZE must be odd"),
        ("FITNET", "HINT_LAYER=4", r"HINT_LAYER must be in 0\.\.3, got 4"),
        ("REVIEWKD", "IN_CHANNELS=[6,8,10,11]", r"IN_CHANNELS must be \[6, 8, 10, 10\]"),
        ("CRD", "FEAT.STUDENT_DIM=64", "STUDENT_DIM must be 10"),
        ("CRD", "NCE.K=14", "CRD.NCE.K must be <= 13"),
        ("CRD", "MODE=loose", "CRD.MODE must be exact or relax"),
        ("RKD", "PDIST.EPSILON=-1", "RKD.PDIST.EPSILON must be >= 0, got -1"),
    ],
)
def test_bad_values(name, change, words):
    with pytest.raises(ConfigError, match=words):
        build(name, changes=change)


STEMS = make_pair(STUDENT[:1], TEACHER[:1])
BARE = functools.partial(nn.BatchNorm2d, affine=False)
OTHERS = {"widths": ()}, {"norm": BARE}, {"norm": functools.partial(nn.GroupNorm, 1)}


@pytest.mark.parametrize(
    ("name", "pair", "words"),
    [
        ("FITNET", make_pair([(4, 3)] * 3), r"\[3, 3\].*\[8, 8\]"),
        *((name, STEMS, "4x16x16.*8x16x16") for name in ("AT", "NST", "VID", "KDSVD", "OFD")),
        ("REVIEWKD", make_pair(STUDENT, TEACHER[:1]), "teacher requires a stage"),
        ("OFD", make_pair(widths=(5, 7, 3)), "no affine BatchNorm2d of 9 channels"),
        *(("OFD", make_pair(**norms), "no affine BatchNorm2d of 5 channels") for norms in OTHERS),
    ],
)
def test_pairs_that_do_not_work(name, pair, words):
    with pytest.raises(ConfigError, match=words):
        build(name, pair)


def vid_by_hand(s, t, y, method):
    # Parameters are moved by 0.1, see below.
    start = 0.1 + math.log(math.expm1(2.3 - 0.7))
    pairs = zip(method.regressors, s.features[1:], t.features[1:], strict=True)
    pooled = [(regressor(a), pool_to(b, a.shape[2:])) for regressor, a, b in pairs]
    return sum(losses.vid_loss(a, b, torch.full(b.shape[1:2], start), 0.7) for a, b in pooled)


def ofd_by_hand(s, t, y, method):
    total = torch.zeros(())
    for stage, weight in ((1, 1 / 4), (2, 1 / 2), (3, 1.0)):
        source = method.connectors[stage - 1](s.preacts[stage])
        assert source.shape[2:] == s.preacts[stage].shape[2:]
        margin = torch.full((1, source.shape[1], 1, 1), -math.sqrt(2 / math.pi))  # of N(0, 1)
        target = pool_to(t.preacts[stage], source.shape[2:])
        total = total + weight * losses.feat_loss(source, target, margin)
    return total


def review_by_hand(s, t, y, method):
    maps, deeper, fused = [*s.preacts[1:], s.pooled[:, :, None, None]], None, []
    for fusion, x, size in reversed([*zip(method.fusions, maps, (16, 8, 8, 1), strict=True)]):
        mixed = fusion.inner(x)
        if deeper is not None:
            deeper = F.interpolate(deeper, mixed.shape[2:])
            weight, bias = fusion.attention.weight[:, :, 0, 0], fusion.attention.bias
            both = torch.cat([mixed, deeper], 1).movedim(1, 3)
            this, other = (1 / (1 + torch.exp(-(both @ weight.T + bias)))).unbind(3)
            mixed = this[:, None] * mixed + other[:, None] * deeper
        deeper = F.interpolate(mixed, size)
        fused.insert(0, fusion.outer(deeper))
    return losses.hcl_loss(fused, [*t.preacts[1:], t.pooled[:, :, None, None]])


def crd_by_hand(s, t, y, method):
    indices = torch.arange(len(y))
    chosen = ContrastSampler(TARGETS, 5, 6, relaxed=True)(y, indices, torch.tensor(0))
    loss = ReferenceCRD(method)(s.pooled, t.pooled, chosen, indices).float()
    assert method.student_memory.shape == method.teacher_memory.shape == (33, 11)
    return loss


# Methods with modules: hyper-parameters with values that no other key and no default has, and the loss by hand.
KD_WEIGHTS = "WARMUP=9 LOSS.CE_WEIGHT=0.37 LOSS.KD_WEIGHT=4.3 "
FEATURE_WEIGHTS = "WARMUP=9 LOSS.CE_WEIGHT=0.37 LOSS.FEAT_WEIGHT=4.3 "
WIRING = {
    "CTKD": (
        KD_WEIGHTS + "T_START=1.3 T_RANGE=5.7 EPOCHS=7",
        lambda s, t, y, method: losses.ctkd_loss(s.logits, t.logits, 1.3 + 5.7 * torch.tensor(1.1).sigmoid()),
    ),
    "VID": (FEATURE_WEIGHTS + "EPS=0.7 INIT_PRED_VAR=2.3", vid_by_hand),
    "FITNET": (
        FEATURE_WEIGHTS + "HINT_LAYER=3",
        lambda s, t, y, method: losses.hint_loss(method.regressor(s.features[3]), t.features[3]),
    ),
    "OFD": (FEATURE_WEIGHTS + "CONNECTOR.KERNEL_SIZE=3 TEACHER_TRAIN_MODE=True", ofd_by_hand),
    "REVIEWKD": (
        "CE_WEIGHT=0.37 REVIEWKD_WEIGHT=4.3 WARMUP_EPOCHS=9 STU_PREACT=True SHAPES=[1,4,8,16] "
        "OUT_SHAPES=[1,8,8,16] IN_CHANNELS=[6,8,10,10] OUT_CHANNELS=[5,7,9,9]",
        review_by_hand,
    ),
    "CRD": (
        FEATURE_WEIGHTS + "MODE=relax FEAT.DIM=11 FEAT.STUDENT_DIM=10 FEAT.TEACHER_DIM=9 "
        "NCE.K=6 NCE.MOMENTUM=0.8 NCE.TEMPERATURE=0.2",
        crd_by_hand,
    ),
}  # fmt: skip
UNUSED = ("INPUT_SIZE", "MAX_MID_CHANNEL", "LOSS")


@pytest.mark.parametrize("name", WIRING)
def test_every_key_of_a_method_with_modules_reaches_it(name):
    changes, loss = WIRING[name]
    keys = {key for key, _ in leaves(DISTILLERS[name].defaults) if key not in UNUSED}
    assert keys == {change.split("=")[0] for change in changes.split()}
    method, (student, teacher, batch) = build(name, changes=changes), inputs()
    with torch.no_grad():  # at the start, a variance of VID is INIT_PRED_VAR for any EPS
        for parameter in method.parameters():
            parameter += 0.1
    expected = loss(student, teacher, batch.targets, method)
    torch.testing.assert_close(method(student, teacher, batch), expected, rtol=1e-5, atol=0)
    assert (method.ce_weight, method.weight, method.warmup) == (0.37, 4.3, 9)
    assert [method.ramp(epoch) for epoch in (3, 9, 10)] == [1 / 3, 1.0, 1.0]
    assert method.teacher_in_train_mode is (name == "OFD")


WEIGHTS = {"CE_WEIGHT", "KD_WEIGHT", "FEAT_WEIGHT", "WARMUP"}


@pytest.mark.parametrize("name", [key for key in DISTILLERS if hasattr(DISTILLERS[key], "loss")])
def test_every_key_of_a_method_is_an_argument_of_its_loss(name):
    cls = DISTILLERS[name]
    names = [key for key, _ in leaves(cls.defaults)]
    keys = [key for key in names if key.split(".")[-1] not in WEIGHTS.union(UNUSED)]
    assert set(keys) == set(cls.arguments.values())
    others = {"K": 3, "STATISTIC": "range", "WEIGHTING": "none", "PDIST.SQUARED": True}
    values = {key: others.get(key, 1.3 + number) for number, key in enumerate(keys)}
    changes = [f"{key}={value}" for key, value in values.items()]
    method = build(name, changes=" ".join([*changes, "WARMUP=9"]))
    assert method.settings == {argument: values[key] for argument, key in cls.arguments.items()}
    assert method.warmup == 9
    assert method(*inputs()).isfinite()


def test_stages_are_matched_from_the_deepest():
    student, teacher = outputs(STUDENT).features, outputs(TEACHER[:3]).features
    assert match_stages(student, teacher) == (student[2:], teacher[1:])


@EVERY
def test_needs_are_all_that_it_reads(name):
    method, (student, teacher, batch) = build(name).eval(), inputs()
    needs = zip(teacher, (Need.LOGITS, Need.MAPS, Need.MAPS, Need.POOLED), strict=True)
    nothing = torch.tensor(torch.nan)
    kept = Outputs(*(field if need <= method.need else nothing for field, need in needs))
    assert torch.equal(method(student, kept, batch), method(student, teacher, batch))


@pytest.mark.parametrize("maps", [TEACHER, [(4, 2), (6, 2), (8, 1), (10, 1)]])
@EVERY
def test_a_batch_of_one_trains(name, maps):
    method = build(name, make_pair(maps, maps)).train()
    student, teacher, batch = inputs(1, maps, maps)
    loss = method(tree_map(torch.Tensor.requires_grad_, student), teacher, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is None or x.grad.isfinite().all() for x in tree_leaves(student))


@functools.cache
def network(name, variant):
    with torch.device("meta"):
        built = build_model(name, 100 if variant == "cifar" else 1000, variant=variant)
    return built, probe(built, (32, 32) if variant == "cifar" else (224, 224))


def real_pair(teacher, student, variant="cifar"):
    built, outputs_t = network(teacher, variant)
    targets = torch.arange(50_000 if variant == "cifar" else 20_000) % 100
    return Pair(network(student, variant)[1], outputs_t, built, targets, 100)


PAIRS = ("vgg13_mv2", "wrn40_2_shuv1")


@pytest.mark.parametrize("name", [k for k in DISTILLERS if DISTILLERS[k].need > Need.LOGITS])
def test_steps_of_all_pairs_do_not_synchronise(name):
    """Fake tensors raise for host synchronisation and data-dependent shapes; with the shipped configs."""
    pair = real_pair("ResNet50", "MobileNetV1", "imagenet")
    steps = [(build(name, pair), pair)]
    for stem in PAIRS:
        path = ROOT / "configs" / "cifar100" / name.lower() / f"{stem}.yaml"
        cfg = load_config(path if path.exists() else path.parents[1] / "at" / path.name).node
        pair = real_pair(cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT)
        steps.append((DISTILLERS[name].from_config(cfg[name], pair), pair))
    trained = functools.partial(torch.empty, requires_grad=True)
    for method, pair in steps:
        with FakeTensorMode() as mode:
            state = {name: mode.from_tensor(buffer) for name, buffer in method.named_buffers()}
            parameters = {name: trained(each.shape) for name, each in method.named_parameters()}
            student = tree_map(lambda x: trained((5, *x.shape[1:])), pair.student)
            teacher = tree_map(lambda x: torch.empty(5, *x.shape[1:]), pair.teacher)
            index = torch.empty(5, dtype=torch.int64)
            inputs = student, teacher, Batch(torch.empty(5), index, index, index, index[0])
            loss = torch.func.functional_call(method, state | parameters, inputs)
            assert (loss.shape, loss.dtype) == ((), torch.float32)
            loss.backward()
            assert all(parameter.grad is not None for parameter in parameters.values())
            assert any(leaf.grad is not None for leaf in tree_leaves(student))


def test_curriculum_of_ctkd():
    method, (student, teacher, batch) = build("CTKD", changes="EPOCHS=10"), inputs(5)
    assert list(method.state_dict()) == ["theta"]
    theta = torch.ones((), requires_grad=True)
    plain = losses.ctkd_loss(student.logits, teacher.logits, 1 + 20 * theta.sigmoid())
    (slope,) = torch.autograd.grad(plain, theta)
    first = (1 - math.cos(math.pi / 10)) / 2
    for epoch, strength in ((1, first), (5, 0.5), (10, 1.0), (240, 1.0)):
        method.begin_epoch(epoch, seed=0)
        loss = method(student, teacher, batch)
        (reversed_slope,) = torch.autograd.grad(loss, list(method.parameters()))
        torch.testing.assert_close(loss, plain)
        assert reversed_slope.item() == pytest.approx(-strength * slope.item(), rel=1e-3)


@pytest.mark.slow
def test_extra_parameters_are_the_references(facts):
    """All counts of the reference, which includes five scalars for CRD and omits the variances of VID."""
    rows = json.loads((facts / "distiller_pairs.json").read_text())["rows"]
    rows = [row for row in rows if row["dataset"] == "cifar100" and row.get("forward") == "ok"]
    methods = ("FITNET", "AT", "RKD", "CRD", "OFD", "REVIEWKD", "VID")
    rows = [row for row in rows if row["method"] in methods]
    assert len(rows) >= 60
    for row in rows:
        pair = real_pair(row["teacher"], row["student"])
        expected = row["extra_parameters_reported_by_peer"] - 5 * (row["method"] == "CRD")
        if row["method"] == "VID":
            expected += sum(maps.shape[1] for maps in pair.teacher.features[1:])
        with torch.device("meta"):
            method = build(row["method"], pair)
        assert method.extra_parameters() == expected, row


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("negatives", [1, 5, 13])
def test_negatives_are_distinct_and_of_other_classes(negatives):
    sampler, everyone = ContrastSampler(TARGETS, 5, negatives, relaxed=True), torch.arange(33)
    chosen = torch.vmap(sampler, (None, None, 0))(TARGETS, everyone, torch.arange(2000))
    assert chosen[7].equal(sampler(TARGETS, everyone, torch.tensor(7)))
    assert chosen.shape == (2000, 33, 1 + negatives)
    assert (TARGETS[chosen[..., 0]] == TARGETS).all()
    assert (TARGETS[chosen[..., 1:]] != TARGETS[:, None]).all()
    assert (chosen.sort().values.diff() > 0).all()
    first = chosen[:, TARGETS.tolist().index(1)]
    for drawn, members in ((first[:, :1], TARGETS == 1), (first[:, 1:], TARGETS != 1)):
        counts = drawn.flatten().bincount(minlength=33)[members]
        rate = drawn.shape[1] / members.sum()
        assert ((counts - 2000 * rate).abs() < 5 * (2000 * rate * (1 - rate)).sqrt()).all()


MOMENTUM, TEMPERATURE = 0.8, 0.2


class ReferenceCRD:
    """CRD with gathered rows, exponentials and autograd (section 3 of the paper), in RepDistiller's order."""

    def __init__(self, method):
        self.method, self.z = copy.deepcopy(method), {}
        self.memory_s, self.memory_t = self.method.student_memory, self.method.teacher_memory

    def __call__(self, student, teacher, chosen, indices):
        embedded, total = [], torch.zeros((), dtype=torch.float64)
        linears = (self.method.embed_student, self.method.embed_teacher)
        for linear, pooled in zip(linears, (student, teacher), strict=True):
            v = pooled @ linear.weight.T + linear.bias
            embedded.append(v / v.square().sum(1, keepdim=True).sqrt())
        noise = (chosen.shape[1] - 1) / len(TARGETS)
        for side, memory in enumerate((self.memory_t, self.memory_s)):
            scores = torch.einsum("bd,bkd->bk", embedded[side], memory[chosen])
            exponentials = torch.exp(scores / TEMPERATURE)
            z = self.z.setdefault(side, exponentials.detach().mean() * len(TARGETS))
            p = exponentials / z
            posterior, rejected = p / (p + noise + 1e-7), noise / (p + noise + 1e-7)
            total = total - (posterior[:, 0].log().sum() + rejected[:, 1:].log().sum()) / len(p)
        with torch.no_grad():
            for v, memory in zip(embedded, (self.memory_s, self.memory_t), strict=True):
                moved = MOMENTUM * memory[indices] + (1 - MOMENTUM) * v
                moved = moved / moved.square().sum(1, keepdim=True).sqrt()
                for row, index in reversed([*zip(moved, indices.tolist(), strict=True)]):
                    memory[index] = row  # of equal samples the first remains
        return total


@pytest.mark.parametrize(("dense", "relaxed"), [(True, False), (False, True)])
def test_steps_equal_the_reference(dense, relaxed, monkeypatch):
    if not dense:
        monkeypatch.setattr(crd, "DENSE_SAMPLES", 0)
        monkeypatch.setattr(crd, "CHUNK", 2 * 8 * 8)  # two anchors at a time
    sampler, index = ContrastSampler(TARGETS, 5, 7, relaxed), torch.tensor([4, 9, 30, 4, 17])
    method = CRD([6, 10], sampler, 8, MOMENTUM, TEMPERATURE).double()
    reference, empty = ReferenceCRD(method), torch.empty(0)
    for step in range(3):
        student, teacher = (torch.randn(5, width, dtype=torch.float64) for width in (6, 10))
        again, student = student.clone().requires_grad_(), student.requires_grad_()
        batch = Batch(torch.empty(5), TARGETS[index], index, -index, torch.tensor(11 + step))
        chosen = sampler(batch.targets, index, batch.key)
        assert chosen[:, 0].equal(index) != relaxed
        expected = reference(again, teacher, chosen, index)
        outputs = (Outputs(empty, (), (), pooled) for pooled in (student, teacher))
        value = method(*outputs, batch)
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        value.backward()
        expected.backward()
        torch.testing.assert_close(student.grad, again.grad)
        for ours, theirs in zip(method.parameters(), reference.method.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(method.student_memory, reference.memory_s)
        torch.testing.assert_close(method.teacher_memory, reference.memory_t)
        torch.testing.assert_close(method.log_z.exp(), torch.stack([*reference.z.values()]))
