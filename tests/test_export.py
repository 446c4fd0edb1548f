"""Exports of networks: each file against the network it is made from, on real digits, and what is refused."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_user_error, tool
from test_models import EACH_FAMILY, build
from torch import Tensor, nn

from mdistiller_norm.build import open_checkpoint
from mdistiller_norm.cli import execute
from mdistiller_norm.data.digits import digits
from mdistiller_norm.data.folder import MEAN, STD
from mdistiller_norm.engine.checkpoint import load, load_weights
from mdistiller_norm.errors import CheckpointError, ConfigError
from mdistiller_norm.export import check, open_subject


@pytest.fixture
def student(run: Path) -> Path:
    """Its weights."""
    return run / "student_last.pt"


def export(*arguments: object) -> None:
    assert execute(["export", *map(str, arguments)]) == 0


def pixels() -> Tensor:
    """All test digits as ``[360, 3, 32, 32]`` in 0..1, made without a loader."""
    return digits().test.images.permute(0, 3, 1, 2).float() / 255


def logits(student: Path) -> Tensor:
    """The network's own, of the same images."""
    network, dataset = open_checkpoint(student)
    images = next(iter(dataset.eval_loader(360, torch.device("cpu"))))[0]
    with torch.no_grad():
        return network.eval()(images)


def read_pt2(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """What a user without this package does."""
    extra = {"about.json": ""}
    return torch.export.load(path, extra_files=extra).module(), json.loads(extra["about.json"])


def saved(path: Path, variant: str, name: str, **about: Any) -> Path:
    """A weights file of a network with statistics unlike those it starts with, on images that are nowhere."""
    network = build(variant, name, "cpu")
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 2)
    known = {
        "name": name, "variant": variant, "classes": [str(number) for number in range(network.num_classes)],
        "dataset": "flowers", "type": "image_folder", "mean": list(MEAN), "std": list(STD), "image_size": [32, 32],
    }  # fmt: skip
    torch.save({"model": network.state_dict(), "about": known | about}, path)
    return path


def test_the_tool_writes_a_pt2_beside_the_checkpoint(student: Path) -> None:
    done = tool("export", "-c", student)
    path = student.with_suffix(".pt2")
    module, about = read_pt2(path)
    path.unlink()
    assert "Unable to load" not in done.stderr  # what torch says to a file whose name does not end in .pt2
    assert "random images, batches of 1 and 16" in done.stdout
    assert "digits images, batches of 1 and 64" in done.stdout
    stated = load_weights(student).about
    shared = ("name", "variant", "dataset", "classes", "mean", "std", "image_size", "top1")
    assert {key: about[key] for key in shared} == {key: stated[key] for key in shared}
    assert "minus mean" in about["input"]
    normalised = (pixels() - torch.tensor(about["mean"])[:, None, None]) / torch.tensor(about["std"])[:, None, None]
    for count in (1, 3, 360):
        torch.testing.assert_close(module(normalised[:count]), logits(student)[:count], rtol=1e-4, atol=1e-4)
    with pytest.raises((AssertionError, RuntimeError)):  # the size of the images is fixed
        module(torch.zeros(2, 3, 40, 40))


def test_normalisation_can_be_part_of_the_file(student: Path, tmp_path: Path) -> None:
    export("-c", student, "-o", tmp_path / "s.pt2", "--with-normalisation", "-bs", 5)
    module, about = read_pt2(tmp_path / "s.pt2")
    assert about["input"] == "float32 [B, 3, 32, 32], RGB in 0..1"
    torch.testing.assert_close(module(pixels()), logits(student), rtol=1e-4, atol=1e-4)


def test_a_state_dict_is_bare(run: Path, student: Path, tmp_path: Path) -> None:
    for source in (student, run / "latest.pt"):
        export("-c", source, "-o", tmp_path / f"{source.stem}.pth")
        content = torch.load(tmp_path / f"{source.stem}.pth", weights_only=True)
        assert content.keys() == {"model"}
        expected = load(student)["model"]
        assert content["model"].keys() == expected.keys()
        assert all(torch.equal(content["model"][key], expected[key]) for key in expected)


