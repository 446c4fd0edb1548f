"""Programs that read finished runs: their numbers against direct computation, on networks trained on the digits."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from conftest import Once
from PIL import Image
from scipy import stats
from short_runs import outputs_of, train_few
from sklearn.metrics import silhouette_score

from mdistiller_norm.analysis.figures import correlation_matrix
from mdistiller_norm.cli import execute, main
from mdistiller_norm.compare import mcnemar
from mdistiller_norm.data.digits import digits
from mdistiller_norm.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def groups(once: Once) -> tuple[list[Path], list[Path]]:
    """Run folders of three seeds of two short trainings."""

    def fill(folder: Path) -> None:
        for name, lr in (("plain", 0.02), ("fast", 0.05)):
            for seed in (0, 1, 2):
                settings = (f"SEED={seed}", f"SOLVER.LR={lr}")
                train_few(folder, f"{name},SEED={seed}", *settings, epochs=6)

    folder = once("seeds", fill) / "distill"
    return sorted(folder.glob("plain*")), sorted(folder.glob("fast*"))


def compare(capsys: Capture, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert execute(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def top1(folder: Path, epoch: str = "last") -> float:
    return json.loads((folder / "result.json").read_text())[epoch]["top1"]


def correct(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Predictions of the test images, and whether they are correct."""
    logits, _, targets = outputs_of(path / "student_best.pt")
    return logits.argmax(1).numpy(), (logits.argmax(1) == targets).numpy()


def test_runs_are_grouped_by_seed_and_compared(groups, tmp_path, capsys):
    plain, fast = groups
    page = tmp_path / "page.html"
    record = compare(capsys, *plain, *fast, "--html", page)
    first, second = record["networks"]
    assert (first["name"], first["n"], second["name"], second["n"]) == ("plain", 3, "fast", 3)
    assert (first["network"], first["parameters"]) == ("resnet8", 78042)
    assert first["macs"] == pytest.approx(12.6e6, rel=0.02)
    assert first["last"]["mean"] == pytest.approx(np.mean([top1(folder) for folder in plain]))
    best = [top1(folder, "best") for folder in plain]
    assert first["best"]["std"] == pytest.approx(np.std(best, ddof=1))
    (pair,) = record["pairs"]
    (a, a_correct), (b, b_correct) = correct(plain[0]), correct(fast[0])
    assert pair["agreement"] == pytest.approx(100 * np.mean(a == b), abs=0.3)
    difference = np.sum(a_correct) - np.sum(b_correct)
    assert pair["only_first"] - pair["only_second"] == pytest.approx(difference, abs=1)
    differences = [top1(b) - top1(a) for a, b in zip(plain, fast, strict=True)]
    assert pair["difference"]["n"] == 3
    assert pair["difference"]["mean"] == pytest.approx(np.mean(differences))
    text = page.read_text()
    assert "<td>compared with plain</td>" in text
    assert f"{abs(np.mean(differences)):.2f} [" in text


def test_mcnemar_is_the_exact_binomial_test() -> None:
    first = torch.tensor([True] * 9 + [False] * 3 + [True] * 50)
    second = torch.tensor([False] * 9 + [True] * 3 + [True] * 50)
    expected = pytest.approx(stats.binomtest(3, 12).pvalue)
    assert mcnemar(first, second) == {"only_first": 9, "only_second": 3, "p": expected}
    assert mcnemar(first, first)["p"] == 1


def test_weights_without_a_result(run: Path, tmp_path: Path, capsys: Capture) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(torch.load(run / "student_last.pt")["model"], weights)
    (network,) = compare(capsys, weights, "-m", "resnet8", "-d", "digits")["networks"]
    assert network["last"] is None
    assert network["measured_top1"] == pytest.approx(top1(run), abs=0.3)
    assert network["latency_ms"] > 0
    assert network["images_per_second"] > 0


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


