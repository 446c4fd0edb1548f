"""Whose a run folder is, and what may go on in it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, assert_user_error, tool
from short_runs import config

from mdistiller_norm.cli import run as run_tool
from mdistiller_norm.config import load_config
from mdistiller_norm.data import digits
from mdistiller_norm.engine import distributed
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.run import begin, build_run, train
from mdistiller_norm.run_folder import LATEST, run_folder


def copied(run: Path, out: Path) -> Path:
    folder = out / "distill" / "run"
    folder.mkdir(parents=True)
    for name in (LATEST, "best.pt", "config.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


def test_two_processes_do_not_train_in_one_folder(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    holder = build_run(config(tmp_path, "run", epochs=2), resume=True)  # holds the folder while its log is open
    before = (folder / "metrics.jsonl").read_text()
    again = ["--cfg", folder / "config.yaml", "--resume", "SOLVER.EPOCHS", 2]
    done = tool("train", *again, check=False)
    assert_user_error(done, f"another process is training in {folder}", "EXPERIMENT.NAME")
    assert (folder / "metrics.jsonl").read_text() == before
    holder.trainer.log.close()
    assert "done: last top-1" in tool("train", *again).stdout


def test_a_run_goes_on_with_its_own_data_only(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    changed = digits()
    changed.train.images[0, 0, 0, 0] += 1
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="was run with another data: it cannot be resumed"):
        build_run(config(tmp_path, "run", epochs=2), resume=True, dataset=changed)
    assert (folder / "config.yaml").read_bytes() == before


def test_a_run_goes_on_in_its_own_precision_only(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    state = load(folder / LATEST)
    assert state["identity"]["precision"] == "fp32"
    torch.save(state | {"identity": state["identity"] | {"precision": "bf16"}}, folder / LATEST)
    with pytest.raises(ConfigError, match=r"another precision \(bf16, now fp32\)"):
        build_run(config(tmp_path, "run", epochs=2), resume=True)


def test_states_that_know_less_of_themselves_go_on(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    state = load(folder / LATEST)
    torch.save(state | {"identity": {"teacher": ""}}, folder / LATEST)
    assert train(config(tmp_path, "run", epochs=2), resume=True)["last"]["epoch"] == 2


def test_fewer_epochs_than_were_trained_are_refused(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    train(config(tmp_path, "run", epochs=2), resume=True)
    assert yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]["EPOCHS"] == 2
    before = (folder / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=r"2 epochs behind it already: SOLVER\.EPOCHS 1 is too few"):
        train(config(tmp_path, "run", epochs=1), resume=True)
    assert (folder / "result.json").read_bytes() == before


def test_a_finished_run_keeps_the_record_of_who_trained_it(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    kept = {name: (run / name).read_bytes() for name in ("result.json", "environment.json")}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    result = train(config(tmp_path, "run", epochs=1), resume=True, command=["another"])
    assert result == json.loads(kept["result.json"])
    assert {name: (folder / name).read_bytes() for name in kept} == kept

    longer = build_run(config(tmp_path, "run", epochs=2), resume=True)  # its weights will be others
    begin(longer)
    longer.trainer.log.close()
    assert not (folder / "result.json").exists()
    assert train(config(tmp_path, "run", epochs=2), resume=True, command=["another"])["command"] == "another"


def test_a_run_that_goes_on_elsewhere_says_where_its_parts_were_trained(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    state = load(folder / LATEST)
    (begun,) = state["parts"]
    assert begun["from_step"] == 0
    assert begun["processes"] == 1
    steps, longer = state["total_steps"], config(tmp_path, "run", epochs=2)
    elsewhere = begun | {"device": "another"}
    lost = begun | {"device": "a third", "from_step": steps}  # was stopped before its first step
    for saved, expected in (
        ([begun], [begun]),
        ([elsewhere, lost], [elsewhere, begun | {"from_step": steps}]),
        (None, [begun | {"from_step": steps}]),
    ):
        parts = {} if saved is None else {"parts": saved}
        torch.save({key: value for key, value in state.items() if key != "parts"} | parts, folder / LATEST)
        for _ in range(2):  # the second finds nothing to train
            assert train(longer, resume=True)["parts"] == expected
        assert load(folder / LATEST)["parts"] == expected
        assert json.loads((folder / "result.json").read_text())["parts"] == expected


def test_torchrun_that_starts_it_again_goes_on_with_its_own_run_only(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(run, tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for job in ("none", "a-job"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        for known in (False, True):
            (folder / ".lock").write_text(distributed.launcher() if known else "another")
            if known:
                again = build_run(config(tmp_path, "run", epochs=2))
                assert again.trainer.epoch == 2
                again.trainer.log.close()
            else:
                with pytest.raises(ConfigError, match="holds a run already"):
                    build_run(config(tmp_path, "run", epochs=2))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    with pytest.raises(ConfigError, match="holds a run already"):
        build_run(config(tmp_path, "run", epochs=2))


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"epoch": "1"}], ids=["list", "student", "words"])
def test_a_state_that_is_none_is_one_line(run: Path, tmp_path: Path, content: object) -> None:
    folder = copied(run, tmp_path)
    torch.save(content, folder / LATEST)
    with pytest.raises(CheckpointError, match=r"latest\.pt is not the state of a run"):
        build_run(config(tmp_path, "run", epochs=2), resume=True)


def test_a_state_of_other_networks_is_one_line(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    state = load(folder / LATEST)
    weights = state["trainable"] | {"student.fc.weight": torch.zeros(10, 3)}
    for key, value, words in (
        ("trainable", weights, r"size mismatch for student\.fc\.weight"),
        ("optimizer", {"state": {}, "param_groups": []}, "different number of parameter groups"),
        ("meters", {}, "Missing key"),
    ):
        torch.save(state | {key: value}, folder / LATEST)
        with pytest.raises(
            CheckpointError, match=rf"^the state in {folder} does not fit this run \(.*{words}"
        ) as caught:
            build_run(config(tmp_path, "run", epochs=2), resume=True)
        assert "\n" not in str(caught.value)


def test_a_broken_state_names_the_one_before_it(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    (folder / LATEST).write_bytes((run / LATEST).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"best\.pt is an earlier state: copy it over it"):
        build_run(config(tmp_path, "run", epochs=2), resume=True)
    (folder / LATEST).write_bytes((folder / "best.pt").read_bytes())
    assert train(config(tmp_path, "run", epochs=2), resume=True)["last"]["epoch"] == 2


def test_a_folder_without_its_config_is_one_line(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds latest\.pt and no config\.yaml"):
        build_run(config(tmp_path, "run", epochs=2), resume=True)


def test_a_result_without_its_state_is_kept(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    (folder / LATEST).unlink()
    (folder / "result.json").write_text("{}")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"holds the result of a run and no latest\.pt to go on from"):
        build_run(config(tmp_path, "run", epochs=2), resume=True)
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_mistake_found_late_does_not_take_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.ACCUMULATE 100 does not divide"):
        build_run(config(tmp_path, "run", "SOLVER.ACCUMULATE=100"))
    assert train(config(tmp_path, "run", epochs=1))["last"]["epoch"] == 1


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written \(File name too long\): .*EXPERIMENT\.NAME"):
        build_run(config(tmp_path, "n" * 300))


def test_the_precision_of_a_cache_counts_where_there_is_one(tmp_path: Path) -> None:
    def name(*overrides: str) -> str:
        common = [f"LOG.PREFIX={tmp_path}", "EXPERIMENT.TAG=t", "DISTILLER.TYPE=KD"]
        return run_folder(load_config(None, [*common, *overrides])).name

    half = "DISTILLER.TEACHER_CACHE_PRECISION=fp16"
    assert "PRECISION" not in name(half)
    assert f",{half}" in name(half, "DISTILLER.TEACHER_CACHE=lazy")


def test_a_result_says_what_precision_it_was_trained_in(tmp_path: Path) -> None:
    result = train(config(tmp_path, "run", "SOLVER.PRECISION=fp16", "DEVICE=cpu", epochs=1))
    assert result["precision"] == "fp32"  # a CPU has no fast fp16, and the run said so
    assert result["config"]["SOLVER"]["PRECISION"] == "fp16"


@pytest.mark.parametrize("name", ["metrics.jsonl", "worklog.txt", "tensorboard"])
def test_what_lies_in_the_way_is_one_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "distill" / "run"
    if name == "tensorboard":
        folder.mkdir(parents=True)
        (folder / name).write_text("")
    else:
        (folder / name).mkdir(parents=True)
    done = tool(
        "train", "--cfg", "configs/digits/vanilla_resnet8.yaml", f"LOG.PREFIX={tmp_path}", "SOLVER.EPOCHS=1",
        "SOLVER.LR_DECAY_STAGES=[]", "EXPERIMENT.PROJECT=distill", "EXPERIMENT.NAME=run", check=False,
    )  # fmt: skip
    assert_user_error(done, str(folder))


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "output/run/worklog.txt")

    assert run_tool(full) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: output/run/worklog.txt: No space left on device: free some space")
    assert said.count("\n") == 1


def test_a_signal_to_the_whole_group_saves_although_workers_read_the_images(tmp_path: Path) -> None:
    """What ``timeout``, systemd and batch systems send reaches the loader's workers, too."""
    from PIL import Image

    for split in ("train", "val"):
        for label in range(2):
            (tmp_path / "tree" / split / str(label)).mkdir(parents=True)
            for number in range(16):
                pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "tree" / split / str(label) / f"{number}.png")
    command = [
        sys.executable, "tools/train.py", "--cfg", "configs/digits/vanilla_resnet8.yaml", "DATASET.TYPE=image_folder",
        f"DATASET.ROOT={tmp_path / 'tree'}", "DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=36", "DATASET.NUM_WORKERS=1",
        "SOLVER.BATCH_SIZE=4", "SOLVER.EPOCHS=100000", f"LOG.PREFIX={tmp_path}", "EXPERIMENT.NAME=run",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM; everything is saved" in output[1]
    (state,) = (load(path) for path in tmp_path.rglob(LATEST))
    assert state["epoch"] >= 2
    assert json.loads((tmp_path / "digits" / "run" / "metrics.jsonl").read_text().splitlines()[0])["epoch"] == 1
