"""The report of a ledger: numbers, verdicts and the two documents."""

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.reproduce.ledger import Record, failed_record, signed_record, write_record
from mdistiller_norm.reproduce.plan import cell_config
from mdistiller_norm.reproduce.report import CellView, collect, render, verdict
from mdistiller_norm.reproduce.stats import (
    CONTRADICTED,
    HOLDS,
    UNDECIDED,
    UNTESTED,
    mean_std,
    paired_difference,
    signed,
)
from mdistiller_norm.reproduce.tables import TABLES, Cell

PAIR = "res32x4_res8x4"
PUBLIC = "271c7bfa8a"  # the hash of a public teacher


def made_up(
    cell: Cell, seed: int, last: float, best: float, teacher_hash="a" * 64, **more: object
) -> Record:
    """Return a valid record with chosen accuracies: input of the report, not a measurement."""
    config = cell_config(cell)
    assert config is not None
    node = config.node
    epochs = node.SOLVER.EPOCHS
    methods = [] if node.DISTILLER.TYPE == "NONE" else [node.DISTILLER.TYPE]
    curve = [best - 30 + 30 * i / epochs for i in range(epochs)]
    curve[-2], curve[-1] = best, last
    losses = {
        f"loss_{name}": [3 - 2 * i / epochs for i in range(epochs)] for name in ["ce", *methods]
    }
    teacher = {"name": node.DISTILLER.TEACHER, "top1": 79.0, "top5": 94.0, "hash": teacher_hash}
    record: Record = {
        "format": 1, "status": "finished", "smoke": False, "config_file": cell.config, "seed": seed,
        "at": f"2026-01-0{seed + 1}T00:00:00Z", "command": f"python tools/train.py --cfg {cell.config} SEED={seed}",
        "config": yaml.safe_load(dump(node)) | {"SEED": seed}, "method": methods, "student": node.DISTILLER.STUDENT,
        "teacher": teacher if methods else None,
        "dataset": node.DATASET.TYPE, "epochs": epochs, "seconds": 3600.0, "extra_parameters": 0,
        "last": {"epoch": epochs, "top1": last, "top5": 90.0, "loss": 1.0},
        "best": {"epoch": epochs - 1, "top1": best, "top5": 91.0, "loss": 1.0},
        "environment": {"device": "Test GPU <1>", "torch": "2.6", "python": "3.11", "commit": "c" * 40,
                        "modified": False, "platform": "Linux"},
        "metrics": {"epoch": list(range(1, epochs + 1)), "test_top1": curve,
                    "images_per_second": [8000.0] * epochs} | losses,
    }  # fmt: skip
    return signed_record(record | more)


