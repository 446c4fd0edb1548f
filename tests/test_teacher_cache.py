"""The teacher as a step uses it: folded, compiled, and cached."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import assert_same_state, config, state_of
from torch import nn
from torch.utils._pytree import tree_leaves

from mdistiller_norm.distillers import DISTILLERS, Need
from mdistiller_norm.engine.cache_table import DeviceRows, Table
from mdistiller_norm.engine.compile import choose, compile_student, compile_teacher, compiler_missing
from mdistiller_norm.engine.teacher import LiveTeacher, folded
from mdistiller_norm.engine.teacher_cache import CachedTeacher
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.models import CIFAR_MODELS, build_model
from mdistiller_norm.models.base import Network
from mdistiller_norm.reproduce.ledger import Entry, finished_record
from mdistiller_norm.run import build_run, train
from mdistiller_norm.types import Outputs

NORMKD = "DISTILLER.TYPE=NormKD"


@pytest.fixture
def own_teacher(teacher: str, tmp_path: Path) -> str:
    """A copy of the teacher, with no cache beside it yet."""
    copy = tmp_path / "teacher.pt"
    shutil.copy(teacher.partition("=")[2], copy)
    return f"DISTILLER.TEACHER_WEIGHTS={copy}"


def cached(folder: Path, name: str, *overrides: str, epochs: int = 1, mode: str = "lazy") -> CachedTeacher:
    run = build_run(config(folder, name, NORMKD, f"DISTILLER.TEACHER_CACHE={mode}", *overrides, epochs=epochs))
    run.trainer.fit()
    run.trainer.log.close()
    found = run.trainer.step.teacher
    assert isinstance(found, CachedTeacher)
    return found


def trained_network(name: str) -> torch.nn.Module:
    network = build_model(name, 10).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "vgg8", "ResNet18", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_folding_is_exact_to_rounding_and_leaves_the_network_alone(name: str) -> None:
    network = trained_network(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    for need in (Need.LOGITS, Need.MAPS):
        module = folded(network, need)
        norms = sum(isinstance(part, torch.nn.BatchNorm2d) for part in module.modules())
        assert norms < sum(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())
        with torch.no_grad():
            wanted, got = network.outputs(images), module(images)
        scale = wanted.logits.std()
        torch.testing.assert_close(got.logits / scale, wanted.logits / scale, rtol=1e-4, atol=1e-4)
        if need is Need.MAPS:
            for a, b in zip([*got.features, *got.preacts], [*wanted.features, *wanted.preacts], strict=True):
                torch.testing.assert_close(a / b.std(), b / b.std(), rtol=1e-3, atol=1e-3)
        else:
            assert got.features == got.preacts == ()
    assert_same_state(dict(network.state_dict()), before)


def test_every_model_can_be_folded() -> None:
    for name in CIFAR_MODELS:
        with torch.device("meta"):
            network = build_model(name, 10).eval()
        module = folded(network, Need.LOGITS)
        assert isinstance(module, torch.fx.GraphModule)
        logits = module(torch.empty(2, 3, 32, 32, device="meta")).logits
        assert logits.shape == (2, 10)


class _Sums(Network):
    """Residual sums whose first terms are not fresh, or not of the sum's shape; or a forward that cannot be traced."""

    def __init__(self, kind: str) -> None:
        super().__init__(10)
        self.kind, self.stem, self.conv = kind, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.same, self.pool, self.fc = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def outputs(self, images: torch.Tensor) -> Outputs:
        if self.kind == "untraceable":
            assert isinstance(images, torch.Tensor)
        x = self.stem(images)
        if self.kind == "same":
            y = self.same(x) + self.conv(x)
        elif self.kind == "narrow":
            y = self.conv(self.pool(x)) + x
        else:
            y = self.conv(x) + x
        pooled = torch.cat([x, y.relu()], 1).mean((2, 3))
        return Outputs(self.fc(pooled), (x, y), (x, y), pooled)

    def norms_before_relu(self) -> tuple[None, None]:
        return None, None


@pytest.mark.parametrize("kind", ["same", "narrow", "fresh", "untraceable"])
def test_folding_changes_no_sum(kind: str) -> None:
    network, images = _Sums(kind).eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted, got = network.outputs(images), folded(network, Need.MAPS)(images)
    for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_what_leaves_a_teacher_can_be_saved_for_a_backward() -> None:
    live = LiveTeacher(build_model("resnet8", 10), Need.LOGITS)
    outputs = live.run(torch.randn(4, 3, 32, 32))
    weight = torch.ones(4, 10, requires_grad=True)
    (weight * outputs.logits).sum().backward()
    assert torch.equal(weight.grad, outputs.logits)
    assert not outputs.logits.requires_grad


