"""The package as it is installed: its data, its extras, a wheel in another folder, and the report of the program."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mdistiller_norm.cli import main
from mdistiller_norm.config import leaves, load_config
from mdistiller_norm.data import digits


def test_digits_equal_those_of_scikit_learn():
    source, data = load_digits(), digits()
    split = {"test_size": 360, "stratify": source.target, "random_state": 0}
    indices = train_test_split(np.arange(1797), **split)
    for part, chosen in zip((data.train, data.test), indices, strict=True):
        grey = np.round(source.images[chosen] * (255 / 16)).astype(np.uint8)
        assert (part.images.numpy() == grey.repeat(4, 1).repeat(4, 2)[..., None]).all()
        assert (part.targets.numpy() == source.target[chosen]).all()


def test_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", "--results", str(tmp_path)]) == 2
    message = 'the extra "report": pip install "mdistiller_norm[report]" (jinja2 is missing)'
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["configs/digits/normkd.yaml", "digits/normkd"])
def test_packaged_config_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name).node.DISTILLER.TYPE == "NormKD"
    # A local file comes first. Its bases may be packaged files or files beside it.
    local = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    local.parent.mkdir(parents=True)
    local.with_name("base.yaml").write_text("SEED: 7")
    local.write_text("_BASE_: [digits/kd, base.yaml]")
    config = load_config(name)
    assert (config.node.DISTILLER.TYPE, config.node.SEED) == ("KD", 7)
    assert config.sources["SEED"] == str(local.with_name("base.yaml"))


def output_of(arguments, capsys):
    assert main(arguments.split()) == 0
    return [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]


def test_every_key_has_a_meaning(capsys):
    rows = output_of("config keys", capsys)
    assert {len(row) for row in rows} == {4}
    assert [row[0] for row in rows] == [key for key, _ in leaves(load_config().node)]
    assert output_of("config keys solver.dot.*", capsys)[0][1:3] == ["0.075", "float"]


@pytest.mark.parametrize("name", ["cifar100/combined/normkd_at", "cifar100/ablation/table1/t_1"])
def test_copied_config_equals_the_packaged_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "copy", name]) == 0
    copied = Path(name).name + ".yaml"
    assert load_config(copied).node == load_config(name).node
    assert f"mdistiller-norm train --cfg {copied}\n" in Path(copied).read_text()


def test_models_methods_data_sets_and_configs_are_listed(facts, capsys):
    model = json.loads((facts / "models.json").read_text())["cifar100"]["resnet8x4"]
    _, (*_, parameters, macs) = output_of("list models resnet8x4", capsys)
    expected = [model["n_params"], model["macs_one_image"]["total"]]
    assert [int(number.replace(",", "")) for number in (parameters, macs)] == expected
    methods = {name: reads for name, reads, _ in output_of("list distillers", capsys)}
    assert (methods["NormKD"], methods["CRD"]) == ("logits", "pooled, indices")
    assert "1,797 grey 8x8 images" in output_of("list datasets digits", capsys)[1][1]
    name, about, *_ = output_of("list configs digits/normkd", capsys)[1]
    assert (name, "NormKD, resnet20 -> resnet8" in about) == ("digits/normkd", True)


@pytest.mark.slow
def test_wheel_works_without_a_checkout(tmp_path):
    bin_, work = tmp_path / "env" / "bin", tmp_path / "work"
    work.mkdir()
    Image.fromarray(digits().test.images[0].numpy()).save(work / "digit.png")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(command, *words):
        options = {"capture_output": True, "text": True, "cwd": work, "env": environment}
        done = subprocess.run([*command.split(), *words], **options)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    pip = f"{sys.executable} -m pip --disable-pip-version-check -q"
    run(f"{pip} wheel --no-deps --no-build-isolation -w {tmp_path} {ROOT}")
    run(f"{sys.executable} -m venv --system-site-packages --without-pip {tmp_path}/env")
    (wheel,) = tmp_path.glob("*.whl")
    run(f"{pip} --python {bin_}/python install --no-deps --no-index {wheel}")
    # The packages of this environment, which may be a virtual one itself, follow those of the new one.
    (packages,) = tmp_path.glob("env/lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))

    train = f"{bin_}/mdistiller-norm train --cfg digits/vanilla_resnet8 EXPERIMENT.NAME a"
    short = "SOLVER.EPOCHS 1 SOLVER.LR_DECAY_STAGES [] DATASET.SUBSET 64"
    assert "done: last top-1" in run(f"{train} {short}")
    commands = (
        "eval -c output/digits/a,DATASET.SUBSET=64",
        "predict -c output/digits/a,DATASET.SUBSET=64 digit.png",
        "config show configs/digits/normkd.yaml",
        "list configs digits",
        "reproduce --table digits --methods student --seeds 0 --smoke --dry-run",
    )
    code = "import sys, mdistiller_norm.cli as c; codes = [c.main(x.split()) for x in sys.argv[1:]]\n"
    code += "from mdistiller_norm.engine.teacher_file import *; t = known_teacher('resnet20', 'cifar100')\n"
    code += "print(t.path, t.cache_path(Path('out'))); sys.exit(sum(codes))"
    printed = run(f"{bin_}/python -c", code, *commands)
    folder, name = f"{packages}/mdistiller_norm", "resnet20_cifar100_seed0.pt"
    teacher = f"{folder}/checkpoints/{name} out/teachers/{name}"
    parts = ("360 images", "digit.png", f"# {folder}/configs", "digits/normkd ", "1 to run")
    for words in (*parts, teacher):
        assert words in printed, words


@pytest.mark.slow
def test_report_describes_the_installation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data/cifar-100-python").mkdir(parents=True)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"]["cifar-100-python"] == "data/cifar-100-python"
    assert any("resnet20 on cifar100" in line for line in report["checkpoints"])
    assert report["self_test"]["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_system_without_fcntl_is_named():
    without = "import sys, importlib.util as u; u.find_spec = lambda name: None"
    command = [sys.executable, "-c", f"{without}; import mdistiller_norm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "ImportError: mdistiller_norm requires Linux" in done.stderr
