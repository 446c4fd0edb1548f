"""The teacher of a training step: folded, compiled and cached."""

import copy
import errno
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import assert_same_state, config, few_digits, state_of
from test_models import FAMILIES
from test_models import build as build_on_meta
from torch import nn

from mdistiller_norm.distillers import DISTILLERS, Need
from mdistiller_norm.engine.compile import choose, compile_outputs, compiler_missing
from mdistiller_norm.engine.row_store import DeviceRows, RowStore
from mdistiller_norm.engine.teacher import Teacher, folded
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.engine.trainer import Trainer
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models import Network, Wrapped, build_model
from mdistiller_norm.reproduce.ledger import finished_run
from mdistiller_norm.run import build_run, train
from mdistiller_norm.types import Outputs

CPU = torch.device("cpu")
IMAGES = 100  # 17 steps of 6 images, the last with 4: two groups of rows in an epoch
COMMON = ["DISTILLER.TYPE=NormKD", "SOLVER.BATCH_SIZE=6"]
LAZY = "DISTILLER.TEACHER_CACHE=lazy"
FP16 = "DISTILLER.TEACHER_CACHE_PRECISION=fp16"


def copy_teacher(teacher: str, folder: Path) -> str:
    return f"DISTILLER.TEACHER_WEIGHTS={shutil.copy(teacher.partition('=')[2], folder / 'teacher.pt')}"


@pytest.fixture
def own_teacher(teacher: str, tmp_path: Path) -> str:
    """A copy of the teacher without a cache."""
    return copy_teacher(teacher, tmp_path)


