"""Real runs of a small table, and their ledger. A smoke run has two epochs and takes a few seconds."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Once, wait_for

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump, load_config
from mdistiller_norm.engine.checkpoint import load, load_into, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher_file import find_teacher
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce import plan
from mdistiller_norm.reproduce.ledger import (
    Ledger,
    finished_run,
    read_ledger,
    signed_record,
    write_record,
)
from mdistiller_norm.reproduce.plan import Job, cell_config, cell_identity, make_plan
from mdistiller_norm.reproduce.runner import Execution, pending_jobs
from mdistiller_norm.reproduce.tables import TABLES


def reproduce(*arguments: object) -> tuple[int, str]:
    """Run the command in this process, its trainings in others; return exit code and output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = execute(["reproduce", *map(str, arguments)])
    return code, output.getvalue()


def smoke(output: Path, *arguments: object) -> tuple[int, str]:
    return reproduce("--table", "digits", "--smoke", "--output", output, *arguments)


def ledger_of(output: Path) -> Ledger:
    return read_ledger(output / "smoke" / "results" / "runs", smoke=True)


def jobs_of(output: Path, method: str, *extra: str, seed: int = 0) -> list[Job]:
    cell = TABLES["digits"].cells[method, "res20_res8"]
    return make_plan([cell], [seed], output / "smoke", True, extra, False)


