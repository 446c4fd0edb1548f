"""The library, the examples and the command ``distill``."""

import copy
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from short_runs import SMALLER
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet34_Weights, resnet34

import mdistiller_norm as mdn
from mdistiller_norm.cli import main
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.functional import normkd_loss

IMAGES, TARGETS, INDICES = (
    torch.randn(6, 3, 32, 32),
    torch.tensor([0, 1, 2, 3, 4, 0]),
    torch.arange(6),
)


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
    kd = mdn.Distillation(["KD", "REVIEWKD"], student, teacher, KD={"TEMPERATURE": 2.0})
    assert len(list(kd.parameters())) > len(list(student.parameters())), "the method's parameters"
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = kd(IMAGES, TARGETS)
    assert loss.dtype is torch.float32
    assert list(parts) == ["ce", "KD", "REVIEWKD"]
    kd.to(torch.float64)
    assert next(teacher.parameters()).dtype is torch.float64


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("NormKDD", {}, "NormKD"),
        ("NormKD", {"T": 2.0}, "^arguments: unknown key NormKD.T"),
        (
            "NormKD",
            {"TEMPERATURE_NORM": "hot"},
            "TEMPERATURE_NORM must be a finite number, got hot",
        ),
        ("AT", {}, "AT requires features"),
    ],
)
def test_mistakes_raise_config_errors(method: str, keys: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mdn.Distillation(method, plain_network(), plain_network(), **keys)  # type: ignore[arg-type]


def test_mistakes_in_calls_raise_config_errors() -> None:
    words = r"^overrides: unknown key SOLVER\.EPOCH: did you mean SOLVER\.EPOCHS"
    with pytest.raises(ConfigError, match=words):
        mdn.train("digits/normkd", {"SOLVER.EPOCH": 2})
    networks = mdn.create_model("resnet8", 5), mdn.create_model("resnet8", 5)
    with pytest.raises(
        ConfigError, match="CRD requires the classes of the training set: pass targets"
    ):
        mdn.Distillation("CRD", *networks)
    kd = mdn.Distillation("CRD", *networks, targets=TARGETS, NCE={"K": 4})
    with pytest.raises(ConfigError, match="CRD requires indices"):
        kd(IMAGES, TARGETS)


def test_train_runs_a_config_with_overrides(tmp_path: Path) -> None:
    overrides = {"SOLVER.EPOCHS": 1, "SOLVER.LR_DECAY_STAGES": [], "LOG.PREFIX": str(tmp_path)}
    overrides |= {"EXPERIMENT.NAME": "a", "DATASET.SUBSET": 64}
    result = mdn.train(ROOT / "configs/digits/vanilla_resnet8.yaml", overrides)
    assert result["last"]["epoch"] == 1
    network, about = mdn.load(tmp_path / "digits" / "a,DATASET.SUBSET=64")
    assert about["top1"] == result["best"]["top1"]
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 10)


