"""The report of an installation."""

import json
import tempfile
from pathlib import Path

import pytest

from mdistiller_norm.cli import main


def test_report_describes_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/cifar-100-python").mkdir(parents=True)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["torch"]
    assert report["data"] == {"digits": "in the package", "cifar-100-python": "data/cifar-100-python"}
    assert any("resnet20 on cifar100" in line for line in report["checkpoints"])
    assert report["self_test"]["passed"]
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_failed_self_test_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "self_test:\n  passed: false" in printed
    assert "/nowhere" in printed
