"""The run folder: lock, saved state, and the conditions of resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Once, assert_user_error, tool
from short_runs import build_few, train_few

from mdistiller_norm.cli import main
from mdistiller_norm.config import load_config
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import LATEST, load
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.run_folder import run_folder


@pytest.fixture
def folder(once: Once, tmp_path: Path) -> Path:
    """A copy of a finished run of one epoch; ``resume`` continues it."""
    finished = once("finished", lambda folder: train_few(folder, "run", epochs=1))
    logs = shutil.ignore_patterns("worklog.txt", "tensorboard")
    return shutil.copytree(
        finished / "distill" / "run", tmp_path / "distill" / "run", ignore=logs
    )


def resume(folder: Path, *overrides: str, **more: object) -> dict[str, object]:
    return train_few(folder.parents[1], "run", *overrides, resume=True, **more)


def test_two_processes_do_not_train_in_one_folder(folder: Path, tmp_path: Path) -> None:
    holder = build_few(tmp_path, "run", resume=True)
    before = (folder / "metrics.jsonl").read_text()
    again = ["--cfg", folder / "config.yaml", "--resume", "SOLVER.EPOCHS", 2]
    assert_user_error(
        tool("train", *again, check=False), f"another process is training in {folder}"
    )
    assert (folder / "metrics.jsonl").read_text() == before
    holder.trainer.log.close()
    assert resume(folder)["last"]["epoch"] == 2


def test_a_finished_run_keeps_its_record_and_a_longer_one_replaces_it(folder: Path) -> None:
    files = ("result.json", "environment.json")
    before = {name: (folder / name).read_bytes() for name in files}
    assert resume(folder, epochs=1, command=["another"]) == json.loads(before["result.json"])
    assert {name: (folder / name).read_bytes() for name in files} == before
    (folder / "result.json").write_text("damaged")
    assert resume(folder, epochs=1)["last"]["epoch"] == 1
    assert resume(folder, command=["another"])["command"] == "another"
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["EPOCHS"] == 2


def test_the_parts_of_a_resumed_run_are_recorded(folder: Path) -> None:
    state = load(folder / LATEST)
    (first,) = state["parts"]
    assert (first["from_step"], first["processes"], first["precision"]) == (0, 1, "fp32")
    second = first | {"from_step": state["total_steps"]}
    elsewhere = first | {"device": "another"}
    not_begun = second | {"device": "a third"}
    for saved, expected in (
        ([first], [first]),
        ([elsewhere, not_begun], [elsewhere, second]),
        (None, [second]),  # a state of an older version, which has fewer facts
    ):
        older = state | {"identity": {"teacher": ""}}
        del older["parts"]
        torch.save(state | {"parts": saved} if saved else older, folder / LATEST)
        for _ in range(2):  # nothing is left to train the second time
            assert resume(folder)["parts"] == expected
        assert load(folder / LATEST)["parts"] == expected
        assert json.loads((folder / "result.json").read_text())["parts"] == expected


def test_a_run_that_torchrun_restarts_resumes(folder, tmp_path, monkeypatch):
    for job in ("none", "a-job"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        for restarts, launcher in (("0", distributed.launcher()), ("1", "another")):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
            (folder / ".lock").write_text(launcher)
            with pytest.raises(ConfigError, match="holds a run"):
                build_few(tmp_path, "run")
        (folder / ".lock").write_text(distributed.launcher())
        again = build_few(tmp_path, "run")
        assert again.trainer.epoch == 2
        again.trainer.log.close()


def damaged(key: str, value: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(load(folder / LATEST) | {key: value}, folder / LATEST)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged("epoch", 4), r"SOLVER\.EPOCHS must be >= 3"),
        (damaged("identity", {"precision": "bf16"}), r"another precision \(bf16, now fp32\)"),
        (damaged("identity", {"data": "other"}), "another data"),
        (damaged("trainable", {"fc.weight": torch.zeros(10, 3)}), r"does not fit this run \("),
        (damaged("optimizer", {"state": {}, "param_groups": []}), "number of parameter groups"),
        (damaged("meters", {}), "Missing key"),
        (lambda folder: torch.save([1, 2], folder / LATEST), "is not the state of a run"),
        (lambda folder: (folder / LATEST).write_bytes(b"PK\3\4"), r"latest\.pt is damaged"),
        (lambda folder: (folder / LATEST).unlink(), r"there is no checkpoint .*latest\.pt"),
        (lambda folder: (folder / "config.yaml").unlink(), r"config\.yaml does not exist"),
        (
            lambda folder: (folder / "config.yaml").write_bytes(b"\0"),
            r"config\.yaml cannot be read",
        ),
    ],
)
def test_damaged_states_are_not_resumed(folder, damage, words):
    damage(folder)
    assert_not_resumed(folder, words)


def test_other_settings_are_not_resumed(folder: Path) -> None:
    assert_not_resumed(
        folder, r"with other values of SOLVER\.LR, SEED", "SOLVER.LR=0.1", "SEED=5"
    )


def assert_not_resumed(folder: Path, words: str, *overrides: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        resume(folder, *overrides)
    assert "\n" not in str(caught.value)
    after = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    "content", [b"\0", b"#" * 2**20 + b"#", b"- 1", b"DATASET: {ROOT: [nowhere]}"]
)
def test_a_damaged_config_of_a_run_is_one_line_of_eval(run, tmp_path, content, capsys):
    shutil.copy(run / "student_best.pt", tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    code = main(["eval", "-c", str(tmp_path), "-d", "image_folder"])
    error = capsys.readouterr().err
    assert (code, error.count("\n"), error[:7]) == (2, 1, "error: ")


def test_an_unusable_folder_is_a_config_error(tmp_path: Path) -> None:
    too_long = r"cannot be written \(File name too long\): .*EXPERIMENT\.NAME"
    with pytest.raises(ConfigError, match=too_long):
        build_few(tmp_path, "n" * 300)
    (tmp_path / "distill" / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        build_few(tmp_path, "run")


def test_the_precision_of_a_cache_is_part_of_the_name_if_a_cache_is_used(tmp_path: Path) -> None:
    def name(*overrides: str) -> str:
        common = [f"LOG.PREFIX={tmp_path}", "EXPERIMENT.TAG=t", "DISTILLER.TYPE=KD"]
        return run_folder(load_config(None, [*common, *overrides])).name

    half = "DISTILLER.TEACHER_CACHE_PRECISION=fp16"
    assert "PRECISION" not in name(half)
    assert f",{half}" in name(half, "DISTILLER.TEACHER_CACHE=lazy")


def test_a_signal_to_the_process_group_saves_the_state_despite_workers(tree, tmp_path):
    command = [
        sys.executable, "tools/train.py", "--cfg", "configs/digits/vanilla_resnet8.yaml", "DATASET.TYPE=image_folder",
        f"DATASET.ROOT={tree}", "DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "DATASET.NUM_WORKERS=1",
        "SOLVER.BATCH_SIZE=4", "SOLVER.EPOCHS=100000", f"LOG.PREFIX={tmp_path}", "EXPERIMENT.NAME=run",
    ]  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch 2/"))
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM; the state is saved" in output[1]
    (state,) = (load(path) for path in tmp_path.rglob(LATEST))
    assert state["epoch"] >= 2
    partial = [path for path in (tmp_path / "digits" / "run").glob(".*") if path.name != ".lock"]
    assert not partial
