"""Real runs of a small table, and their ledger. A smoke run has two epochs and takes some seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import ROOT, Once, tool

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump, load_config
from mdistiller_norm.engine.checkpoint import load, load_into, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.teacher_file import find_teacher
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError
from mdistiller_norm.models import build_model
from mdistiller_norm.reproduce.estimate import Estimator
from mdistiller_norm.reproduce.execution import Execution
from mdistiller_norm.reproduce.jobs import (
    Job,
    cell_config,
    cell_identity,
    cost,
    make_plan,
)  # fmt: skip
from mdistiller_norm.reproduce.ledger import Entry, add, digest, finished_record, read_ledger
from mdistiller_norm.reproduce.runner import pending_jobs
from mdistiller_norm.reproduce.tables import load_tables

TABLES = load_tables()


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--table", "digits", "--smoke", "--output", str(folder), *more]


class Done(NamedTuple):
    """What a call of the tool's main function left."""

    returncode: int
    stdout: str


def smoke(folder: Path, *more: str) -> Done:
    """Run a smoke table in this process; its trainings are processes of their own all the same."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = execute(["reproduce", *arguments(folder, *more)])
    return Done(code, said.getvalue())


def records(folder: Path) -> list[Path]:
    return sorted((folder / "smoke" / "results" / "runs").glob("*.json"))


@pytest.fixture(scope="module")
def trained(once: Once) -> Path:
    """An output folder with a finished teacher and one student of it."""
    return once("trained", lambda folder: smoke(folder, "--methods", "kd", "--trials", "1"))


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained`` that a test may change, at a place of its own."""
    shutil.copytree(trained, tmp_path / "output")
    return tmp_path / "output"


def run_folder(output: Path, method: str, seed: int) -> Path:
    (job,) = (
        job
        for job in make_plan(TABLES["digits"].select([method]), [seed], output=output / "smoke", smoke=True).jobs
        if job.cells
    )
    return job.folder


@pytest.mark.slow
def test_a_table_that_is_killed_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    rows = ["--methods", "student", "kd", "normkd", "--seeds", "0", "1"]
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *arguments(tmp_path, *rows)]

    stopped = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(records(tmp_path)) >= 1)
    stopped.send_signal(signal.SIGTERM)  # the polite way
    said, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert re.search(r"[1-7] runs? left, about", said)

    killed = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    before = len(records(tmp_path))
    wait_for(lambda: len(records(tmp_path)) > before)
    time.sleep(1)
    killed.send_signal(signal.SIGKILL)  # its training process lives on
    killed.wait()

    assert "0 failed" in smoke(tmp_path, *rows, "--jobs", "2").stdout
    assert "7 runs: 7 done, 0 to run" in smoke(tmp_path, *rows).stdout
    assert len(records(tmp_path)) == 7  # a teacher and 3 x 2 students
    for log in (tmp_path / "smoke").glob("digits/*/worklog.txt"):
        epochs = [line.split(":")[0] for line in log.read_text().splitlines() if line.startswith("epoch ")]
        assert epochs == ["epoch 1/2", "epoch 2/2"], log
    ledger = read_ledger(tmp_path / "smoke" / "results" / "runs", smoke=True)
    hashes = {entry.record["teacher"]["hash"] for entry in ledger.all_runs() if entry.record["teacher"]}
    assert len(hashes) == 1

    tool("report", "--smoke", "--output", tmp_path)
    text = (tmp_path / "smoke" / "results" / "TABLES.md").read_text()
    assert "Smoke runs" in text
    assert "4 of 12 cells measured" in text
    assert text.count("n = 2: fewer than 3 trials") == 3  # Δ1, and the claim by last and by best epochs


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_teacher_stopped_by_somebody_else_leaves_its_students(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *arguments(tmp_path, "--methods", "kd")]
    tool_process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for((run_folder(tmp_path, "teacher", 0) / "worklog.txt").is_file)
    (training,) = Path(f"/proc/{tool_process.pid}/task/{tool_process.pid}/children").read_text().split()
    os.kill(int(training), signal.SIGTERM)
    said, _ = tool_process.communicate(timeout=60)
    assert tool_process.returncode == 3, said
    assert said.count("not run, its teacher was stopped") == 3
    assert "4 runs left, about" in said


