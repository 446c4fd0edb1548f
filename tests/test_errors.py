"""Bad input: every command prints one line and exits with code 2."""

import io
import os
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, registries_as_before
from test_plugins import REGISTER

from mdistiller_norm.cli import main

DIGITS = f"train --cfg {ROOT}/configs/digits/vanilla_resnet8.yaml LOG.PREFIX=out"
NORMKD = f"train --cfg {ROOT}/configs/digits/normkd.yaml"
SHORT = "SOLVER.EPOCHS=1 SOLVER.LR_DECAY_STAGES=[] SOLVER.BATCH_SIZE=12 DATASET.SUBSET=48"
PAIR = "distill --teacher resnet44 --data digits --student"

# Command -> words of the message.
COMMANDS = [
    ("", "required: COMMAND … mdistiller-norm --help"),
    ("trian", "invalid choice: 'trian'"),
    ("train", "required: --cfg … see mdistiller-norm train --help"),
    (f"{NORMKD} --frobnicate", "unrecognized arguments: --frobnicate"),
    ("train --cfg nowhere.yaml", "config file nowhere.yaml does not exist"),
    ("train --cfg fifo", "config file fifo cannot be read … not a regular file"),
    (f"{DIGITS} SOLVER.LRR 1", "command line: unknown key SOLVER.LRR: did you mean SOLVER.LR"),
    (f"{DIGITS} SOLVER.LR", "SOLVER.LR has no value"),
    (f"{DIGITS} SOLVER '{{LR: 1}}'", "SOLVER is a section: set one of its keys, such as SOLVER."),
    (f"{DIGITS} SOLVER.TRIALS 3", "unknown key SOLVER.TRIALS: it was removed … --trials"),
    (f"{DIGITS} SOLVER.LR fast", "command line: SOLVER.LR must be a finite number, got fast"),
    (f"{DIGITS} SOLVER.NESTEROV true SOLVER.MOMENTUM 0", "MOMENTUM must be > 0 with NESTEROV"),
    (f"{NORMKD} SOLVER.TRAINER dot SOLVER.DOT.DELTA 0.9", "DELTA must be in (0, 1) … and 0.9"),
    (f"{DIGITS} SOLVER.TRAINER dot", "SOLVER.TRAINER dot does not support DISTILLER.TYPE NONE"),
    (f"{DIGITS} SOLVER.ACCUMULATE 7", "SOLVER.BATCH_SIZE 64 must be a multiple … ACCUMULATE 7"),
    (f"{DIGITS} SOLVER.SYNC_BN true", "SOLVER.SYNC_BN requires a GPU, got cpu"),
    (f"{NORMKD} NormKD.LOSS.KD_WEIGHT=-1", "NormKD.LOSS.KD_WEIGHT must be >= 0, got -1"),
    (f"{NORMKD} KD.TEMPERATURE 8", "KD.TEMPERATURE has no effect … normkd.yaml) is NormKD"),
    (f"{NORMKD} EXPERIMENT.PLUGINS no/file.py", "plugin no/file.py does not exist in /"),
    (f"{NORMKD} EXPERIMENT.PLUGINS no_mod", "no_mod cannot be imported: ModuleNotFoundError"),
    (f"{DIGITS} DATASET.TYPE digit", "unknown data set 'digit': did you mean digits?"),
    (f"{DIGITS} DATASET.VAL_SPLIT 0.001", "DATASET.VAL_SPLIT 0.001 holds out no image of digits"),
    (f"{DIGITS} DATASET.RANDAUGMENT=9", "RANDAUGMENT requires image files, digits is in memory"),
    (f"{DIGITS} DATASET.STD '[1, 1, 1]'", "set both DATASET.MEAN and DATASET.STD, or neither"),
    (f"{DIGITS} DATASET.CLASSES '[a, a]'", "CLASSES must be different names, got ['a', 'a']"),
    ("reproduce --table 1 --dry-run DATASET.SUBSET 20", "DATASET.SUBSET would change the result"),
    (f"{DIGITS} DEVICE tpu", "DEVICE … tpu"),
    (f"{DIGITS} DISTILLER.STUDENT resnet21", "unknown CIFAR model 'resnet21' … resnet20"),
    (f"{DIGITS} DISTILLER.STUDENT torchvision:resnet19", "did you mean torchvision:resnet18"),
    (f"{NORMKD} DISTILLER.TEACHER_WEIGHTS pretrained", "weights need a model named timm:"),
    (f"{PAIR} resnet8", "teacher resnet44 … or add --train-teacher"),
    ("eval -c x.pt -bs 0", "must be an integer >= 1, got 0"),
    ("eval -c x.pt --cfg x.yaml -d digits", "--cfg sets the data set"),
    ("eval -c 'two\nlines.pt'", "two lines.pt"),
    ("predict -c x.safetensors run.yaml", "x.safetensors has no network: use the run folder"),
    ("export -c x.pt -o s.foo", "-o s.foo must end in the suffix of its format: .pt2"),
    ("config show digits/normkt", "normkt does not exist; see mdistiller-norm list configs"),
    ("config copy digits/normkd run.yaml", "run.yaml exists: choose another name"),
    ("fetch imagenet", "unknown source 'imagenet'"),
    ("fetch cifar100 --sources run.yaml", "run.yaml cannot be read as sources"),
]


