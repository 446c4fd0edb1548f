"""Half precision: the networks under autocast, the losses in float32, fp16 gradients scaled."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_user_error, tool
from short_runs import SMALLER, config
from torch import nn
from torch.utils.tensorboard import writer

from mdistiller_norm.build import build_precision
from mdistiller_norm.distillers import DISTILLERS, Distiller, Need
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import LiveTeacher
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run, train
from mdistiller_norm.types import Batch, Outputs


def half_step(folder: Path, teacher: str, method: str, dtype: torch.dtype) -> TrainStep:
    """A step as a device with native half precision would run it: the CPU emulates it, slowly, which builders avoid."""
    extra = [f"DISTILLER.TYPE={method}", "SOLVER.BATCH_SIZE=8", *SMALLER.get(method, []), teacher]
    run = build_run(config(folder, "run", *extra))
    run.trainer.log.close()
    step = run.trainer.step
    step.trainable.autocast = dtype
    if step.teacher is not None:
        step.teacher.autocast = dtype
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if dtype is torch.float16 else None
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


class _Looks(Distiller):
    """Notes the types of what it is given of the student."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> torch.Tensor:
        given = (student.logits, student.pooled, student.features[1], student.preacts[1])
        self.in_float32 = [tensor.dtype is torch.float32 for tensor in given]
        return student.logits.mean()


@pytest.mark.parametrize("need", [Need.LOGITS, Need.POOLED, Need.MAPS])
def test_what_no_method_reads_of_the_student_keeps_the_precision_of_its_pass(
    tmp_path: Path, teacher: str, need: Need
) -> None:
    step = half_step(tmp_path, teacher, "KD", torch.bfloat16)
    method = _Looks()
    method.need = need
    step.trainable.distillers["KD"] = method
    batch = step.loader.prepare(*next(step.loader.batches(1)))
    step.trainable(batch, step.teacher(batch), step.loss_weights)
    assert method.in_float32 == [True, need >= Need.POOLED, need >= Need.MAPS, need >= Need.MAPS]


@pytest.mark.parametrize("need", [Need.LOGITS, Need.MAPS])
def test_a_teacher_is_compiled_in_the_arithmetic_it_runs_in(need: Need) -> None:
    modes: list[tuple[bool, ...]] = []

    def compiler(module: nn.Module) -> Callable[[torch.Tensor], Outputs]:
        def run(images: torch.Tensor) -> Outputs:
            modes.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return module(images)

        run(torch.zeros(2, 3, 32, 32))
        return run

    LiveTeacher(build_model("resnet8", 10), need, torch.bfloat16, compiler=compiler).run(torch.zeros(2, 3, 32, 32))
    assert modes == [(True, need is not Need.MAPS, False)] * 2


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


def test_a_scaler_skips_a_step_whose_gradients_overflow(tmp_path: Path, teacher: str) -> None:
    step = half_step(tmp_path, teacher, "KD", torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {name: p.detach().clone() for name, p in step.trainable.named_parameters()}
    step(*next(step.loader.batches(1)))
    assert all(torch.equal(before[name], p) for name, p in step.trainable.named_parameters())
    assert step.scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_emulated_half_precision_is_a_warning_and_fp32(precision: str) -> None:
    dtype, warning = build_precision(precision, torch.device("cpu"))
    if dtype is None:
        assert f"no fast {precision}: using fp32" in warning
    else:
        assert precision == "bf16", "no CPU runs fp16 convolutions fast"
        assert warning == ""


def test_eval_finds_the_figures_that_a_run_in_bf16_recorded(tmp_path: Path) -> None:
    result = train(config(tmp_path, "run", "SOLVER.BATCH_SIZE=64", "SOLVER.PRECISION=bf16"))
    weights = tmp_path / "distill" / "run" / "student_last.pt"
    fp16 = tool("eval", "-c", weights, "--precision", "fp16", "--device", "cpu", check=False)
    assert_user_error(fp16, "--precision fp16", "no fast fp16")
    done = tool("eval", "-c", weights, "--precision", result["precision"]).stdout
    last = result["last"]
    assert f"top-1 {last['top1']:6.2f}  top-5 {last['top5']:6.2f}  loss {last['loss']:7.4f}" in done
    assert f"{result['precision']}, " in done


def test_wandb_starts_before_the_writers_that_it_mirrors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a module in its place that patches what wandb patches: writers that were made before are not seen."""
    stub, seen = types.ModuleType("wandb"), list[str]()

    class Error(Exception):
        pass

    class Mirrored(writer.EventFileWriter):
        def __init__(self, folder: str, *arguments: Any, **options: Any) -> None:
            seen.append(folder.removeprefix(root[-1]))
            super().__init__(folder, *arguments, **options)

    root, original = list[str](), writer.EventFileWriter

    def patch(root_logdir: str) -> None:
        root.append(root_logdir)
        monkeypatch.setattr(writer, "EventFileWriter", Mirrored)

    def unpatch() -> None:
        monkeypatch.setattr(writer, "EventFileWriter", original)

    def init(**options: Any) -> None:
        if options["name"] == "refused":
            raise Error("no API key\nlog in")
        stub.run = types.SimpleNamespace(name=options["name"])

    def finish() -> None:
        stub.run = None

    stub.run, stub.Error, stub.init, stub.finish = None, Error, init, finish
    stub.tensorboard = types.SimpleNamespace(patch=patch, unpatch=unpatch)
    monkeypatch.setitem(sys.modules, "wandb", stub)

    def warnings(name: str) -> tuple[str, Callable[[], None]]:
        close = build_run(config(tmp_path, name, "LOG.WANDB=true")).trainer.log.close
        return "".join(line for line in capsys.readouterr().out.splitlines() if "warning" in line), close

    said, close = warnings("refused")
    assert "wandb does not start (no API key): going on without" in said
    close()
    seen.clear()
    for name in ("one", "another"):
        said, close = warnings(name)
        assert (said, seen) == ("", ["", "/steps"])
        aside, close_aside = warnings("aside")
        assert f"{name} is mirrored already" in aside
        close_aside()
        close()
        assert stub.run is None
        assert writer.EventFileWriter is original
        seen.clear()
        shutil.rmtree(tmp_path / "distill" / "aside")


def test_wandb_that_is_not_installed_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        train(config(tmp_path, "run", "LOG.WANDB=true", epochs=1))
        assert "wandb is not installed" in capsys.readouterr().out
    else:
        pytest.skip("wandb is installed here")
