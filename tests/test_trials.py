"""Several trials at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_user_error, tool
from short_runs import assert_same_state

from mdistiller_norm.config import load_config
from mdistiller_norm.data import Split, TensorDataset, digits
from mdistiller_norm.engine.checkpoint import load
from mdistiller_norm.engine.lockstep import Lockstep, fit_together
from mdistiller_norm.engine.trainer import Interrupted, Trainer
from mdistiller_norm.errors import ConfigError, NonFiniteLossError
from mdistiller_norm.models import build_model
from mdistiller_norm.run import Run, build_runs
from mdistiller_norm.trials import train_trials

CFG = "configs/digits/vanilla_resnet8.yaml"
SHORT = ["SOLVER.BATCH_SIZE", "480", "SOLVER.EPOCHS", "1"]


def test_each_trial_is_what_it_would_have_been_alone(tmp_path: Path) -> None:
    together = tool("train", "--cfg", CFG, *SHORT, "SOLVER.TRIALS", 2, "SEED", 3, "LOG.PREFIX", tmp_path)
    own = ["SEED", 4, "LOG.PREFIX", tmp_path, "EXPERIMENT.NAME", "alone"]
    tool("train", "--cfg", CFG, *SHORT, *own)
    folders = sorted(path for path in (tmp_path / "digits").iterdir() if "seed" in path.name)
    assert [folder.name[-5:] for folder in folders] == ["seed3", "seed4"]
    states = [load(folder / "latest.pt") for folder in (folders[1], tmp_path / "digits" / "alone")]
    assert_same_state(states[0]["trainable"], states[1]["trainable"])
    assert_same_state(states[0]["optimizer"], states[1]["optimizer"])
    top1 = [json.loads((folder / "result.json").read_text())["last"]["top1"] for folder in folders]
    assert f"last top-1 {sum(top1) / 2:.2f} +- " in together.stdout
    assert f"n=2: {top1[0]:.2f}, {top1[1]:.2f}" in together.stdout


def test_a_failing_trial_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "digits" / "run,seed1"
    folder.mkdir(parents=True)
    (folder / "latest.pt").write_text("")  # it looks like a run that is there already
    overrides = [*SHORT, "SOLVER.TRIALS", 2, "EXPERIMENT.NAME", "run", "LOG.PREFIX", tmp_path]
    done = tool("train", "--cfg", CFG, *overrides, check=False)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert f"the trials in {folder} failed" in done.stderr
    assert (tmp_path / "digits" / "run,seed0" / "result.json").exists()
    assert_user_error(tool("train", "--cfg", CFG, "SOLVER.TRIALS", 0, check=False), "SOLVER.TRIALS", "not 0")


def test_stopping_stops_and_saves_all(tmp_path: Path) -> None:
    command = [sys.executable, "tools/train.py", "--cfg", CFG, "SOLVER.TRIALS", "2", "SOLVER.EPOCHS", "500"]
    command += ["SOLVER.BATCH_SIZE", "480", "EXPERIMENT.NAME", "run", "LOG.PREFIX", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    states = [tmp_path / "digits" / f"run,seed{seed}" / "latest.pt" for seed in (0, 1)]
    for _ in range(900):
        if all(state.exists() for state in states):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "Traceback" not in errors
    assert all(load(state)["epoch"] >= 1 for state in states)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names a teacher."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("teacher") / "resnet14.pth"
    torch.save({"model": build_model("resnet14", 10).state_dict()}, file)
    return f"DISTILLER.TEACHER_WEIGHTS={file}"


def few_digits() -> TensorDataset:
    """Forty-four of them, three steps of 16 with a last one of 12: what is proven does not grow with the images."""
    whole = digits()
    train, test = (Split(split.images[:44], split.targets[:44]) for split in (whole.train, whole.test))
    return replace(whole, train=train, test=test)


def lockstep_runs(folder: Path, seeds: tuple[int, ...], *overrides: str, resume: bool = False) -> list[Run]:
    common = [
        "DATASET.TYPE=digits", "DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8", "SOLVER.BATCH_SIZE=16",
        "SOLVER.EPOCHS=2", "SOLVER.NESTEROV=true", f"LOG.PREFIX={folder}", "EXPERIMENT.PROJECT=p", *overrides,
    ]  # fmt: skip
    own = [[f"SOLVER.INIT_SEED={seed}", f"EXPERIMENT.NAME=init{seed}"] for seed in seeds]
    return build_runs([load_config(None, [*common, *names]) for names in own], resume, dataset=few_digits())


def fit(runs: list[Run]) -> dict[Trainer, Exception]:
    try:
        return dict(fit_together([run.trainer for run in runs], Lockstep))
    finally:
        for run in runs:
            run.trainer.log.close()


def state_of(folder: Path, seed: int) -> dict[str, object]:
    state = load(folder / "p" / f"init{seed}" / "latest.pt")
    return {key: value for key, value in state.items() if key != "seconds"}


@pytest.mark.parametrize(
    "more",
    [
        ("DISTILLER.TYPE=NormKD",),
        ("DISTILLER.TYPE=NormKD", "DISTILLER.TEACHER_CACHE=full", "SOLVER.ACCUMULATE=2"),
        ("DISTILLER.TYPE=FITNET",),  # has weights of its own
        ("DISTILLER.TYPE=CRD", "CRD.NCE.K=16"),  # has a memory
        ("DISTILLER.TYPE=KD", "SOLVER.TRAINER=dot", "DISTILLER.TEACHER_CACHE=lazy"),
        ("DISTILLER.TYPE=NONE",),
    ],
    ids=["NormKD", "cached", "FitNet", "CRD", "DOT", "plain"],
)
def test_a_trial_in_lockstep_is_what_it_would_have_been_alone(
    tmp_path: Path, teacher: str, more: tuple[str, ...]
) -> None:
    assert not fit(lockstep_runs(tmp_path / "together", (0, 7), *more, teacher))
    for seed in (0, 7):
        (alone,) = lockstep_runs(tmp_path / "alone", (seed,), *more, teacher)
        alone.trainer.fit()
        alone.trainer.log.close()
        assert_same_state(state_of(tmp_path / "together", seed), state_of(tmp_path / "alone", seed))


def test_the_teacher_sees_a_batch_once_for_all_trials(tmp_path: Path, teacher: str) -> None:
    runs = lockstep_runs(tmp_path, (0, 1, 2), "DISTILLER.TYPE=KD", "SOLVER.EPOCHS=1", teacher)
    live, seen = runs[0].trainer.step.teacher, []
    assert all(run.trainer.step.teacher is live for run in runs)
    run = live.run
    live.run = lambda images: seen.append(len(images)) or run(images)
    fit(runs)
    assert seen == [16, 16, 12]


def test_trials_in_lockstep_stop_resume_and_catch_up(tmp_path: Path, teacher: str) -> None:
    """Stopped in mid-epoch by a real signal; then one of them goes on alone, and the other has to catch up."""
    more = ("DISTILLER.TYPE=NormKD", teacher)
    fit(lockstep_runs(tmp_path / "whole", (0, 1), *more))

    runs, calls = lockstep_runs(tmp_path / "parts", (0, 1), *more), []

    def together(steps):
        lockstep = Lockstep(steps)

        def step(*raw: torch.Tensor) -> None:
            lockstep(*raw)
            calls.append(len(steps))
            if len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)

        return step

    with pytest.raises(Interrupted):
        fit_together([run.trainer for run in runs], together)
    for run in runs:
        assert (run.trainer.epoch, run.trainer.steps_done) == (1, 2)
        run.trainer.log.close()
    (ahead,) = lockstep_runs(tmp_path / "parts", (1,), *more, "SOLVER.EPOCHS=1", resume=True)
    ahead.trainer.fit()
    ahead.trainer.log.close()
    fit(lockstep_runs(tmp_path / "parts", (0, 1), *more, resume=True))
    for seed in (0, 1):
        assert_same_state(state_of(tmp_path / "whole", seed), state_of(tmp_path / "parts", seed))


@pytest.mark.parametrize("mode", ["processes", "lockstep"])
def test_trials_are_not_for_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        train_trials(
            "configs/digits/kd.yaml", [f"LOG.PREFIX={tmp_path}", "SOLVER.TRIALS=2", f"SOLVER.TRIALS_MODE={mode}"], False
        )
    assert not list(tmp_path.iterdir())


def test_a_trial_whose_loss_becomes_nan_leaves_the_others_alone(tmp_path: Path, teacher: str) -> None:
    runs = lockstep_runs(tmp_path / "together", (0, 1), "DISTILLER.TYPE=KD", teacher)
    with torch.no_grad():
        runs[0].trainer.step.trainable.student.fc.bias.fill_(torch.nan)
    failed = fit(runs)
    assert list(failed) == [runs[0].trainer]
    assert isinstance(failed[runs[0].trainer], NonFiniteLossError)
    assert "error: the loss ce and KD became NaN" in (tmp_path / "together" / "p" / "init0" / "worklog.txt").read_text()
    (alone,) = lockstep_runs(tmp_path / "alone", (1,), "DISTILLER.TYPE=KD", teacher)
    alone.trainer.fit()
    alone.trainer.log.close()
    assert_same_state(state_of(tmp_path / "together", 1), state_of(tmp_path / "alone", 1))


def test_a_trial_that_caught_up_goes_on_when_the_leading_one_fails(tmp_path: Path, teacher: str) -> None:
    more = ("DISTILLER.TYPE=KD", "SOLVER.BATCH_SIZE=8", "LOG.TENSORBOARD_FREQ=1", "LOG.CHECKPOINT_STEPS=1", teacher)
    fit(lockstep_runs(tmp_path / "whole", (1,), *more))
    for seed, steps in ((0, 3), (1, 1)):  # of six; the other has to catch up
        (run,) = lockstep_runs(tmp_path / "parts", (seed,), *more)
        turns = run.trainer.turns()
        for _ in range(steps):
            next(turns)
            run.trainer.run_step(*run.trainer.next_batch())
        next(turns)  # saves
        run.trainer.log.close()
    runs = lockstep_runs(tmp_path / "parts", (0, 1), *more, resume=True)
    with torch.no_grad():
        runs[0].trainer.step.trainable.student.fc.bias.fill_(torch.nan)  # is noticed after the step they take together
    assert list(fit(runs)) == [runs[0].trainer]
    assert_same_state(state_of(tmp_path / "whole", 1), state_of(tmp_path / "parts", 1))


def test_lockstep_from_the_command_line(tmp_path: Path) -> None:
    lockstep = ["SOLVER.TRIALS", 2, "SOLVER.TRIALS_MODE", "lockstep", "EXPERIMENT.NAME", "run"]
    done = tool("train", "--cfg", CFG, *SHORT, *lockstep, "SEED", 3, "LOG.PREFIX", tmp_path)
    assert "[seed 3] epoch 1/1" in done.stdout
    assert "[seed 4] epoch 1/1" in done.stdout
    results = [json.loads((tmp_path / "digits" / f"run,init{seed}" / "result.json").read_text()) for seed in (3, 4)]
    assert [result["seed"] for result in results] == [3, 4]
    assert [result["config"]["SEED"] for result in results] == [3, 3]
    assert "n=2" in done.stdout
    again = tool("train", "--cfg", CFG, *SHORT, *lockstep, "SEED", 3, "LOG.PREFIX", tmp_path, check=False)
    assert_user_error(again, "run,init3", "holds a run already")
