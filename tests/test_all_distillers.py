"""Every method in real steps: the losses of 20 steps equal the stored ones.

``python tests/test_all_distillers.py`` stores them anew, after a change that is meant to change them.
"""

import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from short_runs import few_digits

from mdistiller_norm.build import build_distillers, build_step, build_student
from mdistiller_norm.config import load_config
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.models import build_model

CPU = torch.device("cpu")
few = functools.partial(few_digits, 256)  # so that CRD's memory is small
CASES = {name: [f"DISTILLER.TYPE={name}"] for name in DISTILLERS} | {
    "NormKD and REVIEWKD": ["DISTILLER.TYPE=[NormKD, REVIEWKD]"],
    "OFD, teacher in train mode": ["DISTILLER.TYPE=OFD", "OFD.TEACHER_TRAIN_MODE=True"],
    "KD by DOT": ["DISTILLER.TYPE=KD", "SOLVER.TRAINER=dot"],
    "REVIEWKD by DOT": ["DISTILLER.TYPE=REVIEWKD", "SOLVER.TRAINER=dot"],
}
PAIR = ["DATASET.TYPE=digits", "DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8"]
PAIR += ["SOLVER.NESTEROV=True", "SOLVER.LR=1e-4", "SOLVER.BATCH_SIZE=8", "CRD.NCE.K=64"]
# On other machines, rounding dominates the later losses of DIST: its gradient is divided by the spread of the student's
# probabilities. With other kernels (AVX2, SSE4) the first losses of all methods differed by at most a twentieth of
# FIRST, except PKT (a sum of rounded logarithms times 30000) and FitNet (a batch norm over few values, times 100).
STEPS, FIRST_STEPS, STEPS_OF_DIST = 20, 3, 5
FIRST = {"rtol": 1e-4, "atol": 1e-6}
FIRST_OF = {"PKT": {"rtol": 1e-4, "atol": 1e-3}, "FITNET": {"rtol": 1e-3, "atol": 1e-6}}
STORED = Path(__file__).parent / "data" / "twenty_steps.json"


@functools.cache
def network():
    """A teacher with random weights, with the running statistics and the spread of logits of a trained one."""
    torch.manual_seed(1)
    made = build_model("resnet14", 10)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    loader = few().train_loader(32, 0, CPU)
    images = loader.prepare(*next(loader.batches(1))).images
    with torch.no_grad():
        made.fc.weight *= 3 / made.train()(images).std()
    return made.eval()


def machine():
    """The hardware and software that bit-identical losses depend on."""
    fields = ("vendor_id", "cpu family", "model", "model name", "stepping")
    info = Path("/proc/cpuinfo")
    text = info.read_text().split("\n\n")[0] if info.is_file() else ""
    found = dict(re.findall(r"^(.*?)\s*: (.*)$", text, flags=re.M))
    cpu = {field: found.get(field, "") for field in fields}
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    kernels = {"torch": torch.__version__, "platform": sys.platform, "capability": capability}
    return kernels | {"threads": threads, "cpu": cpu}


def measure(name):
    """Weighted cross entropy and distillation losses of 20 steps of resnet14 -> resnet8 with 8 digits."""
    cfg = load_config(None, [*PAIR, *CASES[name]], ["CRD"]).node
    student = build_student("resnet8", few(), cfg.SEED).to(memory_format=torch.channels_last)
    trained = network()
    torch.manual_seed(2)
    methods = build_distillers(cfg, student, trained, few().targets, (32, 32))
    train_mode = any(method.teacher_in_train_mode for method in methods.values())
    need = max(method.need for method in methods.values())
    teacher = Teacher(trained, need, train_mode=train_mode)
    loader, losses = few().train_loader(cfg.SOLVER.BATCH_SIZE, 0, CPU), []
    parts = (cfg, student, methods, loader, teacher, None, CPU)
    step = build_step(*parts, compiled=False, log=print)
    step.begin_epoch(1, 0)
    step.trainable.train()
    batches = step.with_teacher_outputs(step.loader.batches(1))
    for raw, _ in zip(batches, range(STEPS), strict=False):
        step(*raw)
        read = step.meters.read(1).losses  # raises if one is not finite
        losses.append([read[part] for part in step.trainable.loss_names])
        step.meters.reset()
    return losses


def store():
    torch.set_num_threads(1)
    losses = {
        name: [" ".join(map(float.hex, parts)) for parts in measure(name)] for name in CASES
    }
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_stored_ones(name):
    stored = json.loads(STORED.read_text())
    expected = [[*map(float.fromhex, parts.split())] for parts in stored["losses"][name]]
    measured = measure(name)
    if machine() == stored["machine"]:
        assert measured == expected
    else:  # on another processor they differed by up to 2%
        ours, theirs = torch.tensor(measured), torch.tensor(expected)
        first = FIRST_OF.get(name, FIRST)
        torch.testing.assert_close(ours[:FIRST_STEPS], theirs[:FIRST_STEPS], **first)
        later = slice(FIRST_STEPS, STEPS_OF_DIST if name == "DIST" else STEPS)
        torch.testing.assert_close(ours[later], theirs[later], rtol=5e-2, atol=1e-3)


def test_table_of_methods_in_the_docs():
    text = (ROOT / "docs" / "distillers.md").read_text()
    table = text.split("## Overview")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, flags=re.M)) == sorted(DISTILLERS)


if __name__ == "__main__":
    store()
