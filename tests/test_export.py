"""Exported networks against the networks that they are made from, on the digits. ONNX files: test_tools.py."""

import json

import pytest
import torch
import yaml
from short_runs import assert_same_state, outputs_of
from test_models import build, randomise_norms

from mdistiller_norm.cli import execute
from mdistiller_norm.data.digits import digits
from mdistiller_norm.engine.checkpoint import load, load_weights
from mdistiller_norm.errors import CheckpointError, UserError
from mdistiller_norm.export import check
from mdistiller_norm.models import build_model
from mdistiller_norm.student import load_student


@pytest.fixture
def student(run):
    return run / "student_last.pt"


def export(options):
    assert execute(["export", *options.split()]) == 0


def pixels():
    return digits().test.images.permute(0, 3, 1, 2).float() / 255


def read_pt2(path):
    extra = {"about.json": ""}
    return torch.export.load(path, extra_files=extra).module(), json.loads(extra["about.json"])


def test_pt2_beside_the_checkpoint(student, capsys):
    export(f"-c {student}")
    path = student.with_suffix(".pt2")
    module, about = read_pt2(path)
    path.unlink()
    assert "on digits images, batches of 1 and 64" in capsys.readouterr().out
    stored = load_weights(student).about
    for key in ("name", "dataset", "classes", "mean", "std", "top1"):
        assert about[key] == stored[key]
    assert (about["resize"], about["crop"], about["channels"]) == (32, "center", "RGB")
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    expected = outputs_of(student)[0]
    for count in (1, 3, 360):
        found = module((pixels()[:count] - mean) / std)
        torch.testing.assert_close(found, expected[:count], rtol=1e-4, atol=1e-4)


def test_the_normalisation_can_be_included(student, tmp_path):
    foreign = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": load(student)["model"]}, foreign)
    export(f"-c {foreign} -m resnet8 -d digits --with-normalisation -bs 5")
    module, about = read_pt2(foreign.with_suffix(".pt2"))
    assert about["input"] == "float32 [B, 3, 32, 32], RGB in 0..1"
    torch.testing.assert_close(module(pixels()), outputs_of(student)[0], rtol=1e-4, atol=1e-4)


def test_state_dict_of_a_student_and_of_a_run_state(run, student, tmp_path):
    for source in (student, run / "latest.pt"):
        export(f"-c {source} -o {tmp_path}/s.pth --force")
        content = torch.load(tmp_path / "s.pth", weights_only=True)
        assert_same_state(content, {"model": dict(load(student)["model"])})


@pytest.mark.slow
def test_another_network_without_its_data_set(student, tmp_path, capsys):
    network = build("cifar", "ShuffleV1", "cpu")
    randomise_norms(network)
    about = load_weights(student).about | {"name": "ShuffleV1", "classes": list("abcde" * 20)}
    about |= {"dataset": "flowers", "type": "image_folder", "resize": 40}
    torch.save({"model": network.state_dict(), "about": about}, tmp_path / "s.pt")
    export(f"-c {tmp_path}/s.pt --root {tmp_path}")
    _, found, reason = capsys.readouterr().out.splitlines()
    assert found.endswith("on random images, batches of 1 and 16")
    assert reason.startswith(f"checked on random images only: {tmp_path}")
    assert read_pt2(tmp_path / "s.pt2")[1]["resize"] == 40


def test_a_different_network_is_detected(student):
    loaded = load_student(student)
    with pytest.raises(CheckpointError, match="on digits images"):
        check(lambda images: loaded.network(images) + (images.min() > -2), loaded, 8)


def test_a_failed_export_keeps_the_existing_file(student, tmp_path, limited_files):
    content, out = load(student), tmp_path / "s.pt2"
    content["model"]["fc.bias"][3] = float("nan")
    torch.save(content, tmp_path / "s.pt")
    out.write_text("before")
    with pytest.raises(CheckpointError, match=r"nothing is written: .* differ by nan on random"):
        export(f"-c {tmp_path}/s.pt --force")
    limited_files(100_000)
    with pytest.raises(CheckpointError, match=r"s\.pt2 cannot be written \(.*File too large"):
        export(f"-c {student} -o {out} --force")
    assert out.read_text() == "before"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "s.pt", out]


def test_bad_options(student):
    before = sorted(student.parent.iterdir())
    for options, message in (
        ("-o s.onnx --format pt2", "must end in the suffix of its format"),
        ("-o nowhere/s.pt2", "must be a file in an existing folder"),
        (f"-o {student} --force", "exists: choose another path"),
        (f"-o {student}", "exists: choose another path, or replace it with --force"),
        ("--format state_dict --with-normalisation", "weights only"),
    ):
        with pytest.raises(UserError, match=message):
            export(f"-c {student} {options}")
    assert sorted(student.parent.iterdir()) == before


def test_a_folder_for_the_hub(run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    hub = tmp_path / "hub"
    export(f"-c {run} --push-folder {hub}")
    config = json.loads((hub / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet8", 10)
    network = build_model("resnet8", 10)
    network.load_state_dict(safetensors.load_file(hub / "model.safetensors"))
    assert_same_state(network.state_dict(), load(run / "student_best.pt")["model"])
    card = yaml.safe_load((hub / "README.md").read_text().split("---")[1])
    best = json.loads((run / "result.json").read_text())["best"]["top1"]
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == round(best, 2)
    assert "The weights are those of epoch 1." in (hub / "README.md").read_text()
    (hub / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"config\.json exists"):
        export(f"-c {run} --push-folder {hub}")
