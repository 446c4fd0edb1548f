"""Runs that are killed at random times, and files that are damaged at random places."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import assert_same_state, config, state_of

from mdistiller_norm.cli import execute
from mdistiller_norm.engine.checkpoint import load, load_weights
from mdistiller_norm.engine.runtime import STOP_SIGNALS, stop_signals
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.reproduce.ledger import read_ledger
from mdistiller_norm.run import train

KILLS, CORRUPTIONS = 20, 200
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def corrupt(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit, overwrite up to 64 bytes, cut the end off, or insert a byte."""
    place, kind = chance.randrange(len(content)), chance.randrange(4)
    if kind == 0:
        return (
            content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
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
def test_a_damaged_state_is_replaced_by_the_one_before_it(tmp_path, capsys, once, damage):
    whole = once("whole", lambda folder: train(config(folder, "run", epochs=3)))
    shorter = once("shorter", lambda folder: train(config(folder, "run", epochs=2)))
    folder = shutil.copytree(shorter / "distill" / "run", tmp_path / "distill" / "run")
    damage(folder / "latest.pt")
    (folder / "result.json").unlink()
    train(config(tmp_path, "run", epochs=3), resume=True)
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:"))
    assert "latest.prev.pt" in warning
    assert "epoch 2" in warning
    a, b = (state_of(folder, "run") for folder in (whole, tmp_path))
    for state in (a, b):
        del state["parts"]
    assert_same_state(a, b)


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


def kill_processes(pid: int) -> None:
    """Kill a process and its descendants, as in a power failure."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for child in map(int, children):
            kill_processes(child)


def last_save(folder: Path) -> int:
    """Return the time of the newest state in a folder, or -1 while one is being replaced."""
    try:
        return max((path.stat().st_mtime_ns for path in folder.rglob("latest.pt")), default=0)
    except FileNotFoundError:
        return -1


def run_killed(
    start: Callable[[], object], kills: int, longest: float, folder: Path | None = None
) -> None:
    """Run a function in forked processes; kill the first ones after random times, which begin at a save in a folder."""
    chance = random.Random(0)
    for number in range(kills + 1):
        before = last_save(folder) if folder else 0
        child = os.fork()
        if child == 0:
            code = 1
            try:
                start()
                code = 0
            finally:
                os._exit(code)
        if number < kills:
            while folder and last_save(folder) == before and not os.waitid(os.P_PID, child, ENDED):
                time.sleep(0.02)
            time.sleep(chance.uniform(0.0, longest))
            kill_processes(child)
        _, status = os.waitpid(child, 0)
    assert status == 0


def assert_killed_run_equals_whole_one(folder: Path) -> None:
    a, b = (state_of(folder, name) for name in ("whole", "killed"))
    assert len(a.pop("parts")) == 1
    b.pop("parts")
    assert_same_state(a, b)


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_one_that_was_not(tmp_path: Path, teacher: str) -> None:
    settings = (
        "DISTILLER.TYPE=NormKD",
        "DISTILLER.TEACHER_CACHE=lazy",
        "LOG.CHECKPOINT_STEPS=2",
        teacher,
    )
    train(config(tmp_path, "whole", *settings, epochs=4))
    killed = config(tmp_path, "killed", *settings, epochs=4)
    run_killed(lambda: train(killed, resume=True), KILLS, longest=1.5)
    assert_killed_run_equals_whole_one(tmp_path)


@pytest.mark.slow
def test_two_processes_killed_ten_times_equal_ones_that_were_not(tmp_path: Path) -> None:
    # As torchrun, without new imports.
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def start(name: str) -> None:
        pair = LaunchConfig(
            1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
        )
        settings = ("LOG.CHECKPOINT_STEPS=1", "DEVICE=cpu")
        elastic_launch(pair, train)(config(tmp_path, name, *settings, epochs=8), True)

    run_killed(lambda: start("whole"), 0, 0)
    run_killed(lambda: start("killed"), KILLS // 2, 0.1, tmp_path / "distill" / "killed")
    assert_killed_run_equals_whole_one(tmp_path)


@pytest.mark.slow
def test_parallel_runs_of_a_table_killed_ten_times_equal_runs_that_were_not(tmp_path: Path) -> None:
    table = [
        "--table",
        "digits",
        "--methods",
        "student",
        "--seeds",
        "0",
        "1",
        "--smoke",
        "--jobs",
        "2",
    ]

    def start(name: str) -> None:
        command = ["reproduce", *table, "--output", str(tmp_path / name)]
        assert execute([*command, "LOG.CHECKPOINT_STEPS=1"]) == 0

    run_killed(lambda: start("whole"), 0, 0)
    run_killed(lambda: start("killed"), KILLS // 2, 0.1, tmp_path / "killed")
    folders = [tmp_path / name / "smoke" / "results" / "runs" for name in ("whole", "killed")]
    ledgers = [read_ledger(folder, smoke=True) for folder in folders]
    whole, killed = (
        {entry.record["seed"]: entry.record["metrics"] for entry in each.all_runs()}
        for each in ledgers
    )
    assert whole.keys() == killed.keys() == {0, 1}
    assert not ledgers[1].duplicates
    for seed, metrics in whole.items():
        for name in ("epoch", "loss_total", "train_top1", "test_top1", "test_loss"):
            assert metrics[name] == killed[seed][name]
