"""Networks, data sets and methods of a user's own, from files outside of the package, through the real entry points."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_user_error, tool
from short_runs import assert_same_state, state_of
from torchvision.models import VisionTransformer, mobilenet_v3_small, resnet18

from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config, show
from mdistiller_norm.data import DATASETS, ImageOptions
from mdistiller_norm.distillers import DISTILLERS, Need
from mdistiller_norm.engine.checkpoint import load, load_into, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher import LiveTeacher
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError, UserError
from mdistiller_norm.models import CIFAR_MODELS, IMAGENET_MODELS, Wrapped, build_model, probe
from mdistiller_norm.plugins import import_plugin

PLUGIN = """
from helper import resnet10

from mdistiller_norm import data, distillers, models


@models.register("resnet10")
def wrapped(num_classes):
    return models.Wrapped(
        resnet10(num_classes), num_classes, classifier="fc", features=("relu", "layer1", "layer2", "layer3", "layer4")
    )


@data.register("few_digits")
def few_digits(root, options):
    whole = data.digits()
    train, test = (data.Split(split.images[:24], split.targets[:24]) for split in (whole.train, whole.test))
    return data.TensorDataset("few_digits", train, test, whole.classes, whole.mean, whole.std, flip=False)


@distillers.register("MSE")
class MSE(distillers.Distiller):
    defaults = {"LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 0.5}}

    @classmethod
    def from_config(cls, node, pair):
        return cls(ce_weight=node.LOSS.CE_WEIGHT, weight=node.LOSS.KD_WEIGHT)

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).square().mean()
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
DATASET: {{TYPE: few_digits}}
DISTILLER: {{TEACHER: resnet8, STUDENT: resnet10, TEACHER_WEIGHTS: {folder}/teacher.pth}}
SOLVER: {{EPOCHS: 1, BATCH_SIZE: 12, LR: 0.01}}
LOG: {{PREFIX: {folder}}}
"""


@pytest.fixture(scope="module", autouse=True)
def _registries_as_before() -> Iterator[None]:
    """Other test files see nothing of what is registered here."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (CIFAR_MODELS, IMAGENET_MODELS, DATASETS, DISTILLERS):
            patch.setattr(registry, "_entries", dict(registry))
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plugin, the module that it imports, a config beside it, and a teacher's weights."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "helper.py").write_text(HELPER)
    (folder / "mine.yaml").write_text(CONFIG.format(folder=folder))
    torch.manual_seed(0)
    torch.save({"model": build_model("resnet8", 10).state_dict()}, folder / "teacher.pth")
    import_plugin(str(folder / "mine.py"))  # once a process: not by a test that puts the registries back
    return folder


def run(folder: Path, name: str, *overrides: str) -> Path:
    assert execute(["train", "--cfg", str(folder / "mine.yaml"), f"EXPERIMENT.NAME={name}", *overrides]) == 0
    return folder / "distill" / name


def assert_refused(command: list[str], error: type[UserError], reason: str) -> None:
    with pytest.raises(error, match=reason) as refused:
        execute(["train", *command])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["NONE", "NormKD", "FITNET", "MSE"])
def test_a_wrapped_student_learns_from_own_data_with_any_method(mine: Path, method: str) -> None:
    folder = run(mine, method, f"DISTILLER.TYPE={method}")
    result = json.loads((folder / "result.json").read_text())
    assert (result["student"], result["dataset"]) == ("resnet10", "few_digits")
    assert result["config"]["MSE"]["LOSS"]["KD_WEIGHT"] == 0.25
    (metrics,) = read_metrics(folder / "metrics.jsonl")
    assert method == "NONE" or metrics[f"loss_{method}"] > 0
    # torchvision's own names, so that its users can load the weights without this package.
    about = load(folder / "student_last.pt")
    assert [name for name in about["model"] if "conv1" in name][:2] == ["conv1.weight", "layer1.0.conv1.weight"]
    assert about["about"]["plugins"] == result["config"]["EXPERIMENT"]["PLUGINS"]
    assert Path(about["about"]["plugins"][0]).resolve() == mine / "mine.py"


