"""A training step: no values on the host, no change but of its state tensors, half precision with losses in float32."""

import copy

import pytest
import torch
from short_runs import RECIPE, SMALLER, assert_same_state, build_step, few_digits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_norm.cli import main
from mdistiller_norm.data import digits
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.step import TrainStep


def step_on_few_digits(folder, method, *overrides):
    extra = [f"DISTILLER.TYPE={method}", "SOLVER.BATCH_SIZE=8", *SMALLER.get(method, [])]
    return build_step(folder, "run", *extra, *overrides, dataset=few_digits(100))


class HostTensors(TorchDispatchMode):
    """Records all operations with a tensor on the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.seen.append(str(function))
        return result


@pytest.fixture(scope="module", params=["NONE", *DISTILLERS])
def step(teacher, tmp_path_factory, request):
    return step_on_few_digits(tmp_path_factory.mktemp("step"), request.param, teacher)


def test_losses_are_float32_and_finite_under_bf16(step, monkeypatch):
    for module in filter(None, (step.trainable, step.teacher)):
        monkeypatch.setattr(module, "autocast", torch.bfloat16)
    batch = step.loader.prepare(*next(step.loader.batches(1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert step.trainable.student(batch.images).dtype is torch.bfloat16
    outputs = step.teacher(batch) if step.teacher else None
    losses = step.trainable(batch, outputs, step.loss_weights)
    assert losses.parts.dtype is losses.logits.dtype is torch.float32
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


def restore(state, saved):
    with torch.no_grad():
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)


@pytest.mark.parametrize("method", ["NormKD", "CRD", "OFD", "KD"])
def test_everything_that_a_step_changes_can_be_restored(tmp_path, teacher, method):
    """Capturing a graph runs the step a few times and restores the state in place."""
    extra = [teacher, *(RECIPE if method == "KD" else [])]
    straight, restored = (step_on_few_digits(tmp_path / name, method, *extra) for name in "ab")
    raws = list(straight.loader.batches(1))[:3]
    state = restored.state_tensors()
    addresses = [tensor.data_ptr() for tensor in state]
    before = [tensor.clone() for tensor in state]
    for raw in raws[1:]:
        restored(*raw)
    assert not all(map(torch.equal, state, before))
    restore(state, before)
    static = [tensor.clone() for tensor in raws[0]]
    for raw in raws:
        straight(*raw)
        restore(static, list(raw))
        restored(*static)
    # Also those of momenta.
    assert addresses == [tensor.data_ptr() for tensor in restored.state_tensors()]
    for part in ("trainable", "optimizer", "meters"):
        states = (dict(getattr(step, part).state_dict()) for step in (straight, restored))
        assert_same_state(*states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_train_in_half_precision(tmp_path, teacher, dtype):
    """The CPU emulates it; a step whose gradients overflow in float16 is skipped and halves their scale."""
    plain = step_on_few_digits(tmp_path, "NormKD", teacher)
    plain.trainable.autocast = plain.teacher.autocast = dtype
    half = dtype is torch.float16
    scaler = torch.amp.GradScaler("cpu", 1024.0, growth_interval=2, enabled=half)
    parts = (plain.loader, plain.teacher, plain.trainable, plain.optimizer, plain.meters)
    step = TrainStep(*parts, scaler)
    weight = step.trainable.student.conv1.weight
    before, state = weight.detach().clone(), step.state_tensors()
    saved = [tensor.clone() for tensor in state]
    for raw in list(step.loader.batches(1))[:3]:
        step(*raw)
    assert weight.dtype is torch.float32
    assert weight.isfinite().all()
    assert not torch.equal(before, weight)
    step.meters.read(epoch=1)
    if half:
        assert scaler.get_scale() == 2048
        restore(state, saved)
        assert scaler.get_scale() == 1024
        scaler.update(2.0**120)
        step(*next(step.loader.batches(1)))
        assert torch.equal(before, weight)
        assert scaler.get_scale() == 2.0**119


def test_half_precision_that_the_cpu_lacks(run, tmp_path, capsys):
    step = build_step(tmp_path, "run", "SOLVER.PRECISION=bf16")
    is_replaced = "no fast bf16: using fp32" in capsys.readouterr().out
    assert step.trainable.autocast is (None if is_replaced else torch.bfloat16)
    command = f"eval -c {run}/student_last.pt --device cpu --precision"
    assert main([*command.split(), "fp16"]) == 2
    assert "no fast fp16" in capsys.readouterr().err
