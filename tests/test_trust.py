"""Runs that are killed in every phase, and files that are damaged at random places."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import wait_for
from short_runs import assert_same_state, state_of, train_few

from mdistiller_norm.cli import execute
from mdistiller_norm.engine.checkpoint import load, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.runtime import STOP_SIGNALS, stop_signals
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.reproduce.ledger import finished_run, read_ledger
from mdistiller_norm.reproduce.plan import SMOKE


def corrupt(content, chance):
    """Flip a bit, overwrite up to 64 bytes, cut the end off, or insert a byte."""
    place, kind = chance.randrange(len(content)), chance.randrange(4)
    before, rest = content[:place], content[place:]
    if kind == 0:
        return before + bytes([rest[0] ^ 1 << chance.randrange(8)]) + rest[1:]
    if kind == 1:
        noise = chance.randbytes(chance.randrange(1, 65))[: len(rest)]
        return before + noise + rest[len(noise) :]
    return before if kind == 2 else before + b"\0" + rest


@pytest.mark.parametrize("name", ["student_best.pt", "latest.pt"])
def test_no_corruption_of_a_checkpoint_is_accepted_with_other_values(run, tmp_path, name):
    content, chance = (run / name).read_bytes(), random.Random(0)
    expected, file = load(run / name), tmp_path / name
    for _ in range(200):
        file.write_bytes(corrupt(content, chance))
        try:
            found = load(file)
        except CheckpointError:
            continue
        assert_same_state(found, expected)


def test_the_checksums_of_foreign_zip_archives_are_verified(run, tmp_path):
    file, state = tmp_path / "foreign.pth", load_weights(run / "student_last.pt").state
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    content[content.index(state["fc.weight"].numpy().tobytes())] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged .the CRC-32 of .* does not match"):
        load(file)


def test_a_damaged_state_is_replaced_by_the_one_before_it(tmp_path, capsys):
    start = partial(train_few, tmp_path, "run", "LOG.CHECKPOINT_STEPS=3", epochs=1)
    start()
    whole, folder = state_of(tmp_path, "run"), tmp_path / "distill" / "run"
    (folder / "latest.pt").write_bytes(b"x" + (folder / "latest.pt").read_bytes())
    (folder / "result.json").unlink()
    start(resume=True)
    assert "latest.prev.pt at epoch 1" in capsys.readouterr().out
    assert_same_state(state_of(tmp_path, "run"), whole)


def kill_at(point, count, kill):
    """Call ``kill`` before that call of a function, or before that file is replaced by its new version."""

    def occurred(name):
        nonlocal count
        count -= name == point
        if name == point and count == 0:
            kill()

    def audit(event, arguments):
        if event == "os.rename":
            occurred(Path(arguments[1]).name)

    def profile(frame, event, argument):
        if event in ("call", "c_call"):
            occurred(frame.f_code.co_qualname if event == "call" else argument.__name__)

    sys.addaudithook(audit)
    sys.setprofile(profile)
    threading.setprofile(profile)


def fork(function):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: (os.setpgrp(), function()))
    process.start()
    return process


def exit_code(process):
    process.join()
    return process.exitcode


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_exits(number):
    def signals():
        received = []
        signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
        with stop_signals(received.append):
            signal.raise_signal(number)
            if received == [number]:
                signal.raise_signal(number)

    assert exit_code(fork(signals)) == 128 + number


def run_killed(start, *points):
    """Run a function in forked processes that are killed, one at each point, and in a last one to the end."""
    kill_group = partial(os.killpg, 0, signal.SIGKILL)  # as in a power failure
    for point in points:
        killed = fork(lambda point=point: (kill_at(*point, kill_group), start()))
        assert exit_code(killed) == -signal.SIGKILL, point
    assert exit_code(fork(start)) == 0


def assert_equal_to_whole_run(folder, name):
    states = [state_of(folder, each) for each in (name, "whole")]
    for state in states:
        del state["parts"]  # the checkout may change meanwhile
    assert_same_state(*states)
    metrics = read_metrics(folder / "distill" / name / "metrics.jsonl")
    assert [record["epoch"] for record in metrics] == [1, 2]


@pytest.mark.slow
def test_a_run_killed_in_every_phase_equals_one_that_was_not(tmp_path, teacher):
    shutil.copy(teacher.partition("=")[2], tmp_path / "teacher.pt")  # with a cache of its own
    settings = ("DISTILLER.TYPE=NormKD", "DISTILLER.TEACHER_CACHE=lazy", "LOG.CHECKPOINT_STEPS=2")
    copy = f"DISTILLER.TEACHER_WEIGHTS={tmp_path / 'teacher.pt'}"
    train_few(tmp_path, "whole", *settings, teacher)
    run_killed(
        lambda: train_few(tmp_path, "killed", *settings, copy, resume=True),
        *(("pwrite", count) for count in (1, 2, 4)),  # rows of the teacher's cache and checksums
        *(("TrainStep.__call__", count) for count in (1, 2, 3, 4)),
        *(("latest.pt", count) for count in (1, 1, 2)),  # after the previous version was renamed
        *(("evaluate", count) for count in (1, 2)),  # the first is of the teacher
        *(("student_last.pt", 1), ("metrics.jsonl", 1), ("best.pt", 1)),
        *(("TrainStep.__call__", count) for count in (1, 2)),  # of the second epoch
        *(("evaluate", 2), ("student_last.pt", 1), ("result.json", 1)),
    )
    assert_equal_to_whole_run(tmp_path, "killed")


@pytest.mark.slow
def test_two_processes_killed_in_every_phase_equal_ones_that_were_not(tmp_path):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def start(name, resume=True):
        options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork"}
        pair = LaunchConfig(1, 1, 2, max_restarts=1, monitor_interval=0.02, **options)  # torchrun
        settings = ("LOG.CHECKPOINT_STEPS=1", "DEVICE=cpu")
        train = partial(train_few, tmp_path, name, *settings, resume=resume)
        elastic_launch(pair, lambda: train() and None)()

    def kill_second_of_first_attempt():
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    def restarted():
        kill_at("TrainStep.__call__", 3, kill_second_of_first_attempt)
        start("restarted", resume=False)

    run_killed(lambda: start("whole"))
    run_killed(
        lambda: start("killed"),
        *(("TrainStep.__call__", count) for count in (1, 2, 3)),
        *(("latest.pt", count) for count in (1, 2, 2)),
        *(("evaluate", 1), ("student_last.pt", 1), ("TrainStep.__call__", 1), ("evaluate", 1)),
    )
    run_killed(restarted)
    for name in ("killed", "restarted"):
        assert_equal_to_whole_run(tmp_path, name)
    parts = train_few(tmp_path, "killed", epochs=3, resume=True)["parts"]  # one continues two
    assert (parts[0]["processes"], parts[-1]["processes"]) == (2, 1)


def kill_processes(pid):
    """Kill a process and its descendants, which have process groups of their own."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for child in map(int, children):
            kill_processes(child)