def test_a_wrapped_teacher_is_right_though_it_cannot_be_folded(mine: Path) -> None:
    load_config(mine / "mine.yaml")
    network = build_model("resnet10", 10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network.module(images)
    for need in (Need.LOGITS, Need.MAPS):
        outputs = LiveTeacher(copy.deepcopy(network), need).run(images)
        assert torch.equal(outputs.logits, logits)
        assert len(outputs.features) == (5 if need is Need.MAPS else 0)
    torch.save({"model": network.state_dict()}, mine / "wrapped.pth")
    own = ["DISTILLER.STUDENT=resnet8", "DISTILLER.TEACHER=resnet10", f"DISTILLER.TEACHER_WEIGHTS={mine}/wrapped.pth"]
    run(mine, "back", "DISTILLER.TYPE=[NormKD,AT]", *own)
    for method in ("OFD", "REVIEWKD"):  # they read what came before the activation, which hooks do not see
        with pytest.raises(ConfigError, match=f"{method}: .*before their ReLU, and the teacher shows none"):
            run(mine, "refused", f"DISTILLER.TYPE={method}", *own)
    assert not (mine / "distill" / "refused").exists()


def test_resuming_is_exact(mine: Path) -> None:
    run(mine, "whole", "DISTILLER.TYPE=MSE", "SOLVER.EPOCHS=2")
    run(mine, "parts", "DISTILLER.TYPE=MSE")
    run(mine, "parts", "DISTILLER.TYPE=MSE", "SOLVER.EPOCHS=2", "--resume")
    assert_same_state(state_of(mine, "whole")["trainable"], state_of(mine, "parts")["trainable"])


def test_training_and_evaluation_in_processes_of_their_own(mine: Path) -> None:
    tool("train", "--cfg", mine / "mine.yaml", "DISTILLER.TYPE", "MSE", "EXPERIMENT.NAME", "own")
    weights = mine / "distill" / "own" / "student_last.pt"
    refused = tool("eval", "-c", weights, check=False)
    assert_user_error(refused, "student_last.pt is of resnet10 on few_digits", "--plugin", "mine.py")
    evaluated = tool("eval", "-c", weights, "--plugin", mine / "mine.py")
    top1 = json.loads(weights.with_name("result.json").read_text())["last"]["top1"]
    assert evaluated.stdout.split()[:4] == ["resnet10", "few_digits", "top-1", f"{top1:.2f}"]


def test_where_a_plugin_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    for name in ("configs/beside.py", "work/below/here.py", "installed/a_module.py", "work/twice.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"from mdistiller_norm import models\nmodels.register('{Path(name).stem}')(len)\n")
    base, cfg = tmp_path / "configs" / "base.yaml", tmp_path / "configs" / "own.yaml"
    base.write_text("EXPERIMENT: {PLUGINS: [beside.py, below/here.py, a_module]}\n")
    cfg.write_text("_BASE_: base.yaml\n")
    monkeypatch.chdir(tmp_path / "work")
    found = load_config(cfg)
    assert [str(tmp_path / "configs" / "beside.py"), "below/here.py", "a_module"] == found.node.EXPERIMENT.PLUGINS
    assert {"beside", "here", "a_module"} <= set(CIFAR_MODELS) & set(IMAGENET_MODELS)
    assert "below/here.py" in show(found)
    replaced = load_config(cfg, ["EXPERIMENT.PLUGINS", "twice.py"]).node.EXPERIMENT.PLUGINS
    assert replaced == load_config(cfg, ["EXPERIMENT.PLUGINS=[./twice.py]"]).node.EXPERIMENT.PLUGINS == ["twice.py"]
    assert load_config(cfg, ["EXPERIMENT.PLUGINS="]).node.EXPERIMENT.PLUGINS == ""


REGISTER = "from mdistiller_norm import data, distillers, models\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def broken(:\n", ["broken.py:1: ", "syntax"]),
        ("\nimport no_such_module\n", ["broken.py:2: ", "ModuleNotFoundError", "no_such_module"]),
        ("1 / 0\n", ["broken.py:1: ", "ZeroDivisionError: division by zero"]),
        ("import sys\nsys.exit(3)\n", ["broken.py:2: ", "SystemExit: 3"]),
        (REGISTER + "models.register('resnet8x4')(len)\n", ["broken.py:2: ", "'resnet8x4' is registered already"]),
        (REGISTER + "data.register('digits')(len)\n", ["broken.py:2: ", "data set 'digits' is registered already"]),
        (REGISTER + "distillers.register('KD')(distillers.Distiller)\n", ["distiller 'KD' is registered already"]),
        (REGISTER + "distillers.register('New')(object)\n", ["broken.py:2: ", "must be a subclass of Distiller"]),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "broken.py").write_text(text)
    (tmp_path / "own.yaml").write_text("SEED: 1\nEXPERIMENT:\n  PLUGINS: broken.py\n")
    with pytest.raises(ConfigError) as refused:
        execute(["train", "--cfg", str(tmp_path / "own.yaml")])
    for word in ["own.yaml:3: EXPERIMENT.PLUGINS: plugin broken.py cannot be imported", *words]:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plugin_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"command line: EXPERIMENT.PLUGINS: plugin no/file.py does not exist in /"):
        load_config(None, ["EXPERIMENT.PLUGINS", "no/file.py"])
    with pytest.raises(ConfigError, match="plugin no_module cannot be imported: ModuleNotFoundError"):
        load_config(None, ["EXPERIMENT.PLUGINS", "no_module"])
    (tmp_path / "own.yaml").write_text("EXPERIMENT: {PLUGINS: 3}\n")
    with pytest.raises(ConfigError, match=r"own.yaml:1: EXPERIMENT.PLUGINS .* must be text, or a list of them"):
        load_config(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("MSE2: {LOSS: {KD_WEIGHT: 1.0}}\n")
    with pytest.raises(ConfigError, match=r"own.yaml:1: unknown key MSE2"):
        load_config(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("@distillers.register('SOLVER')\nclass Own(distillers.Distiller): pass\n", "'SOLVER' cannot be called so"),
        ("@distillers.register('a.b')\nclass Own(distillers.Distiller): pass\n", "'a.b' cannot be called so"),
        ("@distillers.register('Own')\nclass Own(distillers.Distiller): defaults = {'A': {1, 2}}\n", "a config cannot"),
    ],
)
def test_a_method_that_cannot_have_a_config_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(DISTILLERS, "_entries", dict(DISTILLERS))
    (tmp_path / "own.py").write_text(REGISTER + text)
    with pytest.raises(ConfigError, match=reason):
        load_config(None, [f"EXPERIMENT.PLUGINS={tmp_path}/own.py"])


