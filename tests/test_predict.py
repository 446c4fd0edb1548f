"""Predictions of image files, from weights, run folders and exported files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mdistiller_norm.cli import execute
from mdistiller_norm.data.digits import digits
from mdistiller_norm.errors import UserError
from mdistiller_norm.student import open_checkpoint


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three test digits as PNG files, one of them nested, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "nested").mkdir()
    for name, pixels in zip(("a", "b", "nested/c"), digits().test.images, strict=False):
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    (folder / "broken.png").write_text("text")
    (folder / "notes.txt").write_text("text")
    return folder


def predict(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert execute(["predict", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_probabilities_are_those_of_the_network(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, dataset = open_checkpoint(run / "student_best.pt")
    batch, _ = next(iter(dataset.eval_loader(3, torch.device("cpu"))))
    with torch.no_grad():
        expected = network.eval()(batch).softmax(1)
    files = [images / "a.png", images / "b.png", images / "nested"]
    found = predict(capsys, "-c", run, *files, "-bs", 2, "--top", 20)
    assert [Path(entry["image"]).name for entry in found] == ["a.png", "b.png", "c.png"]
    for entry, row in zip(found, expected, strict=True):
        classes = entry["classes"]
        assert len(classes) == 10
        for each in classes:
            assert each["probability"] == pytest.approx(float(row[int(each["class"])]), abs=1e-5)
        assert classes == sorted(classes, key=lambda each: -each["probability"])


@pytest.mark.parametrize(
    "arguments", [["-o", "s.pt2"], ["-o", "s.pt2", "--with-normalisation"], ["-o", "s.onnx"]]
)
def test_exported_files_predict_the_same(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    if arguments[1].endswith("onnx"):
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    path = tmp_path / arguments[1]
    execute(["export", "-c", str(run), "-o", str(path), *arguments[2:]])
    expected = predict(capsys, "-c", run / "student_best", images / "a.png", "--top", 3)
    found = predict(capsys, "-c", path, images / "a.png", "--top", 3)
    for a, b in zip(found[0]["classes"], expected[0]["classes"], strict=True):
        assert a["class"] == b["class"]
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


def test_unreadable_images_are_named_and_the_others_predicted(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predict(capsys, "-c", run, images, code=1)
    assert [Path(entry["image"]).name for entry in found if "error" in entry] == ["broken.png"]
    assert len(found) == 4
    assert execute(["predict", "-c", str(run), str(images), "--top", "2"]) == 1
    printed = capsys.readouterr()
    assert "broken.png cannot be read" in printed.err
    assert len(printed.out.splitlines()) == 3
    assert printed.out.count("%") == 6


def test_bad_options(run: Path, images: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["-c", run, "nowhere"], "nowhere does not exist"),
        (["-c", run, tmp_path], "has no images"),
        (["-c", run, images, "--top", "0"], "must be an integer >= 1"),
        (["-c", tmp_path, images], "there is no checkpoint"),
        (["-c", tmp_path / "s.pt2", images], "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            execute(["predict", *map(str, arguments)])
