"""Options of the optimizer, the losses and the images, and DOT, against their formulas; the figures that a run logs."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from short_runs import RECIPE, assert_same_state, build_few, build_step, few_digits, train_few
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.tv_tensors import Image

from mdistiller_norm.cli import execute
from mdistiller_norm.data import MemoryTrainLoader, Share, digits
from mdistiller_norm.data.mix import MixedLoader, mix
from mdistiller_norm.data.plan import ALONE
from mdistiller_norm.distillers import Distiller, Need
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.optim import DOT, Schedule, build_fused, set_learning_rate
from mdistiller_norm.engine.trainable import Trainable
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce.ledger import finished_run
from mdistiller_norm.types import Batch, Outputs

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("step", 1, [4, 8, 4, 2]),
        ("cosine", 0, [8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5)]),
        ("cosine", 2, [8 / 3, 16 / 3, 8, 4]),
    ],
)
def test_schedules(kind, warmup, expected):
    schedule = Schedule(kind, 8, 4, warmup, stages=(2, 3), decay=0.5)
    assert [schedule(epoch) for epoch in range(1, 5)] == pytest.approx(expected)


def test_adamw_from_zeros_is_adamw():
    ours = nn.Parameter(torch.randn(2, 3, **DOUBLE))
    theirs, settings = copy.deepcopy(ours), {"lr": 0.1, "weight_decay": 0.3}
    optimizers = [
        build_fused("AdamW", [ours], momentum=0.9, nesterov=True, **settings),
        torch.optim.AdamW([theirs], fused=False, **settings),
    ]
    for _ in range(4):
        gradient = torch.randn(2, 3, **DOUBLE)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_norm_of_a_clipped_gradient(tmp_path):
    plain = ["SOLVER.MOMENTUM=0", "SOLVER.NESTEROV=false", "SOLVER.WEIGHT_DECAY=0"]
    step = build_step(tmp_path, "step", "SOLVER.CLIP_GRAD=0.01", "SOLVER.LR=0.5", *plain)
    parameters = list(step.trainable.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    step(*next(step.loader.batches(1)))
    changes = [old - new.detach() for old, new in zip(before, parameters, strict=True)]
    assert float(nn.utils.get_total_norm(changes)) == pytest.approx(0.5 * 0.01, rel=1e-4)


def test_class_probabilities_and_label_smoothing():
    student, images = build_model("resnet8", 3).double(), torch.randn(4, 3, 8, 8, **DOUBLE)
    probabilities, index = torch.rand(4, 3, **DOUBLE).softmax(1), torch.arange(4)
    trainable = Trainable(student, label_smoothing=0.3)
    losses = trainable(Batch(images, probabilities, index, index, index[0]), None, torch.ones(1))
    smooth = 0.7 * probabilities + 0.1
    expected = -(smooth * losses.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(losses.total, expected)


def test_averaged_weights_are_evaluated_and_saved(tmp_path, capsys):
    data = few_digits(44, 360)  # with all test images
    trainer = build_few(tmp_path, "run", "SOLVER.EMA=0.75", epochs=1, dataset=data).trainer
    student, run_step = trainer.step.trainable.student, trainer.run_step
    for network in (student, trainer.step.trainable.ema):
        network.layer1[0].conv2.weight = network.layer1[0].conv1.weight
    expected = {name: value.clone() for name, value in student.state_dict().items()}

    def averaged(*raw):
        run_step(*raw)
        for name, value in student.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value

    trainer.run_step = averaged
    result = trainer.fit()
    trainer.log.close()
    content = load(trainer.folder / "student_last.pt")
    assert content["about"]["ema"] == 0.75
    torch.testing.assert_close(dict(content["model"]), expected)
    capsys.readouterr()
    for name in ("student_last.pt", "latest.pt"):
        execute(["eval", "-c", str(trainer.folder / name)])
        assert f"top-1 {result['last']['top1']:6.2f}" in capsys.readouterr().out


def test_gradient_norms_are_logged_and_do_not_change_the_run(tmp_path, teacher):
    common = ["DISTILLER.TYPE=NormKD", teacher]
    train_few(tmp_path, "plain", *common)
    train_few(tmp_path, "norms", *common, "LOG.GRAD_NORMS=true")
    assert_same_state(*(load(path)["trainable"] for path in tmp_path.glob("distill/*/latest.pt")))
    records = read_metrics(tmp_path / "distill" / "norms" / "metrics.jsonl")
    assert all(record["grad_norm_distill"] > 0 for record in records)
    train_few(tmp_path, "plain", *common, "LOG.GRAD_NORMS=true", epochs=3, resume=True)
    assert len(finished_run(tmp_path / "distill" / "plain").record["metrics"]["lr"]) == 3
    step = build_step(tmp_path, "step", *common, "SOLVER.BATCH_SIZE=8", dataset=few_digits(44))
    step.begin_epoch(1, 0)
    step.optimizer.param_groups[0]["lr"] = 0.0
    norms = step.gradient_norms(*next(step.loader.batches(1)))
    assert norms["grad_norm_ce"] == records[0]["grad_norm_ce"]
    step.loss_weights[1] = 0.0
    step(*next(step.loader.batches(1)))
    total = nn.utils.get_total_norm([p.grad for p in step.trainable.student.parameters()])
    assert float(total) == pytest.approx(norms["grad_norm_ce"], rel=1e-4)


def test_tensorboard_has_three_groups_and_a_cosine_keeps_its_length(tmp_path):
    train_few(tmp_path, "run", "LOG.TENSORBOARD_FREQ=4", *RECIPE)
    events = EventAccumulator(str(tmp_path / "distill" / "run" / "tensorboard")).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    steps = {tag: [event.step for event in entries] for tag, entries in scalars.items()}
    assert steps["train/loss_ce"] == steps["train/loss_total"] == [4, 8, 12]
    for tag in ("epoch/test_top1", "epoch/lr", "epoch/grad_norm_ce", "speed/images_per_second"):
        assert steps[tag] == [1, 2], tag
    assert {tag.split("/")[0] for tag in steps} == {"train", "epoch", "speed"}
    with pytest.raises(ConfigError, match=r"other values of SOLVER\.EPOCHS"):  # of the cosine
        train_few(tmp_path, "run", "LOG.TENSORBOARD_FREQ=4", *RECIPE, epochs=3, resume=True)


def test_mixed_images_and_targets_equal_torchvisions():
    images, targets = torch.randn(5, 3, 8, 10), torch.tensor([1, 0, 2, 2, 1])
    batch = Batch(images, targets, *[torch.zeros(())] * 3)
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


def test_draws_are_distributed_and_depend_on_the_epoch_and_the_rank():
    def draw(mixup, cutmix, epoch=1, seed=0, share=ALONE):
        loader = MemoryTrainLoader(digits(), 8, seed, share)
        return MixedLoader(loader, mixup, cutmix, 10, torch.device("cpu"))._draw(epoch)

    drawn = torch.cat([draw(0.4, 1.0, seed=seed) for seed in range(10)])
    top, left, bottom, right, weight = drawn.T
    cut, area = weight == 0, (bottom - top) * (right - left)
    assert cut.float().mean() == pytest.approx(0.5, abs=0.05)
    assert area[cut].mean() == pytest.approx(0.5, abs=0.05)  # a uniform distribution
    assert (draw(0.4, 0)[:, 4] > 0).all()
    assert (draw(0, 0.4)[:, 4] == 0).all()
    for other in (draw(1, 1, epoch=2), draw(1, 1, share=Share(1, 2))):
        assert not torch.equal(draw(1, 1), other)


class Student(nn.Module):
    """``logits = images @ both * task``; the distillation reads ``images @ both``."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(3, 4, **DOUBLE))
        self.task = nn.Parameter(torch.randn(4, **DOUBLE))

    def outputs(self, images):
        pooled = images @ self.both
        return Outputs(pooled * self.task, (), (), pooled)