METHOD = (
    REGISTER
    + """
@distillers.register("Own")
class Own(distillers.Distiller):
    @classmethod
    def from_config(cls, node, pair):
        return {built}

    def forward(self, student, teacher, batch):
        return {loss}
"""
)


@pytest.mark.parametrize(
    ("built", "loss", "reason"),
    [
        ("cls()", "None", "Own: forward must return a scalar .*got a NoneType"),
        ("cls()", "student.logits.mean(1)", r"Own: forward must return a scalar .*shape \[12\]"),
        ("cls()", "student.logits.mean().item()", "Own: forward must return a scalar .*got a float"),
        ("cls()", "student.logits.mean().detach()", "Own: the loss must have a gradient"),
        ("cls()", "teacher.logits.mean()", "Own: the loss must have a gradient"),
        ("None", "student.logits.mean()", "Own: from_config must return a Distiller, got NoneType"),
        ("cls()", "super().forward(student, teacher, batch)", "Own requires a forward method"),
        ("super().from_config(node, pair)", "student.logits.mean()", ""),  # valid, without keys and so without a node
    ],
)
def test_a_method_with_a_mistake_is_one_line(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, loss: str, reason: str
) -> None:
    monkeypatch.setattr(DISTILLERS, "_entries", dict(DISTILLERS))
    (tmp_path / "own.py").write_text(METHOD.format(built=built, loss=loss))
    (mine / "own.yaml").write_text(f"_BASE_: mine.yaml\nEXPERIMENT: {{PLUGINS: [mine.py, {tmp_path}/own.py]}}\n")
    command = ["--cfg", str(mine / "own.yaml"), "DISTILLER.TYPE=Own", f"LOG.PREFIX={tmp_path}"]
    if not reason:
        assert execute(["train", *command]) == 0
        return
    assert_refused(command, ConfigError, reason)


DATA = (
    REGISTER
    + """
import torch

@data.register("own_data")
def own_data(root, options):
    images, targets = torch.zeros(12, 8, 8, 3, dtype=torch.uint8), torch.arange(12) % 3
    facts = {{"name": "own_data", "classes": ("a", "b", "c"), "mean": (0.3,) * 3, "std": (0.3,) * 3}}
    train, test = (images, targets), (images[:3], targets[:3])
    {mistake}
    return data.TensorDataset(train=data.Split(*train), test=data.Split(*test), **facts)
"""
)


