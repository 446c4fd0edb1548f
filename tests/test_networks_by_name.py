"""Networks of timm, torchvision and local folders in the layout of the Hugging Face Hub, built by name."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights, resnet18

from mdistiller_norm.build import build_teacher
from mdistiller_norm.cli import main
from mdistiller_norm.config import load_config
from mdistiller_norm.data import Split, TensorDataset
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.models.preprocessed import Preprocessed, differences

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


def run_folder(folder: Path, name: str) -> Path:
    return folder / "distill" / f"{name},DATASET.SUBSET=100"


def train(folder: Path, name: str, *overrides: str) -> dict:
    words = [
        "DATASET.TYPE=digits",
        "DATASET.SUBSET=100",
        "SOLVER.EPOCHS=1",
        f"LOG.PREFIX={folder}",
    ]
    words = [f"--cfg={folder}/run.yaml", f"EXPERIMENT.NAME={name}", *words, *overrides]
    assert main(["train", *words]) == 0
    return json.loads((run_folder(folder, name) / "result.json").read_text())


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
    weights = f"DISTILLER.TEACHER_WEIGHTS={run_folder(folder, 'teacher')}/student_last.pt"
    teacher = ["DISTILLER.TEACHER=timm:test_vit", weights]
    train(folder, "teacher", "DISTILLER.STUDENT=timm:test_vit")
    cached = train(
        folder, "kd", "DISTILLER.TYPE=NormKD", "DISTILLER.STUDENT=torchvision:mobilenet_v3_small", *teacher,
        "DISTILLER.TEACHER_CACHE=full",
    )  # fmt: skip
    assert cached["teacher"]["cache"] == "fp32"
    methods = ["DISTILLER.TYPE=[AT,CRD]", "CRD.NCE.K=16"]
    train(folder, "at", *methods, "DISTILLER.STUDENT=timm:test_resnet", *teacher)
    weights = str(run_folder(folder, "kd") / "student_last.pt")
    assert main(["eval", "-c", weights]) == 0
    assert main(["export", "-c", weights, "--out", str(folder / "kd.pth")]) == 0


def test_pretrained_weights_of_a_hub_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"local-dir:{folder}/hub"
    words = ["DISTILLER.TYPE=KD", "DISTILLER.TEACHER_WEIGHTS=pretrained", "SOLVER.LR=1e-9"]
    words += [f"DISTILLER.TEACHER={name}", f"DISTILLER.STUDENT={name}"]
    result = train(folder, "hub", *words, "DISTILLER.TEACHER_CACHE=full")
    assert "was trained on images with another image_size [160, 160]" in capsys.readouterr().out
    train(folder, "live", *words)
    logs = [run_folder(folder, run) / "metrics.jsonl" for run in ("hub", "live")]
    cached, live = map(read_metrics, logs)
    assert [epoch["loss_KD"] for epoch in cached] == [epoch["loss_KD"] for epoch in live]
    stored = build_model(name, 10, pretrained=True).eval()
    other = build_model(name, 7, pretrained=True)
    assert (stored.pretrained["num_classes"], other.module.fc.out_features) == (10, 7)
    after = torch.load(run_folder(folder, "hub") / "student_last.pt")["model"]
    before, seven = (net.state_dict()["layer1.0.conv1.weight"] for net in (stored, other))
    assert torch.equal(before, seven)
    torch.testing.assert_close(before, after["layer1.0.conv1.weight"])
    assert result["teacher"]["cache"] == "fp32"


@pytest.fixture
def weights_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """Replace the download of ResNet18's weights by a file with random ones in torch.hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    state = resnet18().state_dict()
    torch.save(
        state, tmp_path / "hub/checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    )
    return state


def test_pretrained_weights_of_torchvision(
    weights_of_torchvision: dict[str, torch.Tensor],
) -> None:
    network = build_model("torchvision:resnet18.IMAGENET1K_V1", 10, pretrained=True)
    assert torch.equal(
        network.state_dict()["conv1.weight"], weights_of_torchvision["conv1.weight"]
    )
    assert network.pretrained["num_classes"] == 1000
    assert network.module.fc.out_features == 10


@pytest.mark.usefixtures("weights_of_torchvision")
@pytest.mark.parametrize(
    "name", ["timm:test_vit", "timm:resnet10t", "torchvision:resnet18.IMAGENET1K_V1"]
)
def test_the_teacher_sees_the_preprocessing_of_its_library(name: str) -> None:
    network = build_model(name, 10, pretrained=name.startswith("torchvision")).eval()
    ours = {"image_size": (64, 64), "mean": (0.48, 0.45, 0.4), "std": (0.28, 0.26, 0.27)}
    if name.startswith("timm"):  # without the central crop
        config = timm.data.resolve_data_config({"crop_pct": 1.0}, model=network.module)
        transform = timm.data.create_transform(**config)
    else:
        transform = ResNet18_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    crops = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(ours[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.module(torch.stack([transform(crop) for crop in crops]))
        found = Preprocessed(network, network.pretrained, ours)((crops - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert differences(ours, ours) == []


@pytest.mark.usefixtures("weights_of_torchvision")
def test_the_images_are_converted_for_published_weights() -> None:
    name = "DISTILLER.TEACHER_WEIGHTS=torchvision:ResNet18_Weights.IMAGENET1K_V1"
    split = Split(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    dataset = TensorDataset(
        "own", split, split, tuple(map(str, range(1000))), (0.5,) * 3, (0.25,) * 3
    )
    cfg = load_config(None, ["DISTILLER.TEACHER=torchvision:resnet18", name]).node
    network, file = build_teacher(cfg, dataset)
    assert (type(network), network.size) == (Preprocessed, (224, 224))
    assert "images with another image_size [224, 224] (here [32, 32]), mean" in file.warning
