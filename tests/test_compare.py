"""The comparison of networks: numbers against direct computation, on runs on the digits."""

from __future__ import annotations

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
def seeds(once: Once) -> list[Path]:
    """Run folders of three seeds of a short training."""

    def fill(folder: Path) -> None:
        for seed in (0, 1, 2):
            train(config(folder, f"plain,SEED={seed}", f"SEED={seed}", "SOLVER.LR=0.02", epochs=1))

    return sorted((once("seeds", fill) / "distill").iterdir())


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert execute(["compare", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def top1(folder: Path, epoch: str = "last") -> float:
    return json.loads((folder / "result.json").read_text())[epoch]["top1"]


def predictions(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    network, dataset = open_checkpoint(path / "student_best.pt")
    images, targets = next(iter(dataset.eval_loader(1000, torch.device("cpu"))))
    with torch.no_grad():
        return network.eval()(images).argmax(1).numpy(), targets.numpy()


def test_runs_are_grouped_by_seed_and_compared(
    seeds: list[Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    record = compare(capsys, run, *seeds, "--html", page)
    first, second = record["networks"]
    assert (first["name"], second["name"]) == ("run", "plain")
    assert (first["n"], second["n"]) == (1, 3)
    assert first["network"] == second["network"] == "resnet8"
    assert first["parameters"] == 78042
    assert first["macs"] == pytest.approx(12.6e6, rel=0.02)
    assert second["last"]["mean"] == pytest.approx(np.mean([top1(folder) for folder in seeds]))
    assert second["best"]["std"] == pytest.approx(np.std([top1(folder, "best") for folder in seeds], ddof=1))
    (pair,) = record["pairs"]
    (a, targets), (b, _) = predictions(run), predictions(seeds[0])
    assert pair["agreement"] == pytest.approx(100 * np.mean(a == b), abs=0.3)
    counts = pair["mcnemar"]
    assert counts["only_first"] - counts["only_second"] == pytest.approx(
        np.sum(a == targets) - np.sum(b == targets), abs=1
    )
    assert pair["difference"]["n"] == 1
    assert pair["difference"]["mean"] == pytest.approx(top1(seeds[0]) - top1(run))
    assert page.read_text().count("<tr>") == 5


def test_differences_over_common_seeds(
    seeds: list[Path], capsys: pytest.CaptureFixture[str], once: Once
) -> None:
    def fill(folder: Path) -> None:
        for seed in (0, 1, 2):
            train(config(folder, f"fast,SEED={seed}", f"SEED={seed}", "SOLVER.LR=0.05", epochs=1))

    others = sorted((once("fast", fill) / "distill").iterdir())
    assert execute(["compare", *map(str, [*seeds, *others])]) == 0
    table = capsys.readouterr().out
    expected = np.mean([top1(b) - top1(a) for a, b in zip(seeds, others, strict=True)])
    assert "compared with plain" in table
    assert f"{abs(expected):.2f} [" in table
    assert "(n = 3)" in table


def test_mcnemar_is_the_exact_binomial_test() -> None:
    first = torch.tensor([True] * 9 + [False] * 3 + [True] * 50)
    second = torch.tensor([False] * 9 + [True] * 3 + [True] * 50)
    found = mcnemar(first, second)
    assert (found["only_first"], found["only_second"]) == (9, 3)
    assert found["p"] == pytest.approx(stats.binomtest(3, 12).pvalue)
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
