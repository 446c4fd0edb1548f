"""The run folder: lock, saved state, and the conditions of resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, assert_user_error, tool
from short_runs import build_few, train_few

from mdistiller_norm.cli import main
from mdistiller_norm.config import load_config
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import LATEST, load
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models import build_model
from mdistiller_norm.run_folder import run_folder


@pytest.fixture
def folder(once, tmp_path):
    finished = once("finished", lambda folder: train_few(folder, "run", epochs=1))
    logs = shutil.ignore_patterns("worklog.txt", "tensorboard")
    target = tmp_path / "distill" / "run"
    return shutil.copytree(finished / "distill" / "run", target, ignore=logs)


def resume(folder, *overrides, **more):
    return train_few(folder.parents[1], "run", *overrides, resume=True, **more)


def test_names_contain_the_overrides_and_fit_a_file_system():
    def name(*overrides):
        return run_folder(load_config(None, ["EXPERIMENT.TAG=t", *overrides])).name

    assert name("DATASET.SUBSET=20", "SEED=1") == "t,DATASET.SUBSET=20,SEED=1"
    classes = [f"DATASET.CLASSES=[{'xé' * 150}, {last}]" for last in ("a", "b")]
    assert name(classes[0])[:100] == name(classes[1])[:100]
    assert name(classes[0]) != name(classes[1])
    assert 200 < len(name(classes[0]).encode()) < 255


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(folder, tmp_path):
    holder = build_few(tmp_path, "run", resume=True)
    again = ["--cfg", folder / "config.yaml", "--resume", "SOLVER.EPOCHS", 2]
    assert_user_error(tool("train", *again, check=False), f"is training in {folder}")
    holder.trainer.log.close()
    assert resume(folder)["last"]["epoch"] == 2


def test_a_finished_run_keeps_its_record_and_a_longer_one_replaces_it(folder):
    files = [folder / "result.json", folder / "environment.json"]
    before = [file.read_bytes() for file in files]
    assert resume(folder, epochs=1, command=["another"]) == json.loads(before[0])
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(ConfigError, match=r"with other values of SOLVER\.LR, SEED"):
        resume(folder, "SOLVER.LR=0.1", "SEED=5")
    files[0].write_text("damaged")
    (folder / "student_last.pt").unlink()
    assert resume(folder, epochs=1)["last"]["epoch"] == 1
    assert load(folder / "student_last.pt")["about"]["epoch"] == 1
    assert resume(folder, command=["another"])["command"] == "another"
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["EPOCHS"] == 2


def test_the_parts_of_a_resumed_run_are_recorded(folder):
    state = load(folder / LATEST)
    (first,) = state["parts"]
    second = first | {"from_step": state["total_steps"]}
    elsewhere, not_begun = first | {"device": "another"}, second | {"device": "a third"}
    torch.save(state | {"parts": [elsewhere, not_begun]}, folder / LATEST)
    for _ in range(2):  # nothing is left to train the second time
        assert resume(folder)["parts"] == [elsewhere, second]


def test_a_run_that_torchrun_restarts_resumes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-job")
    for restarts, launcher in (("0", distributed.launcher()), ("1", "another")):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        (folder / ".lock").write_text(launcher)
        with pytest.raises(ConfigError, match="holds a run"):
            build_few(tmp_path, "run")
    (folder / ".lock").write_text(distributed.launcher())
    assert build_few(tmp_path, "run").trainer.epoch == 2


def changed(**values):
    return lambda folder: torch.save(load(folder / LATEST) | values, folder / LATEST)


DAMAGES = [
    (changed(epoch=4), r"SOLVER\.EPOCHS must be >= 3"),
    (changed(identity={"precision": "bf16"}), r"another precision \(bf16, now fp32\)"),
    (changed(identity={"data": "other"}), "another data"),
    (changed(trainable={"fc.weight": torch.zeros(10, 3)}), r"does not fit this run \("),
    (changed(optimizer={"state": {}, "param_groups": []}), "number of parameter groups"),
    (lambda folder: torch.save([1, 2], folder / LATEST), "is not the state of a run"),
    (lambda folder: (folder / LATEST).write_bytes(b"PK\3\4"), r"latest\.pt is damaged"),
    (lambda folder: (folder / LATEST).unlink(), r"there is no checkpoint .*latest\.pt"),
    (lambda folder: (folder / "config.yaml").write_bytes(b"\0"), r"config\.yaml cannot be read"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_states_are_not_resumed(folder, damage, words):
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        resume(folder)
    assert "\n" not in str(caught.value)
    assert all((folder / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize("content", [b"\0", b"#" * 2**20 + b"#", b"- 1"])
def test_a_damaged_config_of_a_run_is_one_line_of_eval(run, tmp_path, content, capsys):
    shutil.copy(run / "student_best.pt", tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    code = main(["eval", "-c", str(tmp_path), "-d", "image_folder"])
    error = capsys.readouterr().err
    assert (code, error.count("\n"), error[:7]) == (2, 1, "error: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_process_group_saves_the_state_despite_workers(tree, tmp_path, number):
    torch.save(build_model("resnet8", 3).state_dict(), tmp_path / "teacher.pth")
    arguments = (
        f"--cfg digits/kd DATASET.TYPE=image_folder DATASET.ROOT={tree} DATASET.IMAGE_SIZE=32 LOG.PREFIX={tmp_path} "
        f"DISTILLER.TEACHER=resnet8 DISTILLER.TEACHER_WEIGHTS={tmp_path}/teacher.pth DATASET.NUM_WORKERS=1 "
        f"SOLVER.BATCH_SIZE=4 SOLVER.EPOCHS=100000 EXPERIMENT.NAME=run"
    )
    command = [sys.executable, "tools/train.py", *arguments.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    next(line for line in process.stdout if line.startswith("epoch 2/"))
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name}; the state is saved" in output[1]
    assert load(tmp_path / "digits" / "run" / LATEST)["epoch"] >= 2
    assert [path.name for path in (tmp_path / "digits" / "run").glob(".*")] == [".lock"]