@pytest.fixture(scope="session")
def trained(once: Once) -> Path:
    """An output folder with a finished teacher and one student, trained in this process."""

    def train(folder: Path) -> None:
        for job in jobs_of(folder, "kd"):
            assert execute(["train", "--cfg", job.config_file, *job.overrides]) == 0
        smoke(folder, "--methods", "kd", "--trials", 1)

    return once("trained", train)


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained`` that a test may change."""
    shutil.copytree(trained, tmp_path / "output")
    return tmp_path / "output"


@pytest.mark.slow
def test_a_table_that_is_stopped_and_killed_resumes_and_repeats_no_epoch(tmp_path, monkeypatch):
    often = "LOG.CHECKPOINT_STEPS=4"
    (job,) = jobs_of(tmp_path, "student", often)
    arguments = ["--table", "digits", "--methods", "student", "--seeds", "0", "--smoke", often]
    arguments += ["--output", str(tmp_path)]
    latest, previous = (job.folder / name for name in ("latest.pt", "latest.prev.pt"))
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *arguments]

    stopped = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: read_metrics(job.folder / "metrics.jsonl"))
    stopped.send_signal(signal.SIGTERM)
    printed, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "1/1 [seed 0] digits/vanilla,resnet8: stopped, 1 of 2 epochs done" in printed
    assert "1 run left, about" in printed

    monkeypatch.setattr("mdistiller_norm.reproduce.runner.GRACE", 0.5)
    execution = Execution(job, tmp_path / "smoke" / "results", 1, {})
    previous.unlink()
    assert execution.start()
    assert execution.process is not None
    wait_for(lambda: latest.exists() and previous.exists())
    os.kill(execution.process.pid, signal.SIGSTOP)  # like a long evaluation at the deadline
    execution.stop(kill=True)
    wait_for(execution.poll)
    assert execution.process.returncode == -signal.SIGKILL

    previous.unlink()
    killed = multiprocessing.get_context("fork").Process(target=reproduce, args=arguments)
    killed.start()
    wait_for(lambda: latest.exists() and previous.exists())
    killed.kill()  # the training continues
    killed.join()

    code, printed = reproduce(*arguments)
    assert code == 0
    assert "1 done, 0 failed, 0 waiting for a teacher" in printed
    top1 = r"last top-1 \d+\.\d\d, best"
    assert re.search(rf"\] digits/vanilla,resnet8: .*, {top1} top-1 \d+\.\d\d\n", printed)
    assert re.search(rf"  table digits, Student, .*: {top1} .* \(n = 1\)\n", printed)
    assert f"report: mdistiller-norm report --results {execution.folder} --smoke\n" in printed
    assert "1 run: 1 done, 0 to run" in reproduce(*arguments)[1]
    (entry,) = ledger_of(tmp_path).all_runs()
    assert entry.record["metrics"]["epoch"] == [1, 2]
    log = (job.folder / "worklog.txt").read_text()
    assert re.findall(r"^epoch (\d)/2:", log, re.MULTILINE) == ["1", "2"]


@pytest.mark.slow
def test_a_failure_is_recorded_and_stops_only_the_students_of_that_teacher(trained, tmp_path):
    teacher, finished = (jobs_of(folder, "teacher")[0].folder for folder in (tmp_path, trained))
    teacher.mkdir(parents=True)
    (teacher / "config.yaml").write_text(dump(load_config(finished / "config.yaml").node))
    (teacher / "latest.pt").write_bytes(b"not a checkpoint")
    rows = ["--methods", "kd", "student", "--seeds", 0]
    code, printed = smoke(tmp_path, *rows)
    assert code == 1
    assert "1 done, 1 failed, 1 waiting for a teacher" in printed
    assert "[seed 0] digits/kd,resnet20,resnet8: not started, its teacher failed" in printed
    (failure,) = ledger_of(tmp_path).failures
    assert re.fullmatch(r"error: .*\(exit code 2\)", failure.record["error"])
    assert failure.record["log"]
    execute(["report", "--smoke", "--output", str(tmp_path)])
    text = (tmp_path / "smoke" / "results" / "TABLES.md").read_text()
    assert "| Teacher | failed |" in text
    assert "Smoke runs" in text

    shutil.rmtree(teacher)
    shutil.copytree(finished, teacher)
    assert "3 runs: 2 done, 1 to run" in smoke(tmp_path, *rows, "--dry-run")[1]
    smoke(tmp_path, "--add", teacher)
    assert not ledger_of(tmp_path).failures


@pytest.mark.slow
def test_a_budget_stops_the_runs_in_time(tmp_path: Path) -> None:
    started = time.monotonic()
    code, printed = smoke(tmp_path, "--methods", "kd", "--trials", 2, "--budget", "2s")
    assert code == 3, printed
    assert time.monotonic() - started < 60
    assert "3 runs left" in printed
    assert "repeat the command to resume" in printed


@pytest.mark.slow
def test_a_sweep_by_torchrun_is_evaluated_on_held_out_images_and_fills_no_cell(
    tmp_path: Path,
) -> None:
    options = ["--methods", "student", "teacher", "--sweep", "SOLVER.MOMENTUM=0.8", "--trials", 1]
    code, printed = smoke(tmp_path, *options, "--processes", 2)
    assert code == 0
    line = "  table digits, Student with SOLVER.MOMENTUM = 0.8, .* \\(n = 1\\) on held-out images"
    assert re.search(line, printed)
    entries = ledger_of(tmp_path).all_runs()
    (record,) = (entry.record for entry in entries)
    assert (record["config"]["DATASET"]["VAL_SPLIT"], record["processes"]) == (0.1, 2)
    assert record["config"]["SOLVER"]["MOMENTUM"] == 0.8
    start = "torchrun --standalone --nproc-per-node 2 -m mdistiller_norm train --cfg "
    assert record["command"].startswith(start)
    cell = TABLES["digits"].cells["student", "res20_res8"]
    assert cell_identity(cell, smoke=True) not in {entry.identity for entry in entries}


@pytest.mark.slow
def test_submitit_runs_jobs_after_their_teacher(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    options = ["--launcher", "submitit-local", "--slurm", "timeout_min=5"]
    _, printed = smoke(tmp_path, "--methods", "kd", "--trials", 1, *options)
    assert printed.count("submitted as") == 2
    assert "2 done, 0 failed" in printed
    assert len(ledger_of(tmp_path).all_runs()) == 2


def test_slurm_jobs_have_the_options_and_depend_on_their_teacher(tmp_path, monkeypatch):
    """With programs in place of Slurm's that copy their input."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\nn=$(ls {tmp_path}/*.sh 2>/dev/null | wc -l)\n"
            f'for last; do :; done\ncp "$last" {tmp_path}/$n.sh\necho "Submitted batch job $n"\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    constraint = "slurm_additional_parameters={constraint: a100}"
    slurm = ["--launcher", "slurm", "--slurm", constraint, "timeout_min=7"]
    code, printed = smoke(tmp_path / "output", "--methods", "kd", "--trials", 1, *slurm)
    assert code == 3
    assert "2 runs queued on Slurm" in printed
    teacher, student = ((tmp_path / f"{n}.sh").read_text() for n in (0, 1))
    assert all(
        "--constraint=a100" in script and "--time=7" in script for script in (teacher, student)
    )
    assert "--dependency=afterok:0" in student
    assert "--dependency" not in teacher
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match=r"--launcher slurm: .* \(0 jobs submitted\)"):
        smoke(tmp_path / "output", "--methods", "kd", "--trials", 1, *slurm)


