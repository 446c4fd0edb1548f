"""Runs that are killed in every phase, and files that are damaged at random places."""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import wait_for
from short_runs import assert_same_state, state_of, train_few

from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config
from mdistiller_norm.engine.checkpoint import load, load_weights
from mdistiller_norm.engine.logger import read_metrics
from mdistiller_norm.engine.runtime import STOP_SIGNALS, stop_signals
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.reproduce.ledger import finished_run, read_ledger
from mdistiller_norm.reproduce.plan import SMOKE
from mdistiller_norm.run import train

CORRUPTIONS = 200


def corrupt(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit, overwrite up to 64 bytes, cut the end off, or insert a byte."""
    place, kind = chance.randrange(len(content)), chance.randrange(4)
    if kind == 0:
        return (
            content[:place]
            + bytes([content[place] ^ 1 << chance.randrange(8)])
            + content[place + 1 :]
        )
    if kind == 1:
        noise = chance.randbytes(chance.randrange(1, 65))
        return (content[:place] + noise + content[place + len(noise) :])[: len(content)]
    return content[:place] if kind == 2 else content[:place] + b"\0" + content[place:]


@pytest.mark.parametrize("name", ["student_best.pt", "latest.pt"])
def test_no_corruption_of_a_checkpoint_is_accepted_with_other_values(run, tmp_path, name):
    content, chance = (run / name).read_bytes(), random.Random(0)
    expected, file = load(run / name), tmp_path / name
    for _ in range(CORRUPTIONS):
        file.write_bytes(corrupt(content, chance))
        try:
            found = load(file)
        except CheckpointError:
            continue
        assert_same_state(found, expected)


def test_the_checksums_of_foreign_zip_archives_are_verified(run: Path, tmp_path: Path) -> None:
    file, state = tmp_path / "foreign.pth", load_weights(run / "student_last.pt").state
    torch.save(state, file)
    content = bytearray(file.read_bytes())
    place = content.index(state["fc.weight"].numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged .the CRC-32 of .* does not match"):
        load(file)


def prepend_byte(file: Path) -> None:
    file.write_bytes(b"x" + file.read_bytes())


@pytest.mark.parametrize("damage", [Path.unlink, prepend_byte])
def test_a_damaged_state_is_replaced_by_the_one_before_it(tmp_path, capsys, damage):
    start = partial(train_few, tmp_path, "run", "LOG.CHECKPOINT_STEPS=3", epochs=1)
    start()
    whole, folder = state_of(tmp_path, "run"), tmp_path / "distill" / "run"
    damage(folder / "latest.pt")
    (folder / "result.json").unlink()
    start(resume=True)
    (warning,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")
    )
    assert "latest.prev.pt at epoch 1" in warning
    assert_same_state(state_of(tmp_path, "run"), whole)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_a_request_and_the_second_exits(number: signal.Signals) -> None:
    received: list[int] = []
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
        with stop_signals(received.append):
            signal.raise_signal(number)
            if received == [number]:
                signal.raise_signal(number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number


def kill_at(point: str, count: int, kill: Callable[[], None]) -> None:
    """Call ``kill`` before that call of a function, or before that file is replaced by its new version."""

    def occurred(name: str) -> None:
        nonlocal count
        count -= name == point
        if name == point and count == 0:
            kill()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            occurred(Path(arguments[1]).name)

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            occurred(frame.f_code.co_qualname if event == "call" else argument.__name__)

    sys.addaudithook(audit)
    sys.setprofile(profile)
    threading.setprofile(profile)


def kill_all() -> None:
    """Kill the process group of a forked process, as in a power failure."""
    os.killpg(0, signal.SIGKILL)


def kill_second_of_first_attempt() -> None:
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)


def fork(function: Callable[[], object]) -> int:
    """Start a function in another process, with its own process group; return its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgrp()
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_killed(start: Callable[[], object], *points: tuple[str, int]) -> None:
    """Run a function in forked processes that are killed, one at each point, and in a last one to the end."""
    for point in points:
        child = fork(lambda point=point: (kill_at(*point, kill_all), start()))
        assert exit_code(child) == -signal.SIGKILL, point
    assert exit_code(fork(start)) == 0


def assert_equal_to_whole_run(folder: Path, name: str) -> None:
    states = [state_of(folder, each) for each in (name, "whole")]
    for state in states:
        del state["parts"]  # the checkout may change meanwhile
    assert_same_state(*states)
    for run in ("whole", name):
        metrics = read_metrics(folder / "distill" / run / "metrics.jsonl")
        assert [record["epoch"] for record in metrics] == [1, 2]


@pytest.mark.slow
def test_a_run_killed_in_every_phase_equals_one_that_was_not(
    tmp_path: Path, teacher: str
) -> None:
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
def test_two_processes_killed_in_every_phase_equal_ones_that_were_not(tmp_path: Path) -> None:
    # As torchrun, without new imports.
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def start(name: str, resume: bool = True) -> None:
        pair = LaunchConfig(
            1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork", max_restarts=1
        )  # fmt: skip
        settings = ("LOG.CHECKPOINT_STEPS=1", "DEVICE=cpu")

        def work() -> None:
            train_few(tmp_path, name, *settings, resume=resume)

        elastic_launch(pair, work)()

    def restarted() -> None:
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
    parts = train_few(tmp_path, "killed", epochs=3, resume=True)["parts"]
    assert (parts[0]["processes"], parts[-1]["processes"]) == (2, 1), (
        "one continues the run of two"
    )


def kill_processes(pid: int) -> None:
    """Kill a process and its descendants, which have process groups of their own."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for child in map(int, children):
            kill_processes(child)


@pytest.mark.slow
def test_parallel_runs_of_a_killed_table_equal_runs_that_were_not(tmp_path: Path) -> None:
    command = f"reproduce --table digits --methods student --seeds 0 1 --smoke --jobs 2 --output {tmp_path}".split()

    def start() -> None:
        assert execute([*command, "LOG.CHECKPOINT_STEPS=1"]) == 0

    def newest(file: str) -> int:
        with contextlib.suppress(FileNotFoundError):  # while it is replaced
            return max((path.stat().st_mtime_ns for path in tmp_path.rglob(file)), default=0)
        return 0

    for file in (*["latest.pt"] * 7, "student_last.pt", "latest.pt", "result.json"):
        before, child = newest(file), fork(start)
        wait_for(lambda file=file, before=before: newest(file) > before)
        kill_processes(child)
        assert exit_code(child) == -signal.SIGKILL
    run_killed(start)
    ledger = read_ledger(tmp_path / "smoke" / "results" / "runs", smoke=True)
    killed = {entry.record["seed"]: entry.record["metrics"] for entry in ledger.all_runs()}
    assert killed.keys() == {0, 1}
    assert killed[0] != killed[1], "the weights are a function of the seed"
    assert not ledger.duplicates
    for seed, metrics in killed.items():
        place = [f"LOG.PREFIX={tmp_path}", f"EXPERIMENT.NAME={seed}", f"SEED={seed}"]
        train(load_config("digits/vanilla_resnet8", [*SMOKE, *place]))
        whole = finished_run(
            tmp_path / "digits" / str(seed), "configs/digits/vanilla_resnet8.yaml", True
        )
        for name in ("epoch", "loss_total", "train_top1", "test_top1", "test_loss"):
            assert metrics[name] == whole.record["metrics"][name]
