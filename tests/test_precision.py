"""Half precision: the networks under autocast, the losses in float32, fp16 gradients scaled."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, tool
from short_runs import SMALLER, config

from mdistiller_norm.build import build_precision
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.run import build_run, train
from mdistiller_norm.types import Batch, Outputs


def half_step(folder: Path, teacher: str, method: str, dtype: torch.dtype) -> TrainStep:
    """Build a step in half precision, which the CPU emulates."""
    extra = [f"DISTILLER.TYPE={method}", "SOLVER.BATCH_SIZE=8", *SMALLER.get(method, []), teacher]
    run = build_run(config(folder, "run", *extra))
    run.trainer.log.close()
    step = run.trainer.step
    step.trainable.autocast = dtype
    if step.teacher is not None:
        step.teacher.autocast = dtype
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is torch.float16)
    step.trainable.train()
    return step


@pytest.mark.parametrize("method", ["NONE", *DISTILLERS])
def test_losses_are_float32_and_finite_under_bf16(tmp_path: Path, teacher: str, method: str) -> None:
    step = half_step(tmp_path, teacher, method, torch.bfloat16)
    batch = step.loader.prepare(*next(step.loader.batches(1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert step.trainable.student(batch.images).dtype is torch.bfloat16
    losses = step.trainable(batch, step.teacher(batch) if step.teacher else None, step.loss_weights)
    assert losses.parts.dtype is torch.float32
    assert losses.logits.dtype is torch.float32
    assert losses.parts.isfinite().all()


@pytest.mark.parametrize("need", [Need.LOGITS, Need.POOLED, Need.MAPS])
def test_only_outputs_that_a_method_reads_are_converted_to_float32(
    tmp_path: Path, teacher: str, need: Need
) -> None:
    class Recording(Distiller):
        def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
            given = (student.logits, student.pooled, student.features[1], student.preacts[1])
            self.in_float32 = [tensor.dtype is torch.float32 for tensor in given]
            return student.logits.mean()

    step = half_step(tmp_path, teacher, "KD", torch.bfloat16)
    method = Recording()
    method.need = need
    step.trainable.distillers["KD"] = method
    batch = step.loader.prepare(*next(step.loader.batches(1)))
    step.trainable(batch, step.teacher(batch), step.loss_weights)
    assert method.in_float32 == [True, need >= Need.POOLED, need >= Need.MAPS, need >= Need.MAPS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_train_in_half_precision(tmp_path: Path, teacher: str, dtype: torch.dtype) -> None:
    step = half_step(tmp_path, teacher, "NormKD", dtype)
    before = step.trainable.student.conv1.weight.detach().clone()
    for _, raw in zip(range(3), step.loader.batches(1), strict=False):
        step(*raw)
    after = step.trainable.student.conv1.weight.detach()
    assert after.dtype is torch.float32
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    step.meters.read(epoch=1)


def test_a_step_whose_gradients_overflow_is_skipped(tmp_path: Path, teacher: str) -> None:
    step = half_step(tmp_path, teacher, "KD", torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {name: p.detach().clone() for name, p in step.trainable.named_parameters()}
    step(*next(step.loader.batches(1)))
    assert all(torch.equal(before[name], p) for name, p in step.trainable.named_parameters())
    assert step.scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_emulated_half_precision_is_replaced_by_fp32(precision: str) -> None:
    dtype, warning = build_precision(precision, torch.device("cpu"))
    if dtype is None:
        assert f"no fast {precision}: using fp32" in warning
    else:
        assert precision == "bf16", "no CPU runs fp16 convolutions fast"
        assert warning == ""


def test_eval_computes_the_figures_of_a_run_in_bf16(tmp_path: Path) -> None:
    result = train(config(tmp_path, "run", "SOLVER.BATCH_SIZE=64", "SOLVER.PRECISION=bf16"))
    weights = tmp_path / "distill" / "run" / "student_last.pt"
    fp16 = tool("eval", "-c", weights, "--precision", "fp16", "--device", "cpu", check=False)
    assert_user_error(fp16, "--precision fp16", "no fast fp16")
    done = tool("eval", "-c", weights, "--precision", result["precision"]).stdout
    last = result["last"]
    assert f"top-1 {last['top1']:6.2f}  top-5 {last['top5']:6.2f}  loss {last['loss']:7.4f}" in done
    assert f"{result['precision']}, " in done


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_causes_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_run(config(tmp_path, "run", "LOG.WANDB=true")).trainer.log.close()
    assert "wandb is not installed" in capsys.readouterr().out
