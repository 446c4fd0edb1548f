"""The files in examples/ train for one epoch."""

import copy
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.models import ResNet34_Weights, resnet34

import mdistiller_norm as mdn
from mdistiller_norm import cli

SMALL = ["DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "SOLVER.BATCH_SIZE=4"]
SHORT = ["SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES", "[]", "DATASET.NUM_WORKERS", "0", "DEVICE", "cpu"]


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
    assert cli.main(words) == 0
    (folder,) = {file.parent for file in output.glob("*/*/result.json")}
    return folder


def test_image_folders(birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [f"DATASET.ROOT={birds}", *SMALL]
    monkeypatch.chdir(tmp_path)
    teacher = train("examples/birds.yaml", tmp_path / "teacher", *small)
    weights = ["DISTILLER.TEACHER_WEIGHTS", str(teacher / "student_last.pt")]
    train("examples/kd.yaml", tmp_path / "kd", *small, *weights)


def test_method(tmp_path: Path) -> None:
    teacher = train("configs/digits/vanilla_resnet20.yaml", tmp_path / "teacher")
    weights = f"DISTILLER.TEACHER_WEIGHTS={teacher}/student_last.pt"
    train("examples/mse.yaml", tmp_path / "mse", weights)


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
    assert cli.main(["eval", "-c", str(student / "student_last.pt"), *plugin]) == 0


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
        module["distill"](student, teacher, loader, max_epochs=2, enable_checkpointing=False, **options)
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
    exec(source.replace("epochs = 12", "epochs = 1").replace("output/notebook", str(tmp_path)), {})
    assert len(list(tmp_path.glob("digits/*/result.json"))) == 4
