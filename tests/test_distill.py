"""The command ``distill``: a teacher and students on a folder of images, without a config file."""

from pathlib import Path

import yaml

from mdistiller_norm.cli import main

SMALL = ["DATASET.IMAGE_SIZE=32", "DATASET.RESIZE=32", "DATASET.NUM_WORKERS=0", "SOLVER.BATCH_SIZE=16"]


def test_teacher_student_alone_and_distilled(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["distill", "--teacher", "resnet14", "--student", "resnet8", "--data", str(tree)]
    assert main([*command, "--epochs=2", "--train-teacher", "--student-alone", *SMALL]) == 0
    *_, header, teacher, alone, distilled, export = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["model", "top-1"]
    assert teacher.split()[:2] == ["teacher", "resnet14"]
    assert alone.split()[:3] == ["student", "alone", "resnet8"]
    run = Path(distilled.split("  ")[-1].strip())
    assert export == f"export the student: mdistiller-norm export -c '{run}'"
    assert run.name.startswith("resnet8,NormKD,2 epochs,DATASET.IMAGE_SIZE=32")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["NormKD"]["WARMUP"], config["SOLVER"]["EPOCHS"]) == (5, 2)
    assert main([*command, "--epochs=2", *SMALL]) == 0  # finds the teacher, and all is finished
    *lines, distilled_again, _ = capsys.readouterr().out.splitlines()
    assert distilled_again.split() == distilled.split()
    assert lines[-1].split()[:2] == ["teacher", "resnet14"]
    assert any(line.endswith("is finished: nothing left to train") for line in lines)
