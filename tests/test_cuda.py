"""The fast path on a GPU against the eager one: ``bash scripts/test.sh -m cuda`` runs these tests."""

import json

import pytest
import torch
from short_runs import RECIPE, assert_same_state, config, state_of

from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.graph import Captured
from mdistiller_norm.engine.trainer import Interrupted
from mdistiller_norm.run import build_run, train

MISSING = not torch.cuda.is_available()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(MISSING, reason="no GPU, or no -m cuda")]
RESUMED = [
    "CRD CRD.NCE.K=128", "NormKD DISTILLER.TEACHER_CACHE=lazy", "NormKD SOLVER.PRECISION=fp16",
]  # fmt: skip
METHODS = [
    *RESUMED, "NONE", "KD", "NormKD", "DKD", "NormKD_W_DKD", "FITNET", "RKD", "REVIEWKD", "AT", "NST", "PKT", "SP",
    "VID", "DIST", "TTM", "WTTM", "NKD", "DTKD", "CTKD", "RLD", "LSKD", "LSDKD", "OFD OFD.TEACHER_TRAIN_MODE=true",
    "NormKD SOLVER.PRECISION=bf16", "NormKD SOLVER.TRAINER=dot", "NormKD SOLVER.ACCUMULATE=2",
    "NormKD ENGINE.COMPILE=all", f"NormKD {' '.join(RECIPE)}", f"NormKD {' '.join(RECIPE)} SOLVER.PRECISION=fp16",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _without_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def place(tmp_path, teacher):
    return tmp_path, teacher


def settings(place, name, method, *overrides):
    """Return the config of two epochs of 23 steps, the last one with a smaller batch."""
    folder, teacher = place
    weights = "" if method.startswith("NONE") else teacher
    words = f"DEVICE=cuda SOLVER.BATCH_SIZE=64 ENGINE.COMPILE=none ENGINE.DETERMINISTIC=true {weights}"
    return config(folder, name, *words.split(), *f"DISTILLER.TYPE={method}".split(), *overrides)


def trained(place, name, *words):
    train(settings(place, name, *words))
    folder = place[0] / "distill" / name
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss_total"] for line in lines]
    return state_of(place[0], name), (folder / "worklog.txt").read_text(), losses


@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_equals_an_eager_step(method, place):
    eager, _, eager_losses = trained(place, "eager", method, "ENGINE.CUDA_GRAPH=off")
    captured, log, captured_losses = trained(place, "captured", method, "ENGINE.CUDA_GRAPH=on")
    assert "no CUDA graph" not in log
    for key in ("trainable", "optimizer"):
        assert_same_state(captured[key], eager[key])
    assert captured_losses == eager_losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_evaluation_equals_eager_evaluation(precision, place):
    trainer = build_run(settings(place, "a", f"NONE SOLVER.PRECISION={precision}")).trainer
    trainable = trainer.step.trainable
    arguments = (trainable.student, trainer.test, trainable.autocast)
    assert isinstance(trainer.run_step, Captured)  # by default
    assert isinstance(trainer.run_test, Captured)
    for advance in (torch.cuda.synchronize, trainer.fit):  # the graph must read the new weights
        advance()
        # The student itself instead of its folded form, which is equal up to rounding only.
        eager = evaluate(*arguments, trainable.student)
        assert evaluate(*arguments, trainer.run_test)[:3] == eager[:3]


def test_a_cached_teacher_is_held_on_the_device(place):
    live, _, live_losses = trained(place, "live", "NormKD")
    for cache in ("lazy", "full"):
        cached, log, losses = trained(place, cache, f"NormKD DISTILLER.TEACHER_CACHE={cache}")
        assert "the teacher cache is held on the device" in log
        assert losses == pytest.approx(live_losses, rel=1e-2)
        for key in live["trainable"]:
            assert cached["trainable"][key].isfinite().all(), key


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["NONE", "NormKD", "REVIEWKD"])
def test_half_precision_is_finite_and_close(method, precision, place):
    expected = trained(place, "fp32", method)[2]
    half, _, losses = trained(place, precision, method, f"SOLVER.PRECISION={precision}")
    assert losses[-1] == pytest.approx(expected[-1], rel=0.05)  # fp16 may skip the first step
    assert all(value.isfinite().all() for value in half["trainable"].values())


@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_run(method, place):
    expected = trained(place, "whole", method)[0]
    trainer = build_run(settings(place, "parts", method)).trainer
    run_step, steps = trainer.run_step, iter(range(1, 99))

    def interrupted_step(*raw):
        run_step(*raw)
        if next(steps) == 30:  # step 7 of the second epoch
            trainer.stop(15)

    trainer.run_step = interrupted_step
    with pytest.raises(Interrupted):
        trainer.fit()
    trainer.log.close()
    train(settings(place, "parts", method), resume=True)
    for key in ("trainable", "optimizer", "scaler"):
        assert_same_state(state_of(place[0], "parts")[key], expected[key])
