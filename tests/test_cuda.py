"""The fast path on a GPU against the eager one: ``bash scripts/test.sh -m cuda`` runs these tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import RECIPE, assert_same_state, config, state_of

from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.graph import Captured
from mdistiller_norm.engine.trainer import Interrupted, Trainer
from mdistiller_norm.run import build_run, train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device, or not selected by -m cuda"
    ),
]

COMMON = [
    "DEVICE=cuda",
    "SOLVER.BATCH_SIZE=64",
    "ENGINE.COMPILE=none",
    "ENGINE.DETERMINISTIC=true",
]
METHODS = [
    ["NONE"], ["KD"], ["NormKD"], ["DKD"], ["NormKD_W_DKD"], ["FITNET"], ["RKD"], ["CRD", "CRD.NCE.K=128"],
    ["REVIEWKD"], ["AT"], ["NST"], ["PKT"], ["SP"], ["VID"], ["DIST"], ["TTM"], ["WTTM"], ["NKD"], ["DTKD"], ["CTKD"],
    ["RLD"], ["LSKD"], ["LSDKD"], ["OFD", "OFD.TEACHER_TRAIN_MODE=true"], ["NormKD", "SOLVER.PRECISION=bf16"],
    ["NormKD", "SOLVER.PRECISION=fp16"], ["NormKD", "DISTILLER.TEACHER_CACHE=lazy"], ["NormKD", "SOLVER.TRAINER=dot"],
    ["NormKD", "SOLVER.ACCUMULATE=2"], ["NormKD", "ENGINE.COMPILE=all"], ["NormKD", *RECIPE],
    ["NormKD", *RECIPE, "SOLVER.PRECISION=fp16"],
]  # fmt: skip


@pytest.fixture(autouse=True)
def _without_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def trained(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Train for two epochs of 23 steps, the last one with a smaller batch; return the final state."""
    train(config(folder, name, *COMMON, *overrides))
    return state_of(folder, name)


def log_of(folder: Path, name: str) -> str:
    return (folder / "distill" / name / "worklog.txt").read_text()


def losses_of(folder: Path, name: str) -> list[float]:
    """Return the mean training loss of each epoch."""
    lines = (folder / "distill" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss_total"] for line in lines]


def trainer_of(folder: Path, name: str, *overrides: str) -> Trainer:
    return build_run(config(folder, name, *COMMON, *overrides)).trainer


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_a_captured_step_equals_an_eager_step(
    method: list[str], teacher: str, tmp_path: Path
) -> None:
    overrides = [
        f"DISTILLER.TYPE={method[0]}",
        *method[1:],
        *([teacher] if method != ["NONE"] else []),
    ]
    eager = trained(tmp_path, "eager", *overrides, "ENGINE.CUDA_GRAPH=off")
    captured = trained(tmp_path, "captured", *overrides, "ENGINE.CUDA_GRAPH=on")
    assert "no CUDA graph" not in log_of(tmp_path, "captured")
    for key in ("trainable", "optimizer"):
        assert_same_state(captured[key], eager[key])
    assert losses_of(tmp_path, "captured") == losses_of(tmp_path, "eager")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_evaluation_equals_eager_evaluation(precision: str, tmp_path: Path) -> None:
    overrides = ["DISTILLER.TYPE=NONE", f"SOLVER.PRECISION={precision}"]
    trainer = trainer_of(tmp_path, "evaluation", *overrides)
    trainable = trainer.step.trainable
    assert isinstance(trainer.run_step, Captured)  # by default
    assert isinstance(trainer.run_test, Captured)

    def assert_equal() -> None:
        # The student itself instead of its folded form, which is equal up to rounding only.
        eager, captured = (
            evaluate(trainable.student, trainer.test, trainable.autocast, form)[:3]
            for form in (trainable.student, trainer.run_test)
        )
        assert captured == eager

    assert_equal()
    trainer.fit()  # the graph must read the new weights
    assert_equal()


def test_a_cached_teacher_is_held_on_the_device(teacher: str, tmp_path: Path) -> None:
    overrides = ["DISTILLER.TYPE=NormKD", teacher]
    live = trained(tmp_path, "live", *overrides)
    for cache in ("lazy", "full"):
        cached = trained(tmp_path, cache, *overrides, f"DISTILLER.TEACHER_CACHE={cache}")
        assert "the teacher cache is held on the device" in log_of(tmp_path, cache)
        assert losses_of(tmp_path, cache) == pytest.approx(losses_of(tmp_path, "live"), rel=1e-2)
        for key, value in live["trainable"].items():
            assert cached["trainable"][key].shape == value.shape
            assert cached["trainable"][key].isfinite().all(), key


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["NONE", "NormKD", "REVIEWKD"])
def test_half_precision_is_finite_and_close(method, precision, teacher, tmp_path):
    overrides = [f"DISTILLER.TYPE={method}", *([teacher] if method != "NONE" else [])]
    trained(tmp_path, "fp32", *overrides)
    half = trained(tmp_path, precision, *overrides, f"SOLVER.PRECISION={precision}")
    assert losses_of(tmp_path, precision) == pytest.approx(losses_of(tmp_path, "fp32"), rel=0.05)
    assert all(value.isfinite().all() for value in half["trainable"].values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["CRD", "CRD.NCE.K=128"],
        ["NormKD", "DISTILLER.TEACHER_CACHE=lazy"],
        ["NormKD", "SOLVER.PRECISION=fp16"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_equals_an_uninterrupted_run(overrides, teacher, tmp_path):
    overrides = [f"DISTILLER.TYPE={overrides[0]}", *overrides[1:], teacher]
    expected = trained(tmp_path, "whole", *overrides)
    run = build_run(config(tmp_path, "parts", *COMMON, *overrides))
    run_step, done = run.trainer.run_step, 0

    def interrupted_step(*raw: torch.Tensor) -> None:
        nonlocal done
        run_step(*raw)
        done += 1
        if done == 30:  # step 7 of the second epoch
            run.trainer.stop(15)

    run.trainer.run_step = interrupted_step
    with pytest.raises(Interrupted):
        run.trainer.fit()
    run.trainer.log.close()
    train(config(tmp_path, "parts", *COMMON, *overrides), resume=True)
    for key in ("trainable", "optimizer", "scaler"):
        assert_same_state(state_of(tmp_path, "parts")[key], expected[key])
