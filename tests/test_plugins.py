"""Plugins: networks, data sets and methods registered by files outside the package."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torchvision.models import mobilenet_v3_small

from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config, show
from mdistiller_norm.distillers import Need
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import CIFAR_MODELS, IMAGENET_MODELS, Wrapped, build_model, probe
from mdistiller_norm.registry import import_plugin

SUBSET = ",DATASET.SUBSET=24"  # in the names of run folders
REGISTER = "from mdistiller_norm import data, distillers, models\n"
PLUGIN = """
from helper import resnet10

from mdistiller_norm import models


@models.register("resnet10")
def wrapped(num_classes):
    return models.Wrapped(
        resnet10(num_classes), num_classes, classifier="fc", features=("relu", "layer1", "layer2", "layer3", "layer4")
    )


@models.register("blind")
def without_maps(num_classes):
    return models.Wrapped(resnet10(num_classes), num_classes, classifier="fc")
"""
HELPER = """
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


def resnet10(num_classes):
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network
"""
CONFIG = """
EXPERIMENT: {{PLUGINS: mine.py}}
MSE: {{LOSS: {{KD_WEIGHT: 0.25}}}}
DATASET: {{TYPE: three_digits, SUBSET: 24}}
DISTILLER: {{TEACHER: resnet8, STUDENT: resnet10, TEACHER_WEIGHTS: {folder}/teacher.pth}}
SOLVER: {{EPOCHS: 1, BATCH_SIZE: 12, LR: 0.01}}
LOG: {{PREFIX: {folder}}}
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a plugin, a module that it imports, a config and the weights of a teacher."""
    folder = tmp_path_factory.mktemp("mine")
    examples = [(ROOT / "examples" / name).read_text() for name in ("three_digits.py", "mse.py")]
    (folder / "mine.py").write_text("\n".join([PLUGIN, *examples]))
    (folder / "helper.py").write_text(HELPER)
    (folder / "mine.yaml").write_text(CONFIG.format(folder=folder))
    torch.manual_seed(0)
    torch.save({"model": build_model("resnet8", 3).state_dict()}, folder / "teacher.pth")
    import_plugin(
        str(folder / "mine.py")
    )  # once per process, before a test restores the registries
    return folder


def run(folder: Path, name: str, *overrides: str) -> Path:
    command = ["train", "--cfg", str(folder / "mine.yaml"), f"EXPERIMENT.NAME={name}"]
    assert execute([*command, *overrides]) == 0
    return folder / "distill" / f"{name}{SUBSET}"


@pytest.mark.parametrize(
    ("method", "student"),
    [("NONE", "resnet10"), ("FITNET", "resnet10"), ("MSE", "resnet10"), ("PKT", "blind")],
)
def test_a_wrapped_student_trains_on_a_registered_data_set(mine, method, student):
    folder = run(mine, method, f"DISTILLER.TYPE={method}", f"DISTILLER.STUDENT={student}")
    result = json.loads((folder / "result.json").read_text())
    assert (result["student"], result["dataset"]) == (student, "three_digits")
    assert result["config"]["MSE"]["LOSS"]["KD_WEIGHT"] == 0.25
    (metrics,) = read_metrics(folder / "metrics.jsonl")
    assert method == "NONE" or metrics[f"loss_{method}"] > 0
    # The parameter names of torchvision, to load the weights without this package.
    about = load(folder / "student_last.pt")
    assert {"conv1.weight", "layer1.0.conv1.weight"} <= about["model"].keys()
    assert about["about"]["plugins"] == result["config"]["EXPERIMENT"]["PLUGINS"]
    assert Path(about["about"]["plugins"][0]).resolve() == mine / "mine.py"


def test_a_wrapped_teacher_gives_the_logits_of_its_module(mine: Path) -> None:
    load_config(mine / "mine.yaml")
    network = build_model("resnet10", 3).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network.module(images)
    for need in (Need.LOGITS, Need.MAPS):
        outputs = Teacher(copy.deepcopy(network), need)._runs(images)
        assert torch.equal(outputs.logits, logits)
        assert len(outputs.features) == (5 if need is Need.MAPS else 0)
    torch.save({"model": network.state_dict()}, mine / "wrapped.pth")
    own = ["DISTILLER.STUDENT=resnet8", "DISTILLER.TEACHER=resnet10"]
    own += [f"DISTILLER.TEACHER_WEIGHTS={mine}/wrapped.pth"]
    run(mine, "back", "DISTILLER.TYPE=[NormKD,AT]", *own)
    for method in ("OFD", "REVIEWKD"):
        with pytest.raises(ConfigError, match=f"{method}: requires maps before their ReLU"):
            run(mine, "refused", f"DISTILLER.TYPE={method}", *own)


def test_evaluation_in_a_process_of_its_own(mine: Path) -> None:
    weights = run(mine, "own", "DISTILLER.TYPE=MSE") / "student_last.pt"
    code = "import sys; from mdistiller_norm.cli import main; print(main(sys.argv[1:4]), main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "eval", "-c", weights, "--plugin", mine / "mine.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    (error,) = done.stderr.splitlines()
    for words in ("student_last.pt is resnet10 on three_digits", "--plugin", "mine.py"):
        assert words in error
    top1 = json.loads(weights.with_name("result.json").read_text())["last"]["top1"]
    assert done.stdout.split()[:4] == ["resnet10", "three_digits", "top-1", f"{top1:.2f}"]
    assert done.stdout.endswith("\n2 0\n")


def test_folders_in_which_a_plugin_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    for name in (
        "configs/beside.py",
        "work/below/here.py",
        "installed/a_module.py",
        "work/twice.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{REGISTER}models.register('{Path(name).stem}')(len)\n")
    base, cfg = tmp_path / "configs" / "base.yaml", tmp_path / "configs" / "own.yaml"
    base.write_text("EXPERIMENT: {PLUGINS: [beside.py, below/here.py, a_module]}\n")
    cfg.write_text("_BASE_: base.yaml\n")
    monkeypatch.chdir(tmp_path / "work")
    found = load_config(cfg)
    beside = str(tmp_path / "configs" / "beside.py")
    assert [beside, "below/here.py", "a_module"] == found.node.EXPERIMENT.PLUGINS
    assert {"beside", "here", "a_module"} <= set(CIFAR_MODELS) & set(IMAGENET_MODELS)
    assert "below/here.py" in show(found)
    for words in (["EXPERIMENT.PLUGINS", "twice.py"], ["EXPERIMENT.PLUGINS=[./twice.py]"]):
        assert load_config(cfg, words).node.EXPERIMENT.PLUGINS == ["twice.py"]
    assert load_config(cfg, ["EXPERIMENT.PLUGINS="]).node.EXPERIMENT.PLUGINS == ""


def test_wrapping_changes_nothing_about_a_module() -> None:
    module = mobilenet_v3_small(num_classes=10)
    before = copy.deepcopy(module.state_dict())
    maps = ("features.0", "features.3", "features.12")
    network = Wrapped(module, 10, classifier="classifier", features=maps)
    assert list(network.state_dict()) == list(before)
    shapes = probe(network, (64, 64))
    sizes = [tuple(each.shape) for each in shapes.features]
    assert sizes == [(2, 16, 32, 32), (2, 24, 8, 8), (2, 576, 2, 2)]
    assert shapes.pooled.shape == (2, 576)
    assert (shapes.preacts, network.norms_before_relu()) == ((), ())
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last).eval()
    images = torch.randn(2, 3, 64, 64)
    outputs = twin.outputs(images.to(memory_format=torch.channels_last))
    with torch.no_grad():
        logits = module.eval()(images)
        torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            module.classifier(outputs.pooled), logits, rtol=1e-4, atol=1e-5
        )
    assert not [
        each for each in network.modules() if each._forward_hooks or each._forward_pre_hooks
    ]