@pytest.fixture(scope="module")
def filled(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run of two epochs, and a teacher whose cache that run filled."""
    folder = tmp_path_factory.mktemp("filled")
    weights = copy_teacher(teacher, folder)
    found = run(folder, "fills", weights, LAZY, epochs=2)
    assert found.requested == 2 * IMAGES
    assert found.computed == len(found.store.written()) > IMAGES
    return folder, weights


def start(
    folder: Path, name: str, *overrides: str, epochs: int = 1, resume: bool = False
) -> tuple[Trainer, Teacher]:
    cfg = config(folder, name, *COMMON, *overrides, epochs=epochs)
    trainer = build_run(cfg, resume, few_digits(IMAGES)).trainer
    return trainer, trainer.step.teacher


def build(folder: Path, name: str, *overrides: str, **more: Any) -> tuple[Trainer, Any]:
    trainer, found = start(folder, name, *overrides, **more)
    trainer.log.close()
    return trainer, found


def run(folder: Path, name: str, *overrides: str, on_device: bool = False, **more: Any) -> Any:
    trainer, found = start(folder, name, *overrides, **more)
    if on_device:  # the CPU in place of a GPU
        found.device_rows = DeviceRows(found.store, CPU)
    trainer.fit()
    trainer.log.close()
    return found


def edit_weights(override: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = override.partition("=")[2]
    content = torch.load(path, weights_only=True)
    change(content["model"])
    torch.save(content, path)


def trained(network: Network) -> Network:
    """Return a network with the batch norms of a trained one."""
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn(16, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize("name", ["resnet8x4", "ShuffleV2"])
def test_folding_changes_outputs_by_rounding_only(name: str) -> None:
    network = trained(build_model(name, 10))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    for need in (Need.LOGITS, Need.MAPS):
        module = folded(network, need)
        norms = [
            sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.modules())
            for n in (module, network)
        ]
        assert norms[0] < norms[1]
        with torch.no_grad():
            expected, got = network.outputs(images), module(images)
        scale = expected.logits.std()
        torch.testing.assert_close(
            got.logits / scale, expected.logits / scale, rtol=1e-4, atol=1e-4
        )
        maps = [*expected.features, *expected.preacts] if need is Need.MAPS else []
        for a, b in zip([*got.features, *got.preacts], maps, strict=True):
            torch.testing.assert_close(a / b.std(), b / b.std(), rtol=1e-3, atol=1e-3)
    assert_same_state(dict(network.state_dict()), before)


def test_every_family_can_be_folded_and_others_run_unchanged() -> None:
    for variant, name in FAMILIES:
        module = folded(build_on_meta(variant, name), Need.LOGITS)
        assert isinstance(module, torch.fx.GraphModule)
        images = torch.empty(2, 3, 64, 64, device="meta")
        assert module(images).logits.shape == (2, 100 if variant == "cifar" else 1000)
    network, images = build_model("resnet8", 10).eval(), torch.randn(2, 3, 32, 32)
    outputs = network.outputs
    # Cannot be traced.
    network.outputs = lambda images: outputs(images if images.isfinite().all() else -images)
    with torch.no_grad():
        assert torch.equal(folded(network, Need.LOGITS)(images).logits, network(images))


@pytest.mark.parametrize("on_device", [False, True])
def test_runs_that_fill_and_read_the_cache_are_bit_identical(filled, on_device):
    folder, weights = filled
    found = run(folder, f"reads{on_device}", weights, LAZY, epochs=2, on_device=on_device)
    assert (found.requested, found.computed) == (2 * IMAGES, 0)
    assert_same_state(state_of(folder, f"reads{on_device}"), state_of(folder, "fills"))


@pytest.mark.parametrize("cache", ["lazy", "full"])
def test_resuming_with_a_cache_is_exact(filled: tuple[Path, str], cache: str) -> None:
    folder, weights = filled
    overrides = [weights, f"DISTILLER.TEACHER_CACHE={cache}"]
    run(folder, cache, *overrides)
    run(folder, cache, *overrides, epochs=2, resume=True)
    assert_same_state(
        state_of(folder, cache)["trainable"], state_of(folder, "fills")["trainable"]
    )


def test_full_computes_each_row_once_before_the_first_step(
    tmp_path: Path, own_teacher: str
) -> None:
    trainer, found = build(tmp_path, "run", own_teacher, "DISTILLER.TEACHER_CACHE=full", epochs=2)
    found.device_rows = DeviceRows(found.store, CPU)
    for _ in trainer.prefetch:
        pass
    rows = np.unique([found.row_indices(found.loader.batches(epoch)).numpy() for epoch in (1, 2)])
    assert len(found.store.written()) == found.computed == len(rows)
    assert (
        len(found.store.missing(rows))
        == len(found.device_rows.absent(rows))
        == found.requested
        == 0
    )


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_cached_outputs_are_those_of_the_teacher(tmp_path, own_teacher, precision, rounding):
    half = f"DISTILLER.TEACHER_CACHE_PRECISION={precision}"
    _, found = build(tmp_path, "run", own_teacher, LAZY, half, "DISTILLER.TYPE=RKD")
    assert found.store.width == 10 + 64
    for *raw, rows in found.with_teacher_outputs(found.loader.batches(1)):
        batch = found.loader.prepare(*raw)
        with torch.no_grad():
            expected = found.network.outputs(batch.images)
        got = found(batch, rows)
        torch.testing.assert_close(got.logits, expected.logits, rtol=rounding, atol=rounding)
        torch.testing.assert_close(got.pooled, expected.pooled, rtol=rounding, atol=rounding)


def test_each_teacher_and_precision_has_a_cache(tmp_path: Path, own_teacher: str) -> None:
    stores = [
        build(tmp_path, "a", own_teacher, LAZY)[1].store,
        build(tmp_path, "b", own_teacher, LAZY, FP16)[1].store,
    ]
    assert stores[0].rows == IMAGES * 81
    assert [store.dtype for store in stores] == [torch.float32, torch.float16]
    edit_weights(own_teacher, lambda state: state["fc.bias"].add_(1))
    stores.append(build(tmp_path, "c", own_teacher, LAZY)[1].store)
    assert len({store.folder for store in stores}) == 3
    assert {store.folder.parent for store in stores} == {tmp_path / "teacher.pt.cache"}


def test_a_cache_of_changed_code_is_refused(filled, monkeypatch):
    kind = type(build_model("resnet14", 10))
    outputs = kind.outputs

    def scaled(self: Network, images: torch.Tensor) -> Outputs:
        given = outputs(self, images)
        return given._replace(logits=given.logits * 1.1)

    monkeypatch.setattr(kind, "outputs", scaled)
    with pytest.raises(CheckpointError, match="does not match the teacher: remove it"):
        build(filled[0], "after", filled[1], LAZY)


def test_outputs_too_large_for_fp16_are_refused(tmp_path: Path, own_teacher: str) -> None:
    edit_weights(
        own_teacher, lambda state: (state["fc.weight"].mul_(1e5), state["fc.bias"].mul_(1e5))
    )
    with pytest.raises(
        CheckpointError, match=r"for fp16: set DISTILLER\.TEACHER_CACHE_PRECISION fp32"
    ):
        run(tmp_path, "half", own_teacher, LAZY, FP16)


@pytest.mark.parametrize("method", ["KD", "FITNET"])
def test_outputs_that_cannot_be_cached_are_not(
    tmp_path, own_teacher, method, monkeypatch, capsys
):
    monkeypatch.setattr(
        DISTILLERS["KD"], "teacher_in_train_mode", True
    )  # outputs depend on the batch
    _, found = build(tmp_path, "run", f"DISTILLER.TYPE={method}", own_teacher, LAZY)
    assert not isinstance(found, CachedTeacher)
    assert f"no teacher cache: {method} " in capsys.readouterr().out
    assert not (tmp_path / "teacher.pt.cache").exists()


def test_resuming_with_another_rounding_is_refused(tmp_path: Path, own_teacher: str) -> None:
    runs = {"half": [LAZY, FP16], "off": [FP16]}  # without a cache, the precision has no effect
    for name, overrides in runs.items():
        cfg = config(tmp_path, name, *COMMON, own_teacher, *overrides, epochs=1)
        train(cfg, dataset=few_digits(IMAGES))
    assert finished_run(tmp_path / "distill" / "half").precision == "fp32, teacher cache in fp16"
    for name, other in (("half", "off"), ("off", "half")):
        with pytest.raises(ConfigError, match="another precision of the teacher's"):
            build(tmp_path, name, own_teacher, *runs[other], epochs=2, resume=True)


# The file of rows


def open_store(folder: Path) -> RowStore:
    return RowStore(folder, rows=1000, width=3, dtype=torch.float32)


def test_rows_are_written_once_and_shared(tmp_path: Path) -> None:
    a, b = open_store(tmp_path / "t"), open_store(tmp_path / "t")
    rows = np.array([999, 301, 300, 302, 5])  # neighbours in any order
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    a.write(rows, values)
    assert b.missing(np.array([300, 8, 5, 8])).tolist() == [8]
    b.write(np.array([5, 8]), np.full((2, 3), -1))  # 5 is valid and stays
    for store in (a, b, open_store(tmp_path / "t")):
        assert np.array_equal(store.read(rows), values)
        assert store.is_valid(np.array([5, 6, 8])).tolist() == [True, False, True]
        assert store.written().tolist() == [5, 8, 300, 301, 302, 999]
    device_rows = DeviceRows(a, CPU)
    b.write(np.array([7]), np.array([[7, 8, 9]]))
    device_rows.copy_rows(np.array([7]))
    assert device_rows.read(torch.tensor([7, 8, 7])).tolist() == [
        [7, 8, 9],
        [-1, -1, -1],
        [7, 8, 9],
    ]


def test_concurrent_writers_store_each_row_once(tmp_path: Path) -> None:
    stores = [open_store(tmp_path / "t") for _ in range(4)]

    def write(number: int) -> None:
        for first in range(0, 1000, 50):
            stores[number].write(np.arange(first, first + 50), np.full((50, 3), number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    rows = np.arange(1000)
    assert stores[0].is_valid(rows).all()
    assert all(np.array_equal(store.read(rows), stores[0].read(rows)) for store in stores)
    assert (stores[0].read(rows).std(1) == 0).all()


def test_half_written_rows_are_missing_and_written_again(tmp_path: Path) -> None:
    open_store(tmp_path).write(np.array([4, 5, 6]), np.arange(1, 10).reshape(3, 3))
    with (tmp_path / "rows.bin").open(
        "r+b"
    ) as file:  # the checksum reached the disk, the row did not
        file.seek(1000 * 4 + 5 * 12 + 4)
        file.write(bytes(8))
    store = open_store(tmp_path)
    assert store.missing(np.array([4, 5, 6, 7])).tolist() == [5, 7]
    store.write(np.array([4, 5]), np.array([[0, 0, 0], [4, 5, 6]]))
    assert store.read(np.array([4, 5])).tolist() == [[1, 2, 3], [4, 5, 6]]
    (tmp_path / "rows.bin").unlink()
    assert open_store(tmp_path).missing(np.array([4, 5])).tolist() == [4, 5]


def test_unusable_caches_are_refused(tmp_path: Path) -> None:
    folder, rows = tmp_path / "t", np.array([990])
    store = open_store(folder)
    store.write(rows, np.ones((1, 3), np.float32))
    os.truncate(folder / "rows.bin", 100)
    with pytest.raises(CheckpointError, match=r"rows\.bin was truncated: remove"):
        store.missing(rows)
    with pytest.raises(CheckpointError, match=r"rows.bin|mmap length"):
        open_store(folder)
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        open_store(folder)


def test_a_read_only_cache_is_read_and_missing_rows_are_computed(
    tmp_path: Path, teacher: str
) -> None:
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    weights = copy_teacher(teacher, folder)
    first = run(folder, "first", weights, LAZY).store.folder
    folder.chmod(0o777)
    for path in (first, first / "lock", first / "rows.bin"):
        path.chmod(path.stat().st_mode & 0o555)
    before = (first / "rows.bin").read_bytes()
    if user == 0:
        os.seteuid(65534)  # permissions do not restrict root
    try:
        cached = run(folder / "nobody", "cached", weights, LAZY, epochs=2)
    finally:
        os.seteuid(user)
    assert (cached.store.read_only, cached.requested) == (True, 2 * IMAGES)
    assert 0 < cached.computed <= IMAGES
    assert (first / "rows.bin").read_bytes() == before
    run(tmp_path, "writable", weights, LAZY, epochs=2)
    a, b = state_of(folder / "nobody", "cached"), state_of(tmp_path, "writable")
    assert_same_state(a["trainable"], b["trainable"])
    shutil.rmtree(folder)


def test_a_full_disk_is_an_error(tmp_path, own_teacher, monkeypatch):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)  # a disk cannot be filled up for a test
    with pytest.raises(
        CheckpointError, match=r"written \(No space left on device\): free space or set"
    ):
        run(tmp_path, "run", own_teacher, LAZY)


# Compilation


def test_the_choice_depends_on_the_number_of_steps_and_the_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert choose("all", CPU, 10**6) == ("none", f"not compiling: {compiler_missing(CPU)}")
    monkeypatch.undo()
    if compiler_missing(CPU):
        pytest.skip("no C++ compiler on this machine")
    assert choose("auto", CPU, 1) == ("none", "not compiling: fewer than 3,000 steps")
    assert choose("auto", CPU, 10**6)[0] == "teacher"
    assert choose("none", CPU, 10**6) == ("none", "")


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_missing(CPU)), reason="no C++ compiler")
def test_compiled_networks_compute_the_same() -> None:
    layers = {
        "conv": nn.Conv2d(3, 8, 3, bias=False), "norm": nn.BatchNorm2d(8), "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(8, 10),
    }  # fmt: skip
    eager = trained(Wrapped(nn.Sequential(OrderedDict(layers)), 10, classifier="fc"))
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    live = Teacher(
        copy.deepcopy(eager),
        Need.LOGITS,
        compiler=partial(compile_outputs, name="", warn=pytest.fail, freezing=True),
    )
    with torch.no_grad():
        torch.testing.assert_close(live._runs(images).logits, eager(images), rtol=1e-3, atol=1e-3)
    network = copy.deepcopy(eager.train())
    for forward in (eager.outputs, compile_outputs(network.outputs, "", pytest.fail)):
        forward(images).logits.square().mean().backward()
    expected, got = (
        {name: each.grad for name, each in net.named_parameters()} for net in (eager, network)
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "cache"), [("KD", "lazy"), ("AT", "off")])
def test_the_teacher_is_compiled_once(tmp_path, own_teacher, monkeypatch, method, cache):
    compiled = []

    def backend(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr("mdistiller_norm.engine.compile.compiler_missing", lambda device: "")
    more = (
        f"DISTILLER.TYPE={method}",
        f"DISTILLER.TEACHER_CACHE={cache}",
        "ENGINE.COMPILE=teacher",
    )
    step = build(tmp_path, "run", *more, own_teacher)[0].step
    step.trainable.train()
    # A live teacher is compiled again for the last, smaller batch.
    first = 0 if cache == "lazy" else 16
    for raw in step.with_teacher_outputs(step.loader.batches(1, first)):
        step(*raw)
    assert len(compiled) == 1
