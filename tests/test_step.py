"""What makes a training step capturable as a CUDA graph, shown without a GPU; and with one, if there is one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import SMALLER, assert_same_state, config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_norm.data import digits
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.evaluate import evaluate
from mdistiller_norm.engine.graph import CapturedStep
from mdistiller_norm.engine.runtime import choose_cuda_kernels
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.models import build_model
from mdistiller_norm.run import build_run
from mdistiller_norm.types import Outputs


def build_step(folder: Path, name: str, *overrides: str) -> TrainStep:
    run = build_run(config(folder, name, *overrides))
    run.trainer.log.close()
    run.trainer.step.trainable.train()
    return run.trainer.step


class HostTensors(TorchDispatchMode):
    """Notes every operation that takes or gives a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.seen += [str(function)] * any(tensor.device.type == "cpu" for tensor in tensors)
        return result


# KDSVD's eigenvalues come from the host on CUDA: it is the one method whose step is not captured.
@pytest.mark.parametrize("method", ["NONE", *DISTILLERS])
def test_a_step_never_looks_at_a_value_and_touches_nothing_on_the_host(
    tmp_path: Path, teacher: str, method: str
) -> None:
    """Under FakeTensorMode tensors have shapes and no values: any host sync or data-dependent shape is an error.

    On a pretended GPU (where no backward can run) whatever reads or copies a tensor of the host is found, too: a
    recording forbids the copy, and keeps the value for ever.
    """
    step = build_step(tmp_path, "run", f"DISTILLER.TYPE={method}", *SMALLER.get(method, []), teacher)
    on_gpu = copy.deepcopy((step.trainable, step.meters, getattr(step.teacher, "_runs", None)))
    raw = next(step.feed(step.loader.batches(1)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(tensor) for tensor in raw]
        batch = step.loader.prepare(*fake)
        taught = step.teacher(batch) if step.teacher else None
        losses = step.trainable(batch, taught, step.factors)
        losses.total.backward()
        assert losses.total.shape == ()
        assert losses.parts.shape == (len(step.trainable.loss_names),)

    torch.__future__.set_overwrite_module_params_on_conversion(True)  # real parameters cannot become fake in place
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            gpu = torch.device("cuda")
            with HostTensors() as control:
                torch.ones(2, device=gpu) * torch.tensor(2.0)
            assert "aten.mul.Tensor" in control.seen
            trainable, meters, runs = (module and module.to(gpu) for module in on_gpu)
            if step.teacher:
                step.teacher._runs = runs
            there = TrainStep(digits().train_loader(64, 0, gpu), step.teacher, trainable, step.optimizer, meters)
            there.begin_epoch(2, 0)
            raw = next(there.loader.batches(2))
            with HostTensors() as host:
                for lesson in there.lessons(*raw):
                    losses = there.trainable(lesson.batch, lesson.taught, there.factors)
                    there.meters.update(losses, lesson.batch.targets)
            assert losses.total.device.type == "cuda"
            assert host.seen == []
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_the_scale_of_fp16_gradients_can_be_put_back(tmp_path: Path) -> None:
    plain = build_step(tmp_path, "run")
    scaler = torch.amp.GradScaler("cpu", growth_interval=1)
    step = TrainStep(plain.loader, None, plain.trainable, plain.optimizer, plain.meters, scaler)
    state = step.state_tensors()
    before = [tensor.detach().clone() for tensor in state]
    for raw in list(step.loader.batches(1))[:3]:
        step(*raw)
    assert scaler.get_scale() > 65536
    with torch.no_grad():
        for tensor, saved in zip(state, before, strict=True):
            tensor.copy_(saved)
    assert scaler.get_scale() == 65536


def test_momentum_exists_before_the_first_step(tmp_path: Path) -> None:
    step = build_step(tmp_path, "run")
    state = step.optimizer.state
    assert all("momentum_buffer" in state[parameter] for parameter in step.trainable.parameters())
    addresses = [state[parameter]["momentum_buffer"].data_ptr() for parameter in step.trainable.parameters()]
    step(*next(step.loader.batches(1)))
    assert addresses == [state[parameter]["momentum_buffer"].data_ptr() for parameter in step.trainable.parameters()]


@pytest.mark.parametrize("method", ["NormKD", "CRD", "OFD"])
def test_everything_a_step_changes_can_be_put_back(tmp_path: Path, teacher: str, method: str) -> None:
    """What a recording does: run the step a few times, restore the state in place, and nothing has happened."""
    extra = [f"DISTILLER.TYPE={method}", *SMALLER.get(method, []), teacher]
    steps = [build_step(tmp_path, name, *extra) for name in ("straight", "restored")]
    raws = list(steps[0].loader.batches(1))[:3]
    captured = CapturedStep(steps[1])
    state = captured.step.state_tensors()
    addresses = [tensor.data_ptr() for tensor in state]
    before = [tensor.detach().clone() for tensor in state]
    for raw in raws[1:]:
        steps[1](*raw)
    assert not all(torch.equal(tensor, saved) for tensor, saved in zip(state, before, strict=True))
    with torch.no_grad():
        for tensor, saved in zip(state, before, strict=True):
            tensor.copy_(saved)
    static = [tensor.clone() for tensor in raws[0]]
    for raw in raws:
        steps[0](*raw)
        for buffer, tensor in zip(static, raw, strict=True):
            buffer.copy_(tensor)
        steps[1](*static)
    assert addresses == [tensor.data_ptr() for tensor in captured.step.state_tensors()]
    assert_same_state(steps[0].trainable.state_dict(), steps[1].trainable.state_dict())
    assert_same_state(steps[0].optimizer.state_dict(), steps[1].optimizer.state_dict())
    assert_same_state(dict(steps[0].meters.state_dict()), dict(steps[1].meters.state_dict()))


def test_kernels_are_the_fastest_or_those_that_repeat_their_bits() -> None:
    try:
        choose_cuda_kernels(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
    finally:
        choose_cuda_kernels(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


class _Untraceable(type(build_model("resnet8", 2))):
    """A network of a user's own, which looks at its images."""

    def outputs(self, images: torch.Tensor) -> Outputs:
        return super().outputs(images if images.mean() > -1e9 else -images)


def test_evaluation_folds_what_can_be_traced_and_runs_the_rest_as_it_is() -> None:
    torch.manual_seed(0)
    network = build_model("resnet8", 10).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(32, 3, 32, 32))
    loader = digits().eval_loader(64, torch.device("cpu"))
    folded, plain = evaluate(network, loader), evaluate(network, loader, forward=network)
    assert (folded.top1, folded.top5) == (plain.top1, plain.top5)
    assert folded.loss == pytest.approx(plain.loss, rel=1e-5)
    assert network.training
    network.__class__ = _Untraceable
    assert evaluate(network, loader).loss == plain.loss
