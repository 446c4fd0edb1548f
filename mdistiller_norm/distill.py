"""The command ``distill``: train a teacher and a student on a folder of images, without a config file."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdistiller_norm.build import build_dataset, build_student, build_teacher
from mdistiller_norm.catalog import columns
from mdistiller_norm.config import Config, load_config
from mdistiller_norm.data import DATASETS
from mdistiller_norm.engine import distributed
from mdistiller_norm.errors import CheckpointError, ConfigError, UserError
from mdistiller_norm.files import command
from mdistiller_norm.models import PREFIXES
from mdistiller_norm.run import train
from mdistiller_norm.run_folder import run_folder

# For small data sets: the gradient of NormKD's loss is large at first, which short trainings do not recover from.
SMALL_DATA = {"NormKD.WARMUP": 5, "NormKD.LOSS.CE_WEIGHT": 1.0}


def main(options: argparse.Namespace) -> int:
    """Train what is not finished yet, and print the accuracy of each network."""
    teacher, student = options.teacher, options.student
    plain = _config(options, f"teacher,{teacher}", {"STUDENT": teacher})
    alone = _config(options, f"{student},alone", {"STUDENT": student})
    tag = f"{teacher},{student},{'+'.join(_methods(options))}"
    names = {"TYPE": options.method, "TEACHER": teacher, "STUDENT": student}
    weights = str(run_folder(plain) / "student_last.pt")
    if not options.train_teacher and not (run_folder(plain) / "result.json").is_file():
        weights = ""  # of another run, or published
    distilled = _config(options, tag, names | {"TEACHER_WEIGHTS": weights})
    dataset = build_dataset(distilled.node)
    build_student(student, dataset, 0)  # refuse an unknown name before training the teacher
    runs = {"teacher": plain} if options.train_teacher else {}
    runs |= {"student alone": alone} if options.student_alone else {}
    if not options.train_teacher:
        try:
            build_teacher(distilled.node, dataset)
        except CheckpointError as error:
            if weights or not teacher.startswith(PREFIXES):
                raise CheckpointError(f"{error}, or add --train-teacher") from error
            distilled = _config(options, tag, names | {"TEACHER_WEIGHTS": "pretrained"})
            try:
                build_teacher(distilled.node, dataset)
            except UserError as fault:
                raise UserError(f"{fault}, or add --train-teacher") from fault
    runs |= {"distilled": distilled}
    command_line = ["python", *options.command]
    results = {role: train(run, True, command_line, dataset) for role, run in runs.items()}
    if not distributed.is_first():
        return 0
    given = results["distilled"]["teacher"]
    rows = [("", "model", "top-1 (last)", "top-1 (best)", "weights")]
    if not options.train_teacher:
        rows.append(("teacher", given["name"], f"{given['top1']:.2f}", "", given["file"]))
    for role, result in results.items():
        top1 = [f"{result[epoch]['top1']:.2f}" for epoch in ("last", "best")]
        rows.append((role, result["student"], *top1, str(run_folder(runs[role]))))
    print(columns(rows))
    print(f"export the student: {command('export')} -c '{run_folder(distilled)}'")
    return 0


def _methods(options: argparse.Namespace) -> list[str]:
    return [name.strip() for name in options.method.strip("[]").split(",")]


def _config(options: argparse.Namespace, tag: str, names: Mapping[str, str]) -> Config:
    data, epochs = Path(options.data), options.epochs
    is_type = options.data in DATASETS and not data.exists()
    stages = sorted({epochs * part // 8 for part in (5, 6, 7)} - {0, epochs})
    keys: dict[str, Any] = {
        "EXPERIMENT.PROJECT": data.resolve().name,
        "EXPERIMENT.TAG": f"{tag},{epochs} epochs".replace("/", "_"),
        "DATASET.TYPE": options.data if is_type else "image_folder",
        "SOLVER.EPOCHS": epochs,
        "SOLVER.LR_DECAY_STAGES": stages,
        "SOLVER.NESTEROV": True,
        "SOLVER.WEIGHT_DECAY": 5e-4,
    }
    keys |= {} if is_type else {"DATASET.ROOT": data}
    keys |= {f"DISTILLER.{key}": name for key, name in names.items()}
    methods = _methods(options)
    keys |= SMALL_DATA if "TYPE" in names and "NormKD" in methods else {}
    own = [f"{key}={value}" for key, value in keys.items()]
    config = load_config(None, [*own, *options.overrides], others=methods)
    sources = load_config(None, options.overrides, others=methods).sources
    if {sources["EXPERIMENT.NAME"], sources["EXPERIMENT.TAG"]} != {"default"}:
        raise ConfigError(
            "distill sets NAME and TAG: set EXPERIMENT.PROJECT or LOG.PREFIX instead"
        )
    # The folder is named after the tag and the overrides of the user.
    return Config(config.node, sources)
