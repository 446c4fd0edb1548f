"""Training from the config to the run folder, on real digits."""

import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from short_runs import RECIPE, SMALLER, assert_same_state, build_few, state_of, train_few

from mdistiller_norm import errors
from mdistiller_norm.cli import execute
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine import runtime
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.models import build_model


def metrics_of(folder, name):
    return read_metrics(folder / "distill" / name / "metrics.jsonl")


def after_step(run, number, action):
    step, numbers = run.trainer.run_step, itertools.count(1)

    def counted(*raw):
        step(*raw)
        if next(numbers) == number:
            action()

    run.trainer.run_step = counted


def test_a_run_writes_its_files(tmp_path, teacher):
    more = ("LOG.SAVE_CHECKPOINT_FREQ=1", "DATASET.SUBSET=60", "SOLVER.BATCH_SIZE=20")
    result = train_few(tmp_path, "run", "DISTILLER.TYPE=NormKD", teacher, *more, dataset=None)
    folder = tmp_path / "distill" / "run,DATASET.SUBSET=60"
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "result.json", "tensorboard", "worklog.txt", "latest.pt",
        "latest.prev.pt", "best.pt", "student_best.pt", "student_last.pt", "student_1.pt", "student_2.pt", ".lock",
    } == {path.name for path in folder.iterdir()}  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result
    first, second = metrics_of(tmp_path, folder.name)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert result["last"]["top1"] == second["test_top1"]
    assert result["best"]["top1"] == max(first["test_top1"], second["test_top1"])
    assert {"train_top1", "test_top5", "lr", "data_wait"} <= first.keys()
    assert first["loss_total"] == pytest.approx(first["loss_ce"] + first["loss_NormKD"])
    stated = load(teacher.partition("=")[2])["about"]["top1"]
    assert result["teacher"]["top1"] == pytest.approx(stated)
    assert result["environment"]["torch"] == torch.__version__
    assert list((folder / "tensorboard").glob("events*"))
    # The teacher is not in the checkpoint.
    assert all(key.startswith("student.") for key in load(folder / "latest.pt")["trainable"])
    about = load(folder / "student_last.pt")["about"]
    assert (about["name"], about["top1"]) == ("resnet8", result["last"]["top1"])


DOT_EMA = ["SOLVER.TRAINER=dot", "SOLVER.EMA=0.5"]
MIXED = ["DATASET.MIXUP=0.2", "DATASET.CUTMIX=1"]
FAST = ("NONE", "NormKD", "CRD", "OFD", "REVIEWKD")
MARKS = {method: () if method in FAST else pytest.mark.slow for method in ("NONE", *DISTILLERS)}
METHODS = [pytest.param(method, [], marks=marks) for method, marks in MARKS.items()]
MORE = [("KD", RECIPE), ("KD", DOT_EMA), ("NormKD", MIXED), ("NormKD", [*MIXED, *DOT_EMA])]


