"""The benchmark program: the numbers that it reports, not the speed of this machine."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, assert_user_error, tool
from PIL import Image

from mdistiller_norm.errors import UserError

QUICK = ["--blocks", "2", "--steps", "1", "--warmup", "1", "ENGINE.COMPILE=none"]
PAIR = ["DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8"]
SMALL = ["--synthetic", "200", "--batch-size", "16", *QUICK, *PAIR]

# The interface of mdistiller in one module; its method is the mean squared error of the logits.
REFERENCE = """
import functools, sys, torch, torchvision
from mdistiller_norm.models import build_model
from tensorboardX import SummaryWriter
from yacs.config import CfgNode
for name in ("engine", "engine.cfg", "engine.utils", "models", "dataset", "dataset.cifar100", "distillers"):
    sys.modules[f"mdistiller.{name}"] = sys.modules[__name__]
CFG = CfgNode({"DATASET": {"TYPE": "cifar100", "NUM_WORKERS": 2, "TEST": {"BATCH_SIZE": 64}},
               "DISTILLER": {"TYPE": "NONE", "TEACHER": "", "STUDENT": ""}, "LOG": {"PREFIX": "output", "WANDB": True},
               "SOLVER": {"TRAINER": "base", "BATCH_SIZE": 64, "LR": 0.05}, "NormKD": {"LOSS": {"KD_WEIGHT": 0.0}}})
cifar_model_dict = {name: (functools.partial(build_model, name), None) for name in ("resnet14", "resnet8")}
def validate(loader, distiller):
    for image, target in loader:
        distiller(image=image.cuda())
class Trainer:
    def __init__(self, name, distiller, train_loader, val_loader, cfg):
        self.distiller, self.train_loader, self.cfg = distiller, train_loader, cfg
        self.optimizer = torch.optim.SGD(distiller.module.student.parameters(), lr=cfg.SOLVER.LR)
    def train_epoch(self, epoch):
        for image, target in self.train_loader:
            print("a progress bar")
            assert len(image) == 16 and self.cfg.NormKD.LOSS.KD_WEIGHT == 0.9 and not self.cfg.LOG.WANDB
            self.optimizer.zero_grad()
            self.distiller(image=image.cuda(non_blocking=True)).backward()
            self.optimizer.step()
        raise AssertionError("the epoch continued to its evaluation")
def get_dataset(cfg):
    to_tensor, workers = torchvision.transforms.ToTensor(), cfg.DATASET.NUM_WORKERS
    train, test = (torchvision.datasets.CIFAR100(get_data_folder(), part, to_tensor, download=True) for part in (1, 0))
    loaders = [torch.utils.data.DataLoader(split, 16, num_workers=workers) for split in (train, test)]
    return *loaders, len(train), 100
class MSE(torch.nn.Module):
    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student, self.teacher = student, teacher
    def forward(self, image):
        return (self.student(image) - self.teacher(image).detach()).square().mean()
distiller_dict, trainer_dict = {"NormKD": MSE}, {"base": Trainer}
"""


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "tools")
    main, file = importlib.import_module("benchmark").main, tmp_path / "record.json"
    return lambda *arguments: (
        main([*arguments, "--json", str(file)]) or json.loads(file.read_text())
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mdistiller", numbered=False)
    (folder / "__init__.py").write_text(REFERENCE)
    return str(folder.parent)


def assert_quotients(ratio: dict[str, Any], above: dict[str, Any], below: dict[str, Any]) -> None:
    quotients = [a / b for a, b in zip(above["values"], below["values"], strict=True)]
    assert ratio["values"] == pytest.approx(quotients)


def test_time_memory_and_parameters_of_a_method(measure: Any) -> None:
    method = ["--cfg", str(ROOT / "configs/digits/kd.yaml"), "--methods", "FITNET"]
    row = measure("--table9", *method, "--batch-size", "32", *QUICK)["table9"]["FITNET"]
    assert row["extra_parameters"] == 32 * 32 + 3 * 32, (
        "a 1x1 convolution with bias and a batch norm"
    )
    assert 100 < row["memory_mb"] < 5000


def test_training_steps_against_a_reference(measure, reference, capsys):
    row = measure("--against", reference, *SMALL)["against"]["NormKD"]
    assert_quotients(row["ratio"], row["reference_ms"], row["ours_ms"])
    assert "progress bar" not in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_against_a_reference_and_loading(measure, reference, tmp_path):
    for number in range(12):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        Image.new("RGB", (50, 40)).save(tmp_path / str(number % 2) / f"{number}.jpg")
    images = ["--loader", str(tmp_path), "DATASET.NUM_WORKERS=1", "DATASET.IMAGE_SIZE=32"]
    record = measure("--evaluate", "--against", reference, *images, *SMALL)
    found, loader = record["evaluate"], record["loader"]
    assert_quotients(found["ratio"], found["ours"], found["reference"])
    assert (found["images"], loader["images"], loader["workers"]) == (40, 12, 1)


def test_replayed_blocks_hit_the_teacher_cache(measure: Any, tmp_path: Path) -> None:
    benchmark = importlib.import_module("benchmark")
    options = benchmark.parse(["--evaluate", *SMALL, "DISTILLER.TEACHER_CACHE=lazy"])
    bench = benchmark.Bench(options, tmp_path)
    ours = benchmark.Ours(bench.config("NormKD", "run"), bench.dataset, replay=True)
    ours.block(2)
    computed = ours.step.teacher.computed
    ours.block(2)
    assert ours.step.teacher.computed == computed > 0


def test_bad_options(measure: Any, reference: str) -> None:
    done = tool("benchmark", "--against", "no", check=False)
    assert_user_error(done, "no must have mdistiller's layout")
    for arguments, words in (
        ([], "nothing to measure: add --table9"),
        (
            ["--evaluate", "--synthetic", "200", "--batch-size", "300"],
            "BATCH_SIZE must be <= 200",
        ),
        (
            ["--against", reference, "--methods", "KD", *SMALL],
            "has no KD with resnet8 and resnet14",
        ),
    ):
        with pytest.raises(UserError, match=words):
            measure(*arguments)