@pytest.mark.slow
def test_nothing_trains_on_where_nobody_reads_the_output(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *arguments(tmp_path, "--methods", "teacher")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    piped = subprocess.Popen(command, cwd=ROOT, env=buffered, stdout=subprocess.PIPE)
    assert piped.stdout
    piped.stdout.close()  # noticed with the first line that is flushed: that the training was started
    assert piped.wait(timeout=120) == 1
    (lock,) = (tmp_path / "smoke" / "digits" / ".reproduce").glob("*.lock")

    def free() -> bool:
        with lock.open() as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    wait_for(free)
    assert not (run_folder(tmp_path, "teacher", 0) / "result.json").exists()


@pytest.mark.slow
def test_a_failing_cell_is_recorded_and_the_rest_goes_on(output: Path) -> None:
    broken = run_folder(output, "normkd", 0)
    broken.mkdir()
    (broken / "config.yaml").write_text(dump(load_config(run_folder(output, "kd", 0) / "config.yaml").node))
    (broken / "latest.pt").write_bytes(b"not a checkpoint")
    done = smoke(output, "--methods", "normkd", "student", "--seeds", "0")
    assert done.returncode == 1
    assert "FAILED: digits/normkd,resnet20,resnet8, seed 0: error: " in done.stdout
    assert "1 done, 1 failed" in done.stdout
    ledger = read_ledger(output / "smoke" / "results" / "runs", smoke=True)
    (failure,) = ledger.failures
    assert failure.record["error"].startswith("error: ")
    assert failure.record["error"].endswith("(exit code 2)")
    assert execute(["report", "--smoke", "--output", str(output)]) == 0
    text = (output / "smoke" / "results" / "TABLES.md").read_text()
    assert "| NormKD | failed |" in text
    assert "## Failed runs" in text

    shutil.rmtree(broken)
    assert smoke(output, "--methods", "normkd", "--seeds", "0").returncode == 0
    assert not read_ledger(output / "smoke" / "results" / "runs", smoke=True).failures


@pytest.mark.slow
def test_students_of_a_failing_teacher_are_not_run(tmp_path: Path) -> None:
    teacher = run_folder(tmp_path, "teacher", 0)
    teacher.mkdir(parents=True)
    (teacher / "config.yaml").write_text("SOLVER: nonsense\n")
    (teacher / "latest.pt").write_bytes(b"")
    done = smoke(tmp_path, "--methods", "kd", "--trials", "2")
    assert done.returncode == 1
    assert done.stdout.count("not run, its teacher failed") == 2
    assert "0 done, 1 failed, 2 without their teacher" in done.stdout


@pytest.mark.slow
def test_a_budget_stops_in_time_and_says_what_is_left(tmp_path: Path) -> None:
    started = time.monotonic()
    done = smoke(tmp_path, "--methods", "kd", "--trials", "3", "--budget", "12s")
    assert done.returncode == 3, done.stdout
    assert time.monotonic() - started < 60
    assert re.search(r"[1-4] runs? left, about", done.stdout)


@pytest.mark.slow
def test_a_run_that_does_not_stop_is_killed_only_where_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdistiller_norm.reproduce.execution.GRACE", 0.5)
    (job,) = make_plan(TABLES["digits"].select(["student"]), [0], output=tmp_path).jobs
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    for in_time in (False, True):
        execution = Execution(job, tmp_path / "runs")
        before = set(children.read_text().split())
        assert execution.start()
        (training,) = set(children.read_text().split()) - before
        done = job.epochs_done
        wait_for(lambda: job.epochs_done > done)  # noqa: B023
        os.kill(int(training), signal.SIGSTOP)  # busy with something long
        execution.stop(in_time)
        if not in_time:
            time.sleep(1)
            assert execution.poll() == "running"
            os.kill(int(training), signal.SIGCONT)
        outcomes = []
        wait_for(lambda: outcomes.append(execution.poll()) or outcomes[-1] != "running")  # noqa: B023
        assert outcomes[-1] == ("killed" if in_time else "stopped")


@pytest.mark.slow
def test_a_run_of_two_processes_stops_resumes_and_fails_like_any_other(tmp_path: Path) -> None:
    """By torchrun, on the whole schedule of a resnet8: there is time to stop it."""
    options = ["--table", "digits", "--methods", "student", "--seeds", "0", "--processes", "2",
               "--output", str(tmp_path / "output"), "--results", str(tmp_path / "results")]  # fmt: skip
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *options]
    run = tmp_path / "output" / "digits" / "vanilla,resnet8,SEED=0"

    stopped = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) > 0)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=90)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped and saved: digits/vanilla,resnet8, seed 0" in said
    assert "1 run left, about" in said

    whole = (run / "latest.pt").read_bytes()
    (run / "latest.pt").write_bytes(b"not a checkpoint")
    assert execute(["reproduce", *options]) == 1
    (failure,) = read_ledger(tmp_path / "results" / "runs").failures
    assert failure.record["error"].startswith(f"error: {run}/latest.pt")
    assert failure.record["command"].startswith("torchrun --standalone --nproc-per-node 2 tools/train.py --cfg ")

    (run / "latest.pt").write_bytes(whole)
    assert execute(["reproduce", *options]) == 0
    (entry,) = read_ledger(tmp_path / "results" / "runs").all_runs()
    assert entry.record["processes"] == 2
    assert entry.record["command"].startswith("torchrun --standalone --nproc-per-node 2 tools/train.py --cfg ")
    lines = (run / "worklog.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch ")] == [
        f"epoch {i}/12" for i in range(1, 13)
    ]
    assert sum(line.startswith("resuming") for line in lines) == 1


