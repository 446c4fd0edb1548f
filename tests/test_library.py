"""The library: distillation in a loop of the user, loading of students, training from a script."""

from pathlib import Path

import pytest
import torch
from short_runs import SMALLER
from torch import nn
from torch.nn import functional as F

import mdistiller_norm as mdn
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.functional import normkd_loss

ROOT = Path(__file__).resolve().parents[1]
IMAGES, TARGETS, INDICES = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6)


def plain_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))


def test_the_example_of_the_readme(run: Path, tmp_path: Path) -> None:
    student, info = mdn.load(run)
    assert (info["name"], student.training) == ("resnet8", False)
    student, teacher = mdn.create_model("resnet8", 5), plain_network()
    kd = mdn.Distillation("NormKD", student, teacher, TEMPERATURE_NORM=1.5)
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.05)
    before = [p.clone() for p in teacher.parameters()]
    totals = []
    for epoch in range(1, 6):
        loss, parts = kd(IMAGES, TARGETS, epoch=epoch)
        assert torch.allclose(loss, sum(parts.values(), torch.zeros(())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < totals[0]
    assert {id(p) for p in kd.parameters()} == {id(p) for p in student.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not any(name.startswith("_teacher") for name in kd.state_dict())


def test_the_loss_is_cross_entropy_and_method_with_their_weights() -> None:
    student, teacher = plain_network(), plain_network()
    kd = mdn.Distillation("NormKD", student, teacher, LOSS={"KD_WEIGHT": 0.5}, WARMUP=4)
    loss, parts = kd(IMAGES, TARGETS, epoch=2)
    logits = student(IMAGES), teacher(IMAGES)
    expected = 0.1 * F.cross_entropy(logits[0], TARGETS), 0.25 * normkd_loss(*logits)
    torch.testing.assert_close(parts["ce"], expected[0].detach())
    torch.testing.assert_close(parts["NormKD"], expected[1].detach())
    torch.testing.assert_close(loss, sum(expected))


@pytest.mark.parametrize("name", DISTILLERS)
def test_every_method_trains_in_a_loop(name: str) -> None:
    student, teacher = mdn.create_model("resnet8", 5), mdn.create_model("resnet14", 5)
    keys = {"NCE": {"K": 4}} if name in SMALLER else {}
    kd = mdn.Distillation(name, student, teacher, targets=TARGETS, **keys)
    kd.train()
    loss, parts = kd(IMAGES, TARGETS, indices=INDICES)
    loss.backward()
    assert torch.isfinite(loss)
    assert set(parts) == {"ce", name}
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert teacher.training is False


def test_several_methods_and_autocast() -> None:
    student, teacher = mdn.create_model("resnet8", 5), mdn.create_model("resnet14", 5)
    kd = mdn.Distillation(["KD", "AT"], student, teacher, KD={"TEMPERATURE": 2.0})
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = kd(IMAGES, TARGETS)
    assert loss.dtype is torch.float32
    assert list(parts) == ["ce", "KD", "AT"]
    kd.to(torch.float64)
    assert next(teacher.parameters()).dtype is torch.float64


def test_the_parameters_of_a_method_train_with_the_student() -> None:
    student, teacher = mdn.create_model("resnet8", 5), mdn.create_model("resnet14", 5)
    kd = mdn.Distillation("REVIEWKD", student, teacher)
    assert len(list(kd.parameters())) > len(list(student.parameters()))


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("NormKDD", {}, "NormKD"),
        ("NormKD", {"T": 2.0}, "^arguments: unknown key NormKD.T"),
        ("NormKD", {"TEMPERATURE_NORM": "hot"}, "NormKD.TEMPERATURE_NORM must be a finite number, got hot"),
        ("AT", {}, "AT requires features"),
    ],
)
def test_mistakes_raise_config_errors(method: str, keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mdn.Distillation(method, plain_network(), plain_network(), **keys)  # type: ignore[arg-type]


def test_errors_of_train_name_its_argument() -> None:
    with pytest.raises(
        ConfigError, match=r"^overrides: unknown key SOLVER\.EPOCH: did you mean SOLVER\.EPOCHS"
    ):
        mdn.train("digits/normkd", {"SOLVER.EPOCH": 2})


def test_crd_requires_targets_and_indices() -> None:
    networks = mdn.create_model("resnet8", 5), mdn.create_model("resnet8", 5)
    with pytest.raises(ConfigError, match="CRD requires the classes of the training set: pass targets"):
        mdn.Distillation("CRD", *networks)
    kd = mdn.Distillation("CRD", *networks, targets=TARGETS, NCE={"K": 4})
    with pytest.raises(ConfigError, match="CRD requires indices"):
        kd(IMAGES, TARGETS)


def test_train_runs_a_config_with_overrides(tmp_path: Path) -> None:
    overrides = {"SOLVER.EPOCHS": 1, "SOLVER.LR_DECAY_STAGES": [], "LOG.PREFIX": str(tmp_path)}
    overrides["EXPERIMENT.NAME"] = "a"
    result = mdn.train(ROOT / "configs/digits/vanilla_resnet8.yaml", overrides)
    assert result["last"]["epoch"] == 1
    network, about = mdn.load(tmp_path / "digits" / "a")
    assert about["top1"] == result["best"]["top1"]
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 10)
