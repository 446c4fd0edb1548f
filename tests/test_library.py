"""The library, the examples and the command ``distill``."""

import json
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from short_runs import SMALLER, outputs_of
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet34_Weights, resnet34

import mdistiller_norm as mdn
from mdistiller_norm.cli import main
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.functional import normkd_loss

IMAGES, TARGETS = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])


def plain_network():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))


def pair():
    return mdn.create_model("resnet8", 5), mdn.create_model("resnet14", 5)


@torch._dynamo.config.patch(cache_size_limit=2, fail_on_cache_limit_hit=True)
def test_the_example_of_the_readme_compiled_once():
    student, teacher = mdn.create_model("resnet8", 5), plain_network()
    kd = mdn.Distillation("NormKD", student, teacher, TEMPERATURE_NORM=1.5)
    optimizer = torch.optim.SGD(kd.parameters(), lr=0.05)
    recent = torch.__version__ >= "2.10"  # PyTorch 2.6 fails to compile it
    totals, compiled = [], torch.compile(kd, backend="aot_eager") if recent else kd
    for epoch in range(1, 6):
        loss, _ = compiled(IMAGES, TARGETS, epoch=epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < totals[0]
    assert {id(p) for p in kd.parameters()} == {id(p) for p in student.parameters()}
    assert not any(name.startswith("_teacher") for name in kd.state_dict())


def test_the_loss_is_cross_entropy_and_method_with_their_weights():
    student, teacher = nn.Sequential(plain_network().eval()), plain_network()
    kd = mdn.Distillation("NormKD", student, teacher, LOSS={"KD_WEIGHT": 0.5}, WARMUP=4)
    loss, parts = pickle.loads(pickle.dumps(kd))(IMAGES, TARGETS, epoch=2)
    assert (student.training, student[0].training) == (True, False)
    logits = student(IMAGES), teacher(IMAGES)
    expected = 0.1 * F.cross_entropy(logits[0], TARGETS), 0.25 * normkd_loss(*logits)
    torch.testing.assert_close([*parts.values(), loss], [*expected, sum(expected)])


@pytest.mark.parametrize("name", DISTILLERS)
def test_every_method_trains_in_a_loop(name):
    student, teacher = pair()
    keys = {"NCE": {"K": 4}} if name in SMALLER else {}
    kd = mdn.Distillation(name, student, teacher, targets=TARGETS, **keys).train()
    loss, parts = kd(IMAGES, TARGETS, indices=torch.arange(6))
    loss.backward()
    assert torch.isfinite(loss)
    assert (set(parts), teacher.training) == ({"ce", name}, False)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_several_methods_and_autocast():
    student, teacher = pair()
    kd = mdn.Distillation(["KD", "REVIEWKD"], student, teacher, KD={"TEMPERATURE": np.float32(2)})
    assert len(list(kd.parameters())) > len(list(student.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = kd(IMAGES, TARGETS)
    assert (loss.dtype, list(parts)) == (torch.float32, ["ce", "KD", "REVIEWKD"])


@pytest.mark.parametrize(
    ("method", "keys", "words"),
    [
        ("NormKD", {"T": 2.0}, "^arguments: unknown key NormKD.T"),
        ("NormKD", {"TEMPERATURE_NORM": "hot"}, "_NORM must be a finite number, got hot"),
        ("AT", {}, "AT requires features"),
        ("CRD", {}, "CRD requires the classes of the training set: pass targets"),
        ("CRD", {"targets": TARGETS, "NCE": {"K": 4}}, "CRD requires indices"),
        ("KD", {"student": nn.Flatten()}, "Flatten has no parameters"),
        ("KD", {"student": torch.jit.trace(plain_network(), IMAGES)}, "is TorchScript"),
    ],
)
def test_mistakes_raise_config_errors(method, keys, words):
    student, teacher = pair() if method == "CRD" else (plain_network(), plain_network())
    with pytest.raises(ConfigError, match=words):
        mdn.Distillation(method, teacher=teacher, **{"student": student} | keys)(IMAGES, TARGETS)


def test_train_runs_a_config_with_overrides(tmp_path):
    overrides = {"SOLVER.EPOCHS": 1, "SOLVER.LR_DECAY_STAGES": [], "LOG.PREFIX": str(tmp_path)}
    images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    overrides |= {f"DATASET.{key.upper()}": value for key, value in images.items()}
    overrides |= {"EXPERIMENT.NAME": "a", "DATASET.SUBSET": 64}
    result = mdn.train(ROOT / "configs/digits/vanilla_resnet8.yaml", overrides)
    network, about = mdn.load(folder := tmp_path / "digits" / "a,DATASET.SUBSET=64")
    logits, _, targets = outputs_of(folder)
    assert F.cross_entropy(logits, targets).item() == pytest.approx(result["last"]["loss"])
    assert about | images | {"top1": result["best"]["top1"]} == about
    assert (about["name"], network.training) == ("resnet8", False)
    with pytest.raises(ConfigError, match=r"unknown key SOLVER\.EPOCH: did you mean SOLVER"):
        mdn.train("digits/normkd", {"SOLVER.EPOCH": 2})


SHORT = ["SOLVER.EPOCHS=1", "SOLVER.LR_DECAY_STAGES=[]", "DATASET.NUM_WORKERS=0"]
SMALL = ["DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "SOLVER.BATCH_SIZE=36"]


def train(example, *overrides):
    assert main(["train", "--cfg", f"{ROOT}/examples/{example}.yaml", *SHORT, *overrides]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("birds", "kd"), ("finetune", "mobile")])
def test_teacher_and_student_on_image_folders(first, second, tree, tmp_path, monkeypatch):
    # Random weights replace the published ones of ResNet34 in the cache of downloads.
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(resnet34().state_dict(), cache / Path(ResNet34_Weights.IMAGENET1K_V1.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = [f"DATASET.ROOT={tree}", "LOG.PREFIX=output", *SMALL]
    train(first, *options)
    (weights,) = tmp_path.glob("output/*/*/student_last.pt")
    train(second, *options, f"DISTILLER.TEACHER_WEIGHTS={weights}")
    (student,) = tmp_path.glob(f"output/birds/{second}*/student_last.pt")
    plugin = f"--plugin {ROOT}/examples/networks.py --root {tree}"
    assert main(["eval", "-c", str(student), *plugin.split()]) == 0


def test_method(teacher, tmp_path):
    train("mse", teacher, "DISTILLER.TEACHER=resnet14", f"LOG.PREFIX={tmp_path}")
    assert '"loss_MSE"' in next(tmp_path.glob("*/*/metrics.jsonl")).read_text()


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_training_loops_of_other_libraries(package, tmp_path):
    pytest.importorskip(package)
    example = {"lightning": "lightning_module", "transformers": "hf_trainer"}[package]
    distill = runpy.run_path(f"{ROOT}/examples/{example}.py")["distill"]
    networks = pair()
    before = [next(network.parameters()).clone() for network in networks]
    items = [(torch.randn(3, 32, 32), number % 5) for number in range(8)]
    if package == "lightning":
        loader = torch.utils.data.DataLoader(items, 4)
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        distill(*networks, loader, max_epochs=1, default_root_dir=tmp_path, **options)
    else:
        pytest.importorskip("accelerate")
        named = [{"pixel_values": images, "labels": target} for images, target in items]
        options = {"use_cpu": True, "save_strategy": "no", "report_to": "none"}
        distill(*networks, named, tmp_path, num_train_epochs=1, **options)
    after = [next(network.parameters()) for network in networks]
    assert list(map(torch.equal, before, after)) == [False, True]


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples/digits.ipynb").read_text())["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for old, new in (
        ("epochs = 12", "epochs = 1"), ("output/notebook", str(tmp_path)),
        ('"train",', '"train", "DATASET.SUBSET=64",'), ('"digits" / name', '"digits" / f"{name},DATASET.SUBSET=64"'),
    ):  # fmt: skip
        source = source.replace(old, new)
    exec(source, {})
    assert len(list(tmp_path.glob("digits/*/result.json"))) == 4


def test_teacher_student_alone_and_distilled(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = f"distill --teacher resnet14 --student resnet8 --data {tree} --epochs=2".split()
    command += [*SMALL, "DATASET.NUM_WORKERS=0"]
    assert main([*command, "--train-teacher", "--student-alone"]) == 0
    *_, teacher, alone, distilled, export = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (teacher, alone)] == ["teacher", "student"]
    run = Path(distilled.split("  ")[-1].strip())
    assert export == f"export the student: mdistiller-norm export -c '{run}'"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["NormKD"]["WARMUP"], config["SOLVER"]["EPOCHS"]) == (5, 2)
    assert main(command) == 0  # finds the teacher, and all is finished
    *_, distilled_again, _ = capsys.readouterr().out.splitlines()
    assert distilled_again.split() == distilled.split()
    again = [*command, "--train-teacher", "--student-alone", "--method=[NormKD,KD]"]
    assert main([*again, "KD.TEMPERATURE=2"]) == 0
    assert capsys.readouterr().out.count("is finished: nothing left to train") == 2
    assert main([*command, "--teacher=resnet8", "--train-teacher"]) == 0