def test_files_of_others_are_told_what_they_are(student: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": load(student)["model"]}, theirs)
    with pytest.raises(ConfigError, match="add -m"):
        export("-c", theirs)
    export("-c", theirs, "-m", "resnet8", "-d", "digits", "--with-normalisation")
    module, about = read_pt2(tmp_path / "ckpt_epoch_240.pt2")
    assert (about["name"], about["dataset"], len(about["classes"])) == ("resnet8", "digits", 10)
    torch.testing.assert_close(module(pixels()), logits(student), rtol=1e-4, atol=1e-4)


@EACH_FAMILY
def test_every_family_without_its_images(variant: str, name: str, tmp_path: Path, capsys: Any) -> None:
    size = 224 if name == "MobileNetV1" else 32
    path = saved(tmp_path / "s.pt", variant, name, image_size=[size, size])
    export("-c", path, "--root", tmp_path / "nowhere")  # which loads the file and compares it, or fails
    taken, found, why = capsys.readouterr().out.splitlines()
    assert f"{name}, {100 if variant == 'cifar' else 1000} classes, input float32 [B, 3, {size}, {size}]" in taken
    assert found.endswith("on random images, batches of 1 and 16")
    assert why.startswith("checked on random images only: ")
    assert (tmp_path / "s.pt2").is_file()


def test_nothing_is_downloaded_for_a_check(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "data"
    root.mkdir()
    export("-c", saved(tmp_path / "s.pt", "cifar", "resnet8", dataset="cifar100", type="cifar100"), "--root", root)
    assert f"checked on random images only: there is no {root / 'cifar-100-python'}" in capsys.readouterr().out
    assert not list(root.iterdir())


def test_a_network_that_answers_otherwise_is_found(student: Path) -> None:
    subject = open_subject(student, "", "", Path("data"), 8)
    assert len(check(subject.network, subject, False)) == 2
    with pytest.raises(CheckpointError, match=r"on random images its logits differ by 0\.01"):
        check(lambda images: subject.network(images) + 0.01, subject, False)
    swapped = subject._replace(real=subject.real.flip(1) * torch.tensor([1.0, 1.0, 0.0])[:, None, None])
    with pytest.raises(CheckpointError, match="on digits images"):  # right on the random ones only
        check(lambda images: subject.network(images) + (images[:, 2].abs().sum() == 0), swapped, False)


def test_a_file_that_fails_its_check_leaves_the_one_before_it(student: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "s.pt", tmp_path / "s.pt2"
    content = load(student)
    content["model"]["fc.bias"][3] = float("nan")
    torch.save(content, broken)
    out.write_text("before")
    with pytest.raises(CheckpointError, match=r"s\.pt2 is not written: on random images its logits differ by nan"):
        export("-c", broken, "--force")
    assert out.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == [broken, out]


@pytest.mark.parametrize("name", ["s.pt2", "s.pth"])
def test_a_disk_that_is_full_leaves_the_file_before_it(student: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    out.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"{name} could not be written \(.*File too large"):
            export("-c", student, "-o", out, "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_is_there_is_kept_unless_forced(student: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.pth"
    out.write_text("before")
    with pytest.raises(ConfigError, match=r"is there already.*--force"):
        export("-c", student, "-o", out)
    assert out.read_text() == "before"
    export("-c", student, "-o", out, "--force")
    assert load(out).keys() == {"model"}


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    assert_user_error(tool("export", "-c", text, check=False), "text.pt", "is not loaded")
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*none\.pt"):
        export("-c", tmp_path / "none.pt")
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "'tflite' is not known: choose --format pt2, onnx, state_dict"),
        (["-o", "s.bin"], "'.bin' is not known"),
        (["-o", "s.onnx", "--format", "pt2"], "suffix of onnx, and --format is pt2"),
        (["-o", "nowhere/s.pt2"], "is a folder, or in one that is not there"),
        (["--format", "state_dict", "--with-normalisation"], "holds weights only"),
        (["-m", "resnet14"], "does not fit resnet14"),
        (["-bs", "0"], "at least 1"),
    ],
)
def test_options_that_cannot_be(student: Path, arguments: list[str], message: str) -> None:
    before = sorted(student.parent.iterdir())
    with pytest.raises((ConfigError, CheckpointError), match=message):
        export("-c", student, *arguments)
    assert sorted(student.parent.iterdir()) == before


def test_the_checkpoint_itself_is_never_replaced(student: Path) -> None:
    with pytest.raises(ConfigError, match="is the checkpoint itself"):
        export("-c", student, "-o", student, "--force")


def test_onnx_without_its_packages_says_what_to_install(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # Python's own way to say that a module is not there
    with pytest.raises(ConfigError, match="pip install onnx onnxscript onnxruntime"):
        export("-c", student, "--format", "onnx")


def test_onnx(student: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: it comes with the extra onnx")
    import onnxruntime

    export("-c", student, "-o", tmp_path / "s.onnx", "--with-normalisation")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert about["name"] == "resnet8"
    assert json.loads(about["classes"]) == [str(number) for number in range(10)]
    assert json.loads(about["mean"]) == pytest.approx([0.3054] * 3)
    for count in (1, 3, 360):
        (found,) = session.run(["logits"], {"images": pixels()[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits(student)[:count], rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.onnx"]