@pytest.mark.parametrize(("method", "more"), [*METHODS, *MORE])
def test_resuming_is_bit_identical(tmp_path, teacher, method, more):
    extra = [f"DISTILLER.TYPE={method}", *SMALLER.get(method, []), teacher, *more]
    few = {"images": 20}  # an epoch has 2 steps of 8 and one of 4
    train_few(tmp_path, "whole", *extra, **few)
    run = build_few(tmp_path, "parts", *extra, **few)
    run.trainer.step.optimizer.param_groups[0] |= {"capturable": True} if more is RECIPE else {}
    after_step(run, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(errors.Interrupted):
        run.trainer.fit()
    run.trainer.log.close()
    assert (run.trainer.epoch, run.trainer.steps_done) == (1, 2)
    if method in ("NONE", "CRD"):  # resumes at the end of an epoch too
        train_few(tmp_path, "parts", *extra, epochs=1, resume=True, **few)
    with (tmp_path / "distill" / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')  # the line of a killed process
    train_few(tmp_path, "parts", *extra, resume=True, **few)
    assert_same_state(state_of(tmp_path, "whole"), state_of(tmp_path, "parts"))
    whole, parts = (metrics_of(tmp_path, name) for name in ("whole", "parts"))
    for record in (*whole, *parts):
        for key in ("seconds", "images_per_second", "data_wait"):
            del record[key]
    assert whole == parts
    assert [record["epoch"] for record in whole] == [1, 2]


def test_the_warm_up_and_the_learning_rate_follow_the_epoch(tmp_path, teacher):
    common = ["DISTILLER.TYPE=DKD", "SOLVER.LR=1e-9", "SOLVER.LR_DECAY_STAGES=[1]", teacher]
    for name, warmup in (("none", 0), ("ten", 10)):
        train_few(tmp_path, name, f"DKD.WARMUP={warmup}", *common, images=20)
    full, ramped = metrics_of(tmp_path, "none"), metrics_of(tmp_path, "ten")
    assert [record["lr"] for record in full] == pytest.approx([1e-9, 1e-10])
    for a, b in zip(full, ramped, strict=True):
        assert b["loss_DKD"] == pytest.approx(a["loss_DKD"] * b["epoch"] / 10, rel=1e-3)


def test_a_non_finite_loss_stops_and_keeps_the_last_finite_state(tmp_path):
    train_few(tmp_path, "run", epochs=1)
    latest = tmp_path / "distill" / "run" / "latest.pt"
    state = load(latest)
    state["trainable"]["student.fc.weight"][0, 0] = torch.inf
    torch.save(state, latest)
    before = latest.read_bytes()
    with pytest.raises(errors.NonFiniteLossError, match=r"ce became NaN .* in epoch 2, step 1"):
        train_few(tmp_path, "run", resume=True)
    assert latest.read_bytes() == before
    assert load(latest.with_name("best.pt"))["trainable"]["student.fc.weight"].isfinite().all()


@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_var"])
def test_states_that_are_not_finite_are_not_saved(tmp_path, name):
    run = build_few(tmp_path, "run", "LOG.CHECKPOINT_STEPS=1")
    tensor = run.trainer.step.trainable.student.state_dict()[name]
    after_step(run, 2, lambda: tensor.fill_(torch.inf))
    with pytest.raises(errors.NonFiniteLossError, match=r"norms became NaN .* at step 2 of"):
        run.trainer.fit()
    run.trainer.log.close()
    assert state_of(tmp_path, "run")["steps_done"] == 1


def test_weights_of_a_diverged_epoch_are_not_saved(tmp_path):
    with pytest.raises(errors.NonFiniteLossError, match=r"test loss became NaN .* after epoch 1"):
        train_few(tmp_path, "last", "SOLVER.BATCH_SIZE=44", "SOLVER.LR=1e30", epochs=1)
    assert not list((tmp_path / "distill" / "last").glob("*.pt"))


def test_a_teacher_is_found_and_not_replaced(tmp_path):
    train_few(tmp_path, "teacher", "DISTILLER.STUDENT=resnet14", epochs=1)
    result = train_few(tmp_path, "student", "DISTILLER.TYPE=KD", epochs=1)
    assert result["teacher"]["file"] == str(tmp_path / "distill" / "teacher" / "student_last.pt")
    torch.save({"model": build_model("resnet14", 10).state_dict()}, tmp_path / "raw.pth")
    other = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'raw.pth'}"
    with pytest.raises(errors.ConfigError, match="cannot be resumed with another teacher"):
        build_few(tmp_path, "student", "DISTILLER.TYPE=KD", other, resume=True)


def test_a_bad_teacher_is_a_warning_and_nan_an_error(tmp_path, teacher, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    weights = load(teacher.partition("=")[2])
    torch.save(weights, "checkpoints/teacher.pt")
    manifest = "[{file: teacher.pt, model: resnet14, dataset: digits, top1: 99}]"
    Path("checkpoints/manifest.yaml").write_text(manifest)

    def log_of(name, *more):
        run = build_few(tmp_path, name, "DISTILLER.TYPE=KD", *more)
        run.trainer.log.close()
        return run, (run.trainer.folder / "worklog.txt").read_text()

    run, log = log_of("stated")
    assert run.facts["teacher"]["file"] == "checkpoints/teacher.pt"
    assert "far below its stated 99.00" in log
    assert "about chance" not in log
    for name, value in (("constant", 0.0), ("diverged", torch.nan)):
        weights["model"]["fc.weight"].fill_(value)
        torch.save(weights, f"{name}.pt")
    _, log = log_of("constant", "DISTILLER.TEACHER_WEIGHTS=constant.pt")
    assert "about chance" in log
    with pytest.raises(errors.CheckpointError, match=r"diverged\.pt computes NaN"):
        log_of("diverged", "DISTILLER.TEACHER_WEIGHTS=diverged.pt")


def test_eval_reads_students_states_and_bare_weights(run, tmp_path, monkeypatch, capsys):
    def evaluate(command):
        execute(["eval", *command.split()])
        return capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(run)
    Path("output").symlink_to(run.parents[1])
    torch.save({"state_dict": load("run/student_last.pt")["model"]}, "bare.pth")
    broken = load("run/student_last.pt")
    broken["model"]["fc.weight"][0, 0] = torch.nan
    torch.save(broken, "nan.pt")
    last = json.loads((run / "result.json").read_text())["last"]
    expected = f"top-1 {last['top1']:6.2f}  top-5 {last['top5']:6.2f}  loss {last['loss']:7.4f}"
    student = evaluate("-c run/student_last.pt --per-class").out
    assert len([line for line in student.splitlines() if line.startswith("  ")]) == 10
    assert expected in student
    assert expected in evaluate("-c bare.pth -m resnet8 -d digits -bs 360").out
    assert expected in evaluate("-c bare.pth -m resnet8 --cfg run/config.yaml").out
    assert expected in evaluate("-c run/latest.pt").out
    assert expected in evaluate("-m resnet8 -d digits -c pretrain").out
    monkeypatch.setattr(runtime, "LINE_SECONDS", 0.0)
    assert "\nevaluation: 6 of 6, " in evaluate("-c run").err
    for words, message in (
        ("nan.pt", "nan.pt diverged or is damaged: it computes NaN"),
        ("bare.pth -d digits", "add -m"),
        ("bare.pth -m resnet14 -d digits", "does not fit resnet14 .*layer1.1.conv1.weight"),
    ):
        with pytest.raises(errors.UserError, match=message):
            evaluate(f"-c {words}")