def test_finished_runs_are_added_to_the_ledger_and_not_repeated(output: Path) -> None:
    runs, folder = output / "smoke" / "results" / "runs", jobs_of(output, "kd")[-1].folder
    assert "2 runs: 2 done, 0 to run" in smoke(output, "--methods", "kd", "--trials", 1)[1]
    shutil.rmtree(runs)
    huge = json.dumps(json.loads((folder / "result.json").read_text()) | {"seed": 10**400})
    # Result files of other programs.
    for i, content in enumerate(("[" * 100_000, '{"config": 1}', huge, '{"epochs": 1e999}')):
        (output / "smoke" / "other" / str(i)).mkdir(parents=True)
        (output / "smoke" / "other" / str(i) / "result.json").write_text(content)
    (output / "smoke" / "other" / "pipe").mkdir()
    os.mkfifo(output / "smoke" / "other" / "pipe" / "result.json")
    arguments = ("--methods", "kd", "teacher", "--trials", 1)
    assert "2 runs: 2 done, 0 to run" in smoke(output, *arguments, "--dry-run")[1]
    assert not runs.exists()
    assert "2 runs: 2 done, 0 to run" in smoke(output, *arguments)[1]
    os.utime(folder / "result.json")  # as in a copy of the folder
    assert "already in the ledger" in smoke(output, "--add", folder)[1]
    assert len(list(runs.glob("*.json"))) == 2


def test_estimates_prefer_runs_like_the_job(output: Path) -> None:
    entries = ledger_of(output).all_runs()
    kd = next(entry for entry in entries if entry.record["method"] == ["KD"]).record
    job = jobs_of(output, "dkd")[-1]
    seconds, source = plan.estimate(job, [kd]) or (0.0, "")
    assert source == "finished runs of the same networks"
    start = seconds - kd["seconds"]
    assert 0 < start < 10
    assert plan.estimate(job, []) is None
    assert plan.estimate(jobs_of(output, "dkd", "SOLVER.PRECISION=bf16")[-1], [kd]) is None
    large = load_config("cifar100/vanilla/resnet56").node
    record = kd | {"config": large, "seconds": plan.training_flops(large) / 5e11, "epochs": 240}
    counted = pytest.approx(start + plan.training_flops(job.config) / 5e11)
    assert plan.estimate(job, [record]) == (counted, "operation counts")
    job.folder.mkdir()
    (job.folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 100.0}\n')
    assert plan.estimate(job, [kd]) == (start + 100, "the run's speed so far")