@pytest.mark.slow
def test_a_sweep_is_measured_on_held_out_images_and_fills_no_cell(output: Path) -> None:
    options = ["--methods", "normkd", "teacher", "--sweep", "NormKD.TEMPERATURE_NORM=1,2", "--trials", "1"]
    said = smoke(output, *options).stdout
    assert said.count("on held-out images") == 2
    swept = [e for e in read_ledger(output / "smoke" / "results" / "runs", smoke=True).all_runs()
             if e.record["config"]["DATASET"]["VAL_SPLIT"] == 0.1]  # fmt: skip
    assert {entry.record["config"]["NormKD"]["TEMPERATURE_NORM"] for entry in swept} == {1.0, 2.0}
    logs = [path.read_text() for path in output.glob("smoke/digits/*VAL_SPLIT*/worklog.txt")]
    assert len(logs) == 2
    assert all("called test here is held out of the training images: 0.1 of each class" in log for log in logs)
    cell = TABLES["digits"].cells["normkd", "res20_res8"]
    assert cell_identity(cell, smoke=True) not in {entry.identity for entry in swept}
    execute(["report", "--smoke", "--output", str(output)])
    text = (output / "smoke" / "results" / "TABLES.md").read_text()
    assert "| NormKD | pending |" in text
    for value in (1, 2):
        assert f" NormKD.TEMPERATURE_NORM={value}, seed 0: best " in text
    assert text.count("on 10% of the training set, held out") == 2


