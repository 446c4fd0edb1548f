"""Configs: the shipped YAML files, inheritance, overrides, stored configs and output. Errors: test_errors.py."""

import json
import re
from collections import Counter

import pytest
import yaml
from conftest import ROOT

from mdistiller_norm.config import default_config, leaves, load_config, show
from mdistiller_norm.distillers import DISTILLERS

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def differences(a, b):
    values = dict(leaves(b))
    return [key for key, value in leaves(a) if values[key] != value]


def values(node, keys):
    found = dict(leaves(node))
    return tuple(found[key] for key in keys.split())


def test_shipped_configs_name_their_command_and_write_to_different_folders():
    places = Counter()
    for path in CONFIGS:
        node, text = load_config(ROOT / path).node, (ROOT / path).read_text()
        if "/_base_/" not in path:
            assert node.DISTILLER.TEACHER
            assert node.DISTILLER.STUDENT
            assert re.search(f"^#.*--cfg {path}", text, flags=re.M)
            places[node.EXPERIMENT.PROJECT, node.EXPERIMENT.NAME or node.EXPERIMENT.TAG] += 1
    assert [place for place, count in places.items() if count > 1] == []


def test_defaults_are_a_superset_of_mdistillers(facts, tmp_path):
    theirs = json.loads((facts / "config_defaults.json").read_text())["NormKD"]
    known = {name: node for name, node in theirs.items() if name in default_config()}
    names = {"EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG", "KD", "NormKD", "DKD"}
    assert names <= set(known)
    assert set(theirs) - set(known) <= set(theirs) - set(DISTILLERS)
    node = load_config(write(tmp_path, "theirs.yaml", yaml.safe_dump(known))).node
    ours = dict(leaves(node))
    for section, settings in known.items():
        for key, value in leaves(settings):
            assert ours[f"{section}.{key}"] == value
    # Only logging to a web service is off by default here.
    changed = differences(node, default_config())
    assert [key for key in changed if not key.startswith(tuple(DISTILLERS))] == ["LOG.WANDB"]
    assert type(node.KD.TEMPERATURE) is float  # an int in their file


def test_later_bases_override_earlier_ones_and_the_file_overrides_all(tmp_path):
    write(tmp_path, "base/a.yaml", "SOLVER: {LR: 0.1, EPOCHS: 1, BATCH_SIZE: 8}\n")
    write(tmp_path, "base/b.yaml", "SOLVER: {LR: 0.2, EPOCHS: 2}\n")
    text = "SOLVER: {EPOCHS: 3}\n_BASE_: [../base/a.yaml, ../base/b.yaml]\n"
    config = load_config(write(tmp_path, "run/c.yaml", text), ["SEED", "5"])
    keys = "SOLVER.BATCH_SIZE SOLVER.LR SOLVER.EPOCHS SEED SOLVER.MOMENTUM"
    assert values(config.node, keys) == (8, 0.2, 3, 5, 0.9)
    files = [str(tmp_path / name) for name in ("base/a.yaml", "base/b.yaml", "run/c.yaml")]
    sources = [config.sources[key] for key in keys.split()]
    assert sources == [*files, "command line", "default"]


def test_base_that_two_bases_share_does_not_undo_the_first(tmp_path):
    write(tmp_path, "common.yaml", "SOLVER.LR: 0.05\nSOLVER.EPOCHS: 9\n")
    write(tmp_path, "pair.yaml", "_BASE_: common.yaml\nSOLVER.LR: 0.01\n")
    write(tmp_path, "method.yaml", "_BASE_: common.yaml\nDISTILLER.TYPE: KD\n")
    node = load_config(write(tmp_path, "run.yaml", "_BASE_: [pair.yaml, method.yaml]\n")).node
    assert (node.SOLVER.LR, node.SOLVER.EPOCHS, node.DISTILLER.TYPE) == (0.01, 9, "KD")


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["SOLVER.LR", "1", "SOLVER.LR=5e-4"], "SOLVER.LR", 5e-4),
        (["SOLVER.LR_DECAY_STAGES", "(1, 2)"], "SOLVER.LR_DECAY_STAGES", [1, 2]),
        (["SOLVER.NESTEROV", "True"], "SOLVER.NESTEROV", True),
        (["DISTILLER.TYPE", "[NormKD, DKD]"], "DISTILLER.TYPE", ["NormKD", "DKD"]),
        (["EXPERIMENT.NAME", "007"], "EXPERIMENT.NAME", "007"),
        (["EXPERIMENT.NAME", "&x 'y' [z"], "EXPERIMENT.NAME", "&x 'y' [z"),
        (["EXPERIMENT.NAME", "1:30"], "EXPERIMENT.NAME", "1:30"),
        (["DATASET.ROOT=/data/my #1 set"], "DATASET.ROOT", "/data/my #1 set"),
        (["DATASET.CLASSES=[no, 0, 01, '#']"], "DATASET.CLASSES", ["no", "0", "01", "#"]),
    ],
)
def test_overrides(overrides, key, value):
    config = load_config(None, overrides)
    (found,) = values(config.node, key)
    assert (found, type(found)) == (value, type(value))
    assert config.sources[key] == "command line"
    assert differences(config.node, default_config()) == [key]