# Last and best top-1 by seed.
NUMBERS = {
    "kd": [(73.0, 73.2), (73.4, 73.5), (73.1, 73.4)],
    "normkd": [(76.2, 76.5), (76.6, 76.6), (76.4, 76.7)],
    "dkd": [(76.1, 76.3), (76.3, 76.4)],
    "dkd_normkd": [(77.1, 77.3), (76.2, 77.5)],
    "student": [(72.4, 72.6)],
}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one column of Table 2, a failure, a broken file, and two teachers in one column."""
    folder = tmp_path_factory.mktemp("results") / "runs"
    for row, numbers in NUMBERS.items():
        for seed, (last, best) in enumerate(numbers):
            write_record(
                made_up(TABLES["2"].cells[row, PAIR], seed, last, best, "a" * 64), folder
            )
    write_record(made_up(TABLES["9"].cells["rkd", PAIR], 0, 71.0, 71.5, "b" * 64), folder)
    cell = TABLES["2"].cells["crd", PAIR]
    config = cell_config(cell)
    assert config is not None
    error, more = (
        "error: no <memory> | left",
        {"smoke": False, "seed": 0, "command": "train.py <x>"},
    )
    failure = failed_record(error, ["line 1"], config.node, config_file=cell.config, **more)
    write_record(failure, folder)
    (folder / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def report(ledger: Path) -> Record:
    return collect(ledger)


def view(report: Record, table: str, row: str, column: str = PAIR) -> CellView:
    (found,) = (entry for entry in report["tables"] if entry.table.id == table)
    return found.cells[row, column]


def test_means_and_deviations_equal_numpys(report: Record) -> None:
    cell = view(report, "2", "normkd")
    for which, numbers in (("last", [76.2, 76.6, 76.4]), ("best", [76.5, 76.6, 76.7])):
        result = cell.mean(which)
        assert result is not None
        assert result == (
            3,
            pytest.approx(np.mean(numbers)),
            pytest.approx(np.std(numbers, ddof=1)),
        )
    assert cell.difference == pytest.approx(76.6 - 76.57)
    assert cell.agreement == view(report, "2", "dkd_normkd").agreement == "within"
    assert view(report, "2", "student").agreement == ""
    assert view(report, "2", "kd").agreement == "within"
    assert mean_std([]) is None
    assert mean_std([72.6]) == (1, 72.6, None)


def test_a_mean_far_from_the_papers_is_outside(tmp_path: Path) -> None:
    for seed, top1 in enumerate((70.0, 70.1, 70.2)):
        write_record(made_up(TABLES["2"].cells["kd", PAIR], seed, top1, top1), tmp_path)
    assert view(collect(tmp_path), "2", "kd").agreement == "outside"


def test_one_run_fills_every_cell_that_it_computes(report: Record) -> None:
    runs = view(report, "2", "normkd").runs
    assert view(report, "6", "t_norm_2").runs == view(report, "9", "normkd").runs == runs
    assert view(report, "1", "t_4").runs == view(report, "2", "kd").runs
    assert not view(report, "2", "normkd", "vgg13_vgg8").runs
    assert {entry.milliseconds for entry in runs.values()} == {64 / 8000 * 1000}


def test_paired_intervals_equal_the_t_test() -> None:
    a, b = {0: 76.2, 1: 76.6, 2: 76.4, 7: 1.0}, {0: 73.0, 1: 73.4, 2: 73.1, 9: 2.0}
    result = paired_difference(a, b)
    assert result is not None
    test = scipy_stats.ttest_rel([a[i] for i in range(3)], [b[i] for i in range(3)])
    interval = pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (result.n, (result.low, result.high), result.verdict) == (3, interval, HOLDS)
    for first, second, expected in (
        (b, a, (3, CONTRADICTED)),
        ({0: 1.0, 1: 3.0, 2: 2.0}, {0: 2.0, 1: 1.0, 2: 2.5}, (3, UNDECIDED)),
        ({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}, (2, UNDECIDED)),
        ({0: 0.3, 1: 0.5, 2: 0.7}, {0: 0.1, 1: 0.3, 2: 0.5}, (3, UNDECIDED)),
    ):
        result = paired_difference(first, second)
        assert result is not None
        assert (result.n, result.verdict) == expected
    assert str(result) == "+0.20 (n = 3, identical in all seeds)"
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    expected = ["+0.03", "\N{MINUS SIGN}0.50", "±0.00"]
    assert [signed(value) for value in (0.034, -0.5, -0.001)] == expected


def test_verdicts_of_claims(report: Record) -> None:
    normkd, combined, peak = report["claims"]  # claims about studies without runs are left out
    assert normkd["verdict"] == combined["verdict"] == "partly tested"
    assert [comparison["verdict"] for comparison in normkd["comparisons"]].count(HOLDS) == 1
    assert [comparison["verdict"] for comparison in combined["comparisons"]].count(UNDECIDED) == 1
    assert peak["verdict"] == UNTESTED
    assert verdict({HOLDS}) == HOLDS
    assert verdict({HOLDS, UNDECIDED}) == UNDECIDED
    assert verdict({HOLDS, UNTESTED}) == verdict({UNDECIDED, UNTESTED}) == "partly tested"
    assert verdict({HOLDS, UNDECIDED, UNTESTED, CONTRADICTED}) == CONTRADICTED


def test_a_peak_is_tested_once_all_rows_have_runs(tmp_path: Path) -> None:
    means = {"t_norm_1.5": 76.6, "t_norm_2": 76.5, "t_norm_4": 77.0}
    for row in TABLES["6"].rows:
        for seed in range(3):
            step = 0.02 if row.key == "t_norm_4" else 0.01
            top1 = means.get(row.key, 75.0) + step * seed
            write_record(made_up(TABLES["6"].cells[row.key, PAIR], seed, top1, top1), tmp_path)
    (comparison,) = collect(tmp_path)["claims"][2]["comparisons"]
    assert comparison["verdict"] == CONTRADICTED
    assert comparison["rows"] == "T_norm = 1.5 \N{MINUS SIGN} T_norm = 4"
    assert comparison["last"].mean == pytest.approx(-0.41)


def test_markdown_shows_every_state(report: Record) -> None:
    text = render(report, "report.md.j2")
    row = next(line for line in text.splitlines() if line.startswith("| NormKD |"))
    assert "76.57 → **76.60 ± 0.10** (n = 3, last 76.40 ± 0.20, +0.03)" in row
    assert "76.40 → pending" in row
    for expected in (
        "75.51 → failed",
        "error: no &lt;memory&gt; | left",
        "`broken.json`: malformed (JSONDecodeError",
        "different teachers!",
        "79.42 → 79.00 before distillation",
        "no interval with fewer than 3 seeds",
        "+3.24 → +3.23 [",
        "| T_norm = 2 | 76.57 | 76.60 ± 0.10 | 76.40 ± 0.20 | 3 | +0.03 |",
        "| NormKD | 76.57 | 76.60 ± 0.10 | 76.40 ± 0.20 | 3 | +0.03 | 7.2 | 8.00 ± 0.00 | 0 | 0 |",
        "| CRD | 75.51 | failed |  | 0 |  | 24 |  | 12,300,000 |  |",
        "Table 3: CIFAR-100, teacher and student of different families (55 cells)",
        "(1 of 13 pairs tested)",
    ):
        assert expected in text


def test_the_page_is_complete_escaped_and_loads_nothing(report: Record) -> None:
    text = render(report, "report.html.j2")
    tags = Counter(re.findall(r"<(/?\w+)(?:[^>]*[^>/])?>", text))
    for tag in [tag for tag in tags if tag not in ("meta", "link", "br") and tag[0] != "/"]:
        assert tags[tag] == tags[f"/{tag}"], tag
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    for unescaped in ("<memory>", "Test GPU <1>", "train.py <x>"):
        assert unescaped not in text
    # A chart of accuracy and one of losses for each measured cell, and an overview of columns with two rows or more.
    measured = [
        sum(bool(cell.runs) for cell in entry.cells.values()) for entry in report["tables"]
    ]
    assert tags["svg"] == 2 * sum(measured) + sum(number > 1 for number in measured)


def test_differences_between_runs_of_a_column_are_named(tmp_path: Path) -> None:
    for row, seed, more in (
        ("teacher", 0, {"precision": "fp16"}),  # not compared with other rows
        ("kd", 0, {"precision": "fp32", "processes": 1, "data": "1" * 64}),
        ("kd", 1, {"precision": "bf16", "processes": 2, "data": "2" * 64}),
        ("normkd", 1, {}),  # an older record
    ):
        write_record(made_up(TABLES["2"].cells[row, PAIR], seed, 73.0, 73.2, **more), tmp_path)
    for row in ("kd", "dkd"):
        cell, teacher_hash = TABLES["2"].cells[row, PAIR], PUBLIC.ljust(64, "0")
        write_record(made_up(cell, 1, 74.0, 74.2, teacher_hash), tmp_path)
    report = collect(tmp_path)
    kd, normkd, dkd = (view(report, "2", row) for row in ("kd", "normkd", "dkd"))
    assert sorted(kd.top1("best").items()) == [(0, 73.2), (1, 73.2)], (
        "the teacher of most runs counts"
    )
    assert kd.minus(normkd, "best") is not None
    assert dkd.minus(kd, "best") is None, "different teachers"
    text, page = (render(report, f"report.{name}.j2") for name in ("md", "html"))
    assert f"kd,res32x4,res8x4, seed 1: best 74.20, last 74.00, teacher {PUBLIC} (`" in text
    for line in (
        f"teacher weights (SHA-256): aaaaaaaaaa (3 runs), {PUBLIC} (1 run).",
        "precision: fp32 (3 runs), bf16 (1 run).",
        "number of processes: 1 (3 runs), 2 (1 run).",
        "training images (SHA-256): 1111111111 (1 run), 2222222222 (1 run).",
    ):
        assert f"- Runs of resnet32x4 → resnet8x4 differ in {line}" in text
        assert f"Runs of resnet32x4 → resnet8x4 differ in {line}</p>" in page
    assert f"- The teacher {PUBLIC} of resnet32x4 → resnet8x4 is public (pytorch-cifar-" in text
    assert not re.search(r" differ in .*fp16", text)
    assert "- 1 run: 2 processes on Test GPU &lt;1&gt;, bf16" in text


def test_parts_of_resumed_runs_and_settings_of_other_runs_are_shown(tmp_path: Path) -> None:
    records = [made_up(TABLES["2"].cells["kd", PAIR], seed, 73.0, 73.0) for seed in range(3)]
    here = records[0]["environment"] | {"precision": "fp32", "processes": 1}
    first = {"from_step": 0}
    parts = [[first], [first, {"from_step": 700, "commit": "d" * 40}], [{"from_step": 900}]]
    for record, steps in zip(records, parts, strict=True):
        write_record(signed_record(record | {"parts": [here | part for part in steps]}), tmp_path)
    other = made_up(
        TABLES["2"].cells["normkd", PAIR], 1, 73.0, 73.2, command="train.py SOLVER.LR 0.1"
    )
    other["config"]["SOLVER"]["LR"], other["config"]["DATASET"]["VAL_SPLIT"] = 0.1, 0.1
    write_record(signed_record(other), tmp_path)
    text = render(collect(tmp_path), "report.md.j2")
    assert text.count("trained in parts") == 2
    assert re.search(
        r"1, trained in parts: from step 0 on Test GPU .*; from step 700 on .*d{10}", text
    )
    assert (
        "2, trained in parts: the first 900 steps on an unknown machine; from step 900 on" in text
    )
    assert "seed 1: best 73.20, last 73.00 on 10% of the training set, held out (`" in text
    assert ".json`), by `train.py SOLVER.LR 0.1`" in text


def test_the_command_writes_all_files(ledger: Path, tmp_path: Path) -> None:
    where = ["--results", str(ledger.parent), "--out", str(tmp_path)]
    assert execute(["report", *where, "--export", "csv"]) == 0
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == sum(map(len, NUMBERS.values())) + 1
    first = next(row for row in rows if row["method"] == "NormKD" and row["seed"] == "0")
    assert (first["last_top1"], first["best_top1"]) == ("76.2", "76.5")
    assert first["teacher_hash"] == "a" * 64
    assert "table 6, T_norm = 2" in first["cells"]
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "TABLES.md").is_file()


def test_an_empty_ledger(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert execute(["report", "--results", str(tmp_path)]) == 0
    assert "0 runs in the ledger" in (tmp_path / "TABLES.md").read_text()
    with pytest.raises(ConfigError, match="contains no ledger"):
        execute(["report", "--results", str(tmp_path / "nowhere")])
