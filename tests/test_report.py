"""The report of the ledger: numbers, verdicts, and a page that a browser opens."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump
from mdistiller_norm.engine.logger import Record
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.reproduce.charts import Line, line_chart, nice_ticks
from mdistiller_norm.reproduce.collect import collect
from mdistiller_norm.reproduce.jobs import cell_config
from mdistiller_norm.reproduce.ledger import add, digest, failed_record
from mdistiller_norm.reproduce.markdown import to_markdown
from mdistiller_norm.reproduce.page import to_html
from mdistiller_norm.reproduce.stats import CONTRADICTED, HOLDS, UNDECIDED, UNTESTED, Paired, paired, spread
from mdistiller_norm.reproduce.tables import Cell, load_claims, load_tables
from mdistiller_norm.reproduce.views import ClaimView, Comparison, Report
from mdistiller_norm.reproduce.words import comparison_text, signed

TABLES = load_tables()
PAIR = "res32x4_res8x4"


def made_up(cell: Cell, seed: int, last: float, best: float, teacher_hash: str = "a" * 64) -> Record:
    """A well-formed record with chosen accuracies: the report's input, not a measurement."""
    config = cell_config(cell)
    assert config is not None
    node = config.node
    epochs, methods = node.SOLVER.EPOCHS, [] if node.DISTILLER.TYPE == "NONE" else [node.DISTILLER.TYPE]
    curve = [best - 30 + 30 * i / epochs for i in range(epochs)]
    curve[-2], curve[-1] = best, last
    losses = {f"loss_{name}": [3 - 2 * i / epochs for i in range(epochs)] for name in ["ce", *methods, "total"]}
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
                        "modified": False, "platform": "Linux", "mdistiller_norm": "0.1.0"},
        "metrics": {"epoch": list(range(1, epochs + 1)), "test_top1": curve, "test_loss": losses["loss_ce"],
                    "images_per_second": [8000.0] * epochs} | losses,
    }  # fmt: skip
    return record | {"sha256": digest(record)}


# Last and best top-1 of three seeds.
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
            add(made_up(TABLES["2"].cells[row, PAIR], seed, last, best, ("b" if row == "dkd" else "a") * 64), folder)
    cell = TABLES["2"].cells["crd", PAIR]
    config = cell_config(cell)
    assert config is not None
    tree, error = yaml.safe_load(dump(config.node)), "error: no <memory>"
    add(failed_record(cell.config, tree, 0, "python tools/train.py <x>", error, ["line 1", error], False), folder)
    (folder / "broken.json").write_text("{")
    return folder


@pytest.fixture(scope="module")
def report(ledger: Path) -> Report:
    return collect(ledger)


def view(report: Report, table: str, row: str, column: str = PAIR):
    (found,) = (entry for entry in report.tables if entry.table.id == table)
    return found.cells[row, column]


def test_means_and_deviations_are_numpys(report: Report) -> None:
    cell = view(report, "2", "normkd")
    for which, numbers in (("last", [76.2, 76.6, 76.4]), ("best", [76.5, 76.6, 76.7])):
        result = getattr(cell, which)
        assert result.n == 3
        assert result.mean == pytest.approx(np.mean(numbers))
        assert result.std == pytest.approx(np.std(numbers, ddof=1))
    assert cell.difference == pytest.approx(76.6 - 76.57)
    assert cell.agreement == "within"
    assert view(report, "2", "dkd").best.n == 2
    assert view(report, "2", "student").best.std is None
    assert view(report, "2", "student").agreement == ""
    assert view(report, "2", "dkd_normkd").agreement == "within"
    assert spread([]) is None


