"""The figures: their numbers against direct computation, on networks trained on the real digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Once, assert_user_error, tool
from scipy import stats
from sklearn.metrics import silhouette_score

from mdistiller_norm.analysis.collect import Collected, collect, short_names
from mdistiller_norm.analysis.correlation import correlation_matrix
from mdistiller_norm.analysis.softening import compute as soften
from mdistiller_norm.analysis.softening import entropy
from mdistiller_norm.analysis.tsne import choose_samples, embed
from mdistiller_norm.analysis.tsne import compute as tsne
from mdistiller_norm.build import open_checkpoint
from mdistiller_norm.cli import execute
from mdistiller_norm.config import load_config
from mdistiller_norm.errors import CheckpointError, ConfigError, DataError, UserError
from mdistiller_norm.run import train


@pytest.fixture(scope="module")
def runs(once: Once) -> Path:
    """A folder with three runs of two epochs: a teacher, a student alone, and one distilled."""
    return once("figures", train_three) / "p"


def train_three(folder: Path) -> None:
    common = [f"LOG.PREFIX={folder}", "EXPERIMENT.PROJECT=p", "DATASET.TYPE=digits", "SOLVER.EPOCHS=2",
              "DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8"]  # fmt: skip
    train(load_config(None, [*common, "EXPERIMENT.NAME=teacher", "DISTILLER.STUDENT=resnet14"]))
    train(load_config(None, [*common, "EXPERIMENT.NAME=alone"]))
    weights = f"DISTILLER.TEACHER_WEIGHTS={folder / 'p' / 'teacher' / 'student_last.pt'}"
    train(load_config(None, [*common, "EXPERIMENT.NAME=taught", "DISTILLER.TYPE=NormKD", weights]))


def weights(runs: Path, name: str) -> str:
    return str(runs / name / "student_last.pt")


def drawn(stem: Path) -> dict[str, Any]:
    """The figure's data, after a look at its two pictures."""
    assert stem.with_name(f"{stem.name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in stem.with_name(f"{stem.name}.svg").read_text()
    data: dict[str, Any] = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    return data


def outputs(path: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Logits, pooled features and targets of the whole test split, in one batch."""
    network, dataset = open_checkpoint(path)
    (batch,) = dataset.eval_loader(1000, torch.device("cpu"))
    with torch.no_grad():
        result = network.eval().outputs(batch[0])
    return result.logits.double().numpy(), result.pooled.numpy(), batch[1].numpy()


def test_collecting_in_batches_is_one_pass_in_order(runs: Path) -> None:
    logits, pooled, targets = outputs(weights(runs, "teacher"))
    collected = collect(Path(weights(runs, "teacher")), "t", batch_size=77)
    np.testing.assert_allclose(collected.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(collected.pooled, pooled, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(collected.targets, targets)
    stated = json.loads((runs / "teacher" / "result.json").read_text())["last"]["top1"]
    assert collected.top1 == pytest.approx(stated, abs=0.3)


def test_tsne(runs: Path, tmp_path: Path) -> None:
    stem = tmp_path / "new" / "tsne.v1"
    paths = [weights(runs, "teacher"), weights(runs, "taught")]
    options = ["tsne", "-c", *paths, "--samples", "120", "--classes", "4", "--seed", "3", "--data", "--out"]
    execute(["visualize", *options, str(stem)])
    data = drawn(stem)
    _, pooled, targets = outputs(paths[1])
    chosen = data["samples"]
    assert len(chosen) == len(set(chosen)) == 120
    assert data["targets"] == targets[chosen].tolist()
    assert set(data["targets"]) == {0, 1, 2, 3}
    assert data["classes"] == ["0", "1", "2", "3"]
    teacher, student = data["networks"]
    assert (teacher["name"], student["name"]) == ("teacher", "taught")
    assert student["silhouette"] == pytest.approx(silhouette_score(pooled[chosen], targets[chosen]), abs=1e-4)
    assert np.asarray(student["points"]).shape == (120, 2)
    assert teacher["points"] != student["points"]
    execute(["visualize", *options, str(tmp_path / "again")])
    assert drawn(tmp_path / "again") == data, "the seed fixes the picture"
    names = ("tsne.v1.svg", "again.svg")
    first, second = ((stem.parent if i == 0 else tmp_path).joinpath(name).read_bytes() for i, name in enumerate(names))
    assert first == second


def test_tsne_keeps_neighbours_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(3, 8, generator=generator)
    labels = torch.arange(90) % 3
    points = embed((centres[labels] + torch.randn(90, 8, generator=generator)).numpy(), 0, 30.0, "sklearn")
    assert silhouette_score(points, labels.numpy()) > 0.8


def test_tsne_of_a_sample_a_class_shows_nothing() -> None:
    one_each = Collected("n", torch.eye(9), torch.eye(9), torch.arange(9), tuple("abcdefghi"))
    with pytest.raises(ConfigError, match="9 samples of 9 classes shows nothing"):
        tsne([one_each])


def test_opentsne_is_an_engine_too(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("openTSNE", reason="openTSNE is not installed: python -m pip install openTSNE")
    options = ["tsne", "-c", weights(runs, "teacher"), "--samples", "60", "--engine", "opentsne", "--data"]
    execute(["visualize", *options, "--out", str(tmp_path / "figure")])
    assert np.isfinite(drawn(tmp_path / "figure")["networks"][0]["points"]).all()


def test_the_choice_of_samples_is_a_function_of_the_seed() -> None:
    targets = torch.arange(100) % 10
    a, b, c = (choose_samples(targets, 5, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert (targets[a] < 5).all()
    assert len(choose_samples(targets, 5, 1000, 0)) == 50


def test_correlation(runs: Path, tmp_path: Path) -> None:
    stem = tmp_path / "correlation"
    students = [weights(runs, "alone"), weights(runs, "taught")]
    execute(["visualize", "correlation", "-t", weights(runs, "teacher"), "-c", *students, "--data", "--out", str(stem)])
    data = drawn(stem)
    matrices = {}
    for name in ("teacher", "alone", "taught"):
        logits, _, _ = outputs(weights(runs, name))
        matrices[name, "raw"] = np.corrcoef(logits, rowvar=False)
        matrices[name, "normalised"] = np.corrcoef(logits / logits.std(1, ddof=1, keepdims=True), rowvar=False)
    assert [student["name"] for student in data["students"]] == ["alone", "taught"]
    for student in data["students"]:
        for kind in ("raw", "normalised"):
            difference = matrices[student["name"], kind] - matrices["teacher", kind]
            np.testing.assert_allclose(student[kind]["difference"], difference, atol=1e-4)
            assert student[kind]["mean_absolute"] == pytest.approx(np.abs(difference).mean(), abs=1e-4)
            assert student[kind]["mean_absolute"] > 0


def test_a_network_correlates_with_itself_and_constant_logits_with_nothing() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = 1.5
    matrix = correlation_matrix(logits)
    assert matrix.diagonal()[[0, 1, 3]].tolist() == pytest.approx([1, 1, 1])
    assert matrix[2].abs().max() == 0
    logits[7] = 3.0  # a sample without spread
    assert correlation_matrix(logits, normalise=True).isfinite().all()


def test_logits(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "logits"
    options = ["logits", "-c", weights(runs, "teacher"), "--sample", "5", "--temperatures", "1", "3", "--fixed", "3"]
    execute(["visualize", *options, "--t-norm", "1.5", "--tolerance", "1.1", "--data", "--out", str(stem)])
    data = drawn(stem)
    logits, _, targets = outputs(weights(runs, "teacher"))
    spread = logits.std(1, ddof=1)
    own = 1.5 * spread
    assert data["samples"] == len(targets) == 360
    assert data["std"]["mean"] == pytest.approx(spread.mean(), rel=1e-4)
    assert sum(data["std"]["counts"]) == 360
    np.testing.assert_allclose(data["std"]["counts"], np.histogram(spread, data["std"]["edges"])[0], atol=2)
    assert data["over_softened"] == pytest.approx((own < 3 / 1.1).sum(), abs=1)
    assert data["under_softened"] == pytest.approx((own > 3 * 1.1).sum(), abs=1)
    assert data["over_softened"] + data["under_softened"] <= 360

    def softmax(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    fixed, norm = data["entropy"]["by_temperature"].values()
    for entry, temperature in ((fixed, 3.0), (norm, own[:, None])):
        expected = stats.entropy(softmax(logits / temperature), axis=1)
        assert entry["mean"] == pytest.approx(expected.mean(), rel=1e-4)
        assert entry["std"] == pytest.approx(expected.std(ddof=1), rel=1e-3)
        assert sum(entry["counts"]) == 360
    assert norm["std"] < fixed["std"], "NormKD evens out how soft the targets are"
    sample = data["sample"]
    assert sample["target"] == str(targets[5])
    assert list(sample["softened"])[:2] == ["T = 1", "T = 3"]
    for (name, entry), temperature in zip(sample["softened"].items(), (1.0, 3.0, own[5]), strict=True):
        np.testing.assert_allclose(entry["values"], logits[5] / temperature, rtol=1e-3, atol=1e-4, err_msg=name)
        assert entry["top_probability"] == pytest.approx(softmax(logits[5] / temperature).max(), rel=1e-3)
    assert "over-softens" in capsys.readouterr().out


def test_entropy_and_counts_at_known_points() -> None:
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([np.log(8)] * 2)
    assert entropy(torch.tensor([[1000.0, 0, 0]])).item() == 0
    # Spreads of 1 and 4: T = 4 is above 1.25 * 2 * 1 and below 2 * 4 / 1.25.
    rows = torch.tensor([[-1.0, 0, 1], [-4.0, 0, 4], [-2.0, 0, 2]])
    data = soften(Collected("n", rows, rows, torch.tensor([2, 2, 2]), ("a", "b", "c")))
    assert (data["over_softened"], data["under_softened"]) == (1, 1)


def test_curves_of_run_folders_and_of_ledger_records(runs: Path, tmp_path: Path) -> None:
    execute(
        ["visualize", "curves", str(runs / "alone"), str(runs / "taught"), "--data", "--out", str(tmp_path / "curves")]
    )
    data = drawn(tmp_path / "curves")
    assert [run["name"] for run in data["runs"]] == ["alone", "taught"]
    for run in data["runs"]:
        result = json.loads((runs / run["name"] / "result.json").read_text())
        assert run["best"] == result["best"]["top1"]
        assert run["last"] == result["last"]["top1"]
        assert run["metrics"]["epoch"] == [1, 2]
    assert "loss_NormKD" in data["runs"][1]["metrics"]
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"metrics": data["runs"][0]["metrics"]}))
    execute(["visualize", "curves", str(record), "--names", "mine", "--data", "--out", str(tmp_path / "again")])
    assert drawn(tmp_path / "again")["runs"][0] == data["runs"][0] | {"name": "mine"}


def test_names_tell_files_apart(tmp_path: Path) -> None:
    assert short_names([Path("a/x.pt"), Path("b/x.pt")]) == ["a", "b"]
    assert short_names([Path("a/x.pt"), Path("a/y.pt")]) == ["a/x", "a/y"]
    assert short_names([Path("p/a/x.pt"), Path("q/a/x.pt")]) == ["p/a/x.pt", "q/a/x.pt"]
    folders = [tmp_path / project / "kd,LR=0.1" for project in ("p", "q")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert short_names(folders) == ["p/kd,LR=0.1", "q/kd,LR=0.1"]
    assert short_names([ROOT / "checkpoints" / "resnet20_cifar100_seed0.pt"]) == ["resnet20_cifar100_seed0"]


def test_mistakes_are_one_line(runs: Path, tmp_path: Path) -> None:
    assert_user_error(tool("visualize", "logits", "-c", tmp_path / "none.pt", check=False), "none.pt")
    teacher = weights(runs, "teacher")
    student = torch.load(weights(runs, "alone"))
    student["model"]["fc.bias"].fill_(torch.nan)
    diverged = str(tmp_path / "diverged.pt")
    torch.save(student, diverged)
    out = ["--out", str(tmp_path / "x")]
    cases: list[tuple[list[str], type[UserError], str]] = [
        (["logits", "-c", teacher, "--sample", "360", *out], ConfigError, "samples 0 to 359"),
        (["logits", "-c", teacher, "--tolerance", "1", *out], ConfigError, "--tolerance must be above 1"),
        (["logits", "-c", teacher, "--fixed", "0", *out], ConfigError, "positive"),
        (["logits", "-c", teacher, "--tolerance", "nan", *out], ConfigError, "--tolerance must be above 1"),
        (["tsne", "-c", teacher, "--classes", "1", *out], ConfigError, "of 1 classes shows nothing"),
        (["tsne", "-c", teacher, "--samples", "-5", *out], ConfigError, "--samples and --classes must be zero or"),
        (["tsne", "-c", teacher, "--seed", "-1", *out], ConfigError, "not 2000, 0, -1, 30"),
        (["tsne", "-c", teacher, "--perplexity", "nan", *out], ConfigError, "--perplexity positive"),
        (["curves", str(runs / "alone"), "--out", "."], ConfigError, "--out . names no file"),
        (["tsne", "-c", teacher, "-bs", "0", *out], ConfigError, "-bs must be at least 1"),
        (["tsne", "-c", teacher, "--names", "a", "b", *out], ConfigError, "2 names for 1 files"),
        (["logits", "-c", diverged, *out], CheckpointError, "diverged.pt gives NaN"),
        (["tsne", "-c", diverged, *out], CheckpointError, "diverged.pt gives NaN"),
        (["curves", str(tmp_path), *out], DataError, "no metrics.jsonl"),
        (["curves", str(tmp_path / "none.json"), *out], DataError, "neither a run folder nor a record"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            execute(["visualize", *arguments])
    line = (runs / "alone" / "metrics.jsonl").read_text().splitlines()[0]
    for content, words in (
        (b"\x80\x00\xff\n", "has no metrics.jsonl with a finished epoch"),
        (b"3\n[]\n", "has no metrics.jsonl with a finished epoch"),
        (b'{"epoch": 1}\n', "are damaged: test_top1 is not a number in every epoch"),
        (f'{line}\n{{"epoch": 2}}\n'.encode(), "are damaged: test_top1 is not a number in every epoch"),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "metrics.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=words):
            execute(["visualize", "curves", str(tmp_path / "run"), *out])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        execute(["visualize", "curves", str(runs / "alone"), "--out", str(tmp_path / "file" / "x")])
    assert not (tmp_path / "x.png").exists()


def test_figures_leave_the_style_of_the_process_alone(runs: Path, tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    execute(["visualize", "curves", str(runs / "alone"), "--out", str(tmp_path / "x")])
    assert dict(mpl.rcParams) == before
    assert not (tmp_path / "x.json").exists()
