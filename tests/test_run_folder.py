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
from conftest import ROOT, assert_user_error, tool
from short_runs import config

from mdistiller_norm.cli import main
from mdistiller_norm.config import load_config
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import LATEST, PREVIOUS, load
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.run import build_run, train
from mdistiller_norm.run_folder import run_folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of one epoch; ``resume`` continues it."""
    copy = tmp_path / "distill" / "run"
    copy.mkdir(parents=True)
    for name in (LATEST, "best.pt", "config.yaml", "metrics.jsonl", "result.json", "environment.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    return copy


def resume(folder: Path, *overrides: str, epochs: int = 2, **more: object) -> dict[str, object]:
    return train(config(folder.parents[1], "run", *overrides, epochs=epochs), resume=True, **more)


def test_two_processes_do_not_train_in_one_folder(folder: Path, tmp_path: Path) -> None:
    holder = build_run(config(tmp_path, "run", epochs=2), resume=True)
    before = (folder / "metrics.jsonl").read_text()
    again = ["--cfg", folder / "config.yaml", "--resume", "SOLVER.EPOCHS", 2]
    assert_user_error(tool("train", *again, check=False), f"another process is training in {folder}")
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
        older = {key: value for key, value in state.items() if key != "parts"} | {
            "identity": {"teacher": ""}
        }
        torch.save(state | {"parts": saved} if saved else older, folder / LATEST)
        for _ in range(2):  # nothing is left to train the second time
            assert resume(folder)["parts"] == expected
        assert load(folder / LATEST)["parts"] == expected
        assert json.loads((folder / "result.json").read_text())["parts"] == expected


def test_a_run_that_torchrun_restarts_resumes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for job in ("none", "a-job"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        (folder / ".lock").write_text("another")
        with pytest.raises(ConfigError, match="holds a run"):
            build_run(config(tmp_path, "run", epochs=2))
        (folder / ".lock").write_text(distributed.launcher())
        again = build_run(config(tmp_path, "run", epochs=2))
        assert again.trainer.epoch == 2
        again.trainer.log.close()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    with pytest.raises(ConfigError, match="holds a run"):
        build_run(config(tmp_path, "run", epochs=2))


def damaged(key: str, value: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(load(folder / LATEST) | {key: value}, folder / LATEST)


@pytest.mark.parametrize(
    ("damage", "overrides", "words"),
    [
        (lambda folder: None, ["SOLVER.LR=0.1", "SEED=5"], r"with other values of SOLVER\.LR, SEED"),
        (lambda folder: None, ["SOLVER.EPOCHS=0"], "SOLVER.EPOCHS"),
        (lambda folder: (folder / "config.yaml").unlink(), [], r"config\.yaml does not exist"),
        (
            lambda folder: (folder / "config.yaml").write_bytes(b"\0"),
            [],
            r"config\.yaml cannot be read",
        ),
        (lambda folder: (folder / LATEST).unlink(), [], r"there is no checkpoint .*latest\.pt"),
        (
            lambda folder: torch.save([1, 2], folder / LATEST),
            [],
            r"latest\.pt is not the state of a run",
        ),
        (lambda folder: (folder / LATEST).write_bytes(b"PK\3\4"), [], r"latest\.pt is damaged"),
        (damaged("epoch", 4), [], r"SOLVER\.EPOCHS must be >= 3"),
        (damaged("identity", {"precision": "bf16"}), [], r"another precision \(bf16, now fp32\)"),
        (damaged("identity", {"data": "other"}), [], "another data"),
        (
            damaged("trainable", {"student.fc.weight": torch.zeros(10, 3)}),
            [],
            r"does not fit this run \(",
        ),
        (
            damaged("optimizer", {"state": {}, "param_groups": []}),
            [],
            "different number of parameter groups",
        ),
        (damaged("meters", {}), [], "Missing key"),
    ],
)
def test_what_cannot_be_resumed_is_an_error(folder, damage, overrides, words):
    (folder / PREVIOUS).unlink(missing_ok=True)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        resume(folder, *overrides)
    assert "\n" not in str(caught.value)
    assert {
        path.name: path.read_bytes() for path in folder.glob("*.*") if path.name in before
    } == before


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
    with pytest.raises(
        ConfigError, match=r"cannot be written \(File name too long\): .*EXPERIMENT\.NAME"
    ):
        build_run(config(tmp_path, "n" * 300))
    (tmp_path / "distill" / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        build_run(config(tmp_path, "run"))


def test_the_precision_of_a_cache_is_part_of_the_name_if_a_cache_is_used(tmp_path: Path) -> None:
    def name(*overrides: str) -> str:
        common = [f"LOG.PREFIX={tmp_path}", "EXPERIMENT.TAG=t", "DISTILLER.TYPE=KD"]
        return run_folder(load_config(None, [*common, *overrides])).name

    half = "DISTILLER.TEACHER_CACHE_PRECISION=fp16"
    assert "PRECISION" not in name(half)
    assert f",{half}" in name(half, "DISTILLER.TEACHER_CACHE=lazy")


def test_a_signal_to_the_process_group_saves_the_state_despite_workers(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(64):
        path = (
            tmp_path / "tree" / ("train", "val")[number % 2] / str(number // 2 % 2) / f"{number}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()).save(path)
    command = [
        sys.executable, "tools/train.py", "--cfg", "configs/digits/vanilla_resnet8.yaml", "DATASET.TYPE=image_folder",
        f"DATASET.ROOT={tmp_path / 'tree'}", "DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "DATASET.NUM_WORKERS=1",
        "SOLVER.BATCH_SIZE=4", "SOLVER.EPOCHS=100000", f"LOG.PREFIX={tmp_path}", "EXPERIMENT.NAME=run",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM; the state is saved" in output[1]
    (state,) = (load(path) for path in tmp_path.rglob(LATEST))
    assert state["epoch"] >= 2
    assert [path.name for path in (tmp_path / "digits" / "run").glob(".*")] == [
        ".lock"
    ]  # no partial files