@pytest.mark.slow
def test_submitit_runs_jobs_and_waits_for_the_teacher(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: python -m pip install submitit")
    done = smoke(
        tmp_path, "--methods", "kd", "--trials", "1", "--launcher", "submitit-local", "--slurm", "timeout_min=5"
    )
    assert done.stdout.count("submitted as") == 2
    assert "2 done, 0 failed" in done.stdout
    assert len(records(tmp_path)) == 2


def test_slurm_gets_the_options_and_the_teacher_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With programs in the place of Slurm's that keep what they are given."""
    pytest.importorskip("submitit", reason="submitit is not installed: python -m pip install submitit")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(
            f"#!/bin/sh\nn=$(ls {tmp_path}/*.sh 2>/dev/null | wc -l)\n"
            f'for last; do :; done\ncp "$last" {tmp_path}/$n.sh\necho "Submitted batch job $n"\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ["--launcher", "slurm", "--slurm", "slurm_additional_parameters={constraint: a100}", "timeout_min=7"]
    assert execute(["reproduce", *arguments(tmp_path / "output", "--methods", "kd", "--trials", "1", *options)]) == 3
    assert "2 runs queued on Slurm; the same command with --dry-run says what is done" in capsys.readouterr().out
    teacher, student = ((tmp_path / f"{n}.sh").read_text() for n in (0, 1))
    for script in (teacher, student):
        assert "--constraint=a100" in script
        assert "--time=7" in script
    assert "--dependency=afterok:0" in student
    assert "--dependency" not in teacher


def test_a_job_that_slurm_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: python -m pip install submitit")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: typo' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"seed 0 cannot be submitted \(.*\); jobs before it: 0"):
        smoke(tmp_path / "output", "--methods", "kd", "--trials", "1", "--launcher", "slurm")


def test_slurm_without_slurm_is_one_line(output: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: python -m pip install submitit")
    if shutil.which("sbatch"):
        pytest.skip("this machine has Slurm")
    with pytest.raises(ConfigError, match="submitit cannot use slurm"):
        smoke(output, "--methods", "normkd", "--trials", "1", "--launcher", "slurm")


def test_what_is_finished_is_not_run_again(output: Path) -> None:
    assert "2 runs: 2 done, 0 to run" in smoke(output, "--methods", "kd", "--trials", "1").stdout
    for path in records(output):
        path.unlink()
    # The run folders are still there: they are taken into the ledger, not run again.
    again = smoke(output, "--methods", "kd", "teacher", "--trials", "1")
    assert "2 runs: 2 done, 0 to run" in again.stdout
    assert len(records(output)) == 2
    os.utime(run_folder(output, "kd", 0) / "result.json")  # as a copy of the folder would have it
    smoke(output, "--methods", "kd", "--trials", "1")
    assert len(records(output)) == 2, "one run is one record"


def test_estimates_prefer_what_was_measured(output: Path) -> None:
    entries = read_ledger(output / "smoke" / "results" / "runs", smoke=True).all_runs()
    kd = next(entry for entry in entries if entry.record["method"] == ["KD"]).record
    cpu = torch.device("cpu")

    def job(method: str, seed: int, *extra: str) -> Job:
        plan = make_plan(
            TABLES["digits"].select([method]), [seed], output=output / "smoke", smoke=True, extra=list(extra)
        )
        return plan.jobs[-1]

    estimator = Estimator(entries, cpu)
    start = estimator.of(job("kd", 1)).seconds - kd["seconds"]
    assert 0 < start < 10
    assert estimator.of(job("kd", 1)).source == "finished runs of other seeds"
    assert estimator.of(job("dkd", 0)) == (start + kd["seconds"], "finished runs of the same networks")
    begun = job("kd", 1)
    begun.folder.mkdir()
    (begun.folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 100.0}\n')
    assert estimator.of(begun) == (start + 100, "its own pace so far")
    (begun.folder / "metrics.jsonl").write_text(
        "".join(f'{{"epoch": {epoch + 1}, "seconds": {1000.0 + 10 * epoch}}}\n' for epoch in range(4))
    )
    assert estimator.of(begun)._replace(source="") == (start, ""), "no epoch is left"
    longer = dataclasses.replace(begun, epochs=24)
    assert estimator.of(longer).seconds == start + 20 * 10, "one slow epoch does not count"
    (begun.folder / "metrics.jsonl").write_text('{"epoch": 1, "seconds": 100.0}\n')
    damaged = job("kd", 2)
    damaged.folder.mkdir()
    (damaged.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert estimator.of(damaged) == (start + kd["seconds"] / 2, "finished runs of other seeds")

    # Other runs do not say how fast these are: of another device, of more processes, in another precision.
    elsewhere = kd | {"environment": kd["environment"] | {"device": "another"}}
    shared = kd | {"processes": 2}
    for record, wanted in (
        (elsewhere, job("dkd", 0)),
        (shared, job("dkd", 0)),
        (kd, job("dkd", 0, "SOLVER.PRECISION=bf16")),
    ):
        source = Estimator([Entry(Path("x"), record, "")], cpu).of(wanted).source
        assert source == f"operations counted, at the {wanted.pace.precision} pace of a short trial"

    # Half a teraflop a second in a run of CIFAR's length is this device's pace; a small run's is not looked at.
    large = yaml.safe_load(dump(load_config(ROOT / "configs/cifar100/vanilla/resnet56.yaml").node))
    record = kd | {"config": large, "seconds": cost(large) / 5e11, "epochs": 240}
    estimate = Estimator([*entries, Entry(Path("x"), record, "")], cpu).of(job("student", 1))
    assert estimate.source == "operations counted, at the fp32 pace of finished runs"
    assert estimate.seconds == pytest.approx(start + job("student", 1).cost / 5e11)
    total = estimator.total([begun, job("dkd", 0), job("dkd", 1)])
    assert total.source == "2 from finished runs of the same networks; 1 from its own pace so far"
    assert total.seconds == pytest.approx(3 * start + 100 + 2 * kd["seconds"])


def test_a_merged_ledger_needs_no_teacher_until_a_student_is_missing(output: Path) -> None:
    ledger = read_ledger(output / "smoke" / "results" / "runs", smoke=True)
    elsewhere = output.parent / "other_machine"  # has the records, not the weights
    cells = list(TABLES["digits"].select(["kd", "normkd"]))
    plan = make_plan(cells[:1], [0], output=elsewhere, smoke=True)
    assert pending_jobs(plan.jobs, ledger) == []
    plan = make_plan(cells, [0], output=elsewhere, smoke=True)
    assert [job.config_file for job in pending_jobs(plan.jobs, ledger)] == [
        "configs/digits/vanilla_resnet20.yaml", "configs/digits/normkd.yaml",
    ]  # fmt: skip


def test_a_teacher_is_trained_once_whatever_the_precision(output: Path) -> None:
    rows = ["--methods", "teacher", "kd", "dkd", "--trials", "1", "--dry-run"]
    said = smoke(output, *rows, "SOLVER.PRECISION", "bf16").stdout
    assert "  digits/vanilla,resnet20, seed 0: done" in said
    assert "3 runs: 2 done, 1 to run" in said
    cells = list(TABLES["digits"].select(["dkd"]))
    student = make_plan(cells, [0], output=output / "smoke", smoke=True, extra=["SOLVER.PRECISION=bf16"]).jobs[-1]
    weights = run_folder(output, "teacher", 0) / "student_last.pt"
    assert f"DISTILLER.TEACHER_WEIGHTS={weights}" in student.overrides
    assert "SOLVER.PRECISION=bf16" in str(student.folder), "students are looked for where they will be"
    weights.unlink()
    assert "3 runs: 1 done, 2 to run" in smoke(output, *rows, "SOLVER.PRECISION", "bf16").stdout


def test_a_finished_run_with_broken_metrics_says_so(output: Path) -> None:
    for record in records(output):
        record.unlink()
    metrics = run_folder(output, "kd", 0) / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines(keepends=True)[1])
    said = smoke(output, "--methods", "kd", "--seeds", "0").stdout
    assert "1 failed" in said
    assert re.search(r"failed: digits/kd,resnet20,resnet8, seed 0: .*metrics", said)


def test_a_ledger_that_cannot_be_written_is_refused_before_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        smoke(tmp_path / "output", "--methods", "student", "--seeds", "0", "--results", str(tmp_path / "file" / "in"))
    assert not (tmp_path / "output").exists(), "nothing was trained"


def test_a_dry_run_sees_what_finished_unwatched_and_writes_no_record(output: Path) -> None:
    for record in records(output):
        record.unlink()
    said = smoke(output, "--methods", "kd", "--seeds", "0", "--dry-run").stdout
    assert "2 runs: 2 done, 0 to run" in said
    assert not records(output)
    smoke(output, "--methods", "kd", "--seeds", "0")
    assert len(records(output)) == 2


def test_records_say_what_was_run(trained: Path) -> None:
    ledger = read_ledger(trained / "smoke" / "results" / "runs", smoke=True)
    (entry,) = ledger.of(cell_identity(TABLES["digits"].cells["kd", "res20_res8"], smoke=True)).values()
    record, folder = entry.record, run_folder(trained, "kd", 0)
    result = json.loads((folder / "result.json").read_text())
    for key in ("last", "best", "seconds", "extra_parameters", "environment"):
        assert record[key] == result[key]
    for key in ("teacher", "command"):  # with paths as in everybody's checkout
        assert str(record[key]) == str(result[key]).replace(str(trained / "smoke"), "smoke")
    assert record["smoke"] is True
    assert record["config_file"] == "configs/digits/kd.yaml"
    assert len(record["teacher"]["hash"]) == 64
    assert record["data"] == load(folder / "latest.pt")["identity"]["data"]
    assert {"commit", "torch", "device", "python"} <= record["environment"].keys()
    assert record["metrics"]["epoch"] == [1, 2]
    assert entry.milliseconds == pytest.approx(64e3 / statistics.median(record["metrics"]["images_per_second"]))
    # Smoke runs fill no cell of the real table.
    assert not read_ledger(entry.path.parent).all_runs()
    assert entry.identity != cell_identity(TABLES["digits"].cells["kd", "res20_res8"])


def test_broken_and_edited_files_are_named_and_left_out(output: Path) -> None:
    folder = output / "smoke" / "results" / "runs"
    good = next(path for path in records(output) if "kd" in path.name)
    record = json.loads(good.read_text())
    cases: dict[str, tuple[str, str]] = {}

    def case(name: str, content: str, reason: str) -> None:
        (folder / f"{name}.json").write_text(content)
        cases[f"{name}.json"] = (content, reason)

    def changed(resign: bool = True, **values: Any) -> str:
        new = record | values
        return json.dumps(new | {"sha256": digest(new)} if resign else new)

    case("cut", good.read_text()[:500], "not JSON")
    case("edited", good.read_text().replace('"seed": 0', '"seed": 5'), "sha256 differs")
    case("list", "[]", "not a record")
    case("missing", changed(metrics={}), "metrics.test_top1 is missing")
    case("deep", "[" * 100_000, "not JSON")
    case("nowhere", changed(environment={}), "environment.device is missing")
    case("taught", changed(teacher=record["teacher"] | {"hash": None}), "teacher.hash is None, of the wrong type")
    no_epochs = record["config"]["SOLVER"] | {"EPOCHS": 0}
    empty = {name: [] for name in record["metrics"]}
    case("none", changed(epochs=0, metrics=empty, config=record["config"] | {"SOLVER": no_epochs}), "malformed")
    held_out = record["config"] | {"DATASET": record["config"]["DATASET"] | {"VAL_SPLIT": "x"}}
    case("held out", changed(config=held_out), "config.DATASET.VAL_SPLIT is 'x', of the wrong type")
    case("type", changed(seed="0"), "seed is '0', of the wrong type")
    case("future", changed(format=2), "format 2")
    case("flattered", changed(best=record["best"] | {"top1": 99.9}), "best top1 99.9 differs")
    case("short", changed(metrics=record["metrics"] | {"epoch": [1]}), "not of the epochs 1 to 2")
    case("schedule", changed(epochs=3), "differs from SOLVER.EPOCHS")
    ledger = read_ledger(folder, smoke=True)
    assert {path.name: reason for path, reason in ledger.left_out}.keys() == cases.keys()
    for path, reason in ledger.left_out:
        assert cases[path.name][1] in reason
    assert len(ledger.all_runs()) == 2
    said = smoke(output, "--methods", "kd", "--trials", "1").stdout
    assert "edited.json is left out" in said
    assert "2 runs: 2 done" in said


def test_ledgers_merge_by_copying_and_seeds_count_once(output: Path, tmp_path: Path) -> None:
    record = finished_record(run_folder(output, "kd", 0), "configs/digits/kd.yaml", smoke=True)
    folder = tmp_path / "merged"
    first = add(record, folder)
    assert add(record, folder) == first  # the same record is one file
    later = record | {"at": "2099-01-01T00:00:00Z"}
    add(later | {"sha256": digest(later)}, folder)
    other = record | {"seed": 1}
    add(other | {"sha256": digest(other)}, folder)
    ledger = read_ledger(folder, smoke=True)
    assert sorted(ledger.of(next(iter(ledger.runs)))) == [0, 1]
    assert [entry.record["at"] for entry in ledger.duplicates] == ["2099-01-01T00:00:00Z"]
    with pytest.raises(DataError, match="sha256 differs"):
        add(record | {"seed": 3}, folder)


def test_two_calls_may_add_the_same_record_at_once(output: Path, tmp_path: Path) -> None:
    record = finished_record(run_folder(output, "kd", 0), "configs/digits/kd.yaml", smoke=True)
    several = [record | {"seed": seed} for seed in range(30)]
    several = [other | {"sha256": digest(other)} for other in several]
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(2)

    def add_all() -> None:
        for other in several:
            together.wait(60)
            add(other, tmp_path / "merged")

    processes = [fork.Process(target=add_all) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(path.suffix for path in (tmp_path / "merged").iterdir()) == [".json"] * 30


def test_a_record_names_no_folder_of_the_machine(output: Path) -> None:
    record = finished_record(run_folder(output, "kd", 0), "configs/digits/kd.yaml", smoke=True)
    assert output.is_absolute()
    assert str(output) not in json.dumps(record)
    assert record["config"]["LOG"]["PREFIX"] == "smoke"  # of output/smoke
    assert record["teacher"]["file"].startswith("smoke/digits")


def test_run_folders_made_by_hand_can_be_added(trained: Path, tmp_path: Path) -> None:
    assert (
        execute(["reproduce", "--add", str(run_folder(trained, "kd", 0)), "--smoke", "--results", str(tmp_path)]) == 0
    )
    (entry,) = read_ledger(tmp_path / "runs", smoke=True).all_runs()
    assert entry.record["method"] == ["KD"]


def test_a_run_that_the_ledger_has_is_not_added_again(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = records(output)
    runs = [str(run_folder(output, method, 0)) for method in ("teacher", "kd")]
    os.utime(Path(runs[1], "result.json"))  # as a copy of the folder would have it
    assert execute(["reproduce", "--add", *runs, "--smoke", "--output", str(output)]) == 0
    assert capsys.readouterr().out.count("there already: ") == 2
    assert records(output) == before


def test_published_weights_teach_where_they_may(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder as 240 epochs would leave it: its numbers are made up, its weights are a network's."""
    network = build_model("resnet8x4", 100)

    def run(method: str) -> Path:
        config = cell_config(TABLES["2"].cells[method, "res32x4_res8x4"])
        assert config is not None
        kd = json.loads((run_folder(trained, "kd", 0) / "result.json").read_text())
        last = {"epoch": 240, "top1": 72.5, "top5": 92.0, "loss": 1.0}
        methods = [] if method == "student" else ["KD"]
        result = kd | {"config": yaml.safe_load(dump(config.node)), "epochs": 240, "last": last, "best": last,
                       "method": methods, "student": "resnet8x4", "dataset": "cifar100"}  # fmt: skip
        folder = tmp_path / method
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        lines = [json.dumps({"epoch": i, "test_top1": 72.5, "images_per_second": 1.0}) for i in range(1, 241)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        torch.save({"model": network.state_dict(), "about": {"name": "resnet8x4"}}, folder / "student_last.pt")
        return folder

    monkeypatch.chdir(tmp_path)
    runs = run("kd"), run("student")
    assert execute(["reproduce", "--publish", str(runs[0])]) == 0
    manifest = tmp_path / "checkpoints" / "manifest.yaml"
    manifest.write_text(manifest.read_text().rstrip())  # as some editors leave it
    assert execute(["reproduce", "--publish", str(runs[1])]) == 0
    assert "published checkpoints/resnet8x4_cifar100_seed0.pt" in capsys.readouterr().out
    text = manifest.read_text()
    manifest.write_text(text.replace("resnet8x4", "resnet32x4"))
    with pytest.raises(CheckpointError, match="does not exist"):  # no 240 epochs of training in its place
        execute(["reproduce", "--table", "6", "--dry-run"])
    manifest.write_text(text)
    teacher = find_teacher("resnet8x4", "cifar100", "", tmp_path, "")
    assert teacher.path == Path("checkpoints/resnet8x4_cifar100_seed0.pt"), "a distilled one is no teacher"
    assert teacher.top1 == 72.5
    weights = load_weights(teacher.path)
    assert weights.about["name"] == "resnet8x4"
    assert teacher.path.stat().st_size < 0.6 * (runs[1] / "student_last.pt").stat().st_size
    again = build_model("resnet8x4", 100)
    load_into(again, weights, "resnet8x4")
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), network.eval()(images), rtol=0.02, atol=0.02)

    with pytest.raises(ConfigError, match="is there already"):
        execute(["reproduce", "--publish", str(runs[0])])
    with pytest.raises(ConfigError, match="fills no cell of the paper's tables"):
        execute(["reproduce", "--publish", str(run_folder(trained, "kd", 0))])
    with pytest.raises(DataError, match="is not a finished run"):
        execute(["reproduce", "--publish", str(tmp_path)])