def test_the_parts_of_a_run_that_went_on_elsewhere_are_named(tmp_path: Path) -> None:
    records = [made_up(TABLES["2"].cells["kd", PAIR], seed, 73.0, 73.0) for seed in range(3)]
    here = records[0]["environment"] | {"precision": "fp32", "processes": 1}
    records[0]["parts"] = [here | {"from_step": 0}]
    records[1]["parts"] = [here | {"from_step": 0}, here | {"from_step": 700, "commit": "d" * 40}]
    records[2]["parts"] = [here | {"from_step": 900}]
    for record in records:
        add(record | {"sha256": digest(record)}, tmp_path)
    report = collect(tmp_path)
    for text in (to_markdown(report), to_html(report).replace("&lt;", "<").replace("&gt;", ">")):
        assert text.count("was trained in parts") == 2
        assert "seed 1, was trained in parts: from step 0 on by Test GPU <1>, fp32" in text
        assert re.search(r"from step 700 on by Test GPU <1>, fp32, [^;]*commit dddddddddd", text)
        assert "seed 2, was trained in parts: what trained its first 900 steps is not recorded; from step 900" in text


def test_a_mean_far_from_the_papers_is_outside(tmp_path: Path) -> None:
    for seed, top1 in enumerate((70.0, 70.1, 70.2)):
        add(made_up(TABLES["2"].cells["kd", PAIR], seed, top1, top1), tmp_path)
    assert view(collect(tmp_path), "2", "kd").agreement == "outside"


def test_one_run_fills_every_cell_that_it_computes(report: Report) -> None:
    runs = view(report, "2", "normkd").runs
    assert view(report, "6", "t_norm_2").runs == runs
    assert view(report, "9", "normkd").runs == runs
    assert view(report, "1", "t_4").runs == view(report, "2", "kd").runs
    assert view(report, "2", "normkd", "vgg13_vgg8").state == "pending"
    assert view(report, "9", "normkd").milliseconds.mean == pytest.approx(64 / 8000 * 1000)


def test_paired_intervals_are_those_of_the_t_test() -> None:
    a, b = {0: 76.2, 1: 76.6, 2: 76.4, 7: 1.0}, {0: 73.0, 1: 73.4, 2: 73.1, 9: 2.0}
    result = paired(a, b)
    assert result is not None
    test = scipy_stats.ttest_rel([a[i] for i in range(3)], [b[i] for i in range(3)]).confidence_interval(0.95)
    assert (result.n, result.low, result.high) == (3, pytest.approx(test.low), pytest.approx(test.high))
    assert result.verdict == HOLDS
    assert paired(b, a).verdict == CONTRADICTED
    assert paired({0: 1.0, 1: 3.0, 2: 2.0}, {0: 2.0, 1: 1.0, 2: 2.5}).verdict == UNDECIDED
    two = paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 0.0})
    assert (two.n, two.mean, two.low, two.verdict) == (2, 1.5, None, UNDECIDED)
    alike = paired({0: 0.3, 1: 0.5, 2: 0.7}, {0: 0.1, 1: 0.3, 2: 0.5})
    assert (alike.n, alike.low, alike.verdict) == (3, None, UNDECIDED)
    assert comparison_text(alike) == "+0.20 (n = 3: every trial differs by this, no interval)"
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_claims_say_what_holds_and_what_is_not_tested(report: Report) -> None:
    normkd, combined, peak, *own = report.claims
    assert normkd.verdict == "partly tested"
    assert normkd.summary == "holds: 1 of 13, not tested yet: 12 of 13"
    assert combined.verdict == "partly tested"
    assert combined.summary == "not decided: 1 of 13, not tested yet: 12 of 13"
    assert peak.verdict == UNTESTED  # one of six rows has runs
    assert {claim.verdict for claim in own} == {UNTESTED}