def test_teachers_run_only_for_pending_students_and_once_for_all_precisions(output: Path) -> None:
    ledger, elsewhere = ledger_of(output), output.parent / "another machine"
    cells = [TABLES["digits"].cells[row, "res20_res8"] for row in ("kd", "normkd")]
    assert pending_jobs(make_plan(cells[:1], [0], elsewhere, True, (), False), ledger) == []
    pending = pending_jobs(make_plan(cells, [0], elsewhere, True, (), False), ledger)
    files = [f"configs/digits/{name}.yaml" for name in ("vanilla_resnet20", "normkd")]
    assert [job.config_file for job in pending] == files
    teacher, student = jobs_of(output, "kd")
    (run,) = ledger.of(student.key[0]).values()
    assert student.teacher_hash() == run.teacher_hash
    assert pending_jobs([teacher, student], ledger) == []
    other = dataclasses.replace(run, record=run.record | {"teacher": {"hash": "f" * 64}})
    one = Ledger({(run.identity, other.teacher_hash): {0: other}})
    assert pending_jobs([teacher, student], one) == [student]
    teacher, student = jobs_of(output, "dkd", "SOLVER.PRECISION=bf16")
    assert teacher.folder == jobs_of(output, "teacher")[0].folder
    assert f"DISTILLER.TEACHER_WEIGHTS={teacher.weights}" in student.overrides
    assert "SOLVER.PRECISION=bf16" in str(student.folder)
    assert pending_jobs([teacher, student], ledger) == [student]
    teacher.weights.unlink()
    assert pending_jobs([teacher, student], ledger) == [teacher, student]


def test_a_record_holds_the_run_and_no_path_of_the_machine(trained: Path, tmp_path: Path) -> None:
    ledger, folder = ledger_of(trained), jobs_of(trained, "kd")[-1].folder
    cell = TABLES["digits"].cells["kd", "res20_res8"]
    (entry,) = ledger.of(cell_identity(cell, smoke=True)).values()
    record, result = entry.record, json.loads((folder / "result.json").read_text())
    for key in ("last", "best", "seconds", "extra_parameters", "environment"):
        assert record[key] == result[key]
    assert (record["smoke"], record["config_file"]) == (True, "configs/digits/kd.yaml")
    assert record["data"] == load(folder / "latest.pt")["identity"]["data"]
    assert record["metrics"]["epoch"] == [1, 2]
    assert str(trained) not in json.dumps(record)
    assert record["config"]["LOG"]["PREFIX"] == "smoke"
    assert record["teacher"]["file"].startswith("smoke/digits")
    assert not read_ledger(entry.path.parent).all_runs(), "smoke runs must not fill cells"
    assert reproduce("--add", folder, "--smoke", "--results", tmp_path)[0] == 0
    (entry,) = read_ledger(tmp_path / "runs", smoke=True).all_runs()
    assert entry.record["method"] == ["KD"]


def test_invalid_files_are_ignored_with_a_reason(output: Path) -> None:
    good = next(entry for entry in ledger_of(output).all_runs() if entry.record["method"])
    record, folder = good.record, good.path.parent
    text, metrics = good.path.read_text(), record["metrics"]

    def changed(**values: Any) -> str:
        return json.dumps(signed_record(record | values))

    cases = {
        "cut": (text[:500], "malformed (JSONDecodeError"),
        "edited": (text.replace('"seed": 0', '"seed": 5'), "sha256 differs"),
        "list": ("[]", "format is missing"),
        "missing": (changed(metrics={}), "metrics.test_top1 is missing"),
        "deep": ("[" * 100_000, "malformed (RecursionError"),
        "metric": (
            changed(metrics=metrics | {"test_loss": [1e300, 1]}),
            "does not have 2 numbers",
        ),
        "huge": (changed(seed=10**400), "not finite or too large"),
        "digits": (text.replace('"seed": 0', f'"seed": {"9" * 5000}'), "malformed (ValueError"),
        "infinite": (
            changed(last=record["last"] | {"top1": float("inf")}),
            "not finite or too large",
        ),
        "teacher": (
            changed(teacher=record["teacher"] | {"hash": None}),
            "hash must be str, got None",
        ),
        "type": (changed(seed="0"), "seed must be int, got '0'"),
        "future": (changed(format=2), "format must be 1, got 2"),
        "better": (changed(best=record["best"] | {"top1": 99.9}), "best top1 99.9 differs"),
        "short": (
            changed(metrics=metrics | {"epoch": [1, 1]}),
            "do not cover the epochs 1 to SOLVER",
        ),
        "schedule": (changed(epochs=3), "does not have 3 numbers"),
    }
    for name, (content, _) in cases.items():
        (folder / f"{name}.json").write_text(content)
    os.mkfifo(folder / "pipe.json")
    ledger = ledger_of(output)
    reasons = {path.stem: reason for path, reason in ledger.left_out}
    assert "not a regular file" in reasons.pop("pipe")
    assert reasons.keys() == cases.keys()
    for name, reason in reasons.items():
        assert cases[name][1] in reason, name
    assert len(ledger.all_runs()) == 2
    assert "edited.json is ignored" in smoke(output, "--methods", "kd", "--trials", 1)[1]