def test_overrides_may_set_the_keys_of_used_methods():
    kd = ["DISTILLER.TYPE", "KD", "KD.TEMPERATURE", "[1, 2]"]
    assert load_config(None, [*kd[2:], *kd[:2]]).node.KD.TEMPERATURE == [1.0, 2.0]
    assert load_config(None, ["KD.TEMPERATURE=3"], others=["KD"]).node.KD.TEMPERATURE == 3.0


def test_resize_follows_the_image_size_unless_it_is_set():
    assert load_config(None, ["DATASET.IMAGE_SIZE=64"]).node.DATASET.RESIZE == 73
    words = ["DATASET.IMAGE_SIZE=64", "DATASET.RESIZE=64"]
    assert load_config(None, words).node.DATASET.RESIZE == 64


def test_merge_keys_replace_whole_values(tmp_path):
    text = "KD: {LOSS: &a {CE_WEIGHT: 0.3, KD_WEIGHT: 0.7}}\nAT.LOSS: &b {CE_WEIGHT: 0.4, FEAT_WEIGHT: 2}\n"
    text += "NormKD: {LOSS: {<<: *a, KD_WEIGHT: 0.5}}\nPKT: {LOSS: {<<: [*b, {CE_WEIGHT: 9}]}}\n"
    node = load_config(write(tmp_path, "run.yaml", text)).node
    assert node.NormKD.LOSS == {"CE_WEIGHT": 0.3, "KD_WEIGHT": 0.5}
    assert node.PKT.LOSS == {"CE_WEIGHT": 0.4, "FEAT_WEIGHT": 2.0}


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "base.yaml", "DISTILLER: {TEACHER_WEIGHTS: ~/w.pt}\nDATASET: {ROOT: ~}\n")
    write(tmp_path, "e.py", "")
    text = "_BASE_: ~/base.yaml\nLOG.PREFIX: ~/runs\nEXPERIMENT.PLUGINS: ~/e.py"
    node = load_config(write(tmp_path, "r/r.yaml", text)).node
    found = values(node, "DISTILLER.TEACHER_WEIGHTS DATASET.ROOT LOG.PREFIX EXPERIMENT.PLUGINS")
    home = str(tmp_path)
    assert found == (f"{home}/w.pt", home, f"{home}/runs", [f"{home}/e.py"])


def test_values_have_the_types_of_their_defaults(tmp_path):
    text = "SOLVER: {WEIGHT_DECAY: 5e-4, LR: 1E-2, EPOCHS: '7', LR_DECAY_STAGES: '(3, 5)', NESTEROV: yes}\n"
    text += "DATASET: {CLASSES: ['1', 02], MEAN: [0.5, 5e-1, 0.5]}\nENGINE: {CUDA_GRAPH: on}\nEXPERIMENT: {TAG: 3}\n"
    node = load_config(write(tmp_path, "run.yaml", text)).node
    keys = ["WEIGHT_DECAY", "LR", "EPOCHS", "LR_DECAY_STAGES", "NESTEROV"]
    assert [node.SOLVER[key] for key in keys] == [5e-4, 1e-2, 7, [3, 5], True]
    found = values(node, "DATASET.CLASSES DATASET.MEAN ENGINE.CUDA_GRAPH EXPERIMENT.TAG")
    assert found == (["1", "02"], [0.5, 0.5, 0.5], "on", "3")


def test_show_prints_values_with_their_sources_and_only_nodes_in_use(tmp_path):
    path = "configs/cifar100/normkd/res32x4_shuv1.yaml"
    file = write(tmp_path, "run.yaml", f"_BASE_: {ROOT / path}\nDKD: {{BETA: 2}}\n")
    text = show(load_config(file, ["SEED", "3"]))
    pair = ROOT / "configs/cifar100/_base_/pairs/res32x4_shuv1.yaml"
    lines = [line.strip().split("# ") for line in text.splitlines() if not line.endswith(":")]
    source_of = {value.strip(): source for value, source in lines}
    assert source_of["LR: 0.01"] == str(pair)
    assert source_of["TAG: 'normkd,res32x4,shuv1'"] == str(ROOT / path)
    assert (source_of["SEED: 3"], source_of["DEVICE: auto"]) == ("command line", "default")
    shown = yaml.safe_load(text)
    assert {"NormKD", "DKD"} <= set(shown)
    assert "KD" not in shown
    assert shown["SOLVER"]["LR_DECAY_STAGES"] == [150, 180, 210]