@pytest.mark.slow
def test_parallel_runs_of_a_killed_table_equal_runs_that_were_not(tmp_path):
    def start():
        table = "--table digits --methods student --seeds 0 1 --smoke --jobs 2"
        command = f"reproduce {table} --output {tmp_path} LOG.CHECKPOINT_STEPS=1"
        assert execute(command.split()) == 0

    def newest(file):
        with contextlib.suppress(FileNotFoundError):  # while it is replaced
            return max((path.stat().st_mtime_ns for path in tmp_path.rglob(file)), default=0)
        return 0

    for file in (*["latest.pt"] * 7, "student_last.pt", "latest.pt", "result.json"):
        before, child = newest(file), fork(start)
        wait_for(lambda file=file, before=before: newest(file) > before)
        kill_processes(child.pid)
        assert exit_code(child) == -signal.SIGKILL
    run_killed(start)
    ledger = read_ledger(tmp_path / "smoke" / "results" / "runs", smoke=True)
    runs = {entry.record["seed"]: entry.record["metrics"] for entry in ledger.all_runs()}
    for seed in (0, 1):
        place = f"LOG.PREFIX={tmp_path} EXPERIMENT.NAME={seed} SEED={seed}"
        execute(["train", "--cfg", "digits/vanilla_resnet8", *SMOKE, *place.split()])
        whole = finished_run(tmp_path / "digits" / str(seed)).record["metrics"]
        for name in ("epoch", "loss_total", "train_top1", "test_top1", "test_loss"):
            assert runs[seed][name] == whole[name]