class Regression(Distiller):
    need = Need.POOLED

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, **DOUBLE))

    def forward(self, student, teacher, batch):
        return (student.pooled * self.own - teacher.pooled).square().mean()


@pytest.mark.parametrize("nesterov", [False, True])
def test_dot_computes_its_formula(nesterov):
    """For each parameter, the sum of the updates of one SGD per loss: 0 of the task, 1 of the distillation."""
    student, regression = Student(), Regression()
    trainable = Trainable(student, {"REGRESSION": regression})
    updates = []
    for parameter, loss, momentum, decay in (
        (student.both, 0, 0.7 - 0.2, 0.11), (student.both, 1, 0.7 + 0.2, 0.0),
        (student.task, 0, 0.7, 0.11), (regression.own, 1, 0.7, 0.11),
    ):  # fmt: skip
        twin = parameter.detach().clone()
        sgd = {"momentum": momentum, "weight_decay": decay, "nesterov": nesterov}
        updates.append((parameter, loss, twin, torch.optim.SGD([twin], lr=1, **sgd)))
    optimizer, index = None, torch.arange(5)
    for rate in (0.3, 0.3, 0.05):
        images, features = torch.randn(5, 3, **DOUBLE), torch.randn(5, 4, **DOUBLE)
        targets = torch.randint(4, (5,))
        batch = Batch(images, targets, index, index, index[0])
        outputs = Outputs(torch.zeros(5, 4), (), (), features)
        pooled = images @ student.both
        losses = [0.6 * F.cross_entropy(pooled * student.task, targets)]
        losses.append(1.7 * F.mse_loss(pooled * regression.own, features))
        if not optimizer:
            network = SimpleNamespace(outputs=lambda _, outputs=outputs: outputs)
            sgd = {"lr": 1, "momentum": 0.7, "weight_decay": 0.11, "nesterov": nesterov}
            optimizer = DOT(trainable, batch, SimpleNamespace(network=network), 0.2, **sgd)
        expected = {parameter: parameter.detach().clone() for parameter in trainable.parameters()}
        for parameter, loss, twin, reference in updates:
            twin.copy_(parameter.detach())
            (twin.grad,) = torch.autograd.grad(losses[loss], [parameter], retain_graph=True)
            set_learning_rate(reference.param_groups, rate)
            reference.step()
            expected[parameter] += twin - parameter.detach()
        set_learning_rate(optimizer.param_groups, rate)
        optimizer.backward(trainable(batch, outputs, torch.tensor([0.6, 1.7], **DOUBLE)).parts)
        optimizer.step()
        for parameter, value in expected.items():
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-13)
