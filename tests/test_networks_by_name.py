"""Networks of timm, torchvision and local folders in the layout of the Hugging Face Hub, built by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

from mdistiller_norm.cli import main
from mdistiller_norm.models import build_model, probe

timm = pytest.importorskip("timm", reason="timm is not installed")
CHANNELS = {  # of the maps: a stem, or the first map twice, then the stages
    "timm:resnet10t": [64, 64, 128, 256, 512],
    "timm:test_convnext": [24, 24, 32, 48, 64],
    "timm:vit_tiny_patch16_224": [192] * 13,
    "torchvision:resnet18": [64, 64, 128, 256, 512],
    "torchvision:mobilenet_v3_small": [16, 16, 24, 48, 576],
    "torchvision:convnext_tiny": [96, 96, 192, 384, 768],
    "torchvision:squeezenet1_1": [64, 128, 256, 512],
}


def train(folder: Path, name: str, *overrides: str) -> dict:
    words = ["DATASET.TYPE=digits", "SOLVER.EPOCHS=1", "SOLVER.BATCH_SIZE=240", f"LOG.PREFIX={folder}"]
    assert main(["train", f"--cfg={folder}/run.yaml", f"EXPERIMENT.NAME={name}", *words, *overrides]) == 0
    return json.loads((folder / "distill" / name / "result.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an empty config and a model that timm saved for the Hub, with ten classes."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "run.yaml").write_text("")
    network = timm.create_model("test_resnet", num_classes=10)
    timm.models.save_for_hf(network, folder / "hub", safe_serialization=True)
    return folder


@pytest.mark.parametrize("name", CHANNELS)
def test_outputs_are_those_of_the_module(name: str) -> None:
    network = build_model(name, 10, image_size=(64, 64)).eval()
    assert [each.shape[1] for each in probe(network, (64, 64)).features] == CHANNELS[name]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.outputs(images).logits, network.module(images))


def test_methods_with_and_without_maps_and_a_cache(folder: Path) -> None:
    weights = f"DISTILLER.TEACHER_WEIGHTS={folder}/distill/teacher/student_last.pt"
    teacher = ["DISTILLER.TEACHER=timm:test_vit", weights]
    train(folder, "teacher", "DISTILLER.STUDENT=timm:test_vit")
    cached = train(
        folder, "kd", "DISTILLER.TYPE=NormKD", "DISTILLER.STUDENT=torchvision:mobilenet_v3_small", *teacher,
        "DISTILLER.TEACHER_CACHE=full",
    )  # fmt: skip
    assert cached["teacher"]["cache"] == "fp32"
    methods = ["DISTILLER.TYPE=[AT,CRD]", "CRD.NCE.K=16"]
    train(folder, "at", *methods, "DISTILLER.STUDENT=timm:test_resnet", *teacher)
    weights = str(folder / "distill" / "kd" / "student_last.pt")
    assert main(["eval", "-c", weights]) == 0
    assert main(["export", "-c", weights, "--out", str(folder / "kd.pth")]) == 0


def test_pretrained_weights_of_a_hub_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"local-dir:{folder}/hub"
    result = train(
        folder, "hub", "DISTILLER.TYPE=KD", f"DISTILLER.TEACHER={name}", "DISTILLER.TEACHER_WEIGHTS=pretrained",
        f"DISTILLER.STUDENT={name}", "DISTILLER.TEACHER_CACHE=full", "SOLVER.LR=1e-9",
    )  # fmt: skip
    assert "was trained on images with another image_size" in capsys.readouterr().out
    stored = build_model(name, 10, pretrained=True).eval()
    other = build_model(name, 7, pretrained=True)
    assert (stored.pretrained["num_classes"], other.module.fc.out_features) == (10, 7)
    before, after = stored.state_dict(), torch.load(folder / "distill" / "hub" / "student_last.pt")["model"]
    assert torch.equal(before["layer1.0.conv1.weight"], other.state_dict()["layer1.0.conv1.weight"])
    torch.testing.assert_close(before["layer1.0.conv1.weight"], after["layer1.0.conv1.weight"])
    assert result["teacher"]["cache"] == "fp32"


def test_pretrained_weights_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with random weights replaces the download in torch.hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    state = resnet18().state_dict()
    torch.save(state, tmp_path / "hub/checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    network = build_model("torchvision:resnet18.IMAGENET1K_V1", 10, pretrained=True)
    assert torch.equal(network.state_dict()["conv1.weight"], state["conv1.weight"])
    assert network.pretrained["num_classes"] == 1000
    assert network.module.fc.out_features == 10
