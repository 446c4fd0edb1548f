"""Exported networks against the networks that they are made from, on the digits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from short_runs import assert_same_state, outputs_of
from test_models import build, randomise_norms
from torch import Tensor, nn

from mdistiller_norm.cli import execute
from mdistiller_norm.data.digits import digits
from mdistiller_norm.engine.checkpoint import load, load_weights
from mdistiller_norm.errors import CheckpointError, UserError
from mdistiller_norm.export import check
from mdistiller_norm.models import build_model
from mdistiller_norm.student import load_student


@pytest.fixture
def student(run: Path) -> Path:
    return run / "student_last.pt"


def export(*arguments: object) -> None:
    assert execute(["export", *map(str, arguments)]) == 0


def pixels() -> Tensor:
    """All test digits as ``[360, 3, 32, 32]`` in 0..1, without a loader."""
    return digits().test.images.permute(0, 3, 1, 2).float() / 255


def read_pt2(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    extra = {"about.json": ""}
    return torch.export.load(path, extra_files=extra).module(), json.loads(extra["about.json"])


def test_pt2_beside_the_checkpoint(student: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export("-c", student)
    path = student.with_suffix(".pt2")
    module, about = read_pt2(path)
    path.unlink()
    printed = capfd.readouterr()
    assert "Unable to load" not in printed.err
    assert "on digits images, batches of 1 and 64" in printed.out
    stored, copied = (
        load_weights(student).about,
        ("name", "dataset", "classes", "mean", "std", "top1"),
    )
    assert {key: about[key] for key in copied} == {key: stored[key] for key in copied}
    assert (about["resize"], about["crop"], about["channels"]) == (32, "center", "RGB")
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    expected = outputs_of(student)[0]
    for count in (1, 3, 360):
        found = module((pixels()[:count] - mean) / std)
        torch.testing.assert_close(found, expected[:count], rtol=1e-4, atol=1e-4)
    with pytest.raises((AssertionError, RuntimeError)):
        module(torch.zeros(2, 3, 40, 40))


def test_the_normalisation_can_be_included(student: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": load(student)["model"]}, foreign)
    export("-c", foreign, "-m", "resnet8", "-d", "digits", "--with-normalisation", "-bs", 5)
    module, about = read_pt2(tmp_path / "ckpt_epoch_240.pt2")
    assert about["input"] == "float32 [B, 3, 32, 32], RGB in 0..1"
    assert (about["name"], about["dataset"], len(about["classes"])) == ("resnet8", "digits", 10)
    torch.testing.assert_close(module(pixels()), outputs_of(student)[0], rtol=1e-4, atol=1e-4)


def test_state_dict_of_a_student_and_of_a_run_state(
    run: Path, student: Path, tmp_path: Path
) -> None:
    for source in (student, run / "latest.pt"):
        export("-c", source, "-o", tmp_path / f"{source.stem}.pth")
        content = torch.load(tmp_path / f"{source.stem}.pth", weights_only=True)
        assert_same_state(content, {"model": dict(load(student)["model"])})


@pytest.mark.parametrize(
    ("variant", "name"), [("cifar", "ShuffleV1"), ("imagenet", "MobileNetV1")]
)
def test_networks_without_its_data_set(
    variant: str, name: str, tmp_path: Path, capsys: Any
) -> None:
    network = build(variant, name, "cpu")
    randomise_norms(network)
    size = 224 if name == "MobileNetV1" else 32
    about = {
        "name": name, "variant": variant, "classes": [str(number) for number in range(network.num_classes)],
        "dataset": "flowers", "type": "cifar100" if variant == "cifar" else "image_folder", "resize": 240,
        "image_size": [size, size], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3],
    }  # fmt: skip
    torch.save({"model": network.state_dict(), "about": about}, tmp_path / "s.pt")
    export(
        "-c", tmp_path / "s.pt", "--root", tmp_path
    )  # CIFAR-100 is not downloaded for the check
    first, found, reason = capsys.readouterr().out.splitlines()
    assert f"{name}, {network.num_classes} classes, input float32 [B, 3, {size}, {size}]" in first
    assert found.endswith("on random images, batches of 1 and 16")
    assert reason.startswith(f"checked on random images only: {tmp_path}")
    assert read_pt2(tmp_path / "s.pt2")[1]["resize"] == (32 if variant == "cifar" else 240)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_different_network_is_detected(student: Path) -> None:
    loaded = load_student(student)
    assert len(check(loaded.network, loaded, 8)) == 2
    with pytest.raises(CheckpointError, match=r"differ by 0\.01 on random images"):
        check(lambda images: loaded.network(images) + 0.01, loaded, 8)
    with pytest.raises(CheckpointError, match="on digits images"):
        check(lambda images: loaded.network(images) + (images.min() > -2), loaded, 8)


def test_a_failed_export_keeps_the_existing_file(student, tmp_path, limited_files):
    content, out = load(student), tmp_path / "s.pt2"
    content["model"]["fc.bias"][3] = float("nan")
    torch.save(content, tmp_path / "s.pt")
    out.write_text("before")
    with pytest.raises(CheckpointError, match=r"nothing is written: .* differ by nan on random"):
        export("-c", tmp_path / "s.pt", "--force")
    limited_files(100_000)
    with pytest.raises(CheckpointError, match=r"s\.pt2 cannot be written \(.*File too large"):
        export("-c", student, "-o", out, "--force")
    assert out.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "s.pt", out]


def test_bad_options(student: Path) -> None:
    before = sorted(student.parent.iterdir())
    for *arguments, message in (
        ("--format", "tflite", "invalid choice: 'tflite'"),
        ("-o", "s.bin", "must end in the suffix of its format"),
        ("-o", "s.onnx", "--format", "pt2", "must end in the suffix of its format"),
        ("-o", "nowhere/s.pt2", "must be a file in an existing folder"),
        ("-o", student, "--force", "exists: choose another path"),
        ("-o", student, "exists: choose another path, or replace it with --force"),
        ("--format", "state_dict", "--with-normalisation", "weights only"),
        ("-m", "resnet14", "does not fit resnet14"),
    ):
        with pytest.raises(UserError, match=message):
            export("-c", student, *arguments)
    assert sorted(student.parent.iterdir()) == before


def test_onnx(student: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    export("-c", student, "-o", tmp_path / "s.onnx", "--with-normalisation")
    session = onnxruntime.InferenceSession(
        tmp_path / "s.onnx", providers=["CPUExecutionProvider"]
    )
    about = session.get_modelmeta().custom_metadata_map
    assert (about["name"], about["resize"], about["channels"]) == ("resnet8", "32", "RGB")
    expected = outputs_of(student)[0]
    for count in (1, 3, 360):
        (found,) = session.run(["logits"], {"images": pixels()[:count].numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), expected[:count], rtol=1e-4, atol=1e-4
        )


def test_a_folder_for_the_hub(run: Path, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    export("-c", run, "--push-folder", tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["resize"]) == (
        "resnet8",
        10,
        32,
    )
    network = build_model("resnet8", 10)
    network.load_state_dict(safetensors.load_file(tmp_path / "hub" / "model.safetensors"))
    assert_same_state(network.state_dict(), load(run / "student_best.pt")["model"])
    card = yaml.safe_load((tmp_path / "hub" / "README.md").read_text().split("---")[1])
    best = json.loads((run / "result.json").read_text())["best"]["top1"]
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == round(best, 2)
    with pytest.raises(UserError, match="exists"):
        export("-c", run, "--push-folder", tmp_path / "hub")
