"""Every method in real steps: the losses of 20 steps equal the stored ones.

``python tests/test_all_distillers.py`` stores them anew, after a change that is meant to change them.
"""

import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from short_runs import few_digits

from mdistiller_norm.build import build_distillers, build_step, build_student
from mdistiller_norm.config import default_config, load_config
from mdistiller_norm.distillers import DISTILLERS, Pair
from mdistiller_norm.engine.step import TrainStep
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.models import build_model, probe
from mdistiller_norm.models.base import Network

CPU = torch.device("cpu")
few = functools.partial(few_digits, 256)  # so that CRD's memory is small
CASES: dict[str, dict[str, Any]] = {name: {"DISTILLER.TYPE": name} for name in DISTILLERS} | {
    "NormKD and REVIEWKD": {"DISTILLER.TYPE": "[NormKD, REVIEWKD]"},
    "OFD, teacher in train mode": {"DISTILLER.TYPE": "OFD", "OFD.TEACHER_TRAIN_MODE": True},
    "KD by DOT": {"DISTILLER.TYPE": "KD", "SOLVER.TRAINER": "dot"},
    "REVIEWKD by DOT": {"DISTILLER.TYPE": "REVIEWKD", "SOLVER.TRAINER": "dot"},
}
STEPS = 20
# On other machines, rounding dominates the later losses of DIST: its gradient is divided by the spread of the student's
# probabilities, which are almost equal at first. With other kernels (AVX2, SSE4) the first three losses of all methods
# differed by at most a twentieth of FIRST, except PKT (a sum of rounded logarithms, weighted by 30000) and FitNet (a
# batch norm over few values, weighted by 100).
FIRST_STEPS, STEPS_OF_DIST = 3, 5
FIRST = {"rtol": 1e-4, "atol": 1e-6}
FIRST_OF = {"PKT": {"rtol": 1e-4, "atol": 1e-3}, "FITNET": {"rtol": 1e-3, "atol": 1e-6}}
STORED = Path(__file__).parent / "data" / "twenty_steps.json"


@functools.cache
def network(name: str) -> Network:
    """A network with random weights, with the running statistics and the spread of logits of a trained one."""
    torch.manual_seed(1)
    made = build_model(name, 10)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    loader = few().train_loader(32, 0, CPU)
    images = loader.prepare(*next(loader.batches(1))).images
    classifier = [module for module in made.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        classifier.weight *= 3 / made.train()(images).std()
    return made.eval()


def make_step(case: dict[str, Any], **more: Any) -> TrainStep:
    """Build the step of a run of resnet14 -> resnet8 on the digits."""
    settings = {
        "DATASET.TYPE": "digits",
        "DISTILLER.TEACHER": "resnet14",
        "DISTILLER.STUDENT": "resnet8",
    }
    settings |= {"SOLVER.NESTEROV": True, "SOLVER.LR": 0.01} | more | case
    if "CRD" in str(settings.get("DISTILLER.TYPE")):
        settings = {"CRD.NCE.K": 64} | settings
    cfg = load_config(None, [f"{key}={value}" for key, value in settings.items()]).node
    student = build_student("resnet8", few(), cfg.SEED).to(memory_format=torch.channels_last)
    torch.manual_seed(2)
    methods = build_distillers(cfg, student, network("resnet14"), few().targets, (32, 32))
    train_mode = any(method.teacher_in_train_mode for method in methods.values())
    need = max(method.need for method in methods.values())
    teacher = Teacher(network("resnet14"), need, train_mode=train_mode)
    loader = few().train_loader(cfg.SOLVER.BATCH_SIZE, 0, CPU)
    step = build_step(
        cfg, student, methods, loader, teacher, None, CPU, compiled=False, log=print
    )
    step.begin_epoch(1, 0)
    step.trainable.train()
    return step


def losses_of(step: TrainStep, count: int) -> Iterator[dict[str, float]]:
    """Yield the losses of the first ``count`` steps."""
    for raw, _ in zip(
        step.with_teacher_outputs(step.loader.batches(1)), range(count), strict=False
    ):
        step(*raw)
        yield step.meters.read(1).losses  # raises if one is not finite
        step.meters.reset()


def machine() -> dict[str, Any]:
    """The hardware and software that bit-identical losses depend on."""
    fields = ("vendor_id", "cpu family", "model", "model name", "stepping")
    cpu = {}
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = {
            key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines)
        }
        cpu = {field: found.get(field, "") for field in fields}
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    kernels = {"torch": torch.__version__, "platform": sys.platform, "capability": capability}
    return kernels | {"threads": threads, "cpu": cpu}


def measure(name: str) -> list[list[float]]:
    """Weighted cross entropy and distillation losses of 20 steps with 8 digits."""
    step = make_step(CASES[name], **{"SOLVER.BATCH_SIZE": 8, "SOLVER.LR": 1e-4})
    return [
        [losses[part] for part in step.trainable.loss_names] for losses in losses_of(step, STEPS)
    ]


def store() -> None:
    """Write ``tests/data/twenty_steps.json``."""
    torch.set_num_threads(1)
    losses = {
        name: [" ".join(value.hex() for value in parts) for parts in measure(name)]
        for name in CASES
    }
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_stored_ones(name: str) -> None:
    stored = json.loads(STORED.read_text())
    expected = [
        [float.fromhex(value) for value in parts.split()] for parts in stored["losses"][name]
    ]
    measured = measure(name)
    if machine() == stored["machine"]:
        assert measured == expected
    else:  # on another processor they differed by up to 2%
        ours, theirs = torch.tensor(measured), torch.tensor(expected)
        torch.testing.assert_close(
            ours[:FIRST_STEPS], theirs[:FIRST_STEPS], **FIRST_OF.get(name, FIRST)
        )
        later = slice(FIRST_STEPS, STEPS_OF_DIST if name == "DIST" else STEPS)
        torch.testing.assert_close(ours[later], theirs[later], rtol=5e-2, atol=1e-3)


def test_table_of_methods_in_the_docs() -> None:
    text = (ROOT / "docs" / "distillers.md").read_text()
    table = text.split("## Overview")[1].split("\n## ")[0]
    lines = [line.strip("|") for line in table.splitlines() if "| `" in line]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    assert sorted(row[0].strip("` ") for row in rows) == sorted(DISTILLERS)
    with torch.device("meta"):
        networks = [build_model(name, 100) for name in ("resnet8x4", "resnet32x4")]
    pair = Pair(*(probe(made) for made in networks), networks[1], torch.arange(50_000) % 100, 100)
    for name, _, _, reads, weights, extra, published in (
        [row[0].strip("` "), *row[1:]] for row in rows
    ):
        with torch.device("meta"):
            method = DISTILLERS[name].from_config(default_config()[name], pair)
        assert reads.split(" + ")[0] == method.need.name.lower(), name
        assert weights == f"{method.ce_weight:g}, {method.weight:g}, {method.warmup}", name
        assert extra == f"{method.extra_parameters():,}", name
        folder = {"NormKD_W_DKD": "dkd_normkd"}.get(name, name.lower())
        header = (ROOT / "configs" / "cifar100" / folder / "res32x4_res8x4.yaml").read_text()
        number = re.search(r"# Paper: (\d\d\.\d\d) top-1", header)
        assert number is None or published.startswith(number[1]), name


if __name__ == "__main__":
    store()
