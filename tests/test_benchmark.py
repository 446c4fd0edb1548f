"""The benchmark program: the numbers that it reports, not the speed of this machine."""

import importlib
import json
from operator import truediv

import pytest
from conftest import ROOT

from mdistiller_norm.errors import UserError

QUICK = "--blocks 2 --steps 1 --warmup 1 ENGINE.COMPILE=none"
SMALL = f"--synthetic 200 --batch-size 16 {QUICK} DISTILLER.TEACHER=resnet14 DISTILLER.STUDENT=resnet8"

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
def measure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    main, file = importlib.import_module("benchmark").main, tmp_path / "record.json"
    return lambda words: (
        main([*words.split(), "--json", str(file)]) or json.loads(file.read_text())
    )


@pytest.mark.slow
def test_time_memory_and_parameters_of_a_method(measure):
    words = f"--table9 --cfg digits/kd --methods FITNET --batch-size 32 {QUICK}"
    row = measure(words)["table9"]["FITNET"]
    assert row["extra_parameters"] == 32 * 32 + 3 * 32  # a convolution with bias, a batch norm
    assert 100 < row["memory_mb"] < 5000


@pytest.mark.slow
def test_steps_and_evaluation_against_a_reference_and_loading(measure, tree, tmp_path):
    (tmp_path / "mdistiller").mkdir()
    (tmp_path / "mdistiller/__init__.py").write_text(REFERENCE)
    images = f"--loader {tree}/train DATASET.NUM_WORKERS=1 DATASET.IMAGE_SIZE=32"
    record = measure(f"--evaluate --against {tmp_path} {images} {SMALL}")
    found, loader = record["evaluate"], record["loader"]
    steps = measure(f"--against {tmp_path} {SMALL}")["against"]["NormKD"]
    quotients = map(truediv, steps["reference_ms"]["values"], steps["ours_ms"]["values"])
    assert steps["ratio"]["values"] == pytest.approx([*quotients])
    quotients = map(truediv, found["ours"]["values"], found["reference"]["values"])
    assert found["ratio"]["values"] == pytest.approx([*quotients])
    assert (found["images"], loader["images"], loader["workers"]) == (40, 36, 1)
    with pytest.raises(UserError, match="has no KD with resnet8 and resnet14"):
        measure(f"--against {tmp_path} --methods KD {SMALL}")


def test_bad_options(measure):
    for words, message in (
        ("--against no", "no must have mdistiller's layout"),
        ("", "nothing to measure: add --table9"),
        ("--evaluate --synthetic 200 --batch-size 300", "BATCH_SIZE must be <= 200"),
    ):
        with pytest.raises(UserError, match=message):
            measure(words)
