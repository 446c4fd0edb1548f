"""Weights from every kind of file, and nothing but weights."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_user_error, tool
from torch import nn
from torchvision.models import mnasnet0_5

from mdistiller_norm.engine import teacher_file
from mdistiller_norm.engine.checkpoint import Saver, load, load_into, load_weights, save_atomically
from mdistiller_norm.engine.teacher_file import TeacherFile, find_teacher
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.models import Wrapped, build_model


def network() -> nn.Module:
    return build_model("resnet8", 10)


def published(kind: str, state: dict[str, torch.Tensor]) -> Any:
    """The layouts that are found in the wild."""
    wrapped = {f"module.{key}": value for key, value in state.items()}
    distiller = {f"module.student.{key}": value for key, value in state.items()}
    distiller |= {f"module.teacher.{key}": value + 1 for key, value in state.items()}
    return {
        "bare": state,
        "mdistiller": {"model": state},
        "mdistiller distiller": {"epoch": 240, "model": distiller, "best_acc": np.float64(75.2)},
        "RepDistiller": {
            "epoch": 240,
            "model": state,
            "opt": argparse.Namespace(model="resnet8", learning_rate=0.05),
            "best_acc": torch.tensor(72.3),
            "accuracy": np.float32(72.3),
        },
        "compiled": {"net": {f"_orig_mod.{key}": value for key, value in wrapped.items()}, "acc": 72.3},
        "tutorial": {"model_state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        "Lightning": {
            "state_dict": {f"model.{key}": value for key, value in state.items()},
            "epoch": 89,
            "pytorch-lightning_version": "2.5",
        },
        "torchvision reference": {"state_dict": wrapped, "args": argparse.Namespace(lr=0.1), "epoch": 89},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "bare",
        "mdistiller",
        "mdistiller distiller",
        "RepDistiller",
        "compiled",
        "tutorial",
        "Lightning",
        "torchvision reference",
    ],
)
def test_published_layouts_load_strictly(tmp_path: Path, kind: str) -> None:
    source, target = network().eval(), network().eval()
    torch.save(published(kind, source.state_dict()), tmp_path / "weights.pth")
    load_into(target, load_weights(tmp_path / "weights.pth"), "resnet8")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(images), target(images))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("echo code from a checkpoint ran",))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": network().state_dict(), "extra": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        load_weights(tmp_path / "evil.pth")
    assert "code from a checkpoint" not in capfd.readouterr().out
    torch.save(network(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"saved whole, save its state_dict\(\)"):
        load_weights(tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": 1}}, "holds no weights"),
        ([1, 2], "holds a list"),
        ({}, "holds no weights"),
    ],
)
def test_files_without_weights_are_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth.* {message}|odd\.pth {message}"):
        load_weights(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset", ["digits"]), ("name", 3), ("type", None), ("variant", {}), ("classes", "abc"), ("plugins", [1]),
        ("mean", [0.5, 0.5]), ("std", [0.0, 0.1, 0.1]), ("image_size", []), ("resize", 0), ("top1", "good"),
    ],
)  # fmt: skip
def test_facts_beside_the_weights_that_cannot_be_are_named(tmp_path: Path, key: str, value: Any) -> None:
    torch.save({"model": network().state_dict(), "about": {"name": "resnet8", key: value}}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=rf"odd\.pt is damaged: it says that its {key} is"):
        load_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize("about", [3, ["resnet8"], None])
def test_facts_of_another_project_are_passed_over(tmp_path: Path, about: Any) -> None:
    torch.save({"model": network().state_dict(), "about": about}, tmp_path / "theirs.pt")
    assert load_weights(tmp_path / "theirs.pt").about == {}


def test_cut_off_and_missing_files_are_named(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pth") as caught:
            load(tmp_path / "cut.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "none.pth")


@pytest.mark.parametrize("text", [b"0 epochs\n", b"\x8a\x01", b"epoch 1/2\n", b"J\n", b"{}\n", b"(l.\n", b"i\n"])
def test_files_that_are_something_else_are_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "worklog.txt").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"worklog\.txt"):
        load(tmp_path / "worklog.txt")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_programs_are_not_taken_for_damaged_files(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.randn(4, 3),)), tmp_path / "student.pt2")
    torch.jit.save(torch.jit.script(nn.Linear(3, 2)), tmp_path / "student.pt")
    for name in ("student.pt2", "student.pt"):
        done = tool("eval", "-m", "resnet8", "-c", tmp_path / name, check=False)
        assert_user_error(done, f"{name} is a program of torch.export or TorchScript: name the checkpoint")
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_weights_of_another_network_name_the_first_difference(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "resnet8.pth")
    weights = load_weights(tmp_path / "resnet8.pth")
    with pytest.raises(CheckpointError, match=r"does not fit resnet14: it lacks tensor layer1\.1\.conv1\.weight"):
        load_into(build_model("resnet14", 10), weights, "resnet14")
    with pytest.raises(CheckpointError, match=r"fc\.weight has shape \(10, 64\), not \(100, 64\)"):
        load_into(build_model("resnet8", 100), weights, "resnet8")
    own_rule = Wrapped(mnasnet0_5(num_classes=4), 4, classifier="classifier.1")  # asks for a version, which files lack
    torch.save(own_rule.state_dict(), tmp_path / "mnasnet.pth")
    with pytest.raises(CheckpointError, match=r"mnasnet\.pth does not load into mnasnet: version should be set"):
        load_into(own_rule, load_weights(tmp_path / "mnasnet.pth"), "mnasnet")


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    save_atomically({"a": torch.ones(2)}, tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()

    class CannotBeSaved:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def __reduce__(self) -> tuple[Any, ...]:
            raise self.error

    (tmp_path / ".state.pt.tmp").write_bytes(b"what a killed process leaves")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_atomically([torch.zeros(2), CannotBeSaved(OSError("No space left"))], tmp_path / "state.pt")
    with pytest.raises(KeyboardInterrupt):
        save_atomically([torch.zeros(2), CannotBeSaved(KeyboardInterrupt())], tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["state.pt"]
    with pytest.raises(CheckpointError, match="could not be written"):
        save_atomically({}, tmp_path / "no such folder" / "state.pt")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, without the real project's manifest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_file, "PROJECT", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def add_entry(project: Path, **changes: Any) -> None:
    file = project / "checkpoints" / "teacher.pt"
    if not file.exists():
        torch.save(network().state_dict(), file)
    entry = {"file": "teacher.pt", "model": "resnet8", "dataset": "digits", "top1": 97.5} | changes
    (project / "checkpoints" / "manifest.yaml").write_text(yaml.safe_dump([entry]))


def find(weights: str = "", dataset: str = "digits") -> TeacherFile:
    return find_teacher("resnet8", dataset, weights, Path("output"), "python tools/train.py --cfg x.yaml")


def test_the_manifest_is_looked_up_by_model_and_data_set(project: Path) -> None:
    add_entry(project)
    assert find().path == Path("checkpoints/teacher.pt")
    assert find().top1 == 97.5
    assert find(str(project / "checkpoints" / "teacher.pt")).top1 == 97.5
    with pytest.raises(CheckpointError, match=r"no weights for the teacher resnet8 on cifar100.*train it with `python"):
        find(dataset="cifar100")


def test_the_manifest_is_checked(project: Path) -> None:
    add_entry(project, sha256=hashlib.sha256(b"other").hexdigest())
    with pytest.raises(CheckpointError, match="its sha256 differs"):
        find()
    add_entry(project, sha256=hashlib.sha256((project / "checkpoints" / "teacher.pt").read_bytes()).hexdigest())
    find()
    (project / "checkpoints" / "teacher.pt").unlink()
    with pytest.raises(CheckpointError, match="which is not there"):
        find()
    (project / "checkpoints" / "manifest.yaml").write_text("- file: only")
    with pytest.raises(CheckpointError, match="at least file, model and dataset"):
        find()
    add_entry(project, file=["teacher.pt"])
    with pytest.raises(CheckpointError, match="at least file, model and dataset"):
        find()
    (project / "checkpoints" / "manifest.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read as a manifest"):
        find()


def test_mdistillers_download_folder_is_found(project: Path) -> None:
    folder = project / "download_ckpts" / "cifar_teachers" / "resnet8_vanilla"
    folder.mkdir(parents=True)
    torch.save({"model": network().state_dict()}, folder / "ckpt_epoch_240.pth")
    assert find(dataset="cifar100").path.name == "ckpt_epoch_240.pth"


def add_run(project: Path, name: str, epochs: int, top1: float, **changes: Any) -> Path:
    folder = project / "output" / "digits" / name
    folder.mkdir(parents=True)
    torch.save({"model": network().state_dict()}, folder / "student_last.pt")
    result = {
        "method": [], "student": "resnet8", "dataset": "digits", "epochs": epochs, "last": {"top1": top1},
        "config": {"DATASET": {"VAL_SPLIT": 0.0}},
    } | changes  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return Path("output", "digits", name, "student_last.pt")


def test_of_the_teachers_trained_here_the_one_of_the_students_schedule_is_taken(project: Path) -> None:
    def found(epochs: int) -> TeacherFile:
        return find_teacher("resnet8", "digits", "", Path("output"), "python tools/train.py --cfg x.yaml", epochs)

    smoke = add_run(project, "smoke", 2, 99.0)
    assert found(2) == TeacherFile(smoke, 99.0)
    assert found(240).path == smoke
    assert found(240).warning.startswith(f"the teacher {smoke} trained for 2 of the 240 epochs")
    assert "python tools/train.py --cfg x.yaml" in found(240).warning
    add_run(project, "worse", 240, 90.0)
    full = add_run(project, "full", 240, 95.0)
    # None of these is a plain run of the whole training set, or of this model.
    add_run(project, "held out", 240, 99.9, config={"DATASET": {"VAL_SPLIT": 0.1}})
    add_run(project, "distilled", 240, 99.9, method=["KD"])
    add_run(project, "another", 240, 99.9, student="resnet20")
    add_run(project, "unreadable", 240, 99.9, config="")
    (project / add_run(project, "without weights", 240, 99.9)).unlink()
    assert found(240) == TeacherFile(full, 95.0)
    assert found(2) == TeacherFile(smoke, 99.0)
    assert found(100) == TeacherFile(full, 95.0), "a longer one is no reason for doubt"
    assert found(0).path == full
    add_entry(project)
    assert found(240).path == Path("checkpoints/teacher.pt")


def test_of_the_teachers_trained_here_one_on_the_same_classes_comes_first(project: Path) -> None:
    add_run(project, "all", 240, 95.0, config={"DATASET": {"CLASSES": []}})
    two = add_run(project, "two", 2, 80.0, config={"DATASET": {"CLASSES": ["a", "b"]}})
    assert find_teacher("resnet8", "digits", "", Path("output"), "", 240, {"CLASSES": ["a", "b"]}).path == two


def test_given_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"TEACHER_WEIGHTS: there is no file nowhere\.pth"):
        find("nowhere.pth")


@pytest.mark.parametrize("background", [False, True])
def test_a_saver_writes_what_was_there_when_it_was_asked(tmp_path: Path, background: bool) -> None:
    saver, weights, of_network = Saver(tmp_path, background), torch.ones(3), nn.BatchNorm1d(2).state_dict()
    state = {"trainable": {"w": weights}, "rates": [0.1], "pair": (weights, "text"), "network": of_network}
    saver.save({"best.pt": state, "latest.pt": state})
    weights.zero_()
    saver.finish()
    for name in ("best.pt", "latest.pt"):
        read = load(tmp_path / name)
        assert torch.equal(read["trainable"]["w"], torch.ones(3))
        assert torch.equal(read["pair"][0], torch.ones(3))
        assert (read["rates"], read["pair"][1]) == ([0.1], "text")
        assert read["network"]._metadata == of_network._metadata  # some networks do not load without


@pytest.mark.parametrize("background", [False, True])
def test_a_saver_says_what_it_could_not_write(tmp_path: Path, background: bool) -> None:
    saver = Saver(tmp_path / "gone", background)

    def save() -> None:
        saver.save({"latest.pt": {}})
        saver.finish()

    with pytest.raises(CheckpointError, match="could not be written"):
        save()
    saver.finish()  # said once
