"""Training from the config to the run folder, on real digits."""

import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from short_runs import (
    RECIPE,
    SMALLER,
    assert_same_state,
    build_few,
    config,
    few_digits,
    state_of,
    train_few,
)

from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config
from mdistiller_norm.data.memory import Split
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine import runtime
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    NonFiniteLossError,
    UserError,
)
from mdistiller_norm.models import build_model
from mdistiller_norm.run import Run, train


def metrics_of(folder: Path, name: str) -> list[dict[str, float]]:
    return read_metrics(folder / "distill" / name / "metrics.jsonl")


def after_step(run: Run, number: int, action: Callable[[], object]) -> None:
    """Call ``action`` after that step of the run."""
    step, done = run.trainer.run_step, 0

    def counted(*raw: torch.Tensor) -> None:
        nonlocal done
        step(*raw)
        done += 1
        if done == number:
            action()

    run.trainer.run_step = counted


def test_a_run_writes_its_files(tmp_path: Path, teacher: str) -> None:
    more = ("LOG.SAVE_CHECKPOINT_FREQ=1", "DATASET.SUBSET=60", "SOLVER.BATCH_SIZE=20")
    result = train(config(tmp_path, "run", "DISTILLER.TYPE=NormKD", teacher, *more))
    folder = tmp_path / "distill" / "run,DATASET.SUBSET=60"
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "result.json", "tensorboard", "worklog.txt", "latest.pt",
        "latest.prev.pt", "best.pt", "student_best.pt", "student_last.pt", "student_1.pt", "student_2.pt", ".lock",
    } == {path.name for path in folder.iterdir()}  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result
    records = metrics_of(tmp_path, folder.name)
    assert [record["epoch"] for record in records] == [1, 2]
    assert result["last"]["top1"] == records[-1]["test_top1"]
    assert result["best"]["top1"] == max(record["test_top1"] for record in records)
    assert {"train_top1", "test_top5", "lr", "data_wait"} <= records[0].keys()
    assert records[0]["loss_total"] == pytest.approx(
        records[0]["loss_ce"] + records[0]["loss_NormKD"]
    )
    assert result["teacher"]["top1"] == pytest.approx(
        load(teacher.partition("=")[2])["about"]["top1"]
    )
    assert result["config"]["NormKD"]["TEMPERATURE_NORM"] == 2.0
    assert result["environment"]["torch"] == torch.__version__
    assert list((folder / "tensorboard").glob("events*"))

    state = load(folder / "latest.pt")
    assert all(key.startswith("student.") for key in state["trainable"]), (
        "a teacher in the checkpoint"
    )
    about = load(folder / "student_last.pt")["about"]
    assert (about["name"], about["top1"]) == ("resnet8", result["last"]["top1"])
    assert about["classes"] == [str(i) for i in range(10)]
    assert load_config(folder / "config.yaml").node.DISTILLER.TYPE == "NormKD"


DOT_EMA = ["SOLVER.TRAINER=dot", "SOLVER.EMA=0.5"]
MIXED = ["DATASET.MIXUP=0.2", "DATASET.CUTMIX=1"]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((method, []) for method in ("NONE", *DISTILLERS)),
        ("KD", RECIPE),
        ("KD", DOT_EMA),
        ("NormKD", MIXED),
        ("NormKD", [*MIXED, *DOT_EMA]),
    ],
)
def test_resuming_is_bit_identical(tmp_path, teacher, method, more):
    extra = [f"DISTILLER.TYPE={method}", *SMALLER.get(method, []), teacher, *more]
    train_few(tmp_path, "whole", *extra)
    run = build_few(tmp_path, "parts", *extra)
    after_step(run, 4, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run.trainer.fit()
    run.trainer.log.close()
    assert (run.trainer.epoch, run.trainer.steps_done) == (1, 4)
    if method in ("NONE", "CRD"):  # resumes at the end of an epoch too
        train_few(tmp_path, "parts", *extra, epochs=1, resume=True)
    with (tmp_path / "distill" / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "lo')  # the line of a killed process
    train_few(tmp_path, "parts", *extra, resume=True)
    assert_same_state(state_of(tmp_path, "whole"), state_of(tmp_path, "parts"))
    whole, parts = (metrics_of(tmp_path, name) for name in ("whole", "parts"))
    for record in (*whole, *parts):
        for key in ("seconds", "images_per_second", "data_wait"):
            del record[key]
    assert whole == parts
    assert [record["epoch"] for record in whole] == [1, 2]


def test_a_run_is_compiled_and_resumed_alike(tmp_path, teacher, monkeypatch):
    from torch._inductor import config as inductor

    extra = ["DISTILLER.TYPE=KD", "SOLVER.TRAINER=dot", "SOLVER.BATCH_SIZE=22", teacher]
    train_few(tmp_path, "eager", *extra)
    monkeypatch.setattr("mdistiller_norm.engine.compile.WORTHWHILE_STEPS", 3)
    train_few(tmp_path, "run", *extra, epochs=1)
    log = tmp_path / "distill" / "run" / "worklog.txt"
    assert "compiling the teacher" not in log.read_text()
    # Falls back to eager.
    with inductor.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True}):
        train_few(tmp_path, "run", *extra, resume=True)
        assert "compiling the teacher" in log.read_text(), "2 of 4 steps are left"
        train_few(tmp_path, "all", *extra, "ENGINE.COMPILE=all")
    text = (tmp_path / "distill" / "all" / "worklog.txt").read_text()
    for name in ("teacher", "student"):
        assert re.search(rf"the {name} could not be compiled \(.*\): it runs uncompiled", text)
    for name in ("run", "all"):
        assert_same_state(
            state_of(tmp_path, "eager")["trainable"], state_of(tmp_path, name)["trainable"]
        )