SMALL = ["DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "SOLVER.BATCH_SIZE=4"]
SHORT = ["SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[]", "DATASET.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write class folders with noise images; return the folder."""
    root = tmp_path_factory.mktemp("data") / "birds"
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("robin", "wren"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return root


def train(path: str, output: Path, *overrides: str) -> Path:
    """Train a config for one epoch and return its run folder."""
    words = ["train", "--cfg", str(ROOT / path), *SHORT, "LOG.PREFIX", str(output), *overrides]
    assert main(words) == 0
    (folder,) = {file.parent for file in output.glob("*/*/result.json")}
    return folder


def test_image_folders(birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [f"DATASET.ROOT={birds}", *SMALL]
    monkeypatch.chdir(tmp_path)
    teacher = train("examples/birds.yaml", tmp_path / "teacher", *small)
    weights = ["DISTILLER.TEACHER_WEIGHTS", str(teacher / "student_last.pt")]
    train("examples/kd.yaml", tmp_path / "kd", *small, *weights)


def test_method(tmp_path: Path) -> None:
    subset = "DATASET.SUBSET=64"
    teacher = train("configs/digits/vanilla_resnet20.yaml", tmp_path / "teacher", subset)
    weights = f"DISTILLER.TEACHER_WEIGHTS={teacher}/student_last.pt"
    train("examples/mse.yaml", tmp_path / "mse", weights, subset)


def test_networks(birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet34's published weights are replaced by random ones in the cache of downloads."""
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(resnet34().state_dict(), cache / Path(ResNet34_Weights.IMAGENET1K_V1.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    small = [f"DATASET.ROOT={birds}", *SMALL]
    teacher = train("examples/finetune.yaml", tmp_path / "teacher", *small)
    weights = f"DISTILLER.TEACHER_WEIGHTS={teacher}/student_last.pt"
    student = train("examples/mobile.yaml", tmp_path / "mobile", *small, weights)
    plugin = ["--plugin", str(ROOT / "examples/networks.py"), "--root", str(birds)]
    assert main(["eval", "-c", str(student / "student_last.pt"), *plugin]) == 0


@pytest.mark.parametrize(
    ("package", "example"), [("lightning", "lightning_module"), ("transformers", "hf_trainer")]
)
def test_training_loops_of_other_libraries(package: str, example: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    pytest.importorskip("accelerate" if package == "transformers" else package)
    module = runpy.run_path(str(ROOT / f"examples/{example}.py"))
    student, teacher = mdn.create_model("resnet8", 5), mdn.create_model("resnet14", 5)
    before = [copy.deepcopy(network.state_dict()) for network in (student, teacher)]
    items = [(torch.randn(3, 32, 32), number % 5) for number in range(8)]
    if package == "lightning":
        loader = torch.utils.data.DataLoader(items, 4)
        options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
        module["distill"](
            student, teacher, loader, max_epochs=2, enable_checkpointing=False, **options
        )
    else:
        named = [{"pixel_values": images, "labels": target} for images, target in items]
        options = {"use_cpu": True, "save_strategy": "no", "report_to": "none"}
        module["distill"](student, teacher, named, tmp_path, num_train_epochs=2, **options)
    changed = [
        any(not torch.equal(value, old[key]) for key, value in network.state_dict().items())
        for network, old in zip((student, teacher), before, strict=True)
    ]
    assert changed == [True, False]


def test_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples/digits.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for old, new in (
        ("epochs = 12", "epochs = 1"),
        ("output/notebook", str(tmp_path)),
        ('"train",', '"train", "DATASET.SUBSET=64",'),
        ('"digits" / name', '"digits" / f"{name},DATASET.SUBSET=64"'),
    ):
        assert old in source
        source = source.replace(old, new)
    exec(source, {})
    assert len(list(tmp_path.glob("digits/*/result.json"))) == 4


TINY = [
    "DATASET.IMAGE_SIZE=32",
    "DATASET.RESIZE=32",
    "DATASET.NUM_WORKERS=0",
    "SOLVER.BATCH_SIZE=16",
]


def test_teacher_student_alone_and_distilled(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["distill", "--teacher", "resnet14", "--student", "resnet8", "--data", str(tree)]
    assert main([*command, "--epochs=2", "--train-teacher", "--student-alone", *TINY]) == 0
    *_, header, teacher, alone, distilled, export = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["model", "top-1"]
    assert teacher.split()[:2] == ["teacher", "resnet14"]
    assert alone.split()[:3] == ["student", "alone", "resnet8"]
    run = Path(distilled.split("  ")[-1].strip())
    assert export == f"export the student: mdistiller-norm export -c '{run}'"
    assert run.name.startswith("resnet8,NormKD,2 epochs,DATASET.IMAGE_SIZE=32")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["NormKD"]["WARMUP"], config["SOLVER"]["EPOCHS"]) == (5, 2)
    assert main([*command, "--epochs=2", *TINY]) == 0  # finds the teacher, and all is finished
    *lines, distilled_again, _ = capsys.readouterr().out.splitlines()
    assert distilled_again.split() == distilled.split()
    assert lines[-1].split()[:2] == ["teacher", "resnet14"]
    assert any(line.endswith("is finished: nothing left to train") for line in lines)