def test_a_claim_on_every_pair_holds_only_on_every_pair() -> None:
    claim = load_claims()[0]
    means = {HOLDS: (0.5, 1.5), CONTRADICTED: (-1.5, -0.5), UNDECIDED: (-1.0, 1.0)}

    def verdict(*wanted: str) -> str:
        results = [Paired(3, sum(means[v]) / 2, *means[v]) if v in means else None for v in wanted]
        return ClaimView(claim, [Comparison("", "", result, result) for result in results]).verdict

    assert verdict(HOLDS, HOLDS) == HOLDS
    assert verdict(HOLDS, UNDECIDED) == UNDECIDED
    assert verdict(HOLDS, UNTESTED) == verdict(UNDECIDED, UNTESTED) == "partly tested"
    assert verdict(HOLDS, UNDECIDED, UNTESTED, CONTRADICTED) == CONTRADICTED
    assert verdict(UNTESTED, UNTESTED) == UNTESTED


def test_the_peak_is_tested_once_all_its_rows_are(tmp_path: Path) -> None:
    table = TABLES["6"]
    for row in table.rows:
        for seed in range(3):
            step = 0.02 if row.key == "t_norm_4" else 0.01
            top1 = {"t_norm_1.5": 76.6, "t_norm_2": 76.5, "t_norm_4": 77.0}.get(row.key, 75.0) + step * seed
            add(made_up(table.cells[row.key, PAIR], seed, top1, top1), tmp_path)
    peak = collect(tmp_path).claims[2]
    assert peak.verdict == CONTRADICTED
    assert peak.comparisons[0].what == "T_norm = 1.5 \N{MINUS SIGN} T_norm = 4"
    assert peak.comparisons[0].last.mean == pytest.approx(-0.41)


def test_markdown_shows_every_state(report: Report) -> None:
    text = to_markdown(report)
    row = next(line for line in text.splitlines() if line.startswith("| NormKD |"))
    assert "76.57 → **76.60 ± 0.10** (n 3, last 76.40 ± 0.20, +0.03)" in row
    assert "76.40 → pending" in row
    assert "75.51 → failed" in text
    assert "`broken.json`: not JSON" in text
    assert "different teachers!" in text
    assert "79.42 → 79.00 in its students' runs" in text
    assert "fewer than 3 trials" in text
    assert "Δ1 = NormKD" in text
    assert "+3.24 → +3.23 [" in text
    assert "T_norm = 2 | 76.57 | 76.60 ± 0.10 | 76.40 ± 0.20 | 3 | +0.03" in text
    assert "Table 3: CIFAR-100, teacher and student of different families (55 cells)" in text