@pytest.mark.parametrize(
    ("mistake", "reason"),
    [
        ("train = (images / 255, targets)", r"own_data: its training images are a tensor \[12, 8, 8, 3\] of float32"),
        ("test = (images.permute(0, 3, 1, 2), targets)", r"its test images are a tensor \[12, 3, 8, 8\] of uint8"),
        ("train = (images[..., 0], targets)", r"a tensor \[12, 8, 8\] of uint8: they must be a tensor \[N, H, W, 3\]"),
        ("test = (images[:0], targets[:0])", "its test images are .*: they must be .*, at least one image"),
        ("train = (images.numpy(), targets)", "its training images are a ndarray"),
        ("train = (images, targets.int())", r"its training targets are a tensor \[12\] of int32"),
        ("train = (images, targets[:6])", r"targets are a tensor \[6\] of int64: they must be a tensor \[12\]"),
        ("train = (images, targets.tolist())", "its training targets are a list"),
        ("test = (images, targets + 1)", r"its test targets are 1 \.\. 3: the numbers of its 3 classes are 0 \.\. 2"),
        ("facts['mean'] = (77.0,) * 3", r"its mean is \(77.0, 77.0, 77.0\) .* of pixels in \[0, 1\]"),
        ("facts['std'] = (0.3, 0.3)", "must be those of the three channels"),
        ("facts['std'] = (0.3, 0.3, 0.0)", "no std may be 0"),
        ("facts['classes'] = (1, 2, 3)", r"its classes are \(1, 2, 3\): they must be text"),
        ("facts['padding'] = -1", "its padding is -1"),
        ("open('/no/database')", "data set 'own_data' cannot be opened: .*No such file"),
        ("return train, test", "data set 'own_data' is opened as a tuple: return a TensorDataset"),
        ("", ""),
    ],
)
def test_a_data_set_with_a_mistake_is_one_line(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, reason: str
) -> None:
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS))
    (tmp_path / "own.py").write_text(DATA.format(mistake=mistake))
    (mine / "own_data.yaml").write_text(f"_BASE_: mine.yaml\nEXPERIMENT: {{PLUGINS: [mine.py, {tmp_path}/own.py]}}\n")
    plain = ["DATASET.TYPE=own_data", "DISTILLER.TYPE=NONE", "DISTILLER.STUDENT=resnet8"]
    command = ["--cfg", str(mine / "own_data.yaml"), *plain, f"LOG.PREFIX={tmp_path}"]
    if not reason:
        assert execute(["train", *command]) == 0
        return
    assert_refused(command, DataError, reason)
    assert not (tmp_path / "distill").exists()


@pytest.mark.parametrize(
    ("name", "network", "reason"),
    [
        ("offline", "open('/no/weights')", "model 'offline' cannot be built: .*No such file"),
        ("bare", "resnet18(num_classes=n)", "model 'bare' must be a Network or Wrapped, got ResNet"),
        ("thousand", "models.Wrapped(resnet18(), n, classifier='fc')", "thousand gives 1000 logits for 10 classes"),
        ("layer9", "models.Wrapped(resnet18(), n, classifier='fc', features=['layer9'])", "did you mean layer4 or"),
        ("fcc", "models.Wrapped(resnet18(), n, classifier='fcc')", "ResNet has no submodule 'fcc': did you mean fc?"),
        (
            "flat",
            "models.Wrapped(resnet18(num_classes=n), n, classifier='fc', features=['fc'])",
            r"got shape \[2, 10\]",
        ),
        (
            "large",
            "models.Wrapped(nn.Sequential(nn.Conv2d(3, 8, 64), nn.Flatten(), nn.Linear(8, n)), n, classifier='2')",
            "model 'large' cannot take images of 32x32 pixels",
        ),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_before_the_first_step(
    mine: Path, tmp_path: Path, name: str, network: str, reason: str
) -> None:
    (tmp_path / "own.py").write_text(
        f"{REGISTER}from torch import nn\nfrom torchvision.models import resnet18\n"
        f"models.register('{name}')(lambda n: {network})\n"
    )
    (mine / "both.yaml").write_text(f"_BASE_: mine.yaml\nEXPERIMENT: {{PLUGINS: [mine.py, {tmp_path}/own.py]}}\n")
    with pytest.raises(ConfigError, match=reason):
        execute(["train", "--cfg", str(mine / "both.yaml"), f"DISTILLER.STUDENT={name}", f"LOG.PREFIX={tmp_path}"])
    assert not (tmp_path / "distill").exists()


def test_wrapping_changes_nothing_about_a_module() -> None:
    module = mobilenet_v3_small(num_classes=10)
    before = copy.deepcopy(module.state_dict())
    network = Wrapped(module, 10, classifier="classifier", features=("features.0", "features.3", "features.12"))
    assert list(network.state_dict()) == list(before)
    shapes = probe(network, (64, 64))
    assert [tuple(each.shape) for each in shapes.features] == [(2, 16, 32, 32), (2, 24, 8, 8), (2, 576, 2, 2)]
    assert shapes.pooled.shape == (2, 576)
    assert (shapes.preacts, network.norms_before_relu()) == ((), ())
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last).eval()
    images = torch.randn(2, 3, 64, 64)
    outputs = twin.outputs(images.to(memory_format=torch.channels_last))
    with torch.no_grad():
        logits = module.eval()(images)
        torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.classifier(outputs.pooled), logits, rtol=1e-4, atol=1e-5)
    assert not [each for each in network.modules() if each._forward_hooks or each._forward_pre_hooks]


