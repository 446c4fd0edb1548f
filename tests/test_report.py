"""The report of a ledger: numbers, verdicts and the two documents."""

import csv
import re
from collections import Counter

import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.reproduce import stats
from mdistiller_norm.reproduce.ledger import failed_record, signed_record, write_record
from mdistiller_norm.reproduce.plan import cell_config
from mdistiller_norm.reproduce.report import collect, render, verdict
from mdistiller_norm.reproduce.stats import CONTRADICTED, HOLDS, UNDECIDED, UNTESTED
from mdistiller_norm.reproduce.tables import TABLES

PAIR = "res32x4_res8x4"
MACHINE = {"device": "Test GPU <1>", "torch": "2.6", "python": "3.11", "platform": "Linux"}
MACHINE |= {"commit": "c" * 40, "modified": False}
PUBLIC = "271c7bfa8a"  # the hash of a public teacher


def write(folder, table, row, seed, last, best, teacher_hash="a" * 64, **more):
    cell = TABLES[table].cells[row, PAIR]
    node = cell_config(cell).node
    epochs = node.SOLVER.EPOCHS
    methods = [] if node.DISTILLER.TYPE == "NONE" else [node.DISTILLER.TYPE]
    curve = [best - 30 + 30 * i / epochs for i in range(epochs - 2)]
    metrics = {"epoch": [*range(1, epochs + 1)], "test_top1": [*curve, best, last]}
    metrics |= {f"loss_{name}": [1.0] * epochs for name in ["ce", *methods]}
    metrics["images_per_second"] = [8000.0] * epochs
    teacher = {"name": node.DISTILLER.TEACHER, "top1": 79.0, "top5": 94.0, "hash": teacher_hash}
    record = {
        "format": 1, "status": "finished", "smoke": False, "config_file": cell.config, "seed": seed,
        "at": f"2026-01-0{seed + 1}T00:00:00Z", "command": f"python tools/train.py --cfg {cell.config} SEED={seed}",
        "config": yaml.safe_load(dump(node)) | {"SEED": seed}, "method": methods, "student": node.DISTILLER.STUDENT,
        "teacher": teacher if methods else None, "dataset": node.DATASET.TYPE, "epochs": epochs, "seconds": 3600.0,
        "last": {"epoch": epochs, "top1": last, "top5": 90.0, "loss": 1.0}, "extra_parameters": 0,
        "best": {"epoch": epochs - 1, "top1": best, "top5": 91.0, "loss": 1.0},
        "metrics": metrics, "environment": MACHINE,
    }  # fmt: skip
    write_record(signed_record(record | more), folder)