def test_ledgers_merge_by_copying_and_each_seed_counts_once(
    trained: Path, tmp_path: Path
) -> None:
    folder = jobs_of(trained, "kd")[-1].folder
    record = finished_run(folder, "configs/digits/kd.yaml", smoke=True).record
    first = write_record(record, tmp_path)
    assert write_record(record, tmp_path) == first
    write_record(signed_record(record | {"at": "2099-01-01T00:00:00Z"}), tmp_path)
    write_record(signed_record(record | {"seed": 1}), tmp_path)
    ledger = read_ledger(tmp_path, smoke=True)
    assert sorted(entry.record["seed"] for entry in ledger.all_runs()) == [0, 1]
    assert [entry.record["at"] for entry in ledger.duplicates] == ["2099-01-01T00:00:00Z"]


def test_published_weights_become_teachers_if_trained_alone(trained, tmp_path, monkeypatch):
    """With run folders as after 240 epochs: made-up numbers, weights of an untrained network."""
    network = build_model("resnet8x4", 100)

    def run(method: str) -> Path:
        config = cell_config(TABLES["2"].cells[method, "res32x4_res8x4"])
        assert config is not None
        last = {"epoch": 240, "top1": 72.5, "top5": 92.0, "loss": 1.0}
        result = json.loads((jobs_of(trained, "kd")[-1].folder / "result.json").read_text())
        result |= {
            "config": yaml.safe_load(dump(config.node)),
            "epochs": 240,
            "dataset": "cifar100",
        }
        result |= {"method": [] if method == "student" else ["KD"], "student": "resnet8x4"}
        result |= {"last": last, "best": last}
        folder = tmp_path / method
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        metrics = {"test_top1": 72.5, "loss_total": 1.0, "images_per_second": 1.0}
        lines = [json.dumps({"epoch": i} | metrics) for i in range(1, 241)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        weights = {"model": network.state_dict(), "about": {"name": "resnet8x4"}}
        torch.save(weights, folder / "student_last.pt")
        return folder

    monkeypatch.chdir(tmp_path)
    runs = run("kd"), run("student")
    assert "published checkpoints/resnet8x4_cifar100_seed0.pt" in reproduce("--publish", *runs)[1]
    teacher = find_teacher("resnet8x4", "cifar100", "", tmp_path, "")
    assert teacher.path == Path("checkpoints/resnet8x4_cifar100_seed0.pt")
    assert teacher.top1 == 72.5
    assert teacher.path.stat().st_size < 0.6 * (runs[1] / "student_last.pt").stat().st_size
    weights, again = load_weights(teacher.path), build_model("resnet8x4", 100)
    load_into(again, weights, "resnet8x4")
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), network.eval()(images), rtol=0.02, atol=0.02)
    assert (
        "| KD | 73.33 | 72.50 | 72.50 | 1 |" in (tmp_path / "results" / "TABLES.md").read_text()
    )
    other = jobs_of(trained, "kd")[-1].folder
    for folder, message in ((runs[0], "exists"), (other, "does not fill a cell")):
        with pytest.raises(ConfigError, match=message):
            reproduce("--publish", folder)
    manifest = tmp_path / "checkpoints" / "manifest.yaml"
    manifest.write_text(manifest.read_text().replace("resnet8x4", "resnet32x4"))
    with pytest.raises(CheckpointError):  # instead of 240 epochs of training
        reproduce("--table", 6, "--dry-run")
