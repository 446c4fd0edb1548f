"""The teacher of a training step: folded, compiled and cached."""

import copy
import errno
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

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
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models import Wrapped, build_model
from mdistiller_norm.run import build_run

CPU = torch.device("cpu")
IMAGES = 67  # 17 steps of 4 images, the last with 3: two groups of rows in an epoch
LAZY, FP16 = "DISTILLER.TEACHER_CACHE=lazy", "DISTILLER.TEACHER_CACHE_PRECISION=fp16"


def copy_teacher(teacher, folder):
    return f"DISTILLER.TEACHER_WEIGHTS={shutil.copy(teacher.partition('=')[2], folder / 'teacher.pt')}"


@pytest.fixture
def own_teacher(teacher, tmp_path):
    return copy_teacher(teacher, tmp_path)


@pytest.fixture(scope="module")
def filled(teacher, tmp_path_factory):
    """A folder with a run of two epochs, and a teacher whose cache that run filled."""
    folder = tmp_path_factory.mktemp("filled")
    weights = copy_teacher(teacher, folder)
    found = run(folder, "fills", weights, LAZY, epochs=2).step.teacher
    assert found.requested == 2 * IMAGES
    assert found.computed == len(found.store.written()) > IMAGES
    return folder, weights


def run(folder, name, *overrides, epochs=1, resume=False, on_device=False, fit=True):
    common = ["DISTILLER.TYPE=NormKD", "SOLVER.BATCH_SIZE=4"]
    cfg = config(folder, name, *common, *overrides, epochs=epochs)
    trainer = build_run(cfg, resume, few_digits(IMAGES)).trainer
    if on_device:  # the CPU in place of a GPU
        trainer.step.teacher.device_rows = DeviceRows(trainer.step.teacher.store, CPU)
    if fit:
        trainer.fit()
    trainer.log.close()
    return trainer


build = partial(run, fit=False)


def trained(network):
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn(16, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize("name", ["resnet8x4", "ShuffleV2"])
def test_folding_changes_outputs_by_rounding_only(name):
    network = trained(build_model(name, 10))
    images = torch.randn(4, 3, 32, 32)
    for need in (Need.LOGITS, Need.MAPS):
        module = folded(network, need)
        with torch.no_grad():
            expected, got = network.outputs(images), module(images)
        a, b = got.logits, expected.logits
        torch.testing.assert_close(a / b.std(), b / b.std(), rtol=1e-4, atol=1e-4)
        maps = [*expected.features, *expected.preacts] if need is Need.MAPS else []
        for a, b in zip([*got.features, *got.preacts], maps, strict=True):
            torch.testing.assert_close(a / b.std(), b / b.std(), rtol=1e-3, atol=1e-3)


def test_every_family_can_be_folded_and_others_run_unchanged():
    for variant, name in FAMILIES:
        module = folded(build_on_meta(variant, name), Need.LOGITS)
        assert isinstance(module, torch.fx.GraphModule)
        images = torch.empty(2, 3, 64, 64, device="meta")
        assert module(images).logits.shape == (2, 100 if variant == "cifar" else 1000)
    repeated, images = trained(build_model("resnet8", 10)), torch.randn(2, 3, 32, 32)
    repeated.layer1[0].conv2 = repeated.layer1[0].conv1
    untraceable, outputs = copy.deepcopy(repeated), repeated.outputs
    untraceable.outputs = lambda images: outputs(images if images.isfinite().all() else -images)
    for network in (repeated, untraceable):
        assert torch.equal(folded(network, Need.LOGITS)(images).logits, network(images))


@pytest.mark.parametrize("option", ["on_device", "resume"])
def test_runs_that_fill_read_and_resume_with_the_cache_are_bit_identical(filled, option):
    folder, weights = filled
    if option == "resume":
        run(folder, option, weights, LAZY)
    found = run(folder, option, weights, LAZY, epochs=2, **{option: True}).step.teacher
    assert found.computed == 0
    assert_same_state(state_of(folder, option), state_of(folder, "fills"))


def test_full_computes_each_row_once_before_the_first_step(tmp_path, own_teacher):
    trainer = build(tmp_path, "run", own_teacher, "DISTILLER.TEACHER_CACHE=full", epochs=2)
    found = trainer.step.teacher
    found.device_rows = DeviceRows(found.store, CPU)
    for _ in trainer.prefetch:
        pass
    rows = np.unique([found.row_indices(found.loader.batches(epoch)).numpy() for epoch in (1, 2)])
    assert len(found.store.written()) == found.computed == len(rows)
    assert not [*found.store.missing(rows), *found.device_rows.absent(rows)]


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-4), ("fp16", 1e-2)])
def test_cached_outputs_are_those_of_the_teacher(tmp_path, own_teacher, precision, rounding):
    half = f"DISTILLER.TEACHER_CACHE_PRECISION={precision}"
    found = build(tmp_path, "run", own_teacher, LAZY, half, "DISTILLER.TYPE=RKD").step.teacher
    assert found.store.width == 10 + 64
    for *raw, rows in found.with_teacher_outputs(found.loader.batches(1)):
        batch = found.loader.prepare(*raw)
        with torch.no_grad():
            expected = found.network.outputs(batch.images)
        got = found(batch, rows)
        for a, b in ((got.logits, expected.logits), (got.pooled, expected.pooled)):
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def test_each_teacher_has_a_cache_and_fp16_must_hold_its_outputs(tmp_path, own_teacher):
    first = build(tmp_path, "a", own_teacher, LAZY).step.teacher.store
    path = tmp_path / "teacher.pt"
    content = torch.load(path, weights_only=True)
    content["model"]["fc.bias"].mul_(1e7)
    torch.save(content, path)
    second = build(tmp_path, "b", own_teacher, LAZY).step.teacher.store
    assert first.rows == second.rows == IMAGES * 81
    assert first.folder != second.folder
    assert first.folder.parent == second.folder.parent == tmp_path / "teacher.pt.cache"
    with pytest.raises(CheckpointError, match=r"for fp16: set .*TEACHER_CACHE_PRECISION fp32"):
        run(tmp_path, "half", own_teacher, LAZY, FP16)


