"""The benchmark: what it reports, not how fast this machine is."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_user_error, tool
from torchvision.io import write_jpeg

from mdistiller_norm.benchmark import Settings, run, show
from mdistiller_norm.benchmark.exactness import FORMS
from mdistiller_norm.benchmark.timing import ratios, spread, take_turns
from mdistiller_norm.benchmark.workload import Ours, load_images, teacher_weights
from mdistiller_norm.config import load_config
from mdistiller_norm.errors import ConfigError, UserError

QUICK = ["--blocks", 2, "--steps", 1, "--warmup", 1]
# Small images of noise on small networks, in the shapes that the reference's loop has.
NETWORKS = ["DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8", "ENGINE.COMPILE=none"]
SMALL = ["--synthetic", 200, "--batch-size", 16, *NETWORKS]

# A checkout in mdistiller's layout, whose networks are this project's and whose method is mean squared error of logits.
REFERENCE = {
    "__init__": "",
    "engine/cfg": """
        from yacs.config import CfgNode
        CFG = CfgNode({
            "DATASET": {"TYPE": "cifar100", "NUM_WORKERS": 2, "TEST": {"BATCH_SIZE": 64}},
            "DISTILLER": {"TYPE": "NONE", "TEACHER": "", "STUDENT": ""},
            "SOLVER": {"TRAINER": "base", "BATCH_SIZE": 64, "LR": 0.05},
            "LOG": {"PREFIX": "output", "WANDB": True},
            "NormKD": {"LOSS": {"KD_WEIGHT": 0.0}},
        })
    """,
    "engine/utils": """
        import torch
        def validate(loader, distiller):
            distiller.eval()
            with torch.no_grad():
                for image, target in loader:
                    distiller(image=image.cuda())
    """,
    "engine/__init__": """
        import os
        import torch
        from tensorboardX import SummaryWriter
        class Trainer:
            def __init__(self, name, distiller, train_loader, val_loader, cfg):
                self.distiller, self.train_loader, self.cfg = distiller, train_loader, cfg
                self.writer = SummaryWriter(os.path.join(cfg.LOG.PREFIX, name))
                self.optimizer = torch.optim.SGD(distiller.module.student.parameters(), lr=cfg.SOLVER.LR)
            def train_epoch(self, epoch):
                self.distiller.train()
                for image, target, index in self.train_loader:
                    print("a progress bar")
                    assert image.shape == (self.cfg.SOLVER.BATCH_SIZE, 3, 32, 32)
                    assert self.cfg.NormKD.LOSS.KD_WEIGHT == 0.9 and not self.cfg.LOG.WANDB
                    self.optimizer.zero_grad()
                    self.distiller(image=image.cuda(non_blocking=True)).backward()
                    self.optimizer.step()
                raise AssertionError("an epoch went on to its evaluation")
        trainer_dict = {"base": Trainer}
    """,
    "models/__init__": """
        from functools import partial
        from mdistiller_norm.models import build_model
        cifar_model_dict = {name: (partial(build_model, name), None) for name in ("resnet14", "resnet8")}
    """,
    "dataset/__init__": """
        from torch.utils.data import DataLoader
        from .cifar100 import CIFAR100Instance, get_data_folder, transform
        from . import cifar100
        def get_dataset(cfg):
            train, test = (
                kind(cifar100.get_data_folder(), train=part, download=True, transform=transform)
                for kind, part in ((CIFAR100Instance, True), (CIFAR100Instance.__base__, False))
            )
            loader = DataLoader(train, cfg.SOLVER.BATCH_SIZE, shuffle=True, num_workers=cfg.DATASET.NUM_WORKERS)
            return loader, DataLoader(test, cfg.DATASET.TEST.BATCH_SIZE), len(train), 100
    """,
    "dataset/cifar100": """
        from torchvision.datasets import CIFAR100
        from torchvision.transforms.functional import to_tensor as transform
        def get_data_folder():
            raise AssertionError("it must read our images")
        class CIFAR100Instance(CIFAR100):
            def __getitem__(self, index):
                return (*super().__getitem__(index), index)
    """,
    "distillers/__init__": """
        from torch import nn
        class MSE(nn.Module):
            def __init__(self, student, teacher, cfg):
                super().__init__()
                self.student, self.teacher = student, teacher
            def forward(self, image):
                return (self.student(image) - self.teacher(image).detach()).square().mean()
        distiller_dict = {"NormKD": MSE}
    """,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout to compare with."""
    root = tmp_path_factory.mktemp("reference")
    for name, text in REFERENCE.items():
        path = root / "mdistiller" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        lines = text.strip("\n").splitlines()
        path.write_text("\n".join(line[8:] for line in lines) + "\n")
    return root


