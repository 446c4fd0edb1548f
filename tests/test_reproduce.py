"""The paper's tables, what computes their cells, and the order in which it is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, assert_user_error, tool

from mdistiller_norm.cli import execute
from mdistiller_norm.config import Config, dump, load_config
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.runtime import slot_environment
from mdistiller_norm.errors import ConfigError, UserError
from mdistiller_norm.reproduce.cli import parse_duration
from mdistiller_norm.reproduce.commands import select_cells
from mdistiller_norm.reproduce.estimate import Estimator, trial_rate, trial_seconds
from mdistiller_norm.reproduce.jobs import (
    cell_command,
    cell_config,
    cell_identity,
    cost,
    forward_flops,
    identity,
    make_plan,
)  # fmt: skip
from mdistiller_norm.reproduce.tables import Cell, load_claims, load_tables
from mdistiller_norm.run_folder import run_folder

TABLES = load_tables()
CELLS = [cell for table in TABLES.values() for cell in table.cells.values()]
TYPES = {
    "fitnet": "FITNET", "rkd": "RKD", "crd": "CRD", "ofd": "OFD", "reviewkd": "REVIEWKD", "at": "AT", "kd": "KD",
    "dkd": "DKD", "normkd": "NormKD", "dkd_normkd": "NormKD_W_DKD", "student": "NONE", "teacher": "NONE",
}  # fmt: skip


def test_the_numbers_are_those_of_the_facts(facts: Path) -> None:
    paper = json.loads((facts / "paper_tables.json").read_text())
    names = {"teacher": "teacher", "student": "student", "dkd_normkd": "DKD+NormKD"}
    for number in ("2", "3", "4", "5"):
        table, expected = TABLES[number], paper[f"table{number}"]
        assert len(table.rows) == len(expected["rows"])
        for row in table.rows:
            name = names.get(row.key, row.name)
            cells = [table.cells[row.key, column.key].paper for column in table.columns]
            if number in "45":
                assert [cells[0]["top1"], cells[0]["top5"]] == expected["rows"][name], name
            else:
                assert [cell["top1"] for cell in cells] == expected["rows"][name], name
        if "delta1_printed" in expected:
            deltas = [expected["delta1_printed"], expected["delta2_printed"]]
            assert [list(delta.printed) for delta in table.deltas] == deltas
    for number in ("1", "6", "7", "8"):
        printed = [cell.paper["top1"] for cell in TABLES[number].cells.values()]
        assert printed == [row["top1"] for row in paper[f"table{number}"]["rows"]]
    assert [cell.paper["top5"] for cell in TABLES["7"].cells.values()] == [r["top5"] for r in paper["table7"]["rows"]]
    for row in TABLES["9"].rows:
        (cell,) = TABLES["9"].select([row.key])
        assert [cell.paper[key] for key in ("top1", "ms", "parameters")] == paper["table9"]["rows"][row.name]


def test_printed_deltas_are_differences_of_printed_means_but_for_the_known_misprint() -> None:
    wrong = []
    for table in TABLES.values():
        for delta in table.deltas:
            for column, printed in zip(table.columns, delta.printed, strict=False):
                first, second = (table.cells[key, column.key].paper["top1"] for key in (delta.row, delta.minus))
                if round(first - second, 2) != printed:
                    wrong.append((table.id, delta.name, column.key))
    assert wrong == [("3", "Δ2", "res32x4_shuv2")]
    assert any("+0.05" in note for note in TABLES["3"].notes)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.table}-{cell.row.key}-{cell.column.key}")
def test_every_cell_names_a_config_of_its_pair_and_method(cell: Cell) -> None:
    if not cell.config:
        assert cell.is_teacher
        assert TABLES[cell.table].dataset == "imagenet"  # published weights
        return
    config = cell_config(cell)
    assert config is not None, f"{cell.config} is not in this checkout"
    node = config.node
    assert TABLES[cell.table].dataset == node.DATASET.TYPE
    assert (cell.column.teacher if cell.is_teacher else cell.column.student) == node.DISTILLER.STUDENT
    if node.DISTILLER.TYPE != "NONE":
        assert cell.column.teacher == node.DISTILLER.TEACHER
    if cell.row.key in TYPES:
        assert TYPES[cell.row.key] == node.DISTILLER.TYPE
    if cell.is_teacher:
        assert cell.config == TABLES[cell.table].teacher_config(cell.column)


def test_settings_of_the_ablations_reach_the_config() -> None:
    def value(table: str, row: str, *path: str) -> Any:
        config = cell_config(next(TABLES[table].select([row])))
        assert config is not None, f"table {table} has no configs in this checkout"
        node = config.node
        for part in path:
            node = node[part]
        return node

    assert value("1", "t_1_to_14", "KD", "TEMPERATURE") == [float(t) for t in range(1, 15)]
    assert value("6", "t_norm_0.75", "NormKD", "TEMPERATURE_NORM") == 0.75
    assert value("8", "range", "NormKD", "STATISTIC") == "range"
    assert value("7", "t_norm_0.5", "NormKD", "TEMPERATURE_NORM") == 0.5


def test_claims_name_rows_that_exist() -> None:
    for claim in load_claims():
        for name in claim.tables:
            keys = {row.key for row in TABLES[name].rows}
            assert {claim.row, claim.than} <= keys if claim.row else set(claim.peak) < keys


def test_the_same_computation_is_one_run_in_all_its_tables() -> None:
    def of(table: str, row: str, pair: str = "res32x4_res8x4") -> str | None:
        return cell_identity(TABLES[table].cells[row, pair])

    assert of("1", "t_4") == of("2", "kd") == of("9", "kd")
    assert of("6", "t_norm_2") == of("2", "normkd") == of("9", "normkd")
    assert of("2", "teacher") == of("3", "teacher", "res32x4_shuv2")
    assert of("1", "t_1") != of("1", "t_2")
    every = {identity: cell.config for cell in CELLS if (identity := cell_identity(cell))}
    assert len(every) > 130


def test_identity_is_what_is_computed(tmp_path: Path) -> None:
    def of(*overrides: str) -> str:
        return identity(load_config(ROOT / "configs/digits/normkd.yaml", overrides).node)

    same = ["SEED=7", "LOG.PREFIX=/elsewhere", "DEVICE=cpu", "SOLVER.PRECISION=bf16", "EXPERIMENT.TAG=x"]
    assert {of(override) for override in same} == {of()}
    unused = tmp_path / "unused.yaml"
    unused.write_text(f"_BASE_: {ROOT / 'configs/digits/normkd.yaml'}\nCRD.NCE.K: 3\n")
    assert identity(load_config(unused).node) == of()
    other = ["SOLVER.EPOCHS=3", "NormKD.TEMPERATURE_NORM=1.5", "DISTILLER.STUDENT=resnet14", "DISTILLER.TYPE=KD"]
    assert len({of(), *(of(override) for override in other)}) == len(other) + 1
    assert of("DISTILLER.TYPE=[NormKD]") == of()
    node = load_config(ROOT / "configs/digits/normkd.yaml").node
    stored = json.loads(json.dumps(yaml.safe_load(dump(node))))
    assert identity(stored) == of()
    del stored["SOLVER"]["DOT"]  # as if made before that key existed
    assert identity(stored) == of()
    plain = load_config(ROOT / "configs/digits/vanilla_resnet8.yaml", ["DISTILLER.TEACHER=resnet56"]).node
    assert identity(plain) == identity(load_config(ROOT / "configs/digits/vanilla_resnet8.yaml").node)


def test_a_plan_has_teachers_first_and_every_run_once(tmp_path: Path) -> None:
    cells = select_cells(["2", "3", "9"], ["kd", "normkd", "teacher"], ["res32x4_res8x4", "res32x4_shuv2"], False)
    plan = make_plan(cells, [0, 1], output=tmp_path)
    assert len({job.key for job in plan.jobs}) == len(plan.jobs) == 1 + 2 * 4
    teacher, *students = plan.jobs
    assert teacher.config_file == "configs/cifar100/vanilla/resnet32x4.yaml"
    assert all(job.teacher is not None and job.teacher.key == teacher.key for job in students)
    assert [job.seed for job in students] == [0] * 4 + [1] * 4
    assert all(f"DISTILLER.TEACHER_WEIGHTS={teacher.weights}" in job.overrides for job in students)
    shared = next(job for job in students if "table 9, KD, resnet32x4 → resnet8x4" in job.cells)
    assert "table 2, KD, resnet32x4 → resnet8x4" in shared.cells


def test_the_queue_is_in_the_order_of_value(tmp_path: Path) -> None:
    plan = make_plan(select_cells([], [], [], True), [0], output=tmp_path, by_value=True)
    assert plan.jobs[0].config_file == "configs/cifar100/vanilla/resnet32x4.yaml"
    first = [cell for job in plan.jobs[1:6] for cell in job.cells if cell.startswith("table 2")]
    names = ("Student", "KD", "DKD", "NormKD", "DKD+NormKD")
    assert set(first) == {f"table 2, {name}, resnet32x4 → resnet8x4" for name in names}
    ranks = [job.queue for job in plan.jobs]
    assert ranks == sorted(ranks)
    wanted = list(TABLES["2"].select(["kd", "student"])) + list(TABLES["6"].select(["t_norm_4"]))
    seeds = [(job.queue, job.seed) for job in make_plan(wanted, [0, 1], output=tmp_path, by_value=True).jobs]
    assert seeds == sorted(seeds)
    features = ("fitnet", "rkd", "crd", "ofd", "reviewkd")
    last = [job for job in plan.jobs if job.queue == 3]
    assert len(last) == 5 * 11
    assert all(job.config_file.split("/")[2] in features for job in last)


def test_overrides_that_would_make_other_runs_are_refused(tmp_path: Path) -> None:
    cells = list(TABLES["digits"].select(["kd"]))
    # 240 and 0.05 are the defaults, and not what this table's configs say.
    for extra in ("SOLVER.LR=0.1", "SOLVER.EPOCHS=240", "SOLVER.LR=0.05", "DISTILLER.TEACHER=resnet56"):
        with pytest.raises(ConfigError, match=rf"{re.escape(extra.split('=')[0])} would change what is computed"):
            make_plan(cells, [0], output=tmp_path, extra=[extra])
    with pytest.raises(ConfigError, match=r"KD\.TEMPERATURE has no effect: DISTILLER\.TYPE"):
        make_plan(cells, [0], output=tmp_path, extra=["KD.TEMPERATURE=8"])
    for extra in ("SEED=3", "LOG.PREFIX=x"):
        with pytest.raises(ConfigError, match=f"{extra.split('=')[0]} is set by reproduce itself"):
            make_plan(cells, [0], output=tmp_path, extra=[extra])
    assert "DEVICE=cpu" in make_plan(cells, [0], output=tmp_path, extra=["DEVICE=cpu"]).jobs[1].overrides


def test_the_cost_counts_operations() -> None:
    # resnet20 of 32x32 images has 40.55 million multiply-adds in its convolutions (He et al., 2016) and its classifier.
    assert forward_flops("resnet20", "cifar100") == pytest.approx(2 * 40.8e6, rel=0.02)
    alone, taught = (load_config(ROOT / f"configs/digits/{name}.yaml").node for name in ("vanilla_resnet8", "kd"))
    images = 12 * 1437
    assert cost(alone) == pytest.approx(images * 3 * forward_flops("resnet8", "digits"))
    assert cost(taught) - cost(alone) == pytest.approx(images * forward_flops("resnet20", "digits"))
    own = load_config(ROOT / "configs/digits/vanilla_resnet8.yaml", ["DISTILLER.STUDENT=of_a_plugin"]).node
    assert cost(own) == 0, "a ledger may hold runs of networks that are not known here"


def test_a_trial_is_made_in_the_precision_that_a_run_would_have() -> None:
    cpu = torch.device("cpu")  # which trains in fp32 where fp16 is asked for
    assert trial_rate(cpu, "fp16") > 0.2 * trial_rate(cpu, "fp32")


def test_a_trial_of_networks_knows_large_from_small_and_training_from_a_pass() -> None:
    cpu = torch.device("cpu")
    seconds = [
        trial_seconds(name, "cifar100", "fp32", trained, cpu)
        for name, trained in (("resnet8", False), ("resnet8", True), ("resnet56", True))
    ]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    with pytest.raises(ConfigError, match="of_a_plugin"):
        trial_seconds("of_a_plugin", "cifar100", "fp32", True, cpu)


@pytest.mark.cuda
def test_on_a_gpu_an_estimate_tries_the_networks(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or not asked for by -m cuda")
    job = make_plan(TABLES["2"].select(["kd"], ["res56_res20"]), [0], output=tmp_path).jobs[-1]
    estimate = Estimator([], torch.device("cuda")).of(job)
    assert estimate.source == "a short trial of its networks"
    assert 60 < estimate.seconds < 36000


def test_config_keys_behind_a_list_are_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path), "--output", str(tmp_path)]
    for words in (
        ["--table", "digits", "--methods", "student", "--seeds", "0", "1", "SOLVER.PRECISION", "bf16", "--dry-run"],
        ["SOLVER.PRECISION=bf16", "--seeds", "0", "1", "--methods", "student", "--dry-run", "--table", "digits"],
        ["--dry-run", "--seeds", "0", "1", "--table", "digits", "--methods", "student", "SOLVER.PRECISION=bf16"],
    ):
        assert execute(["reproduce", *where, *words]) == 0
        printed = capsys.readouterr().out
        assert "2 runs: 0 done, 2 to run" in printed
        assert "bf16 pace" in printed
    with pytest.raises(ConfigError, match=r"unknown key SOLVER\.PRECISON: did you mean SOLVER\.PRECISION"):
        execute(["reproduce", *where, "--table", "digits", "--seeds", "0", "SOLVER.PRECISON", "bf16", "--dry-run"])
    with pytest.raises(ConfigError, match="invalid int value: 'kd'"):
        execute(["reproduce", *where, "--table", "digits", "--seeds", "0", "kd", "--dry-run"])
    with pytest.raises(ConfigError, match="no row of Table 2 called 'KD': did you mean kd"):
        execute(["reproduce", *where, "--table", "2", "--methods", "KD", "NormKD", "DEVICE", "cpu", "--dry-run"])


def test_durations() -> None:
    assert [parse_duration(text) for text in ("90s", "9m", "1h30m")] == [90, 540, 5400]
    for text in ("", "9", "m", "9 minutes"):
        with pytest.raises(ConfigError, match="is not a duration"):
            parse_duration(text)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    assert_user_error(tool("reproduce", "--table", "2", "--methods", "normkdd", check=False), "normkdd", "normkd")
    for arguments, words in (
        (["--table", "10"], "there is no table '10'"),
        ([], "--table is missing"),
        (["--table", "2", "--pairs", "res56"], "no pair of Table 2 called 'res56'"),
        (["--table", "digits", "--budget", "soon"], "--budget 'soon' is not a duration"),
        (["--table", "digits", "--sweep", "KD.TEMPERATURE"], "--sweep takes KEY=A,B,C"),
        (["--table", "digits", "--sweep", "KD.TEMPERATURE=1", "--val-split", "0"], "--val-split must be above 0"),
        (["--table", "digits", "--methods", "kd", "--sweep", "KD.TEMPERATUR=1"], "KD.TEMPERATURE"),
        (["--table", "digits", "--sweep", "KD.TEMPERATURE=1"], "--sweep of the row student: command line: KD."),
        (["--table", "digits", "--methods", "kd", "--sweep", "SEED=1,2"], "two of these values make the same run"),
        (["--table", "digits", "--trials", "0"], "--trials must be >= 1, got 0"),
        (["--table", "digits", "--seeds", "99999999999999999999"], "SEED must be in [0, 2**63)"),
        (["--table", "digits", "--budget", "-5m"], "argument --budget: expected one argument: see mdistiller-norm"),
        (["--table", "digits", "--launcher", "foo"], "argument --launcher: invalid choice: 'foo'"),
        (["--table", "digits", "--jobs", "0"], "--jobs and --processes must be at least 1"),
        (["--table", "digits", "--slurm", "timeout"], "NAME=VALUE, not 'timeout'"),
        (["--table", "digits", "--slurm", "gpus=["], "--slurm 'gpus=[': the value is not YAML"),
        (["--table", "digits", "--slurm", "gpus=1"], "--launcher is missing"),
        (["--table", "digits", "--launcher", "slurm", "--budget", "9m"], "--budget and --jobs are for runs here"),
        (["--table", "1", "2", "--methods", "t_1", "--pairs", "vgg13_vgg8"], "have no cell in common"),
        (["--add", str(tmp_path), "--results", str(tmp_path)], "is not a finished run"),
        (["--add", str(tmp_path), "--results", str(tmp_path), "--dry-run"], "--dry-run is for the runs of tables"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            execute(["reproduce", *arguments])


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert execute(["reproduce", "--table", "4", "digits", "--trials", "1", "--dry-run", *folders]) == 0
    listed = capsys.readouterr().out
    assert "digits/normkd,resnet20,resnet8, seed 0: about" in listed
    assert "after digits/vanilla,resnet20, seed 0" in listed
    assert "table 4, Teacher, ResNet34 → ResNet18" in listed
    assert "one after another (from operations counted" in listed
    assert not list(tmp_path.iterdir())
    execute(["reproduce", "--table", "2", "3", "--methods", "kd", "teacher", "--pairs", "res32x4_res8x4",
             "res32x4_shuv1", "--trials", "1", "--dry-run", *folders])  # fmt: skip
    listed = capsys.readouterr().out
    assert listed.count("  after cifar100_baselines/vanilla,resnet32x4, seed 0") == 2


@pytest.mark.parametrize(("load", "noted"), [(2.5, 1), (0.2, 0)])
def test_a_trial_on_a_busy_machine_is_said_to_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: float, noted: int
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    folders = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert (
        execute(["reproduce", "--table", "digits", "--methods", "student", "--trials", "1", "--dry-run", *folders]) == 0
    )
    assert capsys.readouterr().out.count("note: this machine is busy (load average 2.5)") == noted


def test_runs_side_by_side_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert slot_environment("auto", 0, 1) == {}
    assert slot_environment("auto", 1, 2, 4) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert slot_environment("auto", 1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert slot_environment("auto", 5, 6, 1)["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in slot_environment("cpu", 1, 2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slot_environment("auto", 1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_commands_of_cells_are_runnable() -> None:
    command = cell_command(TABLES["7"].cells["t_norm_0.5", "r50_mv1"], seed=2)
    assert command == "python tools/train.py --cfg configs/imagenet/ablation/table7/t_norm_0.5.yaml SEED=2"
    shown = tool("train", *cell_command(TABLES["digits"].cells["dkd", "res20_res8"]).split()[2:], "--show").stdout
    assert "TYPE: DKD" in shown


def test_the_command_of_a_student_names_what_the_command_of_its_teacher_leaves() -> None:
    """Of the tables that train their own: a teacher of that name may be published, or be there from another run."""

    def made_by(command: str) -> Config:
        *_, file, seed = command.split()
        return load_config(ROOT / file, [seed])

    teachers = {
        (cell.column, TABLES[cell.table].dataset): run_folder(made_by(cell_command(cell))) / "student_last.pt"
        for cell in CELLS
        if cell.is_teacher and TABLES[cell.table].own_teacher
    }
    students = [cell for cell in CELLS if TABLES[cell.table].own_teacher and cell.row.key not in ("teacher", "student")]
    assert {cell.table for cell in students} == {"digits", "short", "short_t_norm"}
    for cell in students:
        weights = teachers[cell.column, TABLES[cell.table].dataset]
        assert f" DISTILLER.TEACHER_WEIGHTS={weights} " in cell_command(cell)
    assert "WEIGHTS" not in cell_command(TABLES["short"].cells["student", "res20_res8"])


@pytest.mark.parametrize(("study", "stages"), [("short", [160, 200, 220]), ("short16", [150, 180, 210])])
def test_short_studies_differ_from_the_papers_recipe_in_length_pair_and_precision_only(
    study: str, stages: list[int]
) -> None:
    for method in ("kd", "normkd", "dkd", "dkd_normkd"):
        short = load_config(ROOT / f"configs/cifar100/{study}/{method}.yaml").node
        full = load_config(ROOT / f"configs/cifar100/{method}/res56_res20.yaml").node
        assert [240 * stage / short.SOLVER.EPOCHS for stage in short.SOLVER.LR_DECAY_STAGES] == stages
        short, full = short.clone(), full.clone()
        for node in (short, full):
            node.defrost()
            node.SOLVER.EPOCHS, node.SOLVER.LR_DECAY_STAGES, node.SOLVER.PRECISION = 0, [], "fp32"
            node.DISTILLER.TEACHER, node.DISTILLER.STUDENT, node.DISTILLER.TEACHER_CACHE = "", "", "off"
            for name in DISTILLERS:
                if name in node and "WARMUP" in node[name]:
                    node[name].WARMUP = 0
        assert identity(short) == identity(full)
