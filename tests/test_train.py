"""Training from config to run folder, on the real digits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_user_error, tool
from short_runs import SMALLER, assert_same_state, config, state_of

from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config
from mdistiller_norm.data.digits import digits
from mdistiller_norm.data.memory import Split, TensorDataset
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.checkpoint import load, save_atomically
from mdistiller_norm.engine.dot import DOT
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.trainer import Interrupted
from mdistiller_norm.errors import CheckpointError, ConfigError, NonFiniteLossError
from mdistiller_norm.run import build_run, train


@pytest.fixture(scope="module")
def few() -> TensorDataset:
    """Forty-four digits, six steps of 8 with a last one of 4: what is proven does not grow with the images."""
    whole = digits()
    train, test = (
        Split(split.images[:count], split.targets[:count]) for split, count in ((whole.train, 44), (whole.test, 40))
    )
    return replace(whole, train=train, test=test)


def fit_few(
    few: TensorDataset, folder: Path, name: str, *overrides: str, epochs: int = 2, resume: bool = False
) -> None:
    """A whole run on a few digits."""
    run = build_run(config(folder, name, "SOLVER.BATCH_SIZE=8", *overrides, epochs=epochs), resume, dataset=few)
    run.trainer.fit()
    run.trainer.log.close()


def test_a_run_leaves_what_it_promises(tmp_path: Path, teacher: str) -> None:
    result = train(config(tmp_path, "run", "DISTILLER.TYPE=NormKD", "LOG.SAVE_CHECKPOINT_FREQ=1", teacher))
    folder = tmp_path / "distill" / "run"
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "result.json", "tensorboard", "worklog.txt", "latest.pt",
        "best.pt", "student_best.pt", "student_last.pt", "student_1.pt", "student_2.pt",
        ".lock",
    } == names  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result
    records = read_metrics(folder / "metrics.jsonl")
    assert [record["epoch"] for record in records] == [1, 2]
    assert result["last"]["top1"] == records[-1]["test_top1"]
    assert result["best"]["top1"] == max(record["test_top1"] for record in records)
    assert {"loss_ce", "loss_NormKD", "loss_total", "train_top1", "test_top5", "lr", "data_wait"} <= records[0].keys()
    assert records[0]["loss_total"] == pytest.approx(records[0]["loss_ce"] + records[0]["loss_NormKD"])
    assert result["teacher"]["top1"] > 30
    assert result["config"]["NormKD"]["TEMPERATURE_NORM"] == 2.0
    assert result["environment"]["torch"] == torch.__version__
    assert list((folder / "tensorboard").glob("events*"))

    state = load(folder / "latest.pt")
    assert not [key for key in state["trainable"] if not key.startswith("student.")], "a teacher in the checkpoint"
    student = load(folder / "student_last.pt")
    assert student["about"]["name"] == "resnet8"
    assert student["about"]["classes"] == [str(i) for i in range(10)]
    assert student["about"]["top1"] == result["last"]["top1"]
    assert load_config(folder / "config.yaml").node.DISTILLER.TYPE == "NormKD"


def test_the_learning_rate_falls_after_its_stages(tmp_path: Path, few: TensorDataset) -> None:
    fit_few(few, tmp_path, "run", "SOLVER.LR_DECAY_STAGES=[1,2]", epochs=3)
    rates = [record["lr"] for record in read_metrics(tmp_path / "distill" / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([0.05, 0.005, 0.0005])


def test_the_same_seed_gives_the_same_weights_and_another_one_others(
    tmp_path: Path, teacher: str, few: TensorDataset
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fit_few(few, tmp_path, name, "DISTILLER.TYPE=KD", f"SEED={seed}", teacher, epochs=1)
    a, b, c = (state_of(tmp_path, name) for name in "abc")
    assert_same_state(a["trainable"], b["trainable"])
    assert not torch.equal(a["trainable"]["student.conv1.weight"], c["trainable"]["student.conv1.weight"])


@pytest.mark.parametrize("method", ["NONE", *DISTILLERS])
def test_resuming_is_exact_in_mid_epoch_and_between_epochs(
    tmp_path: Path, teacher: str, few: TensorDataset, method: str
) -> None:
    extra = [f"DISTILLER.TYPE={method}", "SOLVER.BATCH_SIZE=8", *SMALLER.get(method, []), teacher]
    stops: list[tuple[int, int]] = []  # epoch, and how many of its steps were done

    def fit(name: str, epochs: int = 2, resume: bool = False, stop_after: int = 0) -> None:
        run = build_run(config(tmp_path, name, *extra, epochs=epochs), resume, dataset=few)
        trainer, calls = run.trainer, 0

        def step(*raw: torch.Tensor) -> None:
            nonlocal calls
            trainer.step(*raw)
            calls += 1
            if calls == stop_after:
                signal.raise_signal(signal.SIGTERM)  # a real signal, at a known step

        trainer.run_step = step
        try:
            trainer.fit()
        except Interrupted:
            stops.append((trainer.epoch, trainer.steps_done))
        finally:
            trainer.log.close()

    fit("whole")
    fit("parts", stop_after=4)
    fit("parts", epochs=1, resume=True)
    fit("parts", resume=True)
    assert stops == [(1, 4)]
    assert_same_state(state_of(tmp_path, "whole"), state_of(tmp_path, "parts"))
    records = [read_metrics(tmp_path / "distill" / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [record["epoch"] for record in records[0]] == [1, 2]
    for a, b in zip(*records, strict=True):
        for key in a.keys() - {"seconds", "images_per_second", "data_wait"}:
            assert a[key] == b[key], key


def test_dot_resumes_exactly_and_differs_from_sgd(tmp_path: Path, teacher: str, few: TensorDataset) -> None:
    extra = ["DISTILLER.TYPE=KD", "SOLVER.TRAINER=dot", teacher]
    fit_few(few, tmp_path, "whole", *extra)
    fit_few(few, tmp_path, "parts", *extra, epochs=1)
    fit_few(few, tmp_path, "parts", *extra, resume=True)
    assert_same_state(state_of(tmp_path, "whole"), state_of(tmp_path, "parts"))
    fit_few(few, tmp_path, "sgd", "DISTILLER.TYPE=KD", teacher)
    weights = [state_of(tmp_path, name)["trainable"]["student.conv1.weight"] for name in ("whole", "sgd")]
    assert not torch.equal(*weights)
    with pytest.raises(ConfigError, match=r"SOLVER\.TRAINER dot needs a distillation loss"):
        train(config(tmp_path, "none", "SOLVER.TRAINER=dot"))


def test_a_resumed_run_is_compiled_like_the_whole_run(
    tmp_path: Path,
    teacher: str,
    few: TensorDataset,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setattr("mdistiller_norm.engine.compile.WORTHWHILE_STEPS", 10)
    fit_few(few, tmp_path, "run", "DISTILLER.TYPE=KD", teacher, epochs=1)
    assert "nothing is compiled: 6 steps are fewer than the 10" in capsys.readouterr().out
    with inductor.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True}):  # falls back, and soon
        fit_few(few, tmp_path, "run", "DISTILLER.TYPE=KD", teacher, epochs=2, resume=True)
    assert "compiling the teacher" in capsys.readouterr().out, "6 steps are left, and 12 are the run"


def test_dot_finds_the_parameters_of_a_student_that_is_compiled(
    tmp_path: Path, teacher: str, few: TensorDataset
) -> None:
    from torch._inductor import config as inductor

    extra = ["DISTILLER.TYPE=KD", "SOLVER.TRAINER=dot", "SOLVER.BATCH_SIZE=44", teacher]
    fit_few(few, tmp_path, "eager", *extra, epochs=1)
    with inductor.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True}):  # falls back, and soon
        fit_few(few, tmp_path, "compiled", *extra, "ENGINE.COMPILE=all", epochs=1)
    assert_same_state(state_of(tmp_path, "eager"), state_of(tmp_path, "compiled"))


@pytest.mark.parametrize("method", ["KD", "REVIEWKD"])
def test_dot_without_delta_is_sgd(tmp_path: Path, teacher: str, few: TensorDataset, method: str) -> None:
    common = [f"DISTILLER.TYPE={method}", "SOLVER.NESTEROV=false", "SOLVER.LR=1e-3", "SOLVER.BATCH_SIZE=44", teacher]
    fit_few(few, tmp_path, "dot", "SOLVER.TRAINER=dot", "SOLVER.DOT.DELTA=0", *common)
    fit_few(few, tmp_path, "sgd", *common)
    a, b = (state_of(tmp_path, name)["trainable"] for name in ("dot", "sgd"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_dot_leaves_frozen_parameters_alone(tmp_path: Path, teacher: str, few: TensorDataset) -> None:
    run = build_run(config(tmp_path, "run", "DISTILLER.TYPE=KD", "SOLVER.BATCH_SIZE=44", teacher), dataset=few)
    run.trainer.log.close()
    step, student = run.trainer.step, run.trainer.step.trainable.student
    student.conv1.requires_grad_(False)
    batch = step.loader.prepare(*next(step.loader.batches(1)))
    optimizer = DOT(step.trainable, batch, step.teacher, 0.05, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    before = [weight.detach().clone() for weight in (student.conv1.weight, student.fc.weight)]
    optimizer.step(step.trainable(batch, step.teacher(batch), step.factors).parts)
    assert torch.equal(student.conv1.weight, before[0])
    assert not torch.equal(student.fc.weight, before[1])


def test_several_methods_add_up_and_cross_entropy_counts_once(tmp_path: Path, teacher: str, few: TensorDataset) -> None:
    fit_few(few, tmp_path, "both", "DISTILLER.TYPE=[NormKD,FITNET]", teacher, epochs=1)
    (record,) = read_metrics(tmp_path / "distill" / "both" / "metrics.jsonl")
    parts = [record[f"loss_{name}"] for name in ("ce", "NormKD", "FITNET")]
    assert record["loss_total"] == pytest.approx(sum(parts))
    state = load(tmp_path / "distill" / "both" / "latest.pt")
    assert any(key.startswith("distillers.FITNET.") for key in state["trainable"])


def test_the_warm_up_ramps_the_distillation_loss(tmp_path: Path, teacher: str, few: TensorDataset) -> None:
    for name, warmup in (("none", 0), ("ten", 10)):
        fit_few(few, tmp_path, name, "DISTILLER.TYPE=DKD", f"DKD.WARMUP={warmup}", "SOLVER.LR=1e-9", teacher)
    full, ramped = (read_metrics(tmp_path / "distill" / name / "metrics.jsonl") for name in ("none", "ten"))
    for epoch in (1, 2):
        assert ramped[epoch - 1]["loss_DKD"] == pytest.approx(full[epoch - 1]["loss_DKD"] * epoch / 10, rel=1e-3)


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        ("SOLVER.BATCH_SIZE=45", "SOLVER.BATCH_SIZE 45 is more than the 44 training images: an epoch is one step"),
        ("SOLVER.BATCH_SIZE=44", ""),
        ("DATASET.MEAN=[0.5,0.5,0.5]", "DATASET.MEAN has no effect on digits, which is held in memory"),
        ("DATASET.STD=[0.376,0.376,0.376]", ""),  # what it is anyway
        ("DATASET.CLASSES=[a,b]", "DATASET.CLASSES has no effect on digits"),
        ("DATASET.IMAGE_SIZE=64", "DATASET.IMAGE_SIZE has no effect on digits"),
        ("DATASET.RESIZE=256", ""),
    ],
)
def test_settings_without_effect_are_warnings(
    tmp_path: Path, few: TensorDataset, override: str, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(config(tmp_path, "run", "SOLVER.BATCH_SIZE=8", override), dataset=few)
    run.trainer.log.close()
    warned = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    assert len(warned) == bool(warning)
    assert warning in "".join(warned)


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("NormKD", "NormKD.TEMPERATURE_NORM=0", "NormKD: the temperature must be positive and finite, got 0.0"),
        ("[FITNET,KD]", "KD.LOSS.CE_WEIGHT=-1", r"KD: the weight of the cross entropy \(-1.0\)"),
        ("AT", "AT.P=0", "^AT.P is 0"),
    ],
)
def test_a_value_that_a_method_refuses_names_the_method(
    tmp_path: Path, teacher: str, few: TensorDataset, method: str, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build_run(config(tmp_path, "run", f"DISTILLER.TYPE={method}", override, teacher), dataset=few)
    assert not (tmp_path / "distill").exists()


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    train(config(tmp_path, "run", epochs=1))
    before = (tmp_path / "distill" / "run" / "latest.pt").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already: --resume"):
        train(config(tmp_path, "run", epochs=1))
    with pytest.raises(ConfigError, match=r"other values of SOLVER\.LR, SEED: it cannot be resumed"):
        train(config(tmp_path, "run", "SOLVER.LR=0.1", "SEED=5"), resume=True)
    assert (tmp_path / "distill" / "run" / "latest.pt").read_bytes() == before
    again = train(config(tmp_path, "run", epochs=1), resume=True)
    assert again["last"]["epoch"] == 1


def test_the_time_left_is_judged_by_the_last_epochs(
    tmp_path: Path, few: TensorDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_few(few, tmp_path, "run", epochs=1)
    latest = tmp_path / "distill" / "run" / "latest.pt"
    save_atomically(load(latest) | {"seconds": 1e6}, latest)  # as if the first epoch had been on a slow machine
    fit_few(few, tmp_path, "run", epochs=3, resume=True)
    assert re.search(r"epoch 2/3: .*ETA 0:0", capsys.readouterr().out)


def test_resuming_loses_no_line_of_damaged_metrics(
    tmp_path: Path, few: TensorDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_few(few, tmp_path, "run", epochs=3)
    metrics = tmp_path / "distill" / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"epoch": 4, "lo')  # what a killed process leaves
    fit_few(few, tmp_path, "run", epochs=3, resume=True)
    assert metrics.read_bytes() == whole
    assert "damaged" not in capsys.readouterr().out
    first, _, *rest = whole.splitlines(keepends=True)
    damaged = b"".join([first, b"\x00\xff\x80\n", *rest])
    metrics.write_bytes(damaged)
    fit_few(few, tmp_path, "run", epochs=4, resume=True)
    assert [record["epoch"] for record in read_metrics(metrics)] == [1, 3, 4]
    assert metrics.with_suffix(".damaged").read_bytes() == damaged
    assert f"warning: 1 lines of {metrics} are damaged: they are kept in" in capsys.readouterr().out


def test_resume_refuses_another_teacher(tmp_path: Path, teacher: str) -> None:
    train(config(tmp_path, "other", "DISTILLER.STUDENT=resnet14", epochs=1))
    train(config(tmp_path, "run", "DISTILLER.TYPE=KD", teacher, epochs=1))
    other = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'distill' / 'other' / 'student_last.pt'}"
    with pytest.raises(ConfigError, match="was run with another teacher"):
        train(config(tmp_path, "run", "DISTILLER.TYPE=KD", other), resume=True)


def test_resume_with_nothing_to_resume_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(tmp_path, "run", epochs=1), resume=True)
    assert "nothing to resume" in capsys.readouterr().out


def test_a_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    train(config(tmp_path, "run", epochs=1))
    folder = tmp_path / "distill" / "run"
    good = load(folder / "latest.pt")
    bad = load(folder / "latest.pt")
    bad["trainable"]["student.fc.weight"][0, 0] = torch.inf
    torch.save(bad, folder / "latest.pt")
    written = (folder / "latest.pt").read_bytes()
    with pytest.raises(NonFiniteLossError, match="the loss ce became NaN or infinite in epoch 2, step 1"):
        train(config(tmp_path, "run"), resume=True)
    assert (folder / "latest.pt").read_bytes() == written
    assert_same_state(load(folder / "best.pt")["trainable"], good["trainable"])


def test_weights_that_are_lost_are_not_saved_in_mid_epoch(tmp_path: Path, few: TensorDataset) -> None:
    """After a step whose loss is finite and whose update is not."""
    run = build_run(config(tmp_path, "run", "SOLVER.BATCH_SIZE=8", "LOG.CHECKPOINT_STEPS=1"), dataset=few)
    eager, steps = run.trainer.run_step, iter(range(6))

    def poisoned(*raw: torch.Tensor) -> None:
        eager(*raw)
        if next(steps) == 1:
            with torch.no_grad():
                run.trainer.step.trainable.student.fc.weight[0, 0] = torch.inf

    run.trainer.run_step = poisoned
    with pytest.raises(NonFiniteLossError, match="the weights became NaN or infinite at step 2 of epoch 1"):
        run.trainer.fit()
    run.trainer.log.close()
    saved = load(tmp_path / "distill" / "run" / "latest.pt")
    assert saved["steps_done"] == 1
    assert all(value.isfinite().all() for value in saved["trainable"].values())


def test_weights_that_are_lost_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    one_step = ("SOLVER.BATCH_SIZE=1437", "SOLVER.LR=1e30")
    with pytest.raises(NonFiniteLossError, match="the test loss became NaN or infinite after epoch 1"):
        train(config(tmp_path, "run", *one_step, epochs=1))
    assert not list((tmp_path / "distill" / "run").glob("*.pt"))


def test_a_missing_teacher_is_one_line_with_the_command_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(config(tmp_path, "run", "DISTILLER.TYPE=KD", "DISTILLER.TEACHER=resnet20"))
    message = str(caught.value)
    assert "tools/train.py --cfg configs/digits/vanilla_resnet20.yaml" in message
    assert "\n" not in message
    assert not (tmp_path / "distill").exists(), "nothing may be written before everything was checked"


def test_a_teacher_trained_here_is_found(tmp_path: Path) -> None:
    train(config(tmp_path, "teacher", "DISTILLER.STUDENT=resnet14", epochs=1))
    result = train(config(tmp_path, "student", "DISTILLER.TYPE=KD", epochs=1))
    assert result["teacher"]["file"] == str(tmp_path / "distill" / "teacher" / "student_last.pt")
    assert "of the" not in (tmp_path / "distill" / "student" / "worklog.txt").read_text()
    train(config(tmp_path, "longer", "DISTILLER.TYPE=KD", epochs=2))
    log = (tmp_path / "distill" / "longer" / "worklog.txt").read_text()
    assert f"warning: the teacher {result['teacher']['file']} trained for 1 of the 2 epochs that its student" in log


def test_a_teacher_near_chance_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mdistiller_norm.models import build_model

    torch.save({"model": build_model("resnet14", 10).state_dict()}, tmp_path / "raw.pth")
    override = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'raw.pth'}"
    train(config(tmp_path, "run", "DISTILLER.TYPE=KD", override, epochs=1))
    assert "about chance" in capsys.readouterr().out


@pytest.mark.parametrize(("right", "warned"), [(35, False), (20, True)])
def test_half_of_two_classes_is_chance_and_most_are_not(
    tmp_path: Path, few: TensorDataset, right: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from mdistiller_norm.models import build_model

    always_first = build_model("resnet14", 2)
    with torch.no_grad():
        always_first.fc.weight.zero_()
        always_first.fc.bias.copy_(torch.tensor([1.0, 0.0]))
    torch.save({"model": always_first.state_dict()}, tmp_path / "teacher.pth")
    test = Split(few.test.images, (torch.arange(40) >= right).long())
    two = replace(few, classes=("a", "b"), train=Split(few.train.images, few.train.targets % 2), test=test)
    override = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'teacher.pth'}"
    build_run(config(tmp_path, "run", "DISTILLER.TYPE=KD", "SOLVER.BATCH_SIZE=44", override), dataset=two)
    assert ("about chance" in capsys.readouterr().out) == warned


def test_a_teacher_that_gives_nan_is_refused_before_the_training(tmp_path: Path, teacher: str) -> None:
    weights = load(teacher.partition("=")[2])
    weights["model"]["fc.bias"][0] = torch.nan
    torch.save(weights, tmp_path / "diverged.pt")
    with pytest.raises(CheckpointError, match=r"teacher .*diverged\.pt gives NaN or infinite logits"):
        build_run(config(tmp_path, "run", "DISTILLER.TYPE=KD", f"DISTILLER.TEACHER_WEIGHTS={tmp_path}/diverged.pt"))


def test_a_teacher_far_below_its_manifest_entry_is_a_warning(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "teacher.pt").write_bytes(Path(teacher.partition("=")[2]).read_bytes())
    (folder / "manifest.yaml").write_text("[{file: teacher.pt, model: resnet14, dataset: digits, top1: 99.9}]")
    monkeypatch.chdir(tmp_path)  # where the manifest is looked for first
    result = train(config(tmp_path, "run", "DISTILLER.TYPE=KD", epochs=1))
    assert "far below the 99.90 stated for it" in capsys.readouterr().out
    assert result["teacher"]["file"] == "checkpoints/teacher.pt"


def test_ctrl_c_stops_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "tools/train.py", "--cfg", "configs/digits/vanilla_resnet8.yaml"]
    command += ["LOG.PREFIX", str(tmp_path), "EXPERIMENT.NAME", "run", "SOLVER.EPOCHS", "500"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    folder = tmp_path / "digits" / "run"
    for _ in range(600):
        if (folder / "latest.pt").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped by SIGINT" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert load(folder / "latest.pt")["epoch"] >= 1
    assert [path.name for path in folder.glob(".*")] == [".lock"], "half-written files"


def test_tools_say_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    cfg = "configs/digits/vanilla_resnet8.yaml"
    assert_user_error(tool("train", "--cfg", "nowhere.yaml", check=False), "nowhere.yaml")
    assert_user_error(tool("train", "--cfg", cfg, "SOLVER.LRR", "1", check=False), "SOLVER.LRR", "SOLVER.LR")
    device = tool("train", "--cfg", cfg, "DEVICE", "tpu", "LOG.PREFIX", tmp_path, check=False)
    assert_user_error(device, "DEVICE", "tpu")
    with pytest.raises(ConfigError, match="DEVICE 'meta' cannot be used here"):
        train(config(tmp_path, "meta", "DEVICE=meta"))
    student = tool("train", "--cfg", cfg, "DISTILLER.STUDENT", "resnet21", "LOG.PREFIX", tmp_path, check=False)
    assert_user_error(student, "resnet21", "resnet20")
    assert_user_error(tool("eval", "-c", tmp_path / "none.pt", check=False), "none.pt")
    assert_user_error(tool("eval", "-c", tmp_path / "two\nlines.pt", check=False), "two lines.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    assert_user_error(tool("eval", "-c", tmp_path / "broken.pt", check=False), "broken.pt")
    told = tool("train", "SOLVER.LR", "1", check=False)
    assert told.stderr == ("error: the following arguments are required: --cfg: see tools/train.py --help\n")
    assert not (tmp_path / "digits").exists()


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("train", ["--cfg"], "argument --cfg: expected one argument: see tools/train.py --help"),
        ("train", ["--cfg", "x.yaml", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ("eval", ["-c", "x.pt", "-bs", "x"], "argument -bs/--batch-size: invalid int value: 'x': see tools/eval.py"),
        ("shards", ["--root", "x"], "the following arguments are required: --out"),
        ("visualize", [], "the following arguments are required: FIGURE: see tools/visualize.py --help"),
        ("visualize", ["tsne"], "required: -c/--ckpt: see tools/visualize.py tsne --help"),
        ("export", ["-c"], "argument -c/--ckpt: expected one argument: see tools/export.py --help"),
        ("report", ["--export", "xls"], "argument --export: invalid choice: 'xls'"),
    ],
)
def test_a_mistyped_command_line_is_one_line(
    command: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        execute([command, *arguments], f"tools/{'make_shards' if command == 'shards' else command}.py")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_weights_that_give_nan_have_no_accuracy(tmp_path: Path, teacher: str) -> None:
    student = load(teacher.partition("=")[2])
    student["model"]["fc.weight"][0, 0] = torch.nan
    torch.save(student, tmp_path / "diverged.pt")
    done = tool("eval", "-c", tmp_path / "diverged.pt", check=False)
    assert_user_error(done, "diverged.pt gives NaN or infinite logits on digits")
    assert "top-1" not in done.stdout


def test_show_prints_where_each_key_is_from() -> None:
    shown = tool("train", "--cfg", "configs/digits/normkd.yaml", "--show", "SEED", "7").stdout
    assert "SEED: 7" in shown
    assert "command line" in shown
    assert "configs/digits/normkd.yaml" in shown


def test_eval_reads_students_and_bare_weights_alike(tmp_path: Path) -> None:
    result = train(config(tmp_path, "run", "SOLVER.BATCH_SIZE=64"))
    folder = tmp_path / "distill" / "run"
    torch.save({"state_dict": load(folder / "student_last.pt")["model"]}, tmp_path / "bare.pth")
    knows = tool("eval", "-c", folder / "student_last.pt", "--per-class").stdout
    told = tool("eval", "-c", tmp_path / "bare.pth", "-m", "resnet8", "-d", "digits", "-bs", 360).stdout
    whole = tool("eval", "-c", folder / "latest.pt").stdout
    wanted = (
        f"top-1 {result['last']['top1']:6.2f}  top-5 {result['last']['top5']:6.2f}  loss {result['last']['loss']:7.4f}"
    )
    for output in (knows, told, whole):
        assert wanted in output
    assert len([line for line in knows.splitlines() if line.startswith("  ")]) == 10
    assert_user_error(tool("eval", "-c", tmp_path / "bare.pth", "-d", "digits", check=False), "add -m")
    (tmp_path / "output").mkdir()  # where plain runs of one's own are looked for
    (tmp_path / "distill").rename(tmp_path / "output" / "distill")
    assert wanted in tool("eval", "-m", "resnet8", "-d", "digits", "-c", "pretrain", cwd=tmp_path).stdout
    assert_user_error(tool("eval", "-c", "pretrain", check=False), "-c pretrain", "add -m")
    assert_user_error(tool("eval", "-c", "torchvision:ResNet9_Weights.V1", check=False), "ResNet9_Weights.V1")
    mismatch = tool("eval", "-c", tmp_path / "bare.pth", "-m", "resnet14", "-d", "digits", check=False)
    assert_user_error(mismatch, "does not fit resnet14", "layer1.1.conv1.weight")
