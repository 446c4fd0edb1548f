"""Checkpoints: layouts of other projects, refused files, atomic writes, and the search for a teacher."""

import argparse
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mdistiller_norm.engine import teacher_file
from mdistiller_norm.engine.checkpoint import load_into, load_weights, save_atomically
from mdistiller_norm.engine.teacher_file import TeacherFile, find_teacher
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.models import build_model


def network():
    return build_model("resnet8", 10)


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    "bare": lambda state: state,
    "mdistiller distiller": lambda state: {
        "epoch": 240, "best_acc": np.float64(75.2),
        "model": prefixed("module.student.", state) | {f"module.teacher.{key}": v + 1 for key, v in state.items()},
    },
    "RepDistiller": lambda state: {
        "model": state, "opt": argparse.Namespace(lr=0.1), "best_acc": torch.tensor(7.3), "accuracy": np.float32(7.3),
    },
    "compiled": lambda state: {"net": prefixed("_orig_mod.module.", state), "acc": 72.3},
    "tutorial": lambda state: {"model_state_dict": prefixed("module._orig_mod.", state)},
    "Lightning": lambda state: {"state_dict": prefixed("model.", state), "pytorch-lightning_version": "2.5"},
    "torchvision": lambda state: {"state_dict": prefixed("module.", state), "args": argparse.Namespace(data=Path())},
    "metadata of another project": lambda state: {"model": state, "about": ["resnet8"]},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load_strictly(tmp_path, layout):
    source, target = network().eval(), network().eval()
    file, new = tmp_path / "weights.pth", layout != "torchvision"
    torch.save(LAYOUTS[layout](source.state_dict()), file, _use_new_zipfile_serialization=new)
    file.write_bytes(file.read_bytes().replace(b"cpathlib\n", b"cpathlib._local\n"))  # as in 3.13
    load_into(target, weights := load_weights(file), "resnet8")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(source(images), target(images))
    assert weights.about == {}


class Evil:
    def __reduce__(self):
        return (os.system, ("echo code from a checkpoint ran",))


def stored(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stored({"model": {}, "extra": Evil()}), "could run code"),
        (stored(network()), r"save only its state_dict\(\)"),
        *((stored(network().state_dict())[:n], "may be truncated") for n in (0, 10, 20_000, -10)),
        *((text, "is a text file") for text in (b"J\n", b"(l.\n", b"Entry not found")),
        (b"<!DOCTYPE html><html></html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0\0\0", "a gzip file"),
        (stored({"model": {"a": 1}}), "holds no weights"),
        (stored([1, 2]), "holds a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_other_files_are_refused(tmp_path, content, message, capfd):
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*odd\.pth[^\n]*{message}[^\n]*$"):
        load_weights(tmp_path / "odd.pth")
    assert "code from a checkpoint" not in capfd.readouterr().out


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(network().state_dict(), tmp_path / "resnet8.pth")
    weights = load_weights(tmp_path / "resnet8.pth")
    for other, words in (
        (build_model("resnet14", 10), r"Missing.*layer1\.1\.conv1\.weight"),
        (build_model("resnet8", 100), r"mismatch for fc\.weight.*\[10, 64\].*\[100, 64\]"),
    ):
        with pytest.raises(CheckpointError, match=rf"\.pth does not fit name: .*{words}"):
            load_into(other, weights, "name")


class Interrupted:
    def __reduce__(self):
        raise KeyboardInterrupt


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "state.pt"
    save_atomically({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    (tmp_path / ".state.pt.tmp").write_bytes(b"left by a killed process")
    with pytest.raises(KeyboardInterrupt):
        save_atomically([torch.zeros(2), Interrupted()], path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_file, "ROOTS", (Path(), tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(network().state_dict(), tmp_path / "checkpoints" / "teacher.pt")
    return tmp_path


def add_entry(project, **changes):
    entry = {"file": "teacher.pt", "model": "resnet8", "dataset": "digits", "top1": 97.5}
    (project / "checkpoints" / "manifest.yaml").write_text(yaml.safe_dump([entry | changes]))


def find(weights="", dataset="digits", epochs=0, **data):
    return find_teacher("resnet8", dataset, weights, Path("output"), "python x.py", epochs, data)


def test_the_manifest_and_mdistillers_downloads_are_searched(project):
    file = project / "checkpoints" / "teacher.pt"
    add_entry(project, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert find() == TeacherFile(Path("checkpoints/teacher.pt"), 97.5)
    assert find(str(file)).top1 == 97.5
    with pytest.raises(CheckpointError, match=r"resnet8 on cifar100.*train it with `python"):
        find(dataset="cifar100")
    for kind, name in (("cifar", "ckpt_epoch_240.pth"), ("tiny_imagenet", "ti_res18")):
        path = Path(f"download_ckpts/{kind}_teachers/resnet8_vanilla/{name}")
        path.parent.mkdir(parents=True)
        torch.save({"model": network().state_dict()}, path)
        assert find(dataset={"cifar": "cifar100"}.get(kind, kind)).path == path
    with pytest.raises(CheckpointError, match=r"TEACHER_WEIGHTS: there is no file nowhere\.pth"):
        find("nowhere.pth")
    for change, message in (
        ({"sha256": "0" * 64}, "another SHA-256"),
        ({"file": "gone.pt"}, "does not exist"),
        ({"file": ["teacher.pt"]}, "must have file, model and dataset"),
    ):
        add_entry(project, **change)
        with pytest.raises(CheckpointError, match=message):
            find()


def add_run(project, name, epochs, top1, **changes):
    folder = project / "output" / "digits" / name
    folder.mkdir(parents=True)
    torch.save({"model": network().state_dict()}, folder / "student_last.pt")
    result = {
        "method": [], "student": "resnet8", "dataset": "digits", "epochs": epochs, "last": {"top1": top1},
        "config": {"DATASET": {"VAL_SPLIT": 0.0, "CLASSES": []}},
    } | changes  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return Path("output", "digits", name, "student_last.pt")


def test_finished_runs_are_searched_by_data_length_and_accuracy(project):
    smoke = add_run(project, "smoke", 2, 99.0)
    assert find(epochs=2) == TeacherFile(smoke, 99.0)
    assert f"{smoke} was trained for 2 epochs, the student for 240:" in find(epochs=240).warning
    add_run(project, "worse", 240, 90.0)
    full = add_run(project, "full", 240, 95.0)
    # None of these is a plain run of this model on the whole training set.
    held_out, unreadable = {"config": {"DATASET": {"VAL_SPLIT": 0.1}}}, {"config": ""}
    for other in (held_out, unreadable, {"method": ["KD"]}, {"student": "resnet20"}):
        add_run(project, str(other), 240, 99.9, **other)
    (project / add_run(project, "without weights", 240, 99.9)).unlink()
    assert find(epochs=240) == TeacherFile(full, 95.0)
    two = add_run(project, "two", 2, 80.0, config={"DATASET": {"CLASSES": ["a", "b"]}})
    assert find(epochs=240, CLASSES=["a", "b"]).path == two
    add_entry(project)
    assert find(epochs=240).path == Path("checkpoints/teacher.pt")
