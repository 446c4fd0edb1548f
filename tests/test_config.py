"""Configs: every YAML that is shipped, inheritance, overrides, and what a user reads after a mistake."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mdistiller_norm.config import HELP, Config, default_config, differences, dump, load_config, show
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
RUNS = [path for path in CONFIGS if "/_base_/" not in path]

PAIRS = {
    "res56_res20": ("resnet56", "resnet20"),
    "res110_res32": ("resnet110", "resnet32"),
    "res32x4_res8x4": ("resnet32x4", "resnet8x4"),
    "wrn40_2_wrn_16_2": ("wrn_40_2", "wrn_16_2"),
    "wrn40_2_wrn_40_1": ("wrn_40_2", "wrn_40_1"),
    "vgg13_vgg8": ("vgg13", "vgg8"),
    "res32x4_shuv1": ("resnet32x4", "ShuffleV1"),
    "wrn40_2_shuv1": ("wrn_40_2", "ShuffleV1"),
    "vgg13_mv2": ("vgg13", "MobileNetV2"),
    "res50_mv2": ("ResNet50", "MobileNetV2"),
    "res32x4_shuv2": ("resnet32x4", "ShuffleV2"),
}
# Folder of configs/cifar100 -> DISTILLER.TYPE, and the row's name in the paper.
METHODS = {
    "kd": ("KD", "KD"),
    "dkd": ("DKD", "DKD"),
    "normkd": ("NormKD", "NormKD"),
    "dkd_normkd": ("NormKD_W_DKD", "DKD+NormKD"),
}

# A file of mdistiller's kind: no _BASE_, no NESTEROV, an int where the default is a float.
PEER_FILE = """
EXPERIMENT:
  NAME: ""
  TAG: "NormKD,res50,mobilenetv1"
  PROJECT: "imagenet_baselines"
DATASET:
  TYPE: "imagenet"
  NUM_WORKERS: 32
  TEST:
    BATCH_SIZE: 128
DISTILLER:
  TYPE: "NormKD"
  TEACHER: "ResNet50"
  STUDENT: "MobileNetV1"
SOLVER:
  BATCH_SIZE: 512
  EPOCHS: 100
  LR: 0.2
  LR_DECAY_STAGES: [30, 60, 90]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0001
  MOMENTUM: 0.9
  TYPE: "SGD"
  TRAINER: "crd"
LOG:
  SAVE_CHECKPOINT_FREQ: 10
  WANDB: True
KD:
  TEMPERATURE: 4
NormKD:
  TEMPERATURE_NORM: 1
  LOSS:
    CE_WEIGHT: 0.5
    KD_WEIGHT: 0.5
NormKD_W_DKD:
  LOSS: {}
  ALPHA: 1
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def plain(node: dict) -> dict:
    """A tree as nested dicts."""
    return {name: plain(value) if isinstance(value, dict) else value for name, value in node.items()}


def values(node: dict, *keys: str) -> tuple:
    """The values of dotted keys."""
    found = []
    for key in keys:
        value = node
        for part in key.split("."):
            value = value[part]
        found.append(value)
    return tuple(found)