def test_a_cache_of_changed_code_is_refused(filled, monkeypatch):
    kind = type(build_model("resnet14", 10))
    outputs = kind.outputs

    def scaled(self, images):
        given = outputs(self, images)
        return given._replace(logits=given.logits * 1.1)

    monkeypatch.setattr(kind, "outputs", scaled)
    with pytest.raises(CheckpointError, match="does not match the teacher: remove it"):
        build(filled[0], "after", filled[1], LAZY)


def test_outputs_in_train_mode_are_not_cached(tmp_path, own_teacher, monkeypatch, capsys):
    monkeypatch.setattr(DISTILLERS["KD"], "teacher_in_train_mode", True)
    trainer = build(tmp_path, "run", "DISTILLER.TYPE=KD", own_teacher, LAZY)
    assert not isinstance(trainer.step.teacher, CachedTeacher)
    assert "no teacher cache: KD " in capsys.readouterr().out


def test_resuming_with_another_rounding_is_refused(tmp_path, own_teacher):
    run(tmp_path, "half", own_teacher, LAZY, FP16)
    with pytest.raises(ConfigError, match="another precision of the teacher's"):
        build(tmp_path, "half", own_teacher, FP16, epochs=2, resume=True)  # without a cache


def open_store(folder):
    return RowStore(folder, rows=1000, width=3, dtype=torch.float32)


def test_rows_are_written_once_and_shared(tmp_path):
    a, b = open_store(tmp_path), open_store(tmp_path)
    rows = np.array([999, 301, 300, 302, 5])  # neighbours in any order
    values = np.arange(15).reshape(5, 3)
    a.write(rows, values)
    assert b.missing(np.array([300, 8, 5, 8])).tolist() == [8]
    b.write(np.array([5, 8]), np.full((2, 3), -1))  # 5 is valid and stays
    for store in (a, b, open_store(tmp_path)):
        assert np.array_equal(store.read(rows), values)
        assert store.written().tolist() == [5, 8, 300, 301, 302, 999]


def test_half_written_rows_are_missing_and_written_again(tmp_path):
    open_store(tmp_path).write(np.array([4, 5, 6]), np.arange(1, 10).reshape(3, 3))
    # The checksum reached the disk, the row did not.
    with (tmp_path / "rows.bin").open("r+b") as file:
        file.seek(1000 * 4 + 5 * 12 + 4)
        file.write(bytes(8))
    store = open_store(tmp_path)
    assert store.missing(np.array([4, 5, 6, 7])).tolist() == [5, 7]
    store.write(np.array([4, 5]), np.array([[0, 0, 0], [4, 5, 6]]))
    assert store.read(np.array([4, 5])).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_unusable_caches_are_refused(tmp_path):
    store = open_store(tmp_path / "t")
    os.truncate(tmp_path / "t" / "rows.bin", 100)
    with pytest.raises(CheckpointError, match=r"rows\.bin was truncated: remove"):
        store.missing(np.array([990]))
    with pytest.raises(CheckpointError, match="cannot be used"):
        open_store(tmp_path / "t")


def test_a_read_only_cache_is_read_and_missing_rows_are_computed(teacher):
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    weights = copy_teacher(teacher, folder)
    first = run(folder, "first", weights, LAZY).step.teacher.store.folder
    folder.chmod(0o777)
    for path in (first, first / "lock", first / "rows.bin"):
        path.chmod(path.stat().st_mode & 0o555)
    before = (first / "rows.bin").read_bytes()
    if user == 0:
        os.seteuid(65534)  # permissions do not restrict root
    try:
        cached = run(folder / "nobody", "cached", weights, LAZY, epochs=2).step.teacher
    finally:
        os.seteuid(user)
    assert (cached.store.read_only, cached.requested) == (True, 2 * IMAGES)
    assert 0 < cached.computed <= IMAGES
    assert (first / "rows.bin").read_bytes() == before
    shutil.rmtree(folder)


def test_a_full_disk_is_an_error(tmp_path, own_teacher, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)  # a disk cannot be filled up for a test
    with pytest.raises(CheckpointError, match=r"written \(No space left on device\): free space"):
        run(tmp_path, "run", own_teacher, LAZY)


def test_the_choice_depends_on_the_number_of_steps_and_the_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert choose("all", CPU, 10**6) == ("none", f"not compiling: {compiler_missing(CPU)}")
    monkeypatch.undo()
    if compiler_missing(CPU):
        pytest.skip("no C++ compiler on this machine")
    assert choose("auto", CPU, 1) == ("none", "not compiling: fewer than 3,000 steps")
    assert choose("auto", CPU, 10**6)[0] == "teacher"


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_missing(CPU)), reason="no C++ compiler")
def test_compiled_networks_compute_the_same():
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    eager = trained(Wrapped(nn.Sequential(*layers), 10, classifier="5"))
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    compiler = partial(compile_outputs, name="", warn=pytest.fail, freezing=True)
    live = Teacher(copy.deepcopy(eager), Need.LOGITS, compiler=compiler)
    with torch.no_grad():
        torch.testing.assert_close(live._runs(images).logits, eager(images), rtol=1e-3, atol=1e-3)
    network = copy.deepcopy(eager.train())
    for forward in (eager.outputs, compile_outputs(network.outputs, "", pytest.fail)):
        forward(images).logits.square().mean().backward()
    for expected, got in zip(eager.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