def test_the_warm_up_and_the_learning_rate_follow_the_epoch(tmp_path, teacher):
    common = ["DISTILLER.TYPE=DKD", "SOLVER.LR=1e-9", "SOLVER.LR_DECAY_STAGES=[1,2]", teacher]
    for name, warmup in (("none", 0), ("ten", 10)):
        train_few(tmp_path, name, f"DKD.WARMUP={warmup}", *common, epochs=3)
    full, ramped = metrics_of(tmp_path, "none"), metrics_of(tmp_path, "ten")
    assert [record["lr"] for record in full] == pytest.approx([1e-9, 1e-10, 1e-11])
    for a, b in zip(full, ramped, strict=True):
        assert b["loss_DKD"] == pytest.approx(a["loss_DKD"] * b["epoch"] / 10, rel=1e-3)


def test_a_non_finite_loss_stops_and_keeps_the_last_finite_state(tmp_path: Path) -> None:
    train_few(tmp_path, "run", epochs=1)
    latest = tmp_path / "distill" / "run" / "latest.pt"
    state = load(latest)
    state["trainable"]["student.fc.weight"][0, 0] = torch.inf
    torch.save(state, latest)
    before = latest.read_bytes()
    with pytest.raises(NonFiniteLossError, match="ce became NaN or infinite in epoch 2, step 1"):
        train_few(tmp_path, "run", resume=True)
    assert latest.read_bytes() == before
    assert load(latest.with_name("best.pt"))["trainable"]["student.fc.weight"].isfinite().all()


@pytest.mark.parametrize("name", ["fc.weight", "bn1.running_var"])
def test_states_that_are_not_finite_are_not_saved(tmp_path: Path, name: str) -> None:
    """The loss of a step is computed before its update."""
    run = build_few(tmp_path, "run", "LOG.CHECKPOINT_STEPS=1")
    tensor = run.trainer.step.trainable.student.state_dict()[name]
    after_step(run, 2, lambda: tensor.fill_(torch.inf))
    with pytest.raises(
        NonFiniteLossError, match="norms became NaN or infinite at step 2 of epoch"
    ):
        run.trainer.fit()
    run.trainer.log.close()
    assert state_of(tmp_path, "run")["steps_done"] == 1


def test_weights_of_a_diverged_epoch_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteLossError, match="the test loss became NaN or infinite after epoch 1"
    ):
        train_few(tmp_path, "last", "SOLVER.BATCH_SIZE=44", "SOLVER.LR=1e30", epochs=1)
    assert not list((tmp_path / "distill" / "last").glob("*.pt"))


