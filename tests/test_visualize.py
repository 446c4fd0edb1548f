"""The figures: their numbers against direct computation, on networks trained on the digits."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from conftest import assert_user_error, tool
from scipy import stats
from sklearn.metrics import silhouette_score

from mdistiller_norm.analysis.collect import Collected, collect, short_names
from mdistiller_norm.analysis.figures import correlation_matrix, draw_softening, entropy
from mdistiller_norm.cli import execute
from mdistiller_norm.errors import UserError
from mdistiller_norm.student import open_checkpoint


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
    """Logits, pooled features and targets of the whole test split in one batch."""
    network, dataset = open_checkpoint(path)
    (batch,) = dataset.eval_loader(1000, torch.device("cpu"))
    with torch.no_grad():
        result = network.eval().outputs(batch[0])
    return result.logits.double().numpy(), result.pooled.numpy(), batch[1].numpy()


def test_outputs_are_collected_in_batches_and_in_order(networks: tuple[str, str]) -> None:
    collected = collect(*open_checkpoint(networks[0]), "t", 77, torch.device("cpu"))
    for found, expected in zip(collected[1:4], outputs(networks[0]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_tsne(networks: tuple[str, str], tmp_path: Path) -> None:
    options = ["tsne", "-c", *networks, "--samples", "120", "--classes", "4", "--seed", "3"]
    data = drawn(tmp_path / "new" / "tsne.v1", *options)
    _, pooled, targets = outputs(networks[1])
    chosen = data["samples"]
    assert len(set(chosen)) == 120
    assert data["targets"] == targets[chosen].tolist()
    first, second = data["networks"]
    assert (first["name"], second["name"]) == ("teacher", "run")
    assert second["silhouette"] == pytest.approx(silhouette_score(pooled[chosen], targets[chosen]), abs=1e-4)
    assert silhouette_score(first["points"], data["targets"]) > 0.1, "classes of a trained network are apart"
    before = dict(mpl.rcParams)
    assert drawn(tmp_path / "again", *options) == data, "the seed fixes the embedding"
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "new" / "tsne.v1.svg").read_bytes()
    assert dict(mpl.rcParams) == before


def test_correlation(networks: tuple[str, str], tmp_path: Path) -> None:
    teacher, student = networks
    data = drawn(
        tmp_path / "figure", "correlation", "-t", teacher, "-c", student, teacher, "--names", "a", "b"
    )
    assert [(panel["name"], panel["kind"]) for panel in data["panels"]] == [
        ("a", "raw"), ("b", "raw"), ("a", "normalised"), ("b", "normalised"),
    ]  # fmt: skip
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


def test_entropy_and_counts_of_known_logits() -> None:
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([np.log(8)] * 2)
    assert entropy(torch.tensor([[1000.0, 0, 0]])).item() == 0
    # The standard deviations are 1, 4, 2: T = 4 is above, below and at NormKD's temperature.
    rows = torch.tensor([[-1.0, 0, 1], [-4.0, 0, 4], [-2.0, 0, 2]])
    network = Collected("n", rows, rows, torch.tensor([2, 2, 2]), ("a", "b", "c"))
    _, data, _ = draw_softening(network, sample=0, temperatures=[1.0], fixed=4.0, t_norm=2.0, tolerance=1.25)
    assert (data["over_softened"], data["under_softened"]) == (1, 1)


def test_labels_of_files() -> None:
    assert short_names([Path("a/student_last.pt"), Path("b/latest.pt")]) == ["a", "b"]
    assert short_names([Path("checkpoints/resnet20.pt"), Path("a/best.pt")]) == ["resnet20", "a"]
    paths = ["a/student_last.pt", "a/student_best.pt"]
    assert short_names([*map(Path, paths)]) == paths


def test_bad_options(networks: tuple[str, str], tmp_path: Path) -> None:
    student = torch.load(networks[1])
    student["model"]["fc.bias"].fill_(torch.nan)
    torch.save(student, tmp_path / "diverged.pt")
    done = tool("visualize", "logits", "-c", networks[0], "--out", "/dev/null/a/x", check=False)
    assert_user_error(done, "/dev/null", "Not a directory")
    for figure, *arguments, words in (
        ("logits", "--sample", "360", "must be in 0..359"),
        ("logits", "--fixed", "nan", "must be > 0"),
        ("logits", "-c", str(tmp_path / "diverged.pt"), "diverged gives NaN"),
        ("tsne", "--classes", "1", "2 classes, got 36 and 1"),
        ("tsne", "--seed", "-1", "must be positive"),
        ("tsne", "--names", "a", "b", "must have a name for each of the 1 files"),
    ):
        with pytest.raises(UserError, match=words):
            execute(["visualize", figure, "-c", networks[0], "--out", str(tmp_path / "x"), *arguments])