# Last and best top-1 by seed.
NUMBERS = {
    "kd": [(73.0, 73.2), (73.4, 73.5), (73.1, 73.4)],
    "normkd": [(76.2, 76.5), (76.6, 76.6), (76.4, 76.7)],
    "dkd": [(76.1, 76.3), (76.3, 76.4)],
    "dkd_normkd": [(77.1, 77.3), (76.2, 77.5)],
    "student": [(72.4, 72.6)],
}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """Records of one column of Table 2, a failure, a broken file, and two teachers in one column."""
    folder = tmp_path_factory.mktemp("results") / "runs"
    for row, numbers in NUMBERS.items():
        for seed, accuracies in enumerate(numbers):
            write(folder, "2", row, seed, *accuracies)
    write(folder, "9", "rkd", 0, 71.0, 71.5, "b" * 64)
    cell = TABLES["2"].cells["crd", PAIR]
    about = {"smoke": False, "seed": 0, "command": "train.py <x>", "config_file": cell.config}
    error = "error: no <memory> | left"
    write_record(failed_record(error, ["line 1"], cell_config(cell).node, **about), folder)
    (folder / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def report(ledger):
    return collect(ledger)


def view(report, table, row):
    (found,) = (entry for entry in report["tables"] if entry.table.id == table)
    return found.cells[row, PAIR]


def test_means_and_deviations_equal_numpys(report):
    cell = view(report, "2", "normkd")
    for which, numbers in (("last", [76.2, 76.6, 76.4]), ("best", [76.5, 76.6, 76.7])):
        mean, deviation = np.mean(numbers), np.std(numbers, ddof=1)
        assert cell.mean(which) == (3, pytest.approx(mean), pytest.approx(deviation))
    assert cell.difference == pytest.approx(76.6 - 76.57)
    assert cell.agreement == view(report, "2", "kd").agreement == "within"
    assert view(report, "2", "student").agreement == ""
    # One run fills every cell that it computes.
    assert view(report, "6", "t_norm_2").runs == view(report, "9", "normkd").runs == cell.runs
    assert view(report, "1", "t_4").runs == view(report, "2", "kd").runs
    assert {entry.milliseconds for entry in cell.runs.values()} == {64 / 8000 * 1000}


def test_paired_intervals_equal_the_t_test():
    a, b = {0: 76.2, 1: 76.6, 2: 76.4, 7: 1.0}, {0: 73.0, 1: 73.4, 2: 73.1, 9: 2.0}
    result = stats.paired_difference(a, b)
    test = scipy_stats.ttest_rel([a[i] for i in range(3)], [b[i] for i in range(3)])
    interval = pytest.approx(tuple(test.confidence_interval(0.95)))
    assert (result.n, (result.low, result.high), result.verdict) == (3, interval, HOLDS)
    for first, second, expected in (
        (b, a, (3, CONTRADICTED)),
        ({0: 1.0, 1: 3.0, 2: 2.0}, {0: 2.0, 1: 1.0, 2: 2.5}, (3, UNDECIDED)),
        ({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0}, (2, UNDECIDED)),
        ({0: 0.3, 1: 0.5, 2: 0.7}, {0: 0.1, 1: 0.3, 2: 0.5}, (3, UNDECIDED)),
    ):
        result = stats.paired_difference(first, second)
        assert (result.n, result.verdict) == expected
    assert str(result) == "+0.20 (n = 3, identical in all seeds)"


def test_verdicts_of_claims(report, tmp_path):
    normkd, combined, peak = report["claims"]  # claims about studies without runs are left out
    assert normkd["verdict"] == combined["verdict"] == "partly tested"
    assert [comparison["verdict"] for comparison in normkd["comparisons"]].count(HOLDS) == 1
    assert [comparison["verdict"] for comparison in combined["comparisons"]].count(UNDECIDED) == 1
    assert peak["verdict"] == UNTESTED
    assert verdict({HOLDS, UNDECIDED}) == UNDECIDED
    assert verdict({HOLDS, UNTESTED}) == verdict({UNDECIDED, UNTESTED}) == "partly tested"
    assert verdict({HOLDS, UNDECIDED, UNTESTED, CONTRADICTED}) == CONTRADICTED
    # A peak is tested once all rows have runs.
    means = {"t_norm_1.5": 76.6, "t_norm_2": 76.5, "t_norm_4": 77.0}
    for row in TABLES["6"].rows:
        for seed in range(3):
            top1 = means.get(row.key, 75.0) + (0.02 if row.key == "t_norm_4" else 0.01) * seed
            write(tmp_path, "6", row.key, seed, top1, top1)
    report = collect(tmp_path)
    (comparison,) = report["claims"][2]["comparisons"]
    assert comparison["verdict"] == CONTRADICTED
    assert comparison["last"].mean == pytest.approx(-0.41)
    assert view(report, "6", "t_norm_4").agreement == "outside"


def test_markdown_shows_every_state(report):
    text = render(report, "report.md.j2")
    for expected in (
        "76.57 → **76.60 ± 0.10** (n = 3, last 76.40 ± 0.20, +0.03)",
        "76.40 → pending",
        "error: no &lt;memory&gt; | left",
        "`broken.json`: malformed (JSONDecodeError",
        "different teachers!",
        "79.42 → 79.00 before distillation",
        "+3.24 → +3.23 [",
        "| T_norm = 2 | 76.57 | 76.60 ± 0.10 | 76.40 ± 0.20 | 3 | +0.03 |",
        "| NormKD | 76.57 | 76.60 ± 0.10 | 76.40 ± 0.20 | 3 | +0.03 | 7.2 | 8.00 ± 0.00 | 0 | 0 |",
        "| CRD | 75.51 | failed |  | 0 |  | 24 |  | 12,300,000 |  |",
    ):
        assert expected in text


def test_the_page_is_complete_escaped_and_loads_nothing(report):
    text = render(report, "report.html.j2")
    tags = Counter(re.findall(r"<(/?\w+)(?:[^>]*[^>/])?>", text))
    for tag in [tag for tag in tags if tag not in ("meta", "link", "br") and tag[0] != "/"]:
        assert tags[tag] == tags[f"/{tag}"], tag
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    for unescaped in ("<memory>", "Test GPU <1>", "train.py <x>"):
        assert unescaped not in text


def test_differences_between_runs_of_a_column_are_named(tmp_path):
    for row, seed, more in (
        ("kd", 0, {"precision": "fp32", "processes": 1, "data": "1" * 64}),
        ("kd", 1, {"precision": "bf16", "processes": 2, "data": "2" * 64}),
        ("normkd", 1, {}),  # an older record
    ):
        write(tmp_path, "2", row, seed, 73.0, 73.2, **more)
    for row in ("kd", "dkd"):
        write(tmp_path, "2", row, 1, 74.0, 74.2, PUBLIC.ljust(64, "0"))
    report = collect(tmp_path)
    kd, normkd, dkd = (view(report, "2", row) for row in ("kd", "normkd", "dkd"))
    assert sorted(kd.top1("best").items()) == [(0, 73.2), (1, 73.2)]  # the teacher of most runs
    assert kd.minus(normkd, "best") is not None
    assert dkd.minus(kd, "best") is None  # different teachers
    text = render(report, "report.md.j2")
    assert f"kd,res32x4,res8x4, seed 1: best 74.20, last 74.00, teacher {PUBLIC} (`" in text
    for line in (
        f"teacher weights (SHA-256): aaaaaaaaaa (3 runs), {PUBLIC} (1 run).",
        "precision: fp32 (3 runs), bf16 (1 run).",
        "number of processes: 1 (3 runs), 2 (1 run).",
        "training images (SHA-256): 1111111111 (1 run), 2222222222 (1 run).",
    ):
        assert f"- Runs of resnet32x4 → resnet8x4 differ in {line}" in text
    assert f"- The teacher {PUBLIC} of resnet32x4 → resnet8x4 is public (pytorch-cifar-" in text


def test_parts_of_resumed_runs_and_settings_of_other_runs_are_shown(tmp_path):
    first = MACHINE | {"from_step": 0, "precision": "fp32", "processes": 1}
    parts = [first, first | {"from_step": 700, "commit": "d" * 40}]
    write(tmp_path, "2", "kd", 1, 73.0, 73.0, parts=parts)
    config = yaml.safe_load(dump(cell_config(TABLES["2"].cells["normkd", PAIR]).node))
    config["DATASET"]["VAL_SPLIT"] = 0.1
    write(tmp_path, "2", "normkd", 1, 73.0, 73.2, config=config)
    text = render(collect(tmp_path), "report.md.j2")
    assert re.search("parts: from step 0 on Test GPU.*; from step 700 on .*d{10}", text)
    assert "seed 1: best 73.20, last 73.00 on 10% of the training set, held out (`" in text


def test_the_command_writes_all_files(ledger, tmp_path):
    where = f"--results {ledger.parent} --out {tmp_path} --export csv"
    assert execute(["report", *where.split()]) == 0
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == sum(map(len, NUMBERS.values())) + 1
    first = next(row for row in rows if row["method"] == "NormKD" and row["seed"] == "0")
    assert (first["last_top1"], first["best_top1"]) == ("76.2", "76.5")
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "TABLES.md").is_file()
    with pytest.raises(ConfigError, match="contains no ledger"):
        execute(["report", "--results", str(tmp_path / "nowhere")])
