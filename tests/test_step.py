"""A training step: no values on the host, no change but of its state tensors, half precision with losses in float32."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import RECIPE, SMALLER, assert_same_state, build_step, config, few_digits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_norm.cli import main
from mdistiller_norm.data import digits
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run, train


def step_on_few_digits(folder: Path, method: str, *overrides: str) -> TrainStep:
    extra = [
        f"DISTILLER.TYPE={method}",
        "SOLVER.BATCH_SIZE=8",
        *SMALLER.get(method, []),
        *overrides,
    ]
    return build_step(folder, "run", *extra, dataset=few_digits(100))


class HostTensors(TorchDispatchMode):
    """Records all operations with a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)
        ]
        self.seen += [str(function)] * any(tensor.device.type == "cpu" for tensor in tensors)
        return result


@pytest.fixture(scope="module", params=["NONE", *DISTILLERS])
def step(
    teacher: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> TrainStep:
    """The step of each method."""
    return step_on_few_digits(tmp_path_factory.mktemp("step"), request.param, teacher)


def test_losses_are_float32_and_finite_under_bf16(step, monkeypatch):
    for module in filter(None, (step.trainable, step.teacher)):
        monkeypatch.setattr(module, "autocast", torch.bfloat16)
    batch = step.loader.prepare(*next(step.loader.batches(1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert step.trainable.student(batch.images).dtype is torch.bfloat16
    losses = step.trainable(
        batch, step.teacher(batch) if step.teacher else None, step.loss_weights
    )
    assert losses.parts.dtype is torch.float32
    assert losses.logits.dtype is torch.float32
    assert losses.parts.isfinite().all()


def test_a_step_needs_no_value_and_no_tensor_on_the_host(step, monkeypatch):
    """Fake tensors have no values, so that a host synchronisation or a data-dependent shape is an error.

    On a fake GPU, which cannot run a backward pass, tensors on the host are found too: a CUDA graph cannot copy them.
    """
    on_gpu = copy.deepcopy((step.trainable, step.meters, getattr(step.teacher, "_runs", None)))
    raw = next(step.with_teacher_outputs(step.loader.batches(1)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = step.loader.prepare(*[mode.from_tensor(tensor) for tensor in raw])
        outputs = step.teacher(batch) if step.teacher else None
        losses = step.trainable(batch, outputs, step.loss_weights)
        losses.total.backward()
        assert losses.total.shape == ()
        assert losses.parts.shape == (len(step.trainable.loss_names),)

    if torch.__version__ < "2.7":
        pytest.skip("PyTorch 2.6 initialises CUDA to move parameters to a fake GPU")
    # Parameters cannot become fake in place.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            gpu = torch.device("cuda")
            with HostTensors() as control:
                torch.ones(2, device=gpu) * torch.tensor(2.0)
            assert "aten.mul.Tensor" in control.seen
            trainable, meters, runs = (module and module.to(gpu) for module in on_gpu)
            if step.teacher:
                monkeypatch.setattr(step.teacher, "_runs", runs)
            loader = digits().train_loader(64, 0, gpu)
            fake = TrainStep(loader, step.teacher, trainable, step.optimizer, meters)
            fake.begin_epoch(2, 0)
            raw = next(loader.batches(2))
            with HostTensors() as host:
                batch = loader.prepare(*raw)
                outputs = step.teacher(batch) if step.teacher else None
                losses = trainable(batch, outputs, fake.loss_weights)
                meters.update(losses, batch.targets, True, True)
            assert losses.total.device.type == "cuda"
            assert host.seen == []
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def restore(state: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)


def test_the_scale_of_fp16_gradients_can_be_restored(tmp_path: Path) -> None:
    plain = step_on_few_digits(tmp_path, "NONE")
    scaler = torch.amp.GradScaler("cpu", growth_interval=1)
    step = TrainStep(plain.loader, None, plain.trainable, plain.optimizer, plain.meters, scaler)
    state = step.state_tensors()
    before = [tensor.clone() for tensor in state]
    for raw in list(step.loader.batches(1))[:3]:
        step(*raw)
    assert scaler.get_scale() > 65536
    restore(state, before)
    assert scaler.get_scale() == 65536


@pytest.mark.parametrize("method", ["NormKD", "CRD", "OFD", "KD"])
def test_everything_that_a_step_changes_can_be_restored(tmp_path, teacher, method):
    """Capturing a graph runs the step a few times and restores the state in place."""
    extra = [teacher, *(RECIPE if method == "KD" else [])]
    steps = [
        step_on_few_digits(tmp_path / name, method, *extra) for name in ("straight", "restored")
    ]
    raws = list(steps[0].loader.batches(1))[:3]
    state = steps[1].state_tensors()
    addresses = [tensor.data_ptr() for tensor in state]
    before = [tensor.clone() for tensor in state]
    for raw in raws[1:]:
        steps[1](*raw)
    assert not all(
        torch.equal(tensor, saved) for tensor, saved in zip(state, before, strict=True)
    )
    restore(state, before)
    static = [tensor.clone() for tensor in raws[0]]
    for raw in raws:
        steps[0](*raw)
        restore(static, list(raw))
        steps[1](*static)
    assert addresses == [
        tensor.data_ptr() for tensor in steps[1].state_tensors()
    ]  # also of momenta
    for part in ("trainable", "optimizer", "meters"):
        assert_same_state(*(dict(getattr(step, part).state_dict()) for step in steps))


def test_evaluation_folds_batch_norms() -> None:
    network = build_model("resnet8", 10).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(32, 3, 32, 32))
    loader = few_digits(1).eval_loader(16, torch.device("cpu"))
    folded, plain = evaluate(network, loader), evaluate(network, loader, forward=network)
    assert (folded.top1, folded.top5) == (plain.top1, plain.top5)
    assert folded.loss == pytest.approx(plain.loss, rel=1e-5)


def half_step(folder: Path, teacher: str, method: str, dtype: torch.dtype) -> TrainStep:
    """Build a step in half precision, which the CPU emulates."""
    step = step_on_few_digits(folder, method, teacher)
    step.trainable.autocast = dtype
    if step.teacher is not None:
        step.teacher.autocast = dtype
    step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype is torch.float16)
    return step


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


def test_eval_computes_the_figures_of_a_run_in_bf16(tmp_path, capsys):
    result = train(config(tmp_path, "run", "SOLVER.PRECISION=bf16", epochs=1))
    is_replaced = "no fast bf16: using fp32" in capsys.readouterr().out
    assert result["precision"] == ("fp32" if is_replaced else "bf16")
    command = ["eval", "-c", str(tmp_path / "distill" / "run" / "student_last.pt"), "--precision"]
    assert main([*command, "fp16", "--device", "cpu"]) == 2
    assert "no fast fp16" in capsys.readouterr().err
    assert main([*command, result["precision"]]) == 0
    shown, last = capsys.readouterr().out, result["last"]
    assert (
        f"top-1 {last['top1']:6.2f}  top-5 {last['top5']:6.2f}  loss {last['loss']:7.4f}" in shown
    )
    assert f"{result['precision']}, " in shown


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_causes_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_run(config(tmp_path, "run", "LOG.WANDB=true")).trainer.log.close()
    assert "wandb is not installed" in capsys.readouterr().out
