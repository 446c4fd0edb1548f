"""The paper's tables, the configs and runs of their cells, and the command line of ``reproduce``."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mdistiller_norm.cli import execute
from mdistiller_norm.config import dump, leaves, load_config
from mdistiller_norm.engine.runtime import slot_environment
from mdistiller_norm.errors import UserError
from mdistiller_norm.reproduce import plan
from mdistiller_norm.reproduce.command import select_cells
from mdistiller_norm.reproduce.ledger import identity
from mdistiller_norm.reproduce.plan import cell_command, cell_config, cell_identity, value_rank
from mdistiller_norm.reproduce.tables import TABLES
from mdistiller_norm.run_folder import run_folder

PAIR, KD = "res32x4_res8x4", "--table digits --dry-run --methods kd"
CELLS = [cell for table in TABLES.values() for cell in table.cells.values()]
# Names of rows in the facts.
NAMES = {"teacher": "teacher", "student": "student", "dkd_normkd": "DKD+NormKD"}
# Shapes are read from the networks, the width in the middle is computed from them, and ReviewKD's weight depends on
# the pair, but not in the facts.
COMPUTED = {"FEAT", "SHAPES", "OUT_SHAPES", "IN_CHANNELS", "OUT_CHANNELS", "MAX_MID_CHANNEL"}
COMPUTED |= {"REVIEWKD_WEIGHT"}
TYPES = {
    "fitnet": "FITNET", "rkd": "RKD", "crd": "CRD", "ofd": "OFD", "reviewkd": "REVIEWKD", "at": "AT", "kd": "KD",
    "dkd": "DKD", "normkd": "NormKD", "dkd_normkd": "NormKD_W_DKD", "student": "NONE", "teacher": "NONE",
}  # fmt: skip


def test_printed_numbers_equal_the_facts(facts):
    paper = json.loads((facts / "paper_tables.json").read_text())
    for number in "2345":
        table, expected = TABLES[number], paper[f"table{number}"]
        for row in table.rows:
            cells = [table.cells[row.key, column.key].paper for column in table.columns]
            shown = [*cells[0].values()] if number in "45" else [cell["top1"] for cell in cells]
            assert shown == expected["rows"].pop(NAMES.get(row.key, row.name)), row.name
        assert not expected["rows"]
        if "delta1_printed" in expected:
            deltas = [expected["delta1_printed"], expected["delta2_printed"]]
            assert [delta.printed for delta in table.deltas] == deltas
    for cell in TABLES["9"].cells.values():
        assert list(cell.paper.values()) == paper["table9"]["rows"][cell.row.name]
    for number, setting, key in (
        ("1", "temperatures", "KD.TEMPERATURE"),
        ("6", "T_norm", "NormKD.TEMPERATURE_NORM"),
        ("7", "T_norm", "NormKD.TEMPERATURE_NORM"),
        ("8", "statistic", "NormKD.STATISTIC"),
    ):
        rows = paper[f"table{number}"]["rows"]
        for cell, row in zip(TABLES[number].cells.values(), rows, strict=True):
            value = row.pop(setting)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            value = "range" if value == "max - min" else value
            assert dict(leaves(cell_config(cell).node))[key] == value
            assert cell.paper == row


def test_every_cell_has_a_config_of_its_pair_and_method():
    for cell in CELLS:
        table, config, column = TABLES[cell.table], cell_config(cell), cell.column
        is_teacher = cell.row.key == "teacher"
        if not config:
            assert (is_teacher, table.dataset) == (True, "imagenet")
            continue
        node, student = config.node, column.teacher if is_teacher else column.student
        kind = node.DISTILLER.TYPE
        expected = table.dataset, student, TYPES.get(cell.row.key, kind)
        assert (node.DATASET.TYPE, node.DISTILLER.STUDENT, kind) == expected, cell.name
        assert kind == "NONE" or column.teacher == node.DISTILLER.TEACHER, cell.name
        assert not is_teacher or cell.config == table.teacher_config(column)
        if table.in_paper and table.id != "9" and kind != "NONE":
            printed = [f"{top:.2f} top-{key[3:]}" for key, top in cell.paper.items()]
            assert ", ".join(printed) in (ROOT / cell.config).read_text(), cell.name
        if table.dataset == "cifar100" and kind == "NONE":
            slow = node.DISTILLER.STUDENT.startswith(("Shuffle", "Mobile"))
            assert (0.01 if slow else 0.05) == node.SOLVER.LR, cell.name


def test_configs_have_the_papers_protocol(facts):
    rows = json.loads((facts / "protocol.json").read_text())["paper_pair_rows"]
    known = {(row["dataset"], row["method"], row["teacher"], row["student"]): row for row in rows}
    compared = 0
    for cell in (cell for cell in CELLS if cell.table in "2345"):
        name = (NAMES.get(cell.row.key, cell.row.name), cell.column.teacher, cell.column.student)
        row = known.get((TABLES[cell.table].dataset, *name), {})
        if not row.get("config"):  # a network alone, or OFD for ResNet18, which is not published
            continue
        node = cell_config(cell).node
        solver, method = node.SOLVER, node[node.DISTILLER.TYPE]
        lr = row.get("lr_for_this_pair(paper rule)", row["lr_in_config"])
        for expected, found in (
            ((row["batch"], lr, row["epochs"]), (solver.BATCH_SIZE, solver.LR, solver.EPOCHS)),
            ((row["stages"], row["decay"]), (solver.LR_DECAY_STAGES, solver.LR_DECAY_RATE)),
            ((row["wd"], row["momentum"]), (solver.WEIGHT_DECAY, solver.MOMENTUM)),
        ):
            assert found == expected, cell.name
        assert solver.NESTEROV
        for key in row["method_params"].keys() - COMPUTED:
            ours, theirs = method[key], row["method_params"][key]
            assert (dict(ours) if isinstance(theirs, dict) else ours) == theirs, (cell.name, key)
        if cell.table in "45":
            weights = f"torchvision:{cell.column.teacher}_Weights.IMAGENET1K_V1"
            assert weights == node.DISTILLER.TEACHER_WEIGHTS
        compared += 1
    assert compared == 9 * 11 + 8 * 2 - 1


def test_equal_computations_have_one_identity_in_all_tables():
    def of(table, row, pair=PAIR):
        return cell_identity(TABLES[table].cells[row, pair])

    assert of("1", "t_4") == of("2", "kd") == of("9", "kd")
    assert of("6", "t_norm_2") == of("2", "normkd") == of("9", "normkd")
    assert of("2", "teacher") == of("3", "teacher", "res32x4_shuv2")
    assert of("1", "t_1") != of("1", "t_2")
    assert len({cell_identity(cell) for cell in CELLS}) > 130


def test_identity_depends_on_the_result_only(tmp_path):
    def of(*overrides, path="digits/normkd"):
        return identity(load_config(path, overrides).node)

    same = "SEED=7 LOG.PREFIX=/elsewhere DEVICE=cpu SOLVER.PRECISION=bf16 EXPERIMENT.TAG=x"
    assert {of(), of("DISTILLER.TYPE=[NormKD]"), *map(of, same.split())} == {of()}
    (tmp_path / "unused.yaml").write_text("_BASE_: digits/normkd\nCRD.NCE.K: 3\n")
    assert of(path=tmp_path / "unused.yaml") == of()
    plain = "digits/vanilla_resnet8"
    assert of("DISTILLER.TEACHER=resnet56", path=plain) == of(path=plain)
    other = "SOLVER.EPOCHS=3 NormKD.TEMPERATURE_NORM=1.5 DISTILLER.STUDENT=vgg8 DISTILLER.TYPE=KD"
    assert len({of(), *map(of, other.split())}) == 5
    stored = yaml.safe_load(dump(load_config("digits/normkd").node))
    del stored["SOLVER"]["DOT"]  # a record from before that key existed
    stored["DATASET"]["DECODE"] = "cpu"  # and before these keys were removed
    stored["SOLVER"] |= {"TRIALS": 1, "TRIALS_MODE": "processes", "INIT_SEED": 3}
    assert identity(stored) == of()


def make_plan(cells, seeds, by_value=False):
    return plan.make_plan(cells, seeds, Path("output"), False, (), by_value)


def test_a_plan_has_teachers_first_and_every_run_once():
    rows, pairs = ["kd", "normkd", "teacher"], ["res32x4_res8x4", "res32x4_shuv2"]
    teacher, *students = make_plan(select_cells(["2", "3", "9"], rows, pairs, False), [0, 1])
    assert len({job.key for job in students}) == len(students) == 2 * 4
    assert teacher.config_file == "configs/cifar100/vanilla/resnet32x4.yaml"
    for job in students:
        assert job.teacher.key == teacher.key
        assert f"DISTILLER.TEACHER_WEIGHTS={teacher.weights}" in job.overrides
    assert [job.key[1] for job in students] == [0] * 4 + [1] * 4
    shared = next(job for job in students if "table 9, KD, resnet32x4 → resnet8x4" in job.cells)
    assert "table 2, KD, resnet32x4 → resnet8x4" in shared.cells


def test_the_queue_is_ordered_by_value():
    jobs = make_plan(select_cells([], [], [], True), [0], by_value=True)
    assert jobs[0].config_file == "configs/cifar100/vanilla/resnet32x4.yaml"
    first = {cell for job in jobs[1:6] for cell in job.cells if cell.startswith("table 2")}
    names = ("Student", "KD", "DKD", "NormKD", "DKD+NormKD")
    assert first == {f"table 2, {name}, resnet32x4 → resnet8x4" for name in names}
    ranks = {cell.name: value_rank(cell) for cell in CELLS}
    order = [min(ranks[cell] for cell in job.cells) for job in jobs if job.cells]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--table 10", "--table must be among 1, 2"),
        ("", "got none"),
        ("--table 2 --pairs res56", "--pairs: no 'res56'"),
        ("--table 2 --methods KD NormKD DEVICE cpu", "did you mean kd"),
        ("--table digits --budget 9", "must be a duration such as 90s, 9m or 1h30m, got '9'"),
        ("--table digits --sweep KD.TEMPERATURE", "--sweep must be KEY=A,B,C"),
        ("--table digits --sweep SOLVER.PRECISION=fp32,bf16", "key that belongs to a run's ide"),
        ("--table digits --sweep KD.TEMPERATURE=1 --val-split 0", "--val-split must be > 0"),
        ("--table digits --seeds 0 kd", "--seeds must be integers >= 0"),
        ("--table digits --slurm gpus=1", "--slurm requires --launcher"),
        ("--table digits --launcher slurm --budget 9m", "--budget require --launcher here"),
        ("--add FOLDER --results FOLDER", "FOLDER"),
        # 240 is the default, but not the value of this table's configs.
        (f"{KD} SOLVER.EPOCHS=240", "SOLVER.EPOCHS would change the result"),
        (f"{KD} SEED=3", "SEED is set by reproduce"),
        (f"{KD} SOLVER.PRECISON=bf16", "SOLVER.PRECISON"),
    ],
)
def test_invalid_arguments(tmp_path, arguments, message):
    words = ["reproduce", *arguments.replace("FOLDER", str(tmp_path)).split()]
    with pytest.raises(UserError, match=re.escape(message.replace("FOLDER", str(tmp_path)))):
        execute(words)


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path, capsys):
    command = f"reproduce --output={tmp_path}/out --results={tmp_path}/results --dry-run"
    assert execute(f"{command} --table 4 digits --trials 1".split()) == 0
    listed = capsys.readouterr().out
    assert "[seed 0] digits/normkd,resnet20,resnet8: 0 of 12 epochs done" in listed
    assert "after [seed 0] digits/vanilla,resnet20" in listed
    assert "published weights, nothing to train: table 4, Teacher, ResNet34 → ResNet18" in listed
    # Config keys may follow the values of a list option.
    few = "--table digits --methods student --seeds 0 1 SOLVER.PRECISION bf16"
    assert execute(f"{command} {few}".split()) == 0
    assert "2 runs: 0 done, 2 to run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    cells = select_cells(["digits"], ["student"], [], False)
    job = plan.make_plan(cells, [0], tmp_path, False, [], False)[-1]
    runs = [{"config": job.config, "epochs": 1, "seconds": 9.0, "at": "2026-11-30T00:00:00Z"}]
    runs.append(runs[0] | {"seconds": 1.0, "at": "2026-11-29T00:00:00Z"})
    assert plan.estimate(job, runs) == (5 + 12 * 9, "the latest run of these networks")


def test_parallel_runs_share_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(16))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert slot_environment("auto", 1, 2, 4) == {"OMP_NUM_THREADS": "2"}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert slot_environment("auto", 1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert slot_environment("auto", 5, 6, 1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert slot_environment("auto", 1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "6,7"


def test_commands_of_students_use_the_weights_of_their_teachers_commands(capsys):
    for table in ("digits", "short"):
        (column,) = TABLES[table].columns
        cells = {row.key: TABLES[table].cells[row.key, column.key] for row in TABLES[table].rows}
        *_, file, seed = cell_command(cells["teacher"]).split()
        weights = run_folder(load_config(ROOT / file, [seed])) / "student_last.pt"
        for key, cell in cells.items():
            uses_teacher = f" DISTILLER.TEACHER_WEIGHTS={weights} " in cell_command(cell)
            assert uses_teacher == (key not in ("teacher", "student"))
    command = cell_command(TABLES["digits"].cells["dkd", "res20_res8"])
    assert execute(["train", *command.split()[2:], "--show"]) == 0
    assert "TYPE: DKD" in capsys.readouterr().out
