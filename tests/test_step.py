"""A training step neither reads a value on the host nor changes anything but its state tensors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import RECIPE, SMALLER, assert_same_state, config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_norm.data import digits
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.evaluate import evaluate
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
    """Records all operations with a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.seen += [str(function)] * any(tensor.device.type == "cpu" for tensor in tensors)
        return result


@pytest.mark.parametrize("method", ["NONE", *DISTILLERS])
def test_a_step_needs_no_value_and_no_tensor_on_the_host(tmp_path: Path, teacher: str, method: str) -> None:
    """Fake tensors have no values, so that a host synchronisation or a data-dependent shape is an error.

    On a fake GPU, which cannot run a backward pass, tensors on the host are found too: a CUDA graph cannot copy them.
    """
    step = build_step(tmp_path, "run", f"DISTILLER.TYPE={method}", *SMALLER.get(method, []), teacher)
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
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # real parameters cannot become fake in place
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            gpu = torch.device("cuda")
            with HostTensors() as control:
                torch.ones(2, device=gpu) * torch.tensor(2.0)
            assert "aten.mul.Tensor" in control.seen
            trainable, meters, runs = (module and module.to(gpu) for module in on_gpu)
            if step.teacher:
                step.teacher._runs = runs
            loader = digits().train_loader(64, 0, gpu)
            fake = TrainStep(loader, step.teacher, trainable, step.optimizer, meters)
            fake.begin_epoch(2, 0)
            raw = next(loader.batches(2))
            with HostTensors() as host:
                batch = loader.prepare(*raw)
                outputs = step.teacher(batch) if step.teacher else None
                losses = trainable(batch, outputs, fake.loss_weights)
                meters.update(losses, batch.targets)
            assert losses.total.device.type == "cuda"
            assert host.seen == []
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def restore(state: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)


def test_the_scale_of_fp16_gradients_can_be_restored(tmp_path: Path) -> None:
    plain = build_step(tmp_path, "run")
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
def test_everything_that_a_step_changes_can_be_restored(tmp_path: Path, teacher: str, method: str) -> None:
    """Capturing a graph runs the step a few times and restores the state in place."""
    extra = [
        f"DISTILLER.TYPE={method}",
        *SMALLER.get(method, []),
        *(RECIPE if method == "KD" else []),
        teacher,
    ]
    steps = [build_step(tmp_path, name, *extra) for name in ("straight", "restored")]
    raws = list(steps[0].loader.batches(1))[:3]
    state = steps[1].state_tensors()
    addresses = [tensor.data_ptr() for tensor in state]
    before = [tensor.clone() for tensor in state]
    for raw in raws[1:]:
        steps[1](*raw)
    assert not all(torch.equal(tensor, saved) for tensor, saved in zip(state, before, strict=True))
    restore(state, before)
    static = [tensor.clone() for tensor in raws[0]]
    for raw in raws:
        steps[0](*raw)
        restore(static, list(raw))
        steps[1](*static)
    assert addresses == [
        tensor.data_ptr() for tensor in steps[1].state_tensors()
    ]  # momenta existed from the start
    for part in ("trainable", "optimizer", "meters"):
        assert_same_state(*(dict(getattr(step, part).state_dict()) for step in steps))


class _Untraceable(type(build_model("resnet8", 2))):
    """A network whose forward pass depends on values."""

    def outputs(self, images: torch.Tensor) -> Outputs:
        return super().outputs(images if images.mean() > -1e9 else -images)


def test_evaluation_folds_batch_norms_of_traceable_networks() -> None:
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