def test_a_run_that_fills_and_one_that_reads_are_equal_to_the_bit(tmp_path: Path, own_teacher: str) -> None:
    filler = cached(tmp_path, "fills", own_teacher, epochs=2)
    assert filler.use.asked == 2 * 1437
    assert filler.use.computed == len(filler.table) > 1437
    reader = cached(tmp_path, "reads", own_teacher, epochs=2)
    assert reader.use == (2 * 1437, 0)
    assert_same_state(state_of(tmp_path, "fills"), state_of(tmp_path, "reads"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rows_held_on_a_device_are_those_of_the_table(tmp_path: Path, own_teacher: str, precision: str) -> None:
    """The copy that a GPU would hold, in the memory that is here: a run that reads it is the same to the bit."""
    more = [own_teacher, f"DISTILLER.TEACHER_CACHE_PRECISION={precision}"]
    cached(tmp_path, "first", *more)  # half of what the next runs need
    for name in ("table", "held"):
        lazily = [*more, "DISTILLER.TEACHER_CACHE=lazy"]
        run = build_run(config(tmp_path, name, NORMKD, *lazily, epochs=2))
        teacher = run.trainer.step.teacher
        assert isinstance(teacher, CachedTeacher)
        if name == "held":
            teacher.device_rows = DeviceRows(teacher.table, torch.device("cpu"))
        run.trainer.fit()
        run.trainer.log.close()
    assert_same_state(state_of(tmp_path, "table"), state_of(tmp_path, "held"))


def test_what_is_filled_ahead_is_on_the_device_before_the_first_step(tmp_path: Path, own_teacher: str) -> None:
    run = build_run(config(tmp_path, "run", NORMKD, own_teacher, "DISTILLER.TEACHER_CACHE=full", epochs=1))
    run.trainer.log.close()
    teacher = run.trainer.step.teacher
    assert isinstance(teacher, CachedTeacher)
    teacher.device_rows = DeviceRows(teacher.table, torch.device("cpu"))
    for _ in run.trainer.prefetch:
        pass
    rows = teacher.rows_of(teacher.loader.batches(1)).numpy()
    assert teacher.use == (0, len(rows))
    assert not len(teacher.device_rows.absent(rows))
    assert not len(teacher.table.missing(rows))


def test_rows_are_brought_to_a_device_as_they_come(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    table.write(np.array([1, 999]), np.array([[1, 2, 3], [4, 5, 6]]))
    held = DeviceRows(table, torch.device("cpu"))
    assert held.read(torch.tensor([999, 1, 1])).tolist() == [[4, 5, 6], [1, 2, 3], [1, 2, 3]]
    table.write(np.array([7]), np.array([[7, 8, 9]]))
    held.bring(np.array([1, 7]))
    assert held.read(torch.tensor([7])).tolist() == [[7, 8, 9]]


def test_the_cached_run_is_the_live_one_up_to_rounding(tmp_path: Path, own_teacher: str) -> None:
    common = (NORMKD, own_teacher, "SOLVER.LR=1e-3")
    live = train(config(tmp_path, "live", *common, epochs=1))
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 1e-2)):
        extra = ("DISTILLER.TEACHER_CACHE=lazy", f"DISTILLER.TEACHER_CACHE_PRECISION={precision}")
        result = train(config(tmp_path, precision, *common, *extra, epochs=1))
        assert result["last"]["loss"] == pytest.approx(live["last"]["loss"], rel=tolerance)


def test_cached_rows_are_what_the_live_teacher_says(tmp_path: Path, own_teacher: str) -> None:
    found = cached(tmp_path, "run", own_teacher)
    for *raw, values in islice(found.feed(found.loader.batches(1)), 2):
        batch = found.loader.prepare(*raw)
        with torch.no_grad():
            wanted = found.network(batch.images)
        torch.testing.assert_close(found(batch, values).logits, wanted, rtol=1e-4, atol=1e-4)


def test_full_fills_what_the_schedule_visits_before_the_first_step(tmp_path: Path, own_teacher: str) -> None:
    found = cached(tmp_path, "run", own_teacher, mode="full", epochs=2)
    rows = {int(row) for epoch in (1, 2) for raw in found.loader.batches(epoch) for row in found.rows_of([raw])}
    assert len(found.table) == len(rows)
    assert found.use == (2 * 1437, len(rows)), "a row was computed twice, or in a step"


@pytest.mark.parametrize("mode", ["lazy", "full"])
def test_resuming_with_a_cache_is_exact(tmp_path: Path, own_teacher: str, mode: str) -> None:
    whole = cached(tmp_path, "whole", own_teacher, mode=mode, epochs=2)
    shutil.rmtree(whole.table.folder.parent)
    cached(tmp_path, "parts", own_teacher, mode=mode, epochs=1)
    extra = [NORMKD, f"DISTILLER.TEACHER_CACHE={mode}", own_teacher]
    train(config(tmp_path, "parts", *extra, epochs=2), resume=True)
    a, b = (state_of(tmp_path, name)["trainable"] for name in ("whole", "parts"))
    for key in a:  # the misses were gathered into other batches: equal up to the teacher's rounding
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-3)


