"""Real runs of a small table, and their ledger. A smoke run has two epochs."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import wait_for
from short_runs import few_digits

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump, load_config
from mdistiller_norm.engine.checkpoint import load, load_into, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher_file import find_teacher
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce import ledger as ledgers
from mdistiller_norm.reproduce.ledger import read_ledger, signed_record, write_record
from mdistiller_norm.reproduce.plan import cell_config, cell_identity, make_plan
from mdistiller_norm.reproduce.runner import pending_jobs
from mdistiller_norm.reproduce.tables import TABLES
from mdistiller_norm.run import train

CELLS = TABLES["digits"].cells
SMOKE = "--table digits --smoke --output"
KD = "--methods kd --trials 1"


def reproduce(arguments, code=0):
    """Run the command in this process, its trainings in others; check its exit code and return its output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert execute(["reproduce", *shlex.split(arguments)]) == code, output.getvalue()
    return output.getvalue()


def smoke(output, arguments, code=0):
    return reproduce(f"{SMOKE} {output} {arguments}", code)


def ledger_of(output):
    return read_ledger(output / "smoke" / "results" / "runs", smoke=True)


def jobs_of(output, method, *extra):
    return make_plan([CELLS[method, "res20_res8"]], [0], output / "smoke", True, extra, False)


@pytest.fixture(scope="session")
def trained(once):
    """An output folder with a finished teacher and one student, trained in this process."""

    def fill(folder):
        for job in jobs_of(folder, "kd"):
            train(load_config(job.config_file, job.overrides), dataset=few_digits(64))
        smoke(folder, KD)

    return once("trained", fill)


@pytest.fixture
def output(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "output")


@pytest.mark.slow
def test_a_table_that_is_stopped_and_killed_resumes_and_repeats_no_epoch(tmp_path, capfd):
    (job,) = jobs_of(tmp_path, "student")
    arguments = "--methods student --seeds 0 LOG.CHECKPOINT_STEPS=4"

    def start():
        process = multiprocessing.get_context("fork").Process(
            target=lambda: sys.exit(execute(f"reproduce {SMOKE} {tmp_path} {arguments}".split()))
        )
        process.start()
        return process

    printed = smoke(tmp_path, f"{arguments} --budget 1s", 3)
    assert "1 run left" in printed
    stopped = start()
    wait_for(lambda: read_metrics(job.folder / "metrics.jsonl"))
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join()
    assert stopped.exitcode == 128 + signal.SIGTERM
    assert "digits/vanilla,resnet8: stopped, 1 of 2 epochs done" in capfd.readouterr().out
    (job.folder / "latest.prev.pt").unlink()
    killed = start()
    wait_for((job.folder / "latest.prev.pt").exists)
    killed.kill()  # the training continues
    killed.join()
    printed = smoke(tmp_path, arguments)
    assert "1 done, 0 failed, 0 waiting for a teacher" in printed
    done = r"] digits/vanilla,resnet8: .*, last top-1 \d+\.\d\d, best top-1 \d+\.\d\d\n"
    assert re.search(done, printed)
    assert "1 run: 1 done, 0 to run" in smoke(tmp_path, arguments)
    (entry,) = ledger_of(tmp_path).all_runs()
    assert entry.record["metrics"]["epoch"] == [1, 2]
    log = (job.folder / "worklog.txt").read_text()
    assert re.findall(r"^epoch (\d)/2:", log, re.MULTILINE) == ["1", "2"]


@pytest.mark.slow
def test_a_failure_is_recorded_and_stops_only_the_students_of_that_teacher(trained, tmp_path):
    teacher, finished = (jobs_of(folder, "teacher")[0].folder for folder in (tmp_path, trained))
    teacher.mkdir(parents=True)
    shutil.copy(finished / "config.yaml", teacher)
    (teacher / "latest.pt").write_bytes(b"not a checkpoint")
    printed = smoke(tmp_path, "--methods kd student --seeds 0", 1)
    assert "1 done, 1 failed, 1 waiting for a teacher" in printed
    assert "[seed 0] digits/kd,resnet20,resnet8: not started, its teacher failed" in printed
    (failure,) = ledger_of(tmp_path).failures
    assert re.fullmatch(r"error: .*\(exit code 2\)", failure.record["error"])
    execute(["report", "--smoke", "--output", str(tmp_path)])
    tables = tmp_path / "smoke" / "results" / "TABLES.md"
    assert "| Teacher | failed |" in tables.read_text()
    shutil.rmtree(teacher)
    shutil.copytree(finished.parent, teacher.parent, dirs_exist_ok=True)
    smoke(tmp_path, f"--add {teacher}")
    assert not ledger_of(tmp_path).failures
    weights = load(teacher / "student_last.pt")
    weights["model"]["fc.bias"] += 1  # trained again
    torch.save(weights, teacher / "student_last.pt")
    assert "cannot be resumed with another teacher" in smoke(tmp_path, KD, 1)


