"""The command ``doctor``: describe the installation and test it with 20 steps of NormKD on the digits."""

import argparse
import io
import json
import shutil
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.build import build_device
from mdistiller_norm.config import load_config
from mdistiller_norm.data.cifar import FOLDERS
from mdistiller_norm.engine.compile import compiler_missing
from mdistiller_norm.engine.logger import environment
from mdistiller_norm.engine.teacher_file import PEER_TEACHERS, ROOTS, manifest_files
from mdistiller_norm.errors import first_line
from mdistiller_norm.run import train

OPTIONAL = (
    "scikit-learn", "scipy", "matplotlib", "jinja2", "timm", "submitit", "wandb", "onnx", "onnxruntime",
    "safetensors", "simplejpeg",
)  # fmt: skip


def main(options: argparse.Namespace) -> int:
    """Print the report; return 1 if the self-test fails."""
    report = diagnose(options.root)
    text = (
        json.dumps(report, indent=2) if options.json else yaml.safe_dump(report, sort_keys=False)
    )
    print(text.rstrip())
    return 0 if report["self_test"]["passed"] else 1


def diagnose(root: Path) -> dict[str, Any]:
    """Return the environment, the data and checkpoints that were found, the free space and the result of the test."""
    device = build_device("auto")
    folders = [root / name for name in (*FOLDERS.values(), "imagenet")]
    checkpoints: list[str] = []
    for folder in {folder.resolve() for folder in ROOTS}:
        listed = manifest_files(folder)
        checkpoints += [
            f"{entry['model']} on {entry['dataset']}: {path}" for path, entry in listed
        ]
        for pattern in PEER_TEACHERS.values():
            checkpoints += map(str, folder.glob(pattern.format("*")))
    installed = {package.name.lower(): package.version for package in distributions()}
    return {
        "environment": environment(device),
        "optional": {name: installed.get(name) for name in OPTIONAL},
        "compiler": compiler_missing(device) or "found",
        "data": {"digits": "in the package"}
        | {path.name: str(path) for path in folders if path.exists()},
        "checkpoints": checkpoints,
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free in {Path.cwd()}",
        "self_test": self_test(),
    }


def self_test() -> dict[str, Any]:
    """Train a teacher and, with NormKD, a student for 20 steps each in a temporary folder."""
    start, output = time.perf_counter(), io.StringIO()
    solver = ["SOLVER.EPOCHS=1", "SOLVER.BATCH_SIZE=72", "SOLVER.LR_DECAY_STAGES=[]"]
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(output):
            weights = f"DISTILLER.TEACHER_WEIGHTS={folder}/digits/teacher/student_last.pt"
            for name, file in (
                ("teacher", "digits/vanilla_resnet8"),
                ("student", "digits/normkd"),
            ):
                place = [f"LOG.PREFIX={folder}", f"EXPERIMENT.NAME={name}"]
                train(load_config(file, [*solver, *place, "DISTILLER.TEACHER=resnet8", weights]))
    except Exception as error:  # a broken installation may raise anything
        lines = output.getvalue().splitlines()
        return {"passed": False, "error": first_line(error), "output": lines}
    return {"passed": True, "seconds": round(time.perf_counter() - start, 1)}