def test_another_teacher_data_or_precision_has_another_table(tmp_path: Path, own_teacher: str) -> None:
    first = cached(tmp_path, "a", own_teacher)
    weights = own_teacher.partition("=")[2]
    content = torch.load(weights, weights_only=True)
    content["model"]["fc.bias"][0] += 1
    torch.save(content, weights)
    second = cached(tmp_path, "b", own_teacher)
    third = cached(tmp_path, "c", own_teacher, "DISTILLER.TEACHER_CACHE_PRECISION=fp16")
    assert len({first.table.folder, second.table.folder, third.table.folder}) == 3
    assert second.use.computed == second.use.asked, "a stale row was used"
    assert third.table.dtype == np.float16


def test_answers_of_other_code_with_the_same_weights_are_refused(
    tmp_path: Path, own_teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cached(tmp_path, "before", own_teacher, "DISTILLER.TEACHER_CACHE_PRECISION=fp16")
    outputs = type(found.network).outputs
    half = ["DISTILLER.TEACHER_CACHE=lazy", "DISTILLER.TEACHER_CACHE_PRECISION=fp16"]

    def louder(self: Network, images: torch.Tensor) -> Outputs:
        given = outputs(self, images)
        return given._replace(logits=given.logits * 1.1)

    monkeypatch.setattr(type(found.network), "outputs", louder)
    with pytest.raises(CheckpointError, match=f"{found.table.folder} holds other answers than the teacher gives"):
        train(config(tmp_path, "after", NORMKD, own_teacher, *half, epochs=1))
    shutil.rmtree(found.table.folder)
    train(config(tmp_path, "after", NORMKD, own_teacher, *half, "LOG.PREFIX=" + str(tmp_path / "again"), epochs=1))


def test_answers_that_fp16_cannot_hold_are_refused(tmp_path: Path, own_teacher: str) -> None:
    weights = own_teacher.partition("=")[2]
    content = torch.load(weights, weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        content["model"][name] *= 1e5
    torch.save(content, weights)
    lazy = "DISTILLER.TEACHER_CACHE=lazy"
    half = config(tmp_path, "half", NORMKD, own_teacher, lazy, "DISTILLER.TEACHER_CACHE_PRECISION=fp16", epochs=1)
    with pytest.raises(CheckpointError, match=r"too large for fp16: set DISTILLER\.TEACHER_CACHE_PRECISION fp32"):
        train(half)
    train(config(tmp_path, "whole", NORMKD, own_teacher, lazy, epochs=1))


def test_answers_that_depend_on_the_batch_are_not_kept(
    tmp_path: Path, own_teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DISTILLERS["KD"], "teacher_in_train_mode", True)
    lazy = "DISTILLER.TEACHER_CACHE=lazy"
    train(config(tmp_path, "run", "DISTILLER.TYPE=KD", own_teacher, lazy, epochs=1))
    assert "no teacher cache: KD runs the teacher in training mode" in capsys.readouterr().out
    assert not (tmp_path / "teacher.pt.cache").exists(), "others would take these answers for the teacher's"


def test_resuming_with_answers_of_another_precision_is_refused(tmp_path: Path, own_teacher: str) -> None:
    half = ["DISTILLER.TEACHER_CACHE=lazy", "DISTILLER.TEACHER_CACHE_PRECISION=fp16"]
    train(config(tmp_path, "half", NORMKD, own_teacher, *half, epochs=1))
    with pytest.raises(ConfigError, match=r"another precision of the teacher's answers \(fp16, now as computed\)"):
        train(config(tmp_path, "half", NORMKD, own_teacher), resume=True)
    # The key says nothing of a run without a cache, which is the same with one that does not round.
    train(config(tmp_path, "off", NORMKD, own_teacher, half[1], epochs=1))
    with pytest.raises(ConfigError, match=r"another precision of the teacher's answers \(as computed, now fp16\)"):
        train(config(tmp_path, "off", NORMKD, own_teacher, *half), resume=True)
    train(config(tmp_path, "whole", NORMKD, own_teacher, epochs=1))
    train(config(tmp_path, "whole", NORMKD, own_teacher, half[0]), resume=True)


@pytest.mark.parametrize(("method", "told"), [("KD", "fp32, teacher cache in fp16"), ("FITNET", "fp32")])
def test_a_record_tells_that_the_answers_were_rounded(tmp_path: Path, own_teacher: str, method: str, told: str) -> None:
    half = ("DISTILLER.TEACHER_CACHE=lazy", "DISTILLER.TEACHER_CACHE_PRECISION=fp16")
    train(config(tmp_path, "half", f"DISTILLER.TYPE={method}", own_teacher, *half, epochs=1))
    assert Entry(tmp_path, finished_record(tmp_path / "distill" / "half"), "").precision == told


def test_pooled_features_are_cached_and_maps_are_not(
    tmp_path: Path, own_teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(config(tmp_path, "rkd", "DISTILLER.TYPE=RKD", "DISTILLER.TEACHER_CACHE=lazy", own_teacher))
    found = run.trainer.step.teacher
    assert isinstance(found, CachedTeacher)
    assert found.table.width == 10 + 64
    *raw, values = next(found.feed(found.loader.batches(1)))
    outputs = found(found.loader.prepare(*raw), values)
    with torch.no_grad():
        wanted = found.network.outputs(found.loader.prepare(*raw).images).pooled
    torch.testing.assert_close(outputs.pooled, wanted, rtol=1e-4, atol=1e-4)
    run.trainer.log.close()
    train(config(tmp_path, "fitnet", "DISTILLER.TYPE=FITNET", "DISTILLER.TEACHER_CACHE=lazy", own_teacher, epochs=1))
    assert "no teacher cache: FITNET requires the teacher's maps" in capsys.readouterr().out


def make_table(folder: Path, width: int = 3) -> Table:
    return Table(folder, {"teacher": "abc"}, rows=1000, width=width, dtype=np.dtype(np.float32), shard_rows=300)


def test_rows_are_written_once_and_shared(tmp_path: Path) -> None:
    a, b = make_table(tmp_path / "t"), make_table(tmp_path / "t")
    rows = np.array([5, 900, 7])
    a.write(rows, np.arange(9).reshape(3, 3))
    assert b.missing(np.array([7, 8, 5, 8])).tolist() == [8]
    b.write(np.array([7, 8]), np.full((2, 3), -1))  # 7 is there already: it stays
    assert a.read(np.array([7, 8])).tolist() == [[6, 7, 8], [-1, -1, -1]]
    assert len(a) == len(make_table(tmp_path / "t")) == 4


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    make_table(tmp_path / "t")
    with pytest.raises(CheckpointError, match="was made for something else"):
        make_table(tmp_path / "t", width=4)
    (tmp_path / "t" / "about.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_table(tmp_path / "t")


def test_a_table_lies_in_files_that_are_made_when_they_are_needed(tmp_path: Path) -> None:
    table, reader = make_table(tmp_path / "t"), make_table(tmp_path / "t")
    rows = np.array([999, 301, 300, 302, 5])  # neighbours in any order, and the last, shorter file
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    assert reader.read(rows).tolist() == np.zeros((5, 3)).tolist()
    table.write(rows, values)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "t").glob("rows-*")}
    assert sizes == {"rows-0000.bin": 3600, "rows-0001.bin": 3600, "rows-0003.bin": 1200}
    for one in (table, reader, make_table(tmp_path / "t")):
        assert np.array_equal(one.read(rows), values)
        assert one.there(np.array([5, 6, 300, 600, 999])).tolist() == [True, False, True, False, True]


def test_what_a_crash_left_half_written_is_not_there_and_is_written_again(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    table.write(np.array([4, 5, 6]), np.arange(1, 10).reshape(3, 3))
    with (tmp_path / "t" / "rows-0000.bin").open("r+b") as file:  # the checksum reached the disk, the row did not
        file.seek(5 * 12 + 4)
        file.write(bytes(8))
    again = make_table(tmp_path / "t")
    assert again.missing(np.array([4, 5, 6, 7])).tolist() == [5, 7]
    again.write(np.array([4, 5]), np.array([[0, 0, 0], [4, 5, 6]]))
    assert again.read(np.array([4, 5])).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not len(again.missing(np.array([4, 5, 6])))
    os.truncate(tmp_path / "t" / "rows-0000.bin", 100)
    with pytest.raises(CheckpointError, match=r"rows-0000.bin cannot be read .*: remove it"):
        make_table(tmp_path / "t").read(np.array([4]))
    (tmp_path / "t" / "rows-0000.bin").unlink()
    assert make_table(tmp_path / "t").missing(np.array([4, 5])).tolist() == [4, 5]


def test_a_full_disk_is_a_clear_error(tmp_path: Path, own_teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(tmp_path / "t")
    table.write(np.array([1]), np.ones((1, 3)))

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)  # a disk cannot be filled up for a test
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\): free space or set"):
        table.write(np.array([2]), np.ones((1, 3)))
    assert table.missing(np.array([1, 2])).tolist() == [2]
    with pytest.raises(CheckpointError, match="No space left on device"):  # from the thread that writes
        cached(tmp_path, "run", own_teacher)


def test_too_little_space_is_said_before_training(
    tmp_path: Path, own_teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"may need .* GB and the disk has 0\.00 GB free"):
        cached(tmp_path, "run", own_teacher)


def test_compiling_is_chosen_by_length_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in compiler_missing(cpu)
    kind, why = choose("all", cpu, 10**6)
    assert (kind, why.startswith("nothing is compiled: no C++ compiler")) == ("none", True)
    monkeypatch.undo()
    if compiler_missing(cpu):
        pytest.skip("no C++ compiler on this machine")
    assert choose("auto", cpu, 100)[0] == "none"
    assert choose("auto", cpu, 10**6)[0] == "teacher"
    assert choose("none", cpu, 10**6) == ("none", "")


@pytest.mark.slow
def test_the_compiled_teacher_says_the_same() -> None:
    if why := compiler_missing(torch.device("cpu")):
        pytest.skip(why)
    network = trained_network("resnet8")
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    said: list[str] = []
    live = LiveTeacher(network, Need.LOGITS, compiler=lambda module: compile_teacher(module, images, said.append))
    with torch.no_grad():
        wanted = network(images)
    torch.testing.assert_close(live.run(images).logits, wanted, rtol=1e-3, atol=1e-3)
    assert said == []


@pytest.mark.slow
def test_the_compiled_student_learns_the_same() -> None:
    if why := compiler_missing(torch.device("cpu")):
        pytest.skip(why)
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    said: list[str] = []
    eager = trained_network("resnet8").train()
    network = copy.deepcopy(eager)
    for passes in (eager.outputs, compile_student(network, said.append)):
        passes(images).logits.square().mean().backward()
    wanted, got = ({name: each.grad for name, each in net.named_parameters()} for net in (eager, network))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
    assert said == []


@pytest.mark.parametrize("cache", ["off", "lazy"])
@pytest.mark.parametrize("method", ["KD", "AT"])
def test_the_teacher_is_not_compiled_again_in_the_first_step(
    tmp_path: Path, own_teacher: str, monkeypatch: pytest.MonkeyPatch, method: str, cache: str
) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr("mdistiller_norm.engine.compile.compiler_missing", lambda device: "")
    more = (f"DISTILLER.TYPE={method}", f"DISTILLER.TEACHER_CACHE={cache}", "ENGINE.COMPILE=teacher")
    run = build_run(config(tmp_path, "run", *more, own_teacher))
    run.trainer.log.close()
    assert len(compiled) == 1
    step = run.trainer.step
    step(*next(step.with_teacher_outputs(step.loader.batches(1))))
    assert len(compiled) == 1


def test_a_compiler_that_fails_is_a_line_and_not_a_crash() -> None:
    from torch._inductor import config as inductor

    module, example = build_model("resnet8", 10).eval(), torch.randn(2, 3, 32, 32)
    said: list[str] = []
    with inductor.patch({"cpp.cxx": (None, "/bin/false"), "force_disable_caches": True}):
        run = compile_teacher(folded(module, Need.LOGITS), example, said.append)
        student = compile_student(module, said.append)
        assert torch.equal(student(example).logits, module(example))
    assert run(example).logits.shape == (2, 10)
    assert torch.equal(student(example).logits, module(example))
    assert len(said) == 2
    for line, who in zip(said, ("teacher", "student"), strict=True):
        assert line.startswith(f"the {who} could not be compiled (")
        assert line.endswith("it runs uncompiled")


def test_the_table_describes_itself(tmp_path: Path, own_teacher: str) -> None:
    found = cached(tmp_path, "run", own_teacher)
    about = json.loads((found.table.folder / "about.json").read_text())
    assert about["rows"] == 1437 * 81
    assert about["teacher"] == found.hash
    assert found.table.folder.parent.name == "teacher.pt.cache"