@pytest.mark.slow
def test_a_sweep_by_torchrun_is_evaluated_on_held_out_images_and_fills_no_cell(tmp_path):
    sweep = "--sweep SOLVER.MOMENTUM=0.8 --trials 1 --processes 2"
    printed = smoke(tmp_path, f"--methods student teacher {sweep}")
    line = r"  table digits, Student with SOLVER.MOMENTUM = 0.8, .* \(n = 1\) on held-out images"
    assert re.search(line, printed)
    (entry,) = ledger_of(tmp_path).all_runs()
    record = entry.record
    assert (record["config"]["DATASET"]["VAL_SPLIT"], record["processes"]) == (0.1, 2)
    assert record["config"]["SOLVER"]["MOMENTUM"] == 0.8
    start = "torchrun --standalone --nproc-per-node 2 -m mdistiller_norm train --cfg "
    assert record["command"].startswith(start)
    assert entry.identity != cell_identity(CELLS["student", "res20_res8"], smoke=True)


def test_slurm_jobs_have_the_options_and_depend_on_their_teacher(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\nn=$(ls {tmp_path}/*.sh 2>/dev/null | wc -l)\n"
            f'for last; do :; done\ncp "$last" {tmp_path}/$n.sh\necho "Submitted batch job $n"\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    constraint = "'slurm_additional_parameters={constraint: a100}'"
    arguments = f"{KD} --launcher slurm --slurm {constraint} timeout_min=7"
    assert "2 runs queued on Slurm" in smoke(tmp_path / "output", arguments, 3)
    teacher, student = ((tmp_path / f"{n}.sh").read_text() for n in (0, 1))
    for option in ("--constraint=a100", "--time=7", "--dependency=afterok:0"):
        assert option in student
    assert "--dependency" not in teacher


def test_finished_runs_are_added_to_the_ledger_and_not_repeated(output):
    runs, folder = output / "smoke" / "results" / "runs", jobs_of(output, "kd")[-1].folder
    assert "2 runs: 2 done, 0 to run" in smoke(output, KD)
    shutil.rmtree(runs)
    (output / "smoke" / "other" / "pipe").mkdir(parents=True)
    os.mkfifo(output / "smoke" / "other" / "pipe" / "result.json")
    assert "2 runs: 2 done, 0 to run" in smoke(output, f"{KD} --dry-run")
    assert not runs.exists()
    assert "2 runs: 2 done, 0 to run" in smoke(output, KD)
    os.utime(folder / "result.json")  # as in a copy of the folder
    assert "already in the ledger" in smoke(output, f"--add {folder}")
    assert len(list(runs.glob("*.json"))) == 2


def test_teachers_run_only_for_pending_students_and_once_for_all_precisions(output):
    ledger, (teacher, student) = ledger_of(output), jobs_of(output, "kd")
    _, elsewhere = jobs = jobs_of(output.parent / "elsewhere", "kd")
    assert pending_jobs(jobs, ledger) == []
    jobs = jobs_of(output.parent / "elsewhere", "normkd")
    assert pending_jobs([*jobs, elsewhere], ledger) == jobs
    (run,) = ledger.of(student.key[0]).values()
    assert student.teacher_hash() == run.teacher_hash
    record = run.record | {"teacher": run.record["teacher"] | {"hash": "f" * 64}}
    other = dataclasses.replace(run, record=record)
    one = ledgers.Ledger({(run.identity, other.teacher_hash): {0: other}})
    assert pending_jobs([teacher, student], one) == [student]
    teacher, student = jobs_of(output, "dkd", "SOLVER.PRECISION=bf16")
    assert teacher.folder == jobs_of(output, "teacher")[0].folder
    assert f"DISTILLER.TEACHER_WEIGHTS={teacher.weights}" in student.overrides
    assert "SOLVER.PRECISION=bf16" in str(student.folder)
    assert pending_jobs([teacher, student], ledger) == [student]
    teacher.weights.unlink()
    assert pending_jobs([teacher, student], ledger) == [teacher, student]


def test_a_record_holds_the_run_and_no_path_of_the_machine(trained, tmp_path):
    ledger, folder = ledger_of(trained), jobs_of(trained, "kd")[-1].folder
    (entry,) = ledger.of(cell_identity(CELLS["kd", "res20_res8"], smoke=True)).values()
    record, result = entry.record, json.loads((folder / "result.json").read_text())
    for key in ("last", "best", "seconds", "extra_parameters", "environment"):
        assert record[key] == result[key]
    assert (record["smoke"], record["config_file"]) == (True, "configs/digits/kd.yaml")
    assert record["data"] == load(folder / "latest.pt")["identity"]["data"]
    assert str(trained) not in json.dumps(record)
    assert record["config"]["LOG"]["PREFIX"] == "smoke"
    assert not read_ledger(entry.path.parent).all_runs(), "smoke runs must not fill cells"
    # Ledgers merge by copying; each seed counts once.
    record = ledgers.finished_run(folder, "configs/digits/kd.yaml", smoke=True).record
    assert write_record(record, tmp_path) == write_record(record, tmp_path)
    write_record(signed_record(record | {"at": "2099-01-01T00:00:00Z"}), tmp_path)
    write_record(signed_record(record | {"seed": 1}), tmp_path)
    ledger = read_ledger(tmp_path, smoke=True)
    assert sorted(entry.record["seed"] for entry in ledger.all_runs()) == [0, 1]
    assert [entry.record["at"] for entry in ledger.duplicates] == ["2099-01-01T00:00:00Z"]


def test_invalid_files_are_ignored_with_a_reason(output):
    good = next(entry for entry in ledger_of(output).all_runs() if entry.record["method"])
    text, record, folder = good.path.read_text(), good.record, good.path.parent

    def signed(key, **values):
        return json.dumps(signed_record(record | {key: record[key] | values}))

    cases = {
        "cut": (text[:500], "malformed (JSONDecodeError"),
        "edited": (text.replace('"seed": 0', '"seed": 5'), "sha256 differs"),
        "list": ("[]", "format is missing"),
        "deep": ("[" * 100_000, "malformed (RecursionError"),
        "huge": (text.replace('"seed": 0', f'"seed": {10**400}'), "not finite or too large"),
        "teacher": (signed("teacher", hash=None), "hash must be str, got None"),
        "future": (text.replace('"format": 1', '"format": 2'), "format must be 1, got 2"),
        "better": (signed("best", top1=99.9), "best top1 99.9 differs"),
        "metric": (signed("metrics", test_loss=[1e300, 1]), "does not have 2 numbers"),
        "short": (signed("metrics", epoch=[1, 1]), "do not cover the epochs 1 to SOLVER"),
    }
    for name, (content, _) in cases.items():
        (folder / f"{name}.json").write_text(content)
    os.mkfifo(folder / "pipe.json")
    ledger = ledger_of(output)
    reasons = {path.stem: reason for path, reason in ledger.left_out}
    assert "not a regular file" in reasons.pop("pipe")
    assert reasons.keys() == cases.keys()
    for name, reason in reasons.items():
        assert cases[name][1] in reason
    assert len(ledger.all_runs()) == 2
    assert "edited.json is ignored" in smoke(output, KD)


@pytest.mark.slow
def test_published_weights_become_teachers_if_trained_alone(trained, tmp_path, monkeypatch):
    """With run folders as after 240 epochs: made-up numbers, weights of an untrained network."""
    network, other = build_model("resnet8x4", 100), jobs_of(trained, "kd")[-1].folder
    weights = {"model": network.state_dict(), "about": {"name": "resnet8x4"}}

    def run(row, method):
        config = cell_config(TABLES["2"].cells[row, "res32x4_res8x4"])
        last = {"epoch": 240, "top1": 72.5, "top5": 92.0, "loss": 1.0}
        result = json.loads((other / "result.json").read_text())
        result |= {"config": yaml.safe_load(dump(config.node)), "last": last, "best": last}
        result |= {"method": method, "student": "resnet8x4", "epochs": 240, "dataset": "cifar100"}
        folder = tmp_path / row
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        metrics = {"test_top1": 72.5, "loss_total": 1.0, "images_per_second": 1.0}
        lines = [json.dumps({"epoch": i} | metrics) for i in range(1, 241)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        torch.save(weights, folder / "student_last.pt")
        return folder

    monkeypatch.chdir(tmp_path)
    runs = run("kd", ["KD"]), run("student", [])
    reproduce(f"--publish {runs[0]} {runs[1]}")
    teacher = find_teacher("resnet8x4", "cifar100", "", tmp_path, "")
    assert (teacher.path, teacher.top1) == (Path("checkpoints/resnet8x4_cifar100_seed0.pt"), 72.5)
    again, images = build_model("resnet8x4", 100), torch.randn(4, 3, 32, 32)
    load_into(again, load_weights(teacher.path), "resnet8x4")
    torch.testing.assert_close(again.eval()(images), network.eval()(images), rtol=0.02, atol=0.02)