class Checker(HTMLParser):
    """Open tags, everything that would be loaded, and the text."""

    void = {"meta", "link", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loads += [values[name] or "" for name in ("src", "href") if name in values]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(report: Report) -> None:
    page = to_html(report)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(link.startswith(("#", "data:")) for link in checker.loads)
    assert "url(" not in page
    assert "@import" not in page
    anchors = {link[1:] for link in checker.loads if link.startswith("#")}
    assert all(f'id="{anchor}"' in page for anchor in anchors)
    assert checker.tags.count("table") >= len(TABLES) + 2
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    for words in ("76.60 ± 0.10", "paper 76.57 (+0.03)", "last 76.40 ± 0.20, n 3", "Test GPU <1>, fp32", "broken.json",
                  "error: no <memory>", "python tools/train.py --cfg configs/cifar100/ofd/vgg13_vgg8.yaml SEED=0",
                  "runs of one table had different teachers", "fewer than 3 trials"):  # fmt: skip
        assert words in checker.text, words
    for unescaped in ("no <memory>", "GPU <1>"):
        assert unescaped not in page
    # A chart of accuracy and one of losses for each measured cell, with a line for each run; Table 2's cells and those
    # of Tables 1, 6 and 9 that share the runs; and the overviews of columns with two rows or more.
    cells = [cell for entry in report.tables for cell in entry.cells.values() if cell.runs]
    overviews = [entry for entry in report.tables if sum(bool(cell.runs) for cell in entry.cells.values()) > 1]
    assert checker.tags.count("svg") == 2 * len(cells) + len(overviews)


def test_charts_place_points_where_they_belong() -> None:
    chart = line_chart("A <title>", [Line("a", 0, [1, 2, 3], [10.0, 20.0, 15.0]), Line("b", 9, [1], [12.0])])
    assert "A &lt;title&gt;" in chart
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', chart).group(1).split()]
    assert [x for x, _ in points] == [44, 227, 410]
    heights = [y for _, y in points]
    # 5% of margin above 20 and below 10, in a panel from 26 to 196.
    assert heights == pytest.approx([26 + 170 * (20.5 - y) / 11 for y in (10, 20, 15)], abs=0.06)
    assert 'style="--colour: var(--c1)"' in chart
    assert line_chart("empty", []) == ""
    assert nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert nice_ticks(72.1, 73.9) == [72.5, 73, 73.5]
    long = line_chart("long", [Line("a", 0, list(range(5000)), [float(i) for i in range(5000)])])
    assert len(long) < 6000


def test_differences_have_signs() -> None:
    assert [signed(value) for value in (0.034, -0.5, 0.001, -0.001)] == [
        "+0.03",
        "\N{MINUS SIGN}0.50",
        "±0.00",
        "±0.00",
    ]


def test_several_processes_and_several_environments_are_told_apart(tmp_path: Path) -> None:
    for seed, processes in enumerate((1, 2, 2)):
        record = made_up(TABLES["2"].cells["kd", PAIR], seed, 73.0, 73.2) | {"processes": processes}
        add(record | {"sha256": digest(record)}, tmp_path)
    text = to_markdown(collect(tmp_path))
    assert "- 2 runs: 2 processes on Test GPU <1>, fp32" in text
    assert "- 1 run: Test GPU <1>, fp32" in text


def test_runs_of_a_column_that_differ_in_how_they_were_made_are_named(tmp_path: Path) -> None:
    for row, seed, own in (
        ("teacher", 0, {"precision": "fp16"}),  # whose number is compared with nobody's
        ("kd", 0, {"precision": "fp32", "processes": 1, "data": "1" * 64}),
        ("kd", 1, {"precision": "bf16", "processes": 2, "data": "2" * 64}),
        ("normkd", 1, {}),  # as older records are
    ):
        record = made_up(TABLES["2"].cells[row, PAIR], seed, 73.0, 73.2) | own
        if row == "normkd":
            record["config"]["SEED"] = 0  # and SOLVER.INIT_SEED 1, as of trials in lockstep
        add(record | {"sha256": digest(record)}, tmp_path / "runs")
    execute(["report", "--results", str(tmp_path)])
    text, page = ((tmp_path / name).read_text() for name in ("TABLES.md", "report.html"))
    for line in (
        "precision: fp32 (2 runs), bf16 (1 run).",
        "processes: 1 (2 runs), 2 (1 run).",
        "training images (SHA-256): 1111111111 (1 run), 2222222222 (1 run).",
        "order of the data: of its own seed (2 runs), of seed 0 (1 run).",
    ):
        assert f"- Runs of resnet32x4 → resnet8x4 differ in {line}" in text
        assert f"Runs of resnet32x4 → resnet8x4 differ in {line}</p>" in page
    assert not re.search(r" differ in .*fp16", text)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("--cfg a.yaml SEED 1 NormKD.TEMPERATURE_NORM 1.25 DEVICE cpu", "NormKD.TEMPERATURE_NORM=1.25"),
        ("--cfg a.yaml SOLVER.LR=0.1 DATASET.VAL_SPLIT=0.1 LOG.PREFIX=x", "SOLVER.LR=0.1"),
        ("--cfg a.yaml 'SOLVER.LR_DECAY_STAGES=[9, 10]'", "SOLVER.LR_DECAY_STAGES=[9, 10]"),
        ("--cfg a.yaml", ""),
    ],
)
def test_a_run_of_no_table_says_what_its_command_changed(tmp_path: Path, command: str, shown: str) -> None:
    record = made_up(TABLES["2"].cells["normkd", PAIR], 1, 73.0, 73.2) | {"command": f"python tools/train.py {command}"}
    record["config"]["NormKD"]["TEMPERATURE_NORM"] = 1.25
    record["config"]["SOLVER"] |= {"LR": 0.1, "LR_DECAY_STAGES": [9, 10]}
    add(record | {"sha256": digest(record)}, tmp_path / "runs")
    execute(["report", "--results", str(tmp_path)])
    name = " ".join(["cifar100_baselines/normkd,res32x4,res8x4", *([shown] if shown else [])])
    assert f"- {name}, seed 1: best 73.20" in (tmp_path / "TABLES.md").read_text()