def predict(capsys: Capture, *arguments: object, code: int = 0) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert execute(["predict", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_probabilities_are_those_of_the_network(run, images, capsys):
    expected = outputs_of(run / "student_best.pt")[0][:3].softmax(1)
    files = [images / "a.png", images / "b.png", images / "nested"]
    found = predict(capsys, "-c", run, *files, "-bs", 2, "--top", 20)
    assert [Path(entry["image"]).name for entry in found] == ["a.png", "b.png", "c.png"]
    for entry, row in zip(found, expected, strict=True):
        classes = entry["classes"]
        assert len(classes) == 10
        for each in classes:
            assert each["probability"] == pytest.approx(float(row[int(each["class"])]), abs=1e-5)
        assert classes == sorted(classes, key=lambda each: -each["probability"])


@pytest.mark.parametrize("arguments", [["s.pt2"], ["s.pt2", "--with-normalisation"], ["s.onnx"]])
def test_exported_files_predict_the_same(run, images, tmp_path, capsys, arguments):
    if arguments[0].endswith("onnx"):
        pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    path = tmp_path / arguments[0]
    execute(["export", "-c", str(run), "-o", str(path), *arguments[1:]])
    expected = predict(capsys, "-c", run / "student_best", images / "a.png", "--top", 3)
    found = predict(capsys, "-c", path, images / "a.png", "--top", 3)
    for a, b in zip(found[0]["classes"], expected[0]["classes"], strict=True):
        assert a["class"] == b["class"]
        assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


def test_unreadable_images_are_named_and_the_others_predicted(run, images, capsys):
    found = predict(capsys, "-c", run, images, code=1)
    assert [Path(entry["image"]).name for entry in found if "error" in entry] == ["broken.png"]
    assert len(found) == 4
    assert execute(["predict", "-c", str(run), str(images), "--top", "2"]) == 1
    printed = capsys.readouterr()
    assert "broken.png cannot be read" in printed.err
    assert len(printed.out.splitlines()) == 3
    assert printed.out.count("%") == 6


def test_bad_options_of_predict(run: Path, images: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["-c", run, "nowhere"], "nowhere does not exist"),
        (["-c", run, tmp_path], "has no images"),
        (["-c", run, images, "--top", "0"], "must be an integer >= 1"),
        (["-c", tmp_path, images], "there is no checkpoint"),
        (["-c", tmp_path / "s.pt2", images], "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            execute(["predict", *map(str, arguments)])


@pytest.fixture
def networks(run: Path, teacher: str) -> tuple[str, str]:
    """Weights files of a teacher and a student."""
    return teacher.split("=")[1], str(run / "student_last.pt")


def drawn(stem: Path, *arguments: str) -> dict[str, Any]:
    """Draw a figure, check its pictures and return its data."""
    assert execute(["visualize", *arguments, "--data", "--out", str(stem)]) == 0
    assert stem.with_name(f"{stem.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in stem.with_name(f"{stem.name}.svg").read_text()
    return json.loads(stem.with_name(f"{stem.name}.json").read_text())


def outputs(path: str) -> tuple[np.ndarray, ...]:
    logits, pooled, targets = outputs_of(path)
    return logits.double().numpy(), pooled.numpy(), targets.numpy()


def test_tsne(networks: tuple[str, str], tmp_path: Path) -> None:
    options = ["tsne", "-c", *networks, "--samples", "120", "--classes", "4", "--seed", "3"]
    data = drawn(tmp_path / "new" / "tsne.v1", *options)
    _, pooled, targets = outputs(networks[1])
    chosen = data["samples"]
    assert len(set(chosen)) == 120
    assert data["targets"] == targets[chosen].tolist()
    first, second = data["networks"]
    assert (first["name"], second["name"]) == ("teacher", "run")
    expected = silhouette_score(pooled[chosen], targets[chosen])
    assert second["silhouette"] == pytest.approx(expected, abs=1e-4)
    apart = silhouette_score(first["points"], data["targets"]) > 0.1
    assert apart, "classes of a trained network are apart"
    before = dict(mpl.rcParams)
    assert drawn(tmp_path / "again", *options) == data, "the seed fixes the embedding"
    assert (tmp_path / "again.svg").read_bytes() == (
        tmp_path / "new" / "tsne.v1.svg"
    ).read_bytes()
    assert dict(mpl.rcParams) == before


def test_correlation(networks: tuple[str, str], tmp_path: Path) -> None:
    teacher, student = networks
    options = ["-t", teacher, "-c", student, teacher, "--names", "a", "b"]
    data = drawn(tmp_path / "f", "correlation", *options)
    panels = [f"{panel['name']} {panel['kind']}" for panel in data["panels"]]
    assert panels == ["a raw", "b raw", "a normalised", "b normalised"]
    for number, normalise in ((0, False), (2, True)):
        matrices = []
        for path in networks:
            logits = outputs(path)[0]
            logits = logits / logits.std(1, ddof=1, keepdims=True) if normalise else logits
            matrices.append(np.corrcoef(logits, rowvar=False))
        difference, panel = matrices[1] - matrices[0], data["panels"][number]
        np.testing.assert_allclose(panel["difference"], difference, atol=1e-4)
        assert panel["mean_absolute"] == pytest.approx(np.abs(difference).mean(), abs=1e-4)
        assert data["panels"][number + 1]["mean_absolute"] == 0


def test_constant_logits_correlate_with_nothing() -> None:
    logits = torch.randn(50, 4)
    logits[:, 2] = 1.5
    matrix = correlation_matrix(logits)
    assert matrix.diagonal()[[0, 1, 3]].tolist() == pytest.approx([1, 1, 1])
    assert matrix[2].abs().max() == 0
    assert correlation_matrix(torch.ones(5, 4), normalise=True).isfinite().all()


def test_softened_logits(networks: tuple[str, str], tmp_path: Path) -> None:
    options = ["--sample", "5", "--temperatures", "1", "3", "--fixed", "3", "--t-norm", "1.5"]
    data = drawn(tmp_path / "logits", "logits", "-c", networks[0], *options)
    logits, _, targets = outputs(networks[0])
    own = 1.5 * logits.std(1, ddof=1)
    np.testing.assert_allclose(data["std"], own / 1.5, rtol=1e-4)
    assert data["over_softened"] == pytest.approx((own < 3 / 1.25).sum(), abs=1)
    assert data["under_softened"] == pytest.approx((own > 3 * 1.25).sum(), abs=1)
    fixed, norm = data["entropy"].values()
    for found, temperature in ((fixed, 3.0), (norm, own[:, None])):
        exponentials = np.exp(logits / temperature)
        expected = stats.entropy(exponentials / exponentials.sum(1, keepdims=True), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert data["target"] == str(targets[5])
    for values, temperature in zip(data["softened"].values(), (1.0, 3.0, own[5]), strict=True):
        np.testing.assert_allclose(values, logits[5] / temperature, rtol=1e-3, atol=1e-4)


def test_bad_options_of_visualize(networks, tmp_path, capsys):
    assert main(["visualize", "logits", "-c", networks[0], "--out", "/dev/null/a/x"]) == 2
    assert re.search("error: /dev/null.* Not a directory", capsys.readouterr().err)
    student = torch.load(networks[1])
    student["model"]["fc.bias"].fill_(torch.nan)
    torch.save(student, tmp_path / "diverged.pt")
    for figure, *arguments, words in (
        ("logits", "--sample", "360", "must be in 0..359"),
        ("logits", "--fixed", "nan", "must be > 0"),
        ("logits", "-c", str(tmp_path / "diverged.pt"), "diverged gives NaN"),
        ("tsne", "--classes", "1", "2 classes, got 36 and 1"),
        ("tsne", "--seed", "-1", "must be positive"),
        ("tsne", "--names", "a", "b", "must have a name for each of the 1 files"),
    ):
        with pytest.raises(UserError, match=words):
            execute(
                ["visualize", figure, "-c", networks[0], "--out", str(tmp_path / "x"), *arguments]
            )
