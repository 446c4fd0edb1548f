"""The documentation site."""

import importlib
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_site_builds_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("mkdocs.commands.build").build
    monkeypatch.chdir(ROOT)  # mkdocstrings reads the package from the working directory
    config = importlib.import_module("mkdocs.config").load_config(
        "mkdocs.yml", site_dir=str(tmp_path), strict=True
    )
    build(config)
    assert "SOLVER.PRECISION" in (tmp_path / "configuration/index.html").read_text()
    assert "normkd_loss" in (tmp_path / "library/index.html").read_text()
