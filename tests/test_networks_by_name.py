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
from mdistiller_norm.engine.distributed import synchronise_batch_norms
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.models.preprocessed import Preprocessed

timm = pytest.importorskip("timm", reason="timm is not installed")
CHANNELS = {  # of the maps: a stem, or the first map twice, then the stages
    "timm:test_convnext": [24, 24, 32, 48, 64],
    "timm:vit_tiny_patch16_224": [192] * 13,
    "torchvision:resnet18": [64, 64, 128, 256, 512],
    "torchvision:mobilenet_v3_small": [16, 16, 24, 48, 576],
    "torchvision:squeezenet1_1": [64, 128, 256, 512],
    "torchvision:inception_v3": [32, 64, 80, 192, 288, 768, 2048],
}


def run_folder(folder, name):
    return folder / "distill" / f"{name},DATASET.SUBSET=100"


def train(folder, name, *overrides):
    words = f"""train --cfg={folder}/run.yaml EXPERIMENT.NAME={name} LOG.PREFIX={folder}
        DATASET.TYPE=digits DATASET.SUBSET=100 SOLVER.EPOCHS=1""".split()
    assert main([*words, *overrides]) == 0
    return json.loads((run_folder(folder, name) / "result.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with an empty config and a model that timm saved for the Hub, with ten classes."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "run.yaml").write_text("")
    network = timm.create_model("test_resnet", num_classes=10)
    timm.models.save_for_hf(network, folder / "hub", safe_serialization=True)
    return folder


@pytest.mark.parametrize("name", CHANNELS)
def test_outputs_are_those_of_the_module(name):
    network = build_model(name, 10, image_size=(96, 96)).eval()
    assert [each.shape[1] for each in probe(network, (96, 96)).features] == CHANNELS[name]
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(network.outputs(images).logits, network.module(images))


def test_methods_with_and_without_maps_and_a_cache(folder):
    train(folder, "teacher", "DISTILLER.STUDENT=timm:test_vit")
    teacher = f"""DISTILLER.TEACHER=timm:test_vit
        DISTILLER.TEACHER_WEIGHTS={run_folder(folder, "teacher")}/student_last.pt""".split()
    words = "DISTILLER.STUDENT=torchvision:mnasnet0_5 DISTILLER.TEACHER_CACHE=full DISTILLER.TYPE=NormKD"
    assert train(folder, "kd", *words.split(), *teacher)["teacher"]["cache"] == "fp32"
    methods = ["DISTILLER.TYPE=[AT,CRD]", "CRD.NCE.K=16"]
    train(folder, "at", *methods, "DISTILLER.STUDENT=timm:test_resnet", *teacher)
    assert main(f"eval -c {run_folder(folder, 'kd')}/student_last.pt".split()) == 0


def test_pretrained_weights_of_a_hub_folder(folder, capsys):
    name = f"local-dir:{folder}/hub"
    words = f"""DISTILLER.TYPE=KD DISTILLER.TEACHER_WEIGHTS=pretrained SOLVER.LR=1e-9 DISTILLER.TEACHER_CACHE=full
        DISTILLER.TEACHER={name} DISTILLER.STUDENT={name}""".split()
    assert train(folder, "hub", *words)["teacher"]["cache"] == "fp32"
    assert "was trained on images with another image_size [160, 160]" in capsys.readouterr().out
    stored, other = (build_model(name, classes, pretrained=True) for classes in (10, 7))
    assert (stored.pretrained["num_classes"], other.module.fc.out_features) == (10, 7)
    after = torch.load(run_folder(folder, "hub") / "student_last.pt")["model"]
    before, seven = (net.state_dict()["layer1.0.conv1.weight"] for net in (stored, other))
    assert torch.equal(before, seven)
    torch.testing.assert_close(before, after["layer1.0.conv1.weight"])


@pytest.fixture
def torchvision_state(tmp_path, monkeypatch):
    """Replace the download of ResNet18's weights by a file with random ones in torch.hub's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    path.parent.mkdir(parents=True)
    state = resnet18().state_dict()
    torch.save(state, path)
    return state


def test_the_teacher_sees_the_preprocessing_of_its_library():
    network = build_model("timm:test_vit", 10).eval()
    ours = {"image_size": (64, 64), "mean": (0.48, 0.45, 0.4), "std": (0.28, 0.26, 0.27)}
    # Without the central crop.
    config = timm.data.resolve_data_config({"crop_pct": 1.0}, model=network.module)
    transform, crops = timm.data.create_transform(**config), torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(ours[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.module(torch.stack([transform(crop) for crop in crops]))
        found = Preprocessed(network, network.pretrained, ours)((crops - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_images_are_converted_for_published_weights(torchvision_state, capsys):
    network = build_model("torchvision:resnet18.IMAGENET1K_V1", 10, pretrained=True)
    assert torch.equal(network.state_dict()["conv1.weight"], torchvision_state["conv1.weight"])
    assert (network.pretrained["num_classes"], network.module.fc.out_features) == (1000, 10)
    name = "DISTILLER.TEACHER_WEIGHTS=torchvision:ResNet18_Weights.IMAGENET1K_V1"
    split = Split(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    dataset = TensorDataset("own", split, split, ("a",) * 1000, (0.5,) * 3, (0.25,) * 3)
    cfg = load_config(None, ["DISTILLER.TEACHER=torchvision:resnet18", name]).node
    network, file = build_teacher(cfg, dataset)
    assert (type(network), network.size) == (Preprocessed, (224, 224))
    assert "images with another image_size [224, 224] (here [32, 32]), mean" in file.warning
    command = "distill --teacher torchvision:resnet18 --student resnet8 --data digits"
    assert main(command.split()) == 2  # weights of ImageNet
    assert capsys.readouterr().err.endswith("resnet18, or add --train-teacher\n")


def test_synchronised_batch_norms_keep_their_activation():
    network, images = build_model("timm:test_efficientnet", 10).eval(), torch.rand(2, 3, 64, 64)
    expected = network(images)
    synchronise_batch_norms(network)
    assert any(isinstance(each, torch.nn.SyncBatchNorm) for each in network.modules())
    assert torch.equal(network(images), expected)