def test_the_tool_writes_everything(ledger: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    options = [
        "--results",
        str(ledger.parent),
        "--out",
        str(tmp_path),
        "--export",
        "csv",
        "--hparams",
        str(tmp_path / "hp"),
    ]
    assert execute(["report", *options]) == 0
    assert "old" not in (tmp_path / "README.md").read_text()
    assert (
        "Table 2 (CIFAR-100, teacher and student of one family): 5 of 66 cells" in (tmp_path / "README.md").read_text()
    )
    assert (tmp_path / "README.md").read_text().endswith("after\n")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == sum(map(len, NUMBERS.values()))
    first = next(row for row in rows if row["method"] == "NormKD" and row["seed"] == "0")
    assert (float(first["last_top1"]), float(first["best_top1"]), first["best_epoch"]) == (76.2, 76.5, "239")
    assert "table 6, T_norm = 2" in first["cells"]
    assert first["teacher_hash"] == "a" * 64

    folders = [path for path in (tmp_path / "hp").iterdir() if path.is_dir()]
    assert len(folders) == len(rows)
    assert len(list((tmp_path / "hp").iterdir())) == len(rows) + 1  # and one file of the whole view
    reached = EventAccumulator(str(next(path for path in folders if "-normkd-" in path.name and "seed0" in path.name)))
    reached.Reload()
    assert reached.Scalars("best_top1")[0].value == pytest.approx(76.5)
    before = (tmp_path / "report.html").read_bytes()
    execute(["report", *options[:4]])
    assert (tmp_path / "report.html").read_bytes() == before, "the same ledger must give the same page"


def test_an_empty_ledger_says_pending_everywhere(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    execute(["report", "--results", str(tmp_path)])
    text = (tmp_path / "TABLES.md").read_text()
    assert "0 runs in the ledger" in text
    assert text.count("not tested yet") >= 7
    assert "nan" not in (tmp_path / "report.html").read_text().lower().replace("nand", "")
    with pytest.raises(ConfigError, match="there is no ledger"):
        execute(["report", "--results", str(tmp_path / "nowhere")])


def test_a_browser_opens_the_page_without_errors(report: Report, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "report.html"
    # What the layout measures, written where --dump-dom shows it.
    probe = (
        "<script>addEventListener('load', () => {"
        "document.querySelector('#table-2 details').open = true;"
        "document.querySelector('#table-2 .command button').click();"
        "document.title = JSON.stringify({page: document.documentElement.scrollWidth, window: innerWidth,"
        "tables: document.querySelectorAll('table').length,"
        "names: document.querySelector('#table-2 tbody th').getBoundingClientRect().width,"
        "charts: [...document.querySelectorAll('svg polyline')].length})})</script></body>"
    )
    page.write_text(to_html(report).replace("</body>", probe))
    done = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--enable-logging=stderr", "--window-size=500,900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ":CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout).group(1))
    assert seen["tables"] >= len(TABLES) + 2
    assert seen["charts"] > 10
    assert seen["page"] <= seen["window"], "the page itself must not scroll sideways"
    assert seen["names"] <= 0.4 * 360, "the column of names, which stays, must leave room for numbers on a phone"