def measured(tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """What the tool writes and prints."""
    file = tmp_path / "record.json"
    done = tool("benchmark", "--json", file, *arguments)
    return json.loads(file.read_text()), done.stdout


def assert_spread(found: dict[str, Any], n: int) -> None:
    assert found["n"] == len(found["values"]) == n
    assert 0 < found["q1"] <= found["median"] <= found["q3"]
    assert found["median"] == pytest.approx(statistics.median(found["values"]))


def test_a_spread_has_the_median_and_the_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5, "values": [4.0, 1.0, 3.0, 2.0, 5.0],
    }  # fmt: skip
    assert spread([7.0])["q3"] == 7.0


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that halves its speed in the second round moves both sides and not their ratio."""
    assert ratios([3.0, 6.0], [2.0, 4.0])["values"] == [1.5, 1.5]


def test_the_order_is_reversed_from_round_to_round() -> None:
    calls: list[str] = []

    def contestant(name: str):
        return lambda: calls.append(name) or float(len(calls))

    results = take_turns({name: contestant(name) for name in "abc"}, 2)
    assert "".join(calls) == "abccba"
    assert results == {"a": [1.0, 6.0], "b": [2.0, 5.0], "c": [3.0, 4.0]}


def test_table9_on_the_digits(tmp_path: Path) -> None:
    arguments = ["--table9", "--cfg", "configs/digits/kd.yaml", "--methods", "KD,FITNET", "--batch-size", 32, *QUICK]
    record, printed = measured(tmp_path, *arguments)
    assert record["data"].startswith("real digits")
    assert record["pair"]["teacher"] == "resnet20"
    assert record["pair"]["student"] == "resnet8"
    assert record["machine"]["threads"] >= 1
    assert list(record["table9"]) == ["KD", "FITNET"]
    kd, fitnet = record["table9"].values()
    for row in (kd, fitnet):
        assert_spread(row["ms"], 2)
        assert_spread(row["ratio_to_kd"], 2)
        assert list(row["parts_ms"]) == ["data", "teacher", "student", "loss", "backward", "optimizer"]
        for part in row["parts_ms"].values():
            assert_spread(part, 2)
        rate = row["gflop"] / row["ms"]["median"] * 1000
        assert row["share_of_matmul"] == pytest.approx(rate / record["machine"]["matmul_gflops"])
        assert row["paper"] is None, "the paper has no such pair"
    quotients = [a / b for a, b in zip(fitnet["ms"]["values"], kd["ms"]["values"], strict=True)]
    assert fitnet["ratio_to_kd"]["values"] == pytest.approx(quotients)
    assert kd["ratio_to_kd"]["values"] == [1.0, 1.0]
    assert kd["extra_parameters"] == 0
    assert fitnet["extra_parameters"] == 32 * 32 + 3 * 32, "a 1x1 convolution with bias, and a batch norm"
    # resnet8 12.6 and resnet20 41.0 million multiply-adds; the student's backward is two forwards less the stem's.
    per_image = kd["gflop"] * 1e9 / 32
    assert per_image == pytest.approx(2 * (3 * 12.6e6 + 41.0e6), rel=0.02)
    if kd["memory_mb"]["peak"] is not None:
        assert kd["memory_mb"]["peak"] > kd["memory_mb"]["growth"] > 0
    assert "resnet20 -> resnet8, batch 32" in printed
    assert "1,120" in printed


def test_table9_stands_beside_the_papers_numbers_for_the_papers_pair(tmp_path: Path) -> None:
    record, printed = measured(
        tmp_path,
        "--table9",
        "--methods",
        "FITNET",
        "--synthetic",
        200,
        "--batch-size",
        4,
        *QUICK,
        "ENGINE.COMPILE=none",
    )
    (row,) = record["table9"].values()
    assert row["paper"] == {"ms": 8.0, "ratio_to_kd": pytest.approx(8.0 / 7.1), "extra_parameters": 16800}
    assert row["extra_parameters"] == 16768
    assert row["ratio_to_kd"] is None, "KD was not measured"
    assert "16,768" in printed
    assert "16,800" in printed
    assert "synthetic: 200 images" in printed
    assert "RTX 3080 Ti" in printed


def test_against_a_reference_in_turns(tmp_path: Path, reference: Path) -> None:
    record, printed = measured(tmp_path, "--against", reference, *SMALL, *QUICK)
    (row,) = record["against"].values()
    for name in ("ours_ms", "reference_ms", "ratio"):
        assert_spread(row[name], 2)
    quotients = [a / b for a, b in zip(row["reference_ms"]["values"], row["ours_ms"]["values"], strict=True)]
    assert row["ratio"]["values"] == pytest.approx(quotients)
    assert "reference / ours" in printed
    assert "progress bar" not in printed


def test_evaluation_with_and_without_a_reference(tmp_path: Path, reference: Path) -> None:
    record, printed = measured(tmp_path, "--evaluate", "--against", reference, *SMALL, *QUICK)
    found = record["evaluate"]
    assert found["images"] == 40
    for name in ("ours", "reference", "ratio"):
        assert_spread(found[name], 2)
    assert "evaluation of 40 images" in printed
    overrides = ["SOLVER.BATCH_SIZE=16", *NETWORKS]
    alone = run(Settings(evaluation=True, synthetic=200, blocks=1, overrides=overrides))
    assert list(alone["evaluate"]) == ["images", "ours"]
    assert "images/s" in show(alone)


def test_what_the_fast_forms_of_a_teacher_change(tmp_path: Path) -> None:
    more = ["--cfg", "configs/digits/normkd.yaml", "--teacher", "random", "--steps", 3, "SOLVER.BATCH_SIZE", 64]
    record, printed = measured(tmp_path, "--exactness", "--methods", "NormKD", *more)
    found = record["exactness"]
    assert {"live", "cached fp32", "cached fp16"} <= found.keys() <= set(FORMS)
    live, half = found["live"], found["cached fp16"]
    assert live["loss"] == 0
    assert 0 < live["logits"] < 1e-4 * live["logits_std"]
    assert found["cached fp32"]["loss"] < 1e-5
    assert live["logits"] < half["logits"] < 1e-2 * half["logits_std"]
    assert 0 < half["loss"] < 1e-2
    assert "cached fp16" in printed


def test_a_teacher_that_is_not_cached_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FORMS, "compiled")  # which takes its time
    overrides = ["SOLVER.BATCH_SIZE=16", *NETWORKS]
    record = run(Settings(exactness=True, methods=["AT"], synthetic=200, steps=1, overrides=overrides))
    assert list(record["exactness"]) == ["live"]


def test_replayed_blocks_are_all_hits_of_a_lazy_teacher_cache(tmp_path: Path) -> None:
    overrides = ["DISTILLER.TEACHER_CACHE=lazy", "DISTILLER.TEACHER=resnet14", "SOLVER.BATCH_SIZE=64"]
    asked = load_config(ROOT / "configs/digits/normkd.yaml", overrides)
    dataset, _ = load_images(asked, 0)
    path, about = teacher_weights(asked, dataset, "random", tmp_path)
    assert about == "random"
    more = [f"DISTILLER.TEACHER_WEIGHTS={path}", f"LOG.PREFIX={tmp_path}", "EXPERIMENT.NAME=run"]
    ours = Ours(load_config(ROOT / "configs/digits/normkd.yaml", [*overrides, *more]), dataset, replay=True)
    ours.block(2)
    computed = ours.step.teacher.use.computed
    assert computed > 0
    ours.block(2)
    assert ours.step.teacher.use.computed == computed


def test_the_loading_of_image_files(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(6):
            pixels = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
            write_jpeg(pixels, str(tmp_path / label / f"{number}.jpg"))
    overrides = ["DATASET.NUM_WORKERS=1", "DATASET.IMAGE_SIZE=32", "SOLVER.BATCH_SIZE=4"]
    record = run(Settings(loader=str(tmp_path), blocks=1, overrides=overrides))
    found = record["loader"]
    assert found["images"] == 12
    assert found["workers"] == 1
    assert found["ratio"] == pytest.approx(found["ours"] / found["usual"])
    assert "pair" not in record
    assert f"loading 12 images of {tmp_path}" in show(record)


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert_user_error(tool("benchmark", "--against", nowhere, check=False), str(nowhere), "mdistiller's layout")
    lost = tool("benchmark", "--evaluate", *SMALL, "--json", nowhere / "x.json", check=False)
    assert_user_error(lost, f"--json {nowhere}/x.json is a folder, or in one that is not there")
    assert not lost.stdout
    for settings, words in (
        ({}, "--table9, --evaluate, --exactness, --against PATH or --loader"),
        ({"loader": "nowhere"}, "--loader: there is no folder nowhere"),
        ({"table9": True, "blocks": 0}, "--blocks must be at least 1, not 0"),
        ({"table9": True, "synthetic": 5}, "--synthetic needs at least 100"),
        ({"table9": True, "pair": "res32x4_res8x5"}, r"res32x4_res8x5.*did you mean .*res32x4_res8x4\.yaml"),
        ({"table9": True, "methods": ["NormKDD"], "cfg": str(ROOT / "configs/digits/kd.yaml")}, "did you mean NormKD"),
        ({"table9": True, "synthetic": 200, "teacher": str(nowhere)}, f"there is no file {nowhere}"),
        (
            {"exactness": True, "methods": ["NONE"], "cfg": str(ROOT / "configs/digits/vanilla_resnet8.yaml")},
            "--exactness is about a teacher",
        ),
        ({"table9": True, "synthetic": 200, "overrides": ["SOLVER.BATCH_SIZE=300"]}, "SOLVER.BATCH_SIZE 300"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            run(Settings(**settings))
        assert "\n" not in str(caught.value)


def test_a_reference_that_lacks_something_is_one_line(reference: Path) -> None:
    small = {"against": reference, "synthetic": 200, "blocks": 1, "steps": 1, "warmup": 1}
    overrides = ["SOLVER.BATCH_SIZE=16", *NETWORKS]
    with pytest.raises(ConfigError, match="has no method KD: --methods can be NormKD"):
        run(Settings(**small, methods=["KD"], overrides=overrides))
    with pytest.raises(ConfigError, match="has no CIFAR model resnet20"):
        run(Settings(**small, overrides=[*overrides, "DISTILLER.STUDENT=resnet20"]))
    with pytest.raises(ConfigError, match=r"needs DATASET\.TYPE cifar100, not digits"):
        run(Settings(**small | {"synthetic": 0}, methods=["KD"], cfg=str(ROOT / "configs/digits/kd.yaml")))