def bomb(level):
    """Return a config whose aliases (``*`` in ``level``) refer to the level before, which makes 4**20 nodes."""
    levels = [f"x{i}: &x{i} " + level.replace("*", f"*x{i - 1}") for i in range(1, 20)]
    return "\n".join(["x0: &x0 {a: 1}", *levels])


LISTS = "".join(f", &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40))
# Text of a config -> words of the message.
CONFIGS = [
    ("SOLVER: {LR: true}", "run.yaml: SOLVER.LR must be a finite number, got true"),
    ("SOLVER: {LR: .inf}", "must be a finite number, got .inf"),
    ("SOLVER: {LR: {a: 1}}", "unknown key SOLVER.LR.a"),
    ("SOLVER: {NESTEROV: 1}", "SOLVER.NESTEROV must be true or false, got 1"),
    ("SOLVER: {LR_DECAY_STAGES: [1, x]}", "must be a list (each item an integer), got ['1', "),
    ("SOLVER: {LR_DECAY_STAGES: [2, 2]}", "must be increasing epochs >= 1, got ['2', '2']"),
    ("SOLVER: {PRECISION: tf32}", "SOLVER.PRECISION must be one of fp32, bf16, fp16, got tf32"),
    ("SEED: 99999999999999999999", "SEED must be in [0, 2**63), got 9999"),
    ("DATASET: {MEAN: [7, 7, 7]}", "MEAN must be [] or three numbers in [0, 1], got ['7'"),
    ("EXPERIMENT: {NAME: ../../evil}", "NAME must be the name of one folder, without /, got ../"),
    ("EXPERIMENT: {TAG: ''}", "EXPERIMENT.NAME or TAG (run.yaml) must not be empty"),
    ("DISTILLER: {TYPE: normkd}", "unknown distiller 'normkd': did you mean NormKD"),
    ("DISTILLER: {TYPE: [KD, KD]}", "TYPE must be NONE or different methods, got ['KD', 'KD']"),
    ("NORMKD: {TEMPERATURE_NORM: 2}", "NORMKD.TEMPERATURE_NORM: did you mean NormKD.TEMPERATUR"),
    ("SOLVER: {LR: 1}\nSOLVER.LR: 2", "cannot be read: key SOLVER.LR is given twice"),
    ("- 1", "config file run.yaml cannot be read: it must be a mapping"),
    ("SOLVER:\n  LR: [1\nSEED: 2", "config file run.yaml cannot be read"),
    ('LOG: {PREFIX: "\\ud800"}', "LOG.PREFIX must be valid text"),
    ('_BASE_: "a\\0"', "cannot be read: embedded null"),
    ("_BASE_: [[a]]", "_BASE_ must be a file or a list of files"),
    ("SOLVER: {<<: 3}", "<< must be a mapping or a list of mappings"),
    ("SOLVER: " + "{a: " * 4000, "cannot be read"),
    (bomb("{k: *, l: *, m: *, n: *}"), "it has more than 10,000 keys"),
    (bomb("{<<: [*, *, *, *]}"), "unknown key x0.a"),
    (f"SEED: [&x0 [a]{LISTS}]", "got [['a'], [['a'], "),
]
READS_POOLED = """@distillers.register("New")
class New(distillers.Distiller):
    def helper(self, teacher):
        return teacher.pooled.mean()
"""
# Text of a plugin that cannot be imported -> words of the message.
PLUGINS = [
    ("def broken(:", "own.py:1:  … syntax"),
    ("\nimport no_such_module", "own.py:2: ModuleNotFoundError … no_such_module"),
    ("import sys\nsys.exit(3)", "own.py:2: SystemExit: 3"),
    (f"{REGISTER}models.register('vgg8')(len)", "own.py:2:  … 'vgg8' is registered already"),
    (f"{REGISTER}distillers.register('N')(object)", "own.py:2:  … must be a subclass of Distill"),
    (f"{REGISTER}models.register('new')(lambda: 0)", "'new' requires a function … num_classes"),
    (f"{REGISTER}{READS_POOLED}", "own.py:2:  … New reads pooled: add `need = distillers.Need.P"),
]
METHOD = """
@distillers.register("Own")
class Own(distillers.Distiller):
    def forward(self, student, teacher, batch):
        return {loss}
"""
DATA = """
@data.register("own_data")
def own_data(root, options):
    images, targets = torch.zeros(12, 8, 8, 3, dtype=torch.uint8), torch.arange(12) % 3
    facts = {{"name": "own_data", "classes": ("a", "b", "c"), "mean": (0.3,) * 3, "std": (0.3,) * 3}}
    train, test = (images, targets), (images[:3], targets[:3])
    {mistake}
    return data.TensorDataset(train=data.Split(*train), test=data.Split(*test), **facts)
"""
NO_DISTILLER = """
class Own(distillers.Distiller):
    from_config = classmethod(lambda cls, node, pair: None)
distillers.register("Own")(Own)
"""


def method(loss):
    return METHOD.format(loss=loss), "DISTILLER.TYPE=Own"


def data_set(mistake):
    return DATA.format(mistake=mistake), "DISTILLER.TYPE=NONE DATASET.TYPE=own_data"


def network(arguments, overrides=""):
    register = f"models.register('own')(lambda n: models.Wrapped({arguments}))\n"
    return register, f"DISTILLER.STUDENT=own {overrides}"


# Text of a plugin that can be imported and the overrides that use it -> words of the message.
USED_PLUGINS = [
    (method("None"), "Own: forward must return a scalar … NoneType"),
    (method("student.logits.mean(1)"), "Own: forward must return a scalar … torch.Size([12])"),
    (method("teacher.logits.mean()"), "Own: the loss must have a gradient"),
    ((NO_DISTILLER, "DISTILLER.TYPE=Own"), "Own: from_config must return a Distiller … NoneType"),
    (data_set("train = (images / 255, targets)"), "own_data … float32 [12, 8, 8, 3]"),
    (data_set("test = (images, targets + 1)"), "own_data … 0..2"),
    (data_set("facts['mean'] = (77.0,) * 3"), "own_data … mean"),
    (data_set("open('/no/database')"), "data set 'own_data' cannot be opened … No such file"),
    (data_set("return train, test"), "data set 'own_data' … tuple … TensorDataset"),
    (("class Own: pass\n", "DISTILLER.TYPE=Own"), "Own in  … own.py is not registered"),
    (network("resnet18(), classifier='fc'"), "'own' cannot be built … num_classes"),
    (network("resnet18(), n, classifier='fc'"), "1000 logits for 10 classes"),
    (network("small, n, classifier='fcc'"), "ResNet has no submodule 'fcc' … fc"),
    (network("small, n, classifier='fc', features=['fc']"), "torch.Size([2, 10])"),
    (network("small, n, classifier='fc'", "DISTILLER.TYPE=SP"), "SP requires … which own lacks"),
    (("", "DISTILLER.TYPE=DKD DATASET.MIXUP=0.2"), "MIXUP cannot be used with DKD: an image"),
    (("", "DISTILLER.TEACHER_CACHE=lazy DATASET.MIXUP=1"), "MIXUP cannot be used with DIST"),
    (("", "NormKD.LOSS.CE_WEIGHT=0 NormKD.LOSS.KD_WEIGHT=0"), "NormKD: CE_WEIGHT and the other"),
]


@pytest.fixture(autouse=True)
def _own_folder_and_registries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with registries_as_before():
        yield


def check(command, words, capsys):
    assert main(shlex.split(command)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for word in words.split(" … "):
        assert word in errors


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_command(command, words, capsys):
    Path("run.yaml").write_text("not a checkpoint")
    os.mkfifo("fifo")
    check(command, words, capsys)
    assert {path.name for path in Path().iterdir()} == {"run.yaml", "fifo"}


@pytest.mark.parametrize(("text", "words"), CONFIGS)
def test_config(text, words, capsys):
    Path("run.yaml").write_text(f"{text}\n")
    check("train --cfg run.yaml --show", words, capsys)


@pytest.mark.parametrize(("text", "words"), PLUGINS)
def test_plugin_that_cannot_be_imported(text, words, capsys):
    Path("own.py").write_text(f"{text}\n")
    check(f"{DIGITS} EXPERIMENT.PLUGINS=own.py", words, capsys)


def command_with_plugin(plugin, teacher):
    text, overrides = plugin
    imports = "import torch\nfrom torchvision.models import resnet18\nsmall = resnet18(num_classes=10)\n"
    Path("own.py").write_text(f"{REGISTER}{imports}{text}")
    pair = f"DISTILLER.TYPE=NormKD DISTILLER.TEACHER=resnet14 {teacher} DISTILLER.STUDENT=resnet8"
    return f"{DIGITS} EXPERIMENT.PLUGINS=own.py SOLVER.BATCH_SIZE=12 {pair} {overrides}"


@pytest.mark.parametrize(("plugin", "words"), USED_PLUGINS)
def test_plugin_that_cannot_be_used(plugin, words, teacher, capsys):
    check(command_with_plugin(plugin, teacher), words, capsys)


DAMAGES = [
    ("shutil.rmtree('out')", "out/digits/run … No such file or directory"),
    ("shutil.rmtree(next(Path('out').rglob('tensorboard')))", "tensorboard … No such file"),
    ("resource.setrlimit(resource.RLIMIT_FSIZE, (999, -1))", "out/digits/run … File too large"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
@pytest.mark.usefixtures("limited_files")
def test_run_folder_that_is_damaged_during_training(damage, words, teacher, capsys):
    text, override = method("student.logits.mean()")
    imports = "import resource, shutil\nfrom pathlib import Path\n"
    text = f"{imports}{text}    def begin_epoch(self, epoch, seed):\n        {damage}\n"
    keys = f"{override} {SHORT} EXPERIMENT.NAME=run"
    check(command_with_plugin((text, keys), teacher), words, capsys)


def test_plugins_are_imported_for_training_only(capsys):
    Path("own.py").write_text("open('imported', 'w')\n")
    keys = "EXPERIMENT.PLUGINS: own.py\nDATASET.TYPE: own_data\nDISTILLER.TYPE: Own\nOwn: {SCALE: {A: 007}}\n"
    Path("run.yaml").write_text(keys)
    check("train --cfg run.yaml --no-plugins", "--no-plugins refuses EXPERIMENT.PLUGINS", capsys)
    check("eval --cfg run.yaml -c x.pt", "unknown data set 'own_data'", capsys)
    assert main(["train", "--cfg", "run.yaml", "--show"]) == 0
    assert "    A: '007'" in capsys.readouterr().out
    assert not Path("imported").exists()
    check("train --cfg run.yaml", "unknown key Own.SCALE.A", capsys)
    assert Path("imported").exists()


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_standard_output_that_cannot_show_a_name(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([*f"{DIGITS} {SHORT}".split(), "EXPERIMENT.NAME=gr\u00f6\udce9"]) == 0
    assert Path("out/digits/gr\u00f6\\udce9,DATASET.SUBSET=48/result.json").is_file()
    if stream:
        assert b"gr\\xf6\\udce9" in stream.buffer.getvalue()


@pytest.mark.parametrize("name", ["train/cat/1.png", "train/0.tar"])
def test_data_files_that_are_not_regular(name, capsys):
    kind = "webdataset" if name.endswith("tar") else "image_folder"
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        Path("d", folder).mkdir(parents=True)
    os.mkfifo(Path("d", name))
    for path in ("train/dog/1.png", "val/cat/1.png", "val/dog/1.png"):
        Path("d", path).write_bytes(b"")
    place = "DATASET.ROOT=d DATASET.IMAGE_SIZE=32 DATASET.RESIZE=32"
    words = "not a regular file" if kind == "webdataset" else "can be read"
    check(f"{DIGITS} DATASET.TYPE={kind} {place}", words, capsys)


def test_result_files_of_other_programs(capsys):
    for name in ("fifo", "deep", "large"):
        Path("output/p", name).mkdir(parents=True)
    os.mkfifo("output/p/fifo/result.json")
    Path("output/p/deep/result.json").write_text("[" * 100_000)
    Path("output/p/large/result.json").write_text('{"method": [], "epochs": 1e999}')
    check(f"{NORMKD} DISTILLER.TEACHER=resnet44", "no weights for the teacher resnet44", capsys)