def message(*arguments: object) -> str:
    """What a user reads when these arguments of load_config are refused: one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Shipped files


@pytest.mark.parametrize("path", CONFIGS)
def test_shipped_config_loads_and_round_trips(path, tmp_path):
    config = load_config(ROOT / path)
    assert config.node.is_frozen()
    again = load_config(write(tmp_path, "dump.yaml", dump(config.node)))
    assert again.node == config.node


@pytest.mark.parametrize("path", RUNS)
def test_shipped_run_names_its_networks_and_its_command(path):
    node = load_config(ROOT / path).node
    assert node.DISTILLER.TEACHER
    assert node.DISTILLER.STUDENT
    header = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    assert any(f"--cfg {path}" in line for line in header)


def test_shipped_runs_write_to_different_folders():
    places = Counter()
    for path in RUNS:
        experiment = load_config(ROOT / path).node.EXPERIMENT
        places[experiment.PROJECT, experiment.NAME or experiment.TAG] += 1
    assert [place for place, count in places.items() if count > 1] == []


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_pair_has_the_papers_protocol(method, pair, facts):
    teacher, student = PAIRS[pair]
    kind, row_name = METHODS[method]
    (row,) = [
        row
        for row in json.loads((facts / "protocol.json").read_text())["paper_pair_rows"]
        if (row["dataset"], row["method"], row["teacher"], row["student"]) == ("cifar100", row_name, teacher, student)
    ]
    node = load_config(ROOT / f"configs/cifar100/{method}/{pair}.yaml").node
    assert values(node, "DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT") == (kind, teacher, student)
    solver = node.SOLVER
    assert values(solver, "LR", "LR_DECAY_STAGES", "LR_DECAY_RATE") == (
        row["lr_for_this_pair(paper rule)"], row["stages"], row["decay"],
    )  # fmt: skip
    assert values(solver, "BATCH_SIZE", "EPOCHS") == (row["batch"], row["epochs"])
    assert values(solver, "WEIGHT_DECAY", "MOMENTUM", "NESTEROV") == (row["wd"], row["momentum"], True)
    ours = plain(node[kind])
    assert ours == ours | row["method_params"]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", METHODS)
def test_header_prints_the_papers_number(method, pair, facts):
    tables = json.loads((facts / "paper_tables.json").read_text())
    name = "_".join(PAIRS[pair])
    (number,) = [
        table["rows"][METHODS[method][1]][table["pairs"].index(name)]
        for table in (tables["table2"], tables["table3"])
        if name in table["pairs"]
    ]
    assert f"# Paper: {number:.2f} top-1" in (ROOT / f"configs/cifar100/{method}/{pair}.yaml").read_text()


@pytest.mark.parametrize("model", sorted({model for pair in PAIRS.values() for model in pair}))
def test_every_teacher_and_student_has_a_vanilla_config(model):
    node = load_config(ROOT / f"configs/cifar100/vanilla/{model}.yaml").node
    lr = 0.01 if model.startswith(("Shuffle", "Mobile")) else 0.05
    assert values(node, "DISTILLER.TYPE", "DISTILLER.STUDENT", "SOLVER.LR") == ("NONE", model, lr)


def test_ablations_cover_tables_1_6_and_8(facts):
    tables = json.loads((facts / "paper_tables.json").read_text())
    folder = ROOT / "configs/cifar100/ablation"

    def found(table: str, kind: str, key: str) -> dict:
        """Value -> header of each file of a table."""
        files = sorted((folder / table).glob("*.yaml"))
        values = [load_config(file).node[kind][key] for file in files]
        assert len(files) == len(tables[table]["rows"])
        return {str(value): file.read_text() for value, file in zip(values, files, strict=True)}

    temperatures = found("table1", "KD", "TEMPERATURE")
    for row in tables["table1"]["rows"]:
        several = [float(t) for t in row["temperatures"]]
        assert f"{row['top1']:.2f} top-1" in temperatures[str(several if len(several) > 1 else several[0])]
    scales = found("table6", "NormKD", "TEMPERATURE_NORM")
    for row in tables["table6"]["rows"]:
        assert f"{row['top1']:.2f} top-1" in scales[str(row["T_norm"])]
    statistics = found("table8", "NormKD", "STATISTIC")
    for row, name in zip(tables["table8"]["rows"], ("max", "range"), strict=True):
        assert f"{row['top1']:.2f} top-1" in statistics[name]


def test_digits_configs_are_short_and_share_a_project():
    for name in ("vanilla_resnet20", "vanilla_resnet8", "kd", "normkd", "dkd", "dkd_normkd"):
        node = load_config(ROOT / f"configs/digits/{name}.yaml").node
        assert (node.DATASET.TYPE, node.EXPERIMENT.PROJECT) == ("digits", "digits")
        assert node.SOLVER.LR_DECAY_STAGES[-1] < node.SOLVER.EPOCHS <= 60


# Defaults


def test_defaults_are_a_superset_of_mdistillers(facts, tmp_path):
    theirs = json.loads((facts / "config_defaults.json").read_text())["NormKD"]
    ours = default_config()
    known = {name: node for name, node in theirs.items() if name in ours}
    assert {"EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG", "KD", "NormKD", "NormKD_W_DKD", "DKD"} <= set(known)
    assert set(theirs) - set(known) <= set(theirs) - set(DISTILLERS)
    node = load_config(write(tmp_path, "theirs.yaml", yaml.safe_dump(known))).node
    for section, values in known.items():
        assert plain(node[section]) == plain(node[section]) | values
    # Only logging to a web service is off by default here.
    assert [key for key in differences(node, default_config()) if not key.startswith(tuple(DISTILLERS))] == [
        "LOG.WANDB"
    ]


def test_every_method_has_its_node_and_every_common_key_a_meaning():
    node = default_config()
    for name, cls in DISTILLERS.items():
        assert name not in ("NONE", *{key.split(".")[0] for key in HELP})
        assert not cls.defaults or plain(node[name]) == cls.defaults
    assert all(HELP.values())


def test_default_trees_are_independent():
    first = default_config()
    first.SOLVER.LR_DECAY_STAGES.append(1)
    first.KD.LOSS.CE_WEIGHT = 7.0
    assert default_config().SOLVER.LR_DECAY_STAGES == [150, 180, 210]
    assert default_config().KD.LOSS.CE_WEIGHT == DISTILLERS["KD"].defaults["LOSS"]["CE_WEIGHT"] != 7.0


def test_file_of_mdistillers_kind_loads_unchanged(tmp_path):
    node = load_config(write(tmp_path, "normkd.yaml", PEER_FILE)).node
    assert node.NormKD.TEMPERATURE_NORM == 1.0
    assert isinstance(node.NormKD.TEMPERATURE_NORM, float)
    assert isinstance(node.KD.TEMPERATURE, float)
    assert node.SOLVER.NESTEROV is False
    assert node.SOLVER.TRAINER == "crd"
    assert node.LOG.WANDB is True
    assert node.DISTILLER.STUDENT == "MobileNetV1"
    assert plain(node.NormKD_W_DKD.LOSS) == {}


# Inheritance


def test_later_bases_override_earlier_ones_and_the_file_overrides_all(tmp_path):
    write(tmp_path, "base/a.yaml", "SOLVER: {LR: 0.1, EPOCHS: 1, BATCH_SIZE: 8}\n")
    write(tmp_path, "base/b.yaml", "SOLVER: {LR: 0.2, EPOCHS: 2}\n")
    path = write(tmp_path, "run/c.yaml", "SOLVER: {EPOCHS: 3}\n_BASE_: [../base/a.yaml, ../base/b.yaml]\n")
    config = load_config(path, ["SEED", "5"])
    assert (config.node.SOLVER.BATCH_SIZE, config.node.SOLVER.LR, config.node.SOLVER.EPOCHS) == (8, 0.2, 3)
    assert config.sources["SOLVER.BATCH_SIZE"] == str(tmp_path / "base/a.yaml")
    assert config.sources["SOLVER.LR"] == str(tmp_path / "base/b.yaml")
    assert config.sources["SOLVER.EPOCHS"] == str(path)
    assert config.sources["SEED"] == "command line"
    assert config.sources["SOLVER.MOMENTUM"] == "default"


def test_base_that_two_bases_share_does_not_undo_the_first(tmp_path):
    write(tmp_path, "common.yaml", "SOLVER.LR: 0.05\nSOLVER.EPOCHS: 9\n")
    write(tmp_path, "pair.yaml", "_BASE_: common.yaml\nSOLVER.LR: 0.01\n")
    write(tmp_path, "method.yaml", "_BASE_: common.yaml\nDISTILLER.TYPE: KD\n")
    node = load_config(write(tmp_path, "run.yaml", "_BASE_: [pair.yaml, method.yaml]\n")).node
    assert (node.SOLVER.LR, node.SOLVER.EPOCHS, node.DISTILLER.TYPE) == (0.01, 9, "KD")


def test_circle_of_bases_prints_the_chain(tmp_path):
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    for path, base in ((a, b), (b, c), (c, a)):
        path.write_text(f"_BASE_: {base.name}\n")
    assert message(a) == f"_BASE_ goes in a circle: {a} -> {b} -> {c} -> {a}"
    a.write_text("_BASE_: a.yaml\n")
    assert message(a) == f"_BASE_ goes in a circle: {a} -> {a}"


def test_missing_file_says_who_asked_and_what_is_near(tmp_path):
    path = write(tmp_path, "run.yaml", "_BASE_: base/schedul.yaml\n")
    write(tmp_path, "base/schedule.yaml", "")
    expected = f"config file {tmp_path / 'base/schedul.yaml'} (the _BASE_ of {path}) does not exist: did you mean "
    assert message(path) == expected + f"{tmp_path / 'base/schedule.yaml'}?"
    assert message(tmp_path / "absent" / "x.yaml") == f"config file {tmp_path / 'absent' / 'x.yaml'} does not exist"
    assert "cannot be read" in message(tmp_path)


@pytest.mark.parametrize("base", ["3", "[]", "[a.yaml, 3]", "{a: b}", ""])
def test_base_must_be_paths(base, tmp_path):
    path = write(tmp_path, "run.yaml", f"_BASE_: {base}\n")
    assert message(path).startswith(f"{path}:1: _BASE_ must be a path or a list of paths, not ")


# Overrides


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["SOLVER.LR", "1"], "SOLVER.LR", 1.0),
        (["SOLVER.LR", "5e-4"], "SOLVER.LR", 5e-4),
        (["SOLVER.LR=0.3"], "SOLVER.LR", 0.3),
        (["SOLVER.LR", "1", "SOLVER.LR=0.5"], "SOLVER.LR", 0.5),
        (["SOLVER.LR_DECAY_STAGES", "[1, 2]"], "SOLVER.LR_DECAY_STAGES", [1, 2]),
        (["SOLVER.LR_DECAY_STAGES", "(1, 2)"], "SOLVER.LR_DECAY_STAGES", [1, 2]),
        (["SOLVER.LR_DECAY_STAGES=[]"], "SOLVER.LR_DECAY_STAGES", []),
        (["SOLVER.NESTEROV", "True"], "SOLVER.NESTEROV", True),
        (["DISTILLER.TYPE", "[NormKD, DKD]"], "DISTILLER.TYPE", ["NormKD", "DKD"]),
        (["DISTILLER.TYPE=NormKD"], "DISTILLER.TYPE", "NormKD"),
        (["EXPERIMENT.NAME", "007"], "EXPERIMENT.NAME", "007"),
        (["EXPERIMENT.NAME", "a=b: c"], "EXPERIMENT.NAME", "a=b: c"),
        (["EXPERIMENT.TAG", "kd, a ..b"], "EXPERIMENT.TAG", "kd, a ..b"),
    ],
)
def test_overrides(overrides, key, value):
    config = load_config(None, overrides)
    section, name = key.split(".")
    found = config.node[section][name]
    assert (found, type(found)) == (value, type(value))
    assert config.sources[key] == "command line"
    assert differences(config.node, default_config()) == [key]


def test_overrides_of_a_method_are_for_methods_in_use():
    kd = ["DISTILLER.TYPE", "KD", "KD.TEMPERATURE", "[1, 2]"]
    assert load_config(None, [*kd[2:], *kd[:2]]).node.KD.TEMPERATURE == [1.0, 2.0]
    assert load_config(None, [*kd, "KD.TEMPERATURE=3"]).node.KD.TEMPERATURE == 3.0
    assert load_config(None, ["KD.TEMPERATURE=3"], others=["KD"]).node.KD.TEMPERATURE == 3.0
    path = ROOT / "configs/digits/normkd.yaml"
    told = message(path, ["KD.TEMPERATURE", "8"])
    assert told.startswith("command line: KD.TEMPERATURE would change nothing: KD is not in DISTILLER.TYPE, which is ")
    assert f"NormKD ({path.parent}" in told
    assert "which is NormKD, DKD (command line)" in message(path, ["DISTILLER.TYPE=[NormKD,DKD]", "KD.TEMPERATURE=8"])


def test_override_errors():
    line = "command line: "
    assert message(None, ["SOLVER.LR"]) == line + "SOLVER.LR has no value: overrides are KEY VALUE pairs"
    assert message(None, ["SOLVER.LRR", "1"]).startswith(line + "unknown key SOLVER.LRR: did you mean SOLVER.LR or ")
    assert message(None, ["LR", "1"]) == line + "unknown key LR: did you mean SOLVER.LR?"
    assert message(None, ["solver.lr=1"]) == line + "unknown key solver.lr: did you mean SOLVER.LR?"
    assert "the top keys are EXPERIMENT, DATASET," in message(None, ["qqq", "1"])
    assert "SOLVER is a section, not a value: set one of SOLVER.TRAINER, " in message(None, ["SOLVER", "{LR: 1}"])


# Values and their types


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("SOLVER: {LR: fast}", "SOLVER.LR", "must be a finite number, not 'fast' (str)"),
        ("SOLVER: {LR: true}", "SOLVER.LR", "must be a finite number, not True (bool)"),
        ("SOLVER: {LR: .inf}", "SOLVER.LR", "must be a finite number, not inf (float)"),
        (f"SOLVER: {{LR: 1{'0' * 400}}}", "SOLVER.LR", "must be a finite number, not 1000"),
        ("SOLVER: {LR: }", "SOLVER.LR", "must be a finite number, not null"),
        ("SOLVER: {LR: {a: 1}}", "SOLVER.LR", "must be a finite number, not {'a': 1} (dict)"),
        ("SOLVER: {LR: 0}", "SOLVER.LR", "must be positive, not 0"),
        ("SOLVER: {EPOCHS: 2.0}", "SOLVER.EPOCHS", "must be an integer, not 2.0 (float)"),
        ("SOLVER: {EPOCHS: 0}", "SOLVER.EPOCHS", "must be at least 1, not 0"),
        ("SOLVER: {BATCH_SIZE: false}", "SOLVER.BATCH_SIZE", "must be an integer, not False (bool)"),
        ("SOLVER: {NESTEROV: 1}", "SOLVER.NESTEROV", "must be true or false, not 1 (int)"),
        ("SOLVER: {MOMENTUM: 1}", "SOLVER.MOMENTUM", "must be in [0, 1), not 1"),
        ("SOLVER: {WEIGHT_DECAY: -1}", "SOLVER.WEIGHT_DECAY", "must be zero or positive, not -1"),
        (
            "SOLVER: {LR_DECAY_STAGES: 3}",
            "SOLVER.LR_DECAY_STAGES",
            "must be a list (each item an integer), not 3 (int)",
        ),
        ("SOLVER: {LR_DECAY_STAGES: [1, x]}", "SOLVER.LR_DECAY_STAGES", "(each item an integer), not [1, 'x'] (list)"),
        ("SOLVER: {LR_DECAY_STAGES: [2, 2]}", "SOLVER.LR_DECAY_STAGES", "must be strictly increasing epochs, counted"),
        ("SOLVER: {LR_DECAY_STAGES: [0, 2]}", "SOLVER.LR_DECAY_STAGES", "counted from 1, not [0, 2]"),
        ("SOLVER: {LR_DECAY_STAGES: [-1]}", "SOLVER.LR_DECAY_STAGES", "counted from 1, not [-1]"),
        ("SOLVER: {TRIALS: 99999999999}", "SOLVER.TRIALS", "must be in 1 .. 1000, not 99999999999"),
        ("SOLVER: {INIT_SEED: 9223372036854775808}", "SOLVER.INIT_SEED", "must be a seed below 2**63, or -1, not"),
        ("SOLVER: {EPOCHS: 9223372036854775808}", "SOLVER.EPOCHS", "must be between -2**63 and 2**63, as a tensor's"),
        ("CRD: {NCE: {K: 99999999999999999999}}", "CRD.NCE.K", "must be between -2**63 and 2**63, as a tensor's"),
        ("SEED: 99999999999999999999", "SEED", "must be zero or positive, and below 2**63, not 99999999999999999999"),
        ("EXPERIMENT: {NAME: ../../evil}", "EXPERIMENT.NAME", "the name of one folder, without /, not '../../evil'"),
        ("EXPERIMENT: {NAME: ..}", "EXPERIMENT.NAME", "must be the name of one folder, without /, not '..'"),
        ("EXPERIMENT: {TAG: a/b}", "EXPERIMENT.TAG", "must be the name of one folder, without /, not 'a/b'"),
        ("EXPERIMENT: {TAG: .}", "EXPERIMENT.TAG", "must be the name of one folder, without /, not '.'"),
        ("EXPERIMENT: {PROJECT: a/b}", "EXPERIMENT.PROJECT", "the name of one folder, without / and not empty"),
        ("EXPERIMENT: {PROJECT: ''}", "EXPERIMENT.PROJECT", "the name of one folder, without / and not empty, not ''"),
        ("SOLVER: {PRECISION: tf32}", "SOLVER.PRECISION", "must be one of fp32, bf16, fp16, not 'tf32'"),
        ("SOLVER: {TYPE: Adam}", "SOLVER.TYPE", "must be one of SGD, not 'Adam'"),
        ("SOLVER: {TRAINER: mine}", "SOLVER.TRAINER", "must be one of base, crd, dot, crd_dot, not 'mine'"),
        ("EXPERIMENT: {TAG: 3}", "EXPERIMENT.TAG", "must be text, not 3 (int)"),
        ("KD: {TEMPERATURE: []}", "KD.TEMPERATURE", "must be a finite number, or a list of them"),
        ("KD: {TEMPERATURE: [1, hot]}", "KD.TEMPERATURE", "(each a finite number), not [1, 'hot'] (list)"),
        ("NormKD: {TEMPERATURE_NORM: [1, 2]}", "NormKD.TEMPERATURE_NORM", "must be a finite number, not [1, 2] (list)"),
        ("DISTILLER: {TYPE: normkd}", "DISTILLER.TYPE", "unknown distiller 'normkd': did you mean NormKD or "),
        ("DISTILLER: {TYPE: none}", "DISTILLER.TYPE", "unknown distiller 'none': did you mean NONE"),
        ("DISTILLER: {TYPE: zzzz}", "DISTILLER.TYPE", "unknown distiller 'zzzz': there are: NONE, "),
        ("DISTILLER: {TYPE: [KD, KD]}", "DISTILLER.TYPE", "must list different methods and not NONE among them"),
        ("DISTILLER: {TYPE: [KD, NONE]}", "DISTILLER.TYPE", "must list different methods and not NONE among them"),
    ],
)
def test_wrong_value_names_file_line_key_and_type(text, key, expected, tmp_path):
    path = write(tmp_path, "run.yaml", f"# a comment\n{text}\n")
    told = message(path)
    assert told.startswith(f"{path}:2: {key}")
    assert expected in told


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("SOLVER:\n  LR: 1\n  LEARNING: 2\n", 3, "unknown key SOLVER.LEARNING"),
        ("SOLVER:\n  EPOCH: 2\n", 2, "unknown key SOLVER.EPOCH: did you mean SOLVER.EPOCHS"),
        ("NORMKD:\n  TEMPERATURE_NORM: 2\n", 1, "unknown key NORMKD: did you mean NormKD?"),
        ("SOLVER:\n  _BASE_: x\n", 2, "unknown key SOLVER._BASE_"),
        ("SOLVER: &s\n  DOT: *s\n", 2, "unknown key SOLVER.DOT.DOT"),
        ("SOLVER: 3\n", 1, "SOLVER is a section, not a value: set one of SOLVER.TRAINER, "),
        ("SOLVER:\n", 1, "SOLVER is a section, not a value"),
        ("SOLVER:\n  LR: 1\n  LR: 2\n", 3, "key SOLVER.LR is given twice"),
        ("SOLVER:\n  LR: 1\nSOLVER.LR: 2\n", 3, "key SOLVER.LR is given twice"),
        ("SOLVER:\n  LR: 1\nSOLVER:\n  EPOCHS: 2\n", 3, "key SOLVER is given twice"),
        ("_BASE_: a\n_BASE_: b\n", 2, "key _BASE_ is given twice"),
        ("[a]: 1\n", 1, "a key must be a plain name"),
        ("- 1\n", 1, "a config must be a mapping of keys to values"),
        ("SOLVER:\n  LR: [1\nSEED: 2\n", 3, "not valid YAML: "),
        ("SEED: 1\n---\nSEED: 2\n", 2, "not valid YAML: "),
        ("SEED: !!python/object/apply:os.getcwd []\n", 1, "not valid YAML: could not determine a constructor"),
    ],
)
def test_wrong_structure_names_file_and_line(text, line, expected, tmp_path):
    path = write(tmp_path, "run.yaml", text)
    assert message(path).startswith(f"{path}:{line}: {expected}")


@pytest.mark.parametrize(
    "content", [b"SEED: \x00\n", b"SEED: 2020-13-45\n", b"\xff\xfe\xff", b"SEED: " + b"[" * 5000 + b"]" * 5000]
)
def test_unreadable_file_is_one_line(content, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert str(path) in message(path)


def test_text_that_spells_a_number_is_a_number(tmp_path):
    # YAML 1.1 reads an exponent without a dot as text.
    path = write(
        tmp_path, "run.yaml", "SOLVER: {WEIGHT_DECAY: 5e-4, LR: 1E-2, EPOCHS: '7', LR_DECAY_STAGES: '(3, 5)'}\n"
    )
    solver = load_config(path).node.SOLVER
    assert (solver.WEIGHT_DECAY, solver.LR, solver.EPOCHS, solver.LR_DECAY_STAGES) == (5e-4, 1e-2, 7, [3, 5])


def test_nesterov_without_momentum_is_refused(tmp_path):
    path = write(tmp_path, "run.yaml", "SOLVER: {NESTEROV: true}\n")
    told = message(path, ["SOLVER.MOMENTUM", "0"])
    assert told.startswith(f"SOLVER.NESTEROV ({path}) needs a SOLVER.MOMENTUM above 0 (command line)")


@pytest.mark.parametrize("momenta", [("5",), ("-1",), ("0.9",), ("0.1",), ("0.075", "SOLVER.MOMENTUM=0.075")])
def test_dots_momenta_must_be_those_of_sgd(momenta, tmp_path):
    delta, *more = momenta
    overrides = [f"SOLVER.DOT.DELTA={delta}", *more]
    assert float(delta) == load_config(None, overrides).node.SOLVER.DOT.DELTA  # which SGD does not read
    told = message(write(tmp_path, "run.yaml", "SOLVER: {TRAINER: dot, NESTEROV: true}\n"), overrides)
    assert told.startswith("SOLVER.TRAINER dot trains with the momenta MOMENTUM -/+ DOT.DELTA, which must be above 0")
    assert f"SOLVER.DOT.DELTA {float(delta):g} (command line)" in told


def test_a_run_folder_has_a_name(tmp_path):
    path = write(tmp_path, "run.yaml", "EXPERIMENT: {TAG: ''}\n")
    assert message(path) == f"EXPERIMENT.NAME and TAG ({path}) are empty: the run folder needs one"
    assert load_config(path, ["EXPERIMENT.NAME", "x"]).node.EXPERIMENT.TAG == ""


def test_empty_file_is_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "run.yaml", "# nothing\n")).node == load_config().node == default_config()


# Output


def test_show_prints_values_with_their_sources_and_only_nodes_in_use(tmp_path):
    path = "configs/cifar100/normkd/res32x4_shuv1.yaml"
    file = write(tmp_path, "run.yaml", f"_BASE_: {ROOT / path}\nDKD: {{BETA: 2}}\n")
    config = load_config(file, ["SEED", "3"])
    text = show(config)
    source_of = {
        line.split("#")[0].strip(): line.split("# ")[1] for line in text.splitlines() if not line.endswith(":")
    }
    assert source_of["LR: 0.01"] == str(ROOT / "configs/cifar100/_base_/pairs/res32x4_shuv1.yaml")
    assert source_of["TAG: 'normkd,res32x4,shuv1'"] == str(ROOT / path)
    assert source_of["SEED: 3"] == "command line"
    assert source_of["DEVICE: auto"] == "default"
    shown = yaml.safe_load(text)
    assert {"NormKD", "DKD"} <= set(shown)
    assert "KD" not in shown
    assert shown["SOLVER"]["LR_DECAY_STAGES"] == [150, 180, 210]
    assert len({line.index("#") for line in text.splitlines() if "#" in line}) == 1


def test_show_of_several_methods_shows_all_their_nodes():
    shown = yaml.safe_load(show(load_config(None, ["DISTILLER.TYPE", "[KD, NormKD]"])))
    assert {"KD", "NormKD"} == set(shown) & set(DISTILLERS)


def test_dump_keeps_awkward_values(tmp_path):
    awkward = [
        "EXPERIMENT.NAME",
        "'5e-4: # [x]'",
        "EXPERIMENT.TAG",
        "ü" * 200,
        "DATASET.ROOT",
        "true",
        "SOLVER.LR",
        "1e-12",
    ]
    several = ["DISTILLER.TYPE", "KD", "KD.TEMPERATURE", "[1, 2]", "SOLVER.LR_DECAY_STAGES", "[]"]
    config = load_config(None, [*awkward, *several])
    assert config.node.EXPERIMENT.NAME == "5e-4: # [x]"
    path = tmp_path / "dump.yaml"
    path.write_text(dump(config.node), encoding="utf-8")
    assert load_config(path).node == config.node


def test_differences_names_keys_on_either_side():
    a = load_config(None, ["SOLVER.LR", "1", "KD.LOSS.CE_WEIGHT", "0.5"], others=["KD"]).node
    b = default_config()
    assert differences(a, a) == []
    assert differences(a, b) == ["SOLVER.LR", "KD.LOSS.CE_WEIGHT"]
    del b["NormKD"]
    assert "NormKD.TEMPERATURE_NORM" in differences(a, b)
    assert "NormKD.TEMPERATURE_NORM" in differences(b, a)


def test_config_is_frozen():
    config = load_config()
    assert isinstance(config, Config)
    with pytest.raises(AttributeError):
        config.node.SOLVER.LR = 1.0
    with pytest.raises(AttributeError):
        config.node = default_config()  # type: ignore[misc]