def test_a_teacher_is_found_and_not_replaced(tmp_path: Path) -> None:
    train_few(tmp_path, "teacher", "DISTILLER.STUDENT=resnet14", epochs=1)
    result = train_few(tmp_path, "student", "DISTILLER.TYPE=KD", epochs=1)
    folder = tmp_path / "distill"
    assert result["teacher"]["file"] == str(folder / "teacher" / "student_last.pt")
    assert "trained for" not in (folder / "student" / "worklog.txt").read_text()
    build_few(tmp_path, "longer", "DISTILLER.TYPE=KD").trainer.log.close()
    log = (folder / "longer" / "worklog.txt").read_text()
    assert "student_last.pt was trained for 1 epochs, the student for 2" in log

    torch.save({"model": build_model("resnet14", 10).state_dict()}, tmp_path / "raw.pth")
    other = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'raw.pth'}"
    with pytest.raises(ConfigError, match="cannot be resumed with another teacher"):
        build_few(tmp_path, "student", "DISTILLER.TYPE=KD", other, resume=True)


@pytest.mark.parametrize(("right", "warned"), [(35, False), (20, True)])
def test_a_teacher_near_chance_is_a_warning(tmp_path, right, warned, capsys):
    always_first = build_model("resnet14", 2)
    with torch.no_grad():
        always_first.fc.weight.zero_()
        always_first.fc.bias.copy_(torch.tensor([1.0, 0.0]))
    torch.save({"model": always_first.state_dict()}, tmp_path / "teacher.pth")
    few = few_digits(44)
    train = Split(few.train.images, few.train.targets % 2)
    test = Split(few.test.images, (torch.arange(40) >= right).long())
    two = replace(few, classes=("a", "b"), train=train, test=test)
    override = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'teacher.pth'}"
    build_few(tmp_path, "run", "DISTILLER.TYPE=KD", override, dataset=two)
    assert ("about chance" in capsys.readouterr().out) == warned


def test_a_teacher_far_below_its_manifest_is_a_warning_and_nan_an_error(
    tmp_path, teacher, monkeypatch
):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "teacher.pt").write_bytes(Path(teacher.partition("=")[2]).read_bytes())
    manifest = "[{file: teacher.pt, model: resnet14, dataset: digits, top1: 99}]"
    (folder / "manifest.yaml").write_text(manifest)
    monkeypatch.chdir(tmp_path)
    run = build_few(tmp_path, "run", "DISTILLER.TYPE=KD")
    assert "far below its stated 99.00" in (run.trainer.folder / "worklog.txt").read_text()
    assert run.facts["teacher"]["file"] == "checkpoints/teacher.pt"
    weights = load("checkpoints/teacher.pt")
    weights["model"]["fc.bias"][0] = torch.nan
    torch.save(weights, "diverged.pt")
    with pytest.raises(
        CheckpointError, match=r"teacher diverged\.pt computes NaN or infinite logits"
    ):
        build_few(tmp_path, "nan", "DISTILLER.TYPE=KD", "DISTILLER.TEACHER_WEIGHTS=diverged.pt")


def test_eval_reads_students_states_and_bare_weights(run, tmp_path, monkeypatch, capsys):
    def evaluate(*arguments: object) -> str:
        execute(["eval", *map(str, arguments)])
        return capsys.readouterr().out

    last = json.loads((run / "result.json").read_text())["last"]
    torch.save({"state_dict": load(run / "student_last.pt")["model"]}, tmp_path / "bare.pth")
    expected = f"top-1 {last['top1']:6.2f}  top-5 {last['top5']:6.2f}  loss {last['loss']:7.4f}"
    student = evaluate("-c", run / "student_last.pt", "--per-class")
    assert expected in student
    assert len([line for line in student.splitlines() if line.startswith("  ")]) == 10
    bare = ("-c", tmp_path / "bare.pth", "-m", "resnet8")
    assert expected in evaluate(*bare, "-d", "digits", "-bs", 360)
    assert expected in evaluate(*bare, "--cfg", run / "config.yaml")
    assert expected in evaluate("-c", run / "latest.pt")
    monkeypatch.chdir(tmp_path)
    Path("output").symlink_to(run.parents[1])
    assert expected in evaluate("-m", "resnet8", "-d", "digits", "-c", "pretrain")
    monkeypatch.setattr(runtime, "LINE_SECONDS", 0.0)
    execute(["eval", "-c", str(run)])
    assert "\nevaluation: 6 of 6, " in capsys.readouterr().err
    broken = load(run / "student_last.pt")
    broken["model"]["fc.weight"][0, 0] = torch.nan
    torch.save(broken, "nan.pt")
    for words, message in (
        ("nan.pt", "nan.pt diverged or is damaged: it computes NaN"),
        ("bare.pth -d digits", "add -m"),
        ("bare.pth -m resnet14 -d digits", "does not fit resnet14 .*layer1.1.conv1.weight"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate("-c", *words.split())
