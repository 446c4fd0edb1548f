"""The comparison of networks: numbers against direct computation, on runs on the digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Once
from scipy import stats
from short_runs import config

from mdistiller_norm.cli import execute
from mdistiller_norm.compare import mcnemar
from mdistiller_norm.errors import UserError
from mdistiller_norm.run import train
from mdistiller_norm.student import open_checkpoint


@pytest.fixture(scope="module")
def groups(once: Once) -> tuple[list[Path], list[Path]]:
    """Run folders of three seeds of two short trainings."""

    def fill(folder: Path) -> None:
        for name, lr in (("plain", 0.02), ("fast", 0.05)):
            for seed in (0, 1, 2):
                train(config(folder, f"{name},SEED={seed}", f"SEED={seed}", f"SOLVER.LR={lr}", epochs=1))

    folder = once("seeds", fill) / "distill"
    return sorted(folder.glob("plain*")), sorted(folder.glob("fast*"))


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert execute(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def top1(folder: Path, epoch: str = "last") -> float:
    return json.loads((folder / "result.json").read_text())[epoch]["top1"]


def correct(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Predictions of the test images, and whether they are correct."""
    network, dataset = open_checkpoint(path / "student_best.pt")
    images, targets = next(iter(dataset.eval_loader(1000, torch.device("cpu"))))
    with torch.no_grad():
        predictions = network.eval()(images).argmax(1)
    return predictions.numpy(), (predictions == targets).numpy()


def test_runs_are_grouped_by_seed_and_compared(
    groups: tuple[list[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, fast = groups
    page = tmp_path / "page.html"
    record = compare(capsys, *plain, *fast, "--html", page)
    first, second = record["networks"]
    assert (first["name"], first["n"], second["name"], second["n"]) == ("plain", 3, "fast", 3)
    assert (first["network"], first["parameters"]) == ("resnet8", 78042)
    assert first["macs"] == pytest.approx(12.6e6, rel=0.02)
    assert first["last"]["mean"] == pytest.approx(np.mean([top1(folder) for folder in plain]))
    assert first["best"]["std"] == pytest.approx(np.std([top1(folder, "best") for folder in plain], ddof=1))
    (pair,) = record["pairs"]
    (a, a_correct), (b, b_correct) = correct(plain[0]), correct(fast[0])
    assert pair["agreement"] == pytest.approx(100 * np.mean(a == b), abs=0.3)
    difference = np.sum(a_correct) - np.sum(b_correct)
    assert pair["only_first"] - pair["only_second"] == pytest.approx(difference, abs=1)
    differences = [top1(b) - top1(a) for a, b in zip(plain, fast, strict=True)]
    assert (pair["difference"]["n"], pair["difference"]["mean"]) == (3, pytest.approx(np.mean(differences)))
    text = page.read_text()
    assert "<td>compared with plain</td>" in text
    assert f"{abs(np.mean(differences)):.2f} [" in text


def test_mcnemar_is_the_exact_binomial_test() -> None:
    first = torch.tensor([True] * 9 + [False] * 3 + [True] * 50)
    second = torch.tensor([False] * 9 + [True] * 3 + [True] * 50)
    expected = pytest.approx(stats.binomtest(3, 12).pvalue)
    assert mcnemar(first, second) == {"only_first": 9, "only_second": 3, "p": expected}
    assert mcnemar(first, first)["p"] == 1


def test_weights_without_a_result(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(torch.load(run / "student_last.pt")["model"], weights)
    with pytest.raises(UserError, match="add -m"):
        compare(capsys, weights)
    (network,) = compare(capsys, weights, "-m", "resnet8", "-d", "digits")["networks"]
    assert network["last"] is None
    assert network["measured_top1"] == pytest.approx(top1(run), abs=0.3)
    assert network["latency_ms"] > 0
    assert network["images_per_second"] > 0
