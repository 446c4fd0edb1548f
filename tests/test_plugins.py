"""Plugins: networks, data sets and methods registered by files outside the package."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config
from mdistiller_norm.distillers import Need
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.models import CIFAR_MODELS, IMAGENET_MODELS, build_model
from mdistiller_norm.registry import import_plugin

REGISTER = "from mdistiller_norm import data, distillers, models\n"
PLUGIN = """
from helper import resnet10
from mdistiller_norm import models
LAYERS = ("relu", "layer1", "layer2", "layer3", "layer4")

@models.register("resnet10")
def wrapped(num_classes, features=LAYERS):
    return models.Wrapped(resnet10(num_classes), num_classes, classifier="fc", features=features)
models.register("blind")(lambda num_classes: wrapped(num_classes, ()))
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
def mine(tmp_path_factory):
    """Return a folder with a plugin, a module that it imports, a config and the weights of a teacher."""
    folder = tmp_path_factory.mktemp("mine")
    examples = [(ROOT / "examples" / name).read_text() for name in ("three_digits.py", "mse.py")]
    (folder / "mine.py").write_text("\n".join([PLUGIN, *examples]))
    (folder / "helper.py").write_text(HELPER)
    (folder / "mine.yaml").write_text(CONFIG.format(folder=folder))
    torch.save({"model": build_model("resnet8", 3).state_dict()}, folder / "teacher.pth")
    # Once per process, before a test restores the registries.
    import_plugin(str(folder / "mine.py"))
    return folder


def run(folder, name, *overrides):
    command = f"train --cfg {folder}/mine.yaml EXPERIMENT.NAME={name}".split()
    assert execute([*command, *overrides]) == 0
    return folder / "distill" / f"{name},DATASET.SUBSET=24"


@pytest.mark.parametrize(("method", "student"), [("FITNET", "resnet10"), ("PKT", "blind")])
def test_a_wrapped_student_trains_on_a_registered_data_set(mine, method, student):
    folder = run(mine, method, f"DISTILLER.TYPE={method}", f"DISTILLER.STUDENT={student}")
    result = json.loads((folder / "result.json").read_text())
    assert (result["student"], result["dataset"]) == (student, "three_digits")
    assert read_metrics(folder / "metrics.jsonl")[0][f"loss_{method}"] > 0
    # The parameter names of torchvision, to load the weights without this package.
    content = load(folder / "student_last.pt")
    assert {"conv1.weight", "layer1.0.conv1.weight"} <= content["model"].keys()
    assert Path(content["about"]["plugins"][0]).resolve() == mine / "mine.py"


@pytest.mark.slow
def test_a_registered_method_trains_and_its_student_is_evaluated_elsewhere(mine):
    folder = run(mine, "own", "DISTILLER.TYPE=MSE")
    assert read_metrics(folder / "metrics.jsonl")[0]["loss_MSE"] > 0
    result = json.loads((folder / "result.json").read_text())
    assert result["config"]["MSE"]["LOSS"] == {"CE_WEIGHT": 1.0, "KD_WEIGHT": 0.25}
    code = "import sys; from mdistiller_norm.cli import main; print(main(sys.argv[1:4]), main(sys.argv[1:]))"
    words = f"eval -c {folder}/student_last.pt --plugin {mine}/mine.py".split()
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    (error,) = done.stderr.splitlines()
    assert "student_last.pt is resnet10 on three_digits" in error
    assert done.stdout.split()[2:4] == ["top-1", f"{result['last']['top1']:.2f}"]
    assert done.stdout.endswith("\n2 0\n")


def test_a_wrapped_teacher_gives_the_logits_of_its_module(mine):
    network, images = build_model("resnet10", 3).eval(), torch.randn(2, 3, 32, 32)
    for need, maps in ((Need.LOGITS, 0), (Need.MAPS, 5)):
        outputs = Teacher(copy.deepcopy(network), need)._runs(images)
        assert torch.equal(outputs.logits, network.module(images))
        assert len(outputs.features) == maps
    torch.testing.assert_close(network.module.fc(network.outputs(images).pooled), outputs.logits)
    torch.save({"model": network.state_dict()}, mine / "wrapped.pth")
    own = f"""DISTILLER.STUDENT=resnet8 DISTILLER.TEACHER=resnet10
        DISTILLER.TEACHER_WEIGHTS={mine}/wrapped.pth""".split()
    run(mine, "back", "DISTILLER.TYPE=[NormKD,AT]", *own)
    with pytest.raises(ConfigError, match="OFD: requires maps before their ReLU"):
        run(mine, "refused", "DISTILLER.TYPE=OFD", *own)


def test_folders_in_which_a_plugin_is_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    for name in ("configs/beside", "work/below/here", "installed/a_module", "work/twice"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{REGISTER}models.register('{path.stem}')(len)\n")
    cfg = tmp_path / "configs" / "own.yaml"
    cfg.write_text("_BASE_: base.yaml\n")
    base = cfg.with_name("base.yaml")
    base.write_text("EXPERIMENT: {PLUGINS: [beside.py, below/here.py, a_module]}\n")
    monkeypatch.chdir(tmp_path / "work")
    names = [str(cfg.with_name("beside.py")), "below/here.py", "a_module"]
    assert names == load_config(cfg).node.EXPERIMENT.PLUGINS
    assert {"beside", "here", "a_module"} <= set(CIFAR_MODELS) & set(IMAGENET_MODELS)
    for words in (["EXPERIMENT.PLUGINS", "twice.py"], ["EXPERIMENT.PLUGINS=[./twice.py]"]):
        assert load_config(cfg, words).node.EXPERIMENT.PLUGINS == ["twice.py"]