def test_published_weights_load_strictly(tmp_path: Path) -> None:
    torch.save(resnet18(num_classes=10).state_dict(), tmp_path / "published.pth")
    published = load_weights(tmp_path / "published.pth")
    network = Wrapped(resnet18(num_classes=10), 10, classifier="fc")
    load_into(network, published, "resnet18")
    assert_same_state(dict(network.module.state_dict()), dict(published.state))
    del published.state["layer1.0.conv1.weight"]
    with pytest.raises(CheckpointError, match=r"lacks tensor layer1\.0\.conv1\.weight"):
        load_into(network, published, "resnet18")


def test_the_files_of_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (CIFAR_MODELS, IMAGENET_MODELS, DATASETS, DISTILLERS):
        monkeypatch.setattr(registry, "_entries", {k: v for k, v in registry.items() if k != "MSE"})
    (tmp_path / "my").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = (ROOT / "docs" / "custom.md").read_text()
    files = [tmp_path / name for name in re.findall(r"^# (my/\w+\.(?:py|yaml))", text, re.MULTILINE)]
    for file, content in zip(files, re.findall(r"```\w+\n(# my/.*?)```", text, re.DOTALL), strict=True):
        file.write_text(content)
    for file in files:
        if file.suffix == ".py" and file.stem != "timm_networks":  # timm is not among our dependencies
            import_plugin(str(file))
        elif file.suffix == ".yaml":
            assert load_config(file).sources["EXPERIMENT.PROJECT"] != "default"
    assert probe(build_model("mobile", 5, variant="imagenet"), (128, 128)).features[-1].shape == (2, 576, 4, 4)
    digits = DATASETS["three_digits"](Path(), ImageOptions())
    assert digits.targets.unique().tolist() == [0, 1, 2]
    assert digits.image_size == (32, 32)


def test_a_network_without_maps_takes_methods_that_read_none(mine: Path, tmp_path: Path) -> None:
    transformer = VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=10)
    shapes = probe(Wrapped(transformer, 10, classifier="heads"))
    assert (shapes.features, shapes.pooled.shape) == ((), (2, 24))
    (tmp_path / "own.py").write_text(
        f"{REGISTER}from torchvision.models import resnet18\n"
        "models.register('blind')(lambda n: models.Wrapped(resnet18(num_classes=n), n, classifier='fc'))\n"
    )
    (mine / "blind.yaml").write_text(f"_BASE_: mine.yaml\nEXPERIMENT: {{PLUGINS: [mine.py, {tmp_path}/own.py]}}\n")
    command = ["--cfg", str(mine / "blind.yaml"), "DISTILLER.STUDENT=blind", f"LOG.PREFIX={tmp_path}"]
    with pytest.raises(ConfigError, match="SP requires feature maps, which blind lacks"):
        execute(["train", *command, "DISTILLER.TYPE=SP"])
    assert execute(["train", *command, "DISTILLER.TYPE=PKT"]) == 0
