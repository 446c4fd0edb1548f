"""The documentation: commands parse, configs load, quoted files and links exist, the site builds; the shell scripts."""

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mdistiller_norm import cli, config
from mdistiller_norm.errors import ConfigError

PAGES = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/README.md")
]
PAGES += sorted(ROOT.glob("docs/*.md"))
TOOLS = {"make_shards": "shards"}
STARTS = re.compile(
    r"(?:python(?: -m mdistiller_norm| tools/(\w+)\.py)|torchrun .*?tools/(\w+)\.py|mdistiller-norm)\s(.*)"
)


def code(text: str) -> list[str]:
    """Return the lines of code blocks, indented code and inline code, without comments."""
    fenced = re.findall(r"^ *```.*?\n(.*?)^ *```", text, flags=re.M | re.S)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    lines = "\n".join([*fenced, *inline, *re.findall(r"^ {4}(.*)", text, flags=re.M)]).replace(
        "\\\n", " "
    )
    return [re.sub(r"\s#\s.*", "", line) for line in lines.splitlines()]


def commands() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        for match in filter(None, map(STARTS.search, code(page.read_text()))):
            tool, arguments = match[1] or match[2] or "", match[3].split(";")[0].strip()
            found.append((page.name, TOOLS.get(tool, tool), arguments))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "tool", "arguments"), commands())
def test_documented_command_parses(page, tool, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(arguments) if word != "..."]
    tool, *words = [tool, *words] if tool else words
    for word in words:
        assert not word.startswith(("configs/", "examples/")) or Path(word).is_file(), word
    if "--plugin" in words:
        words[words.index("--plugin") + 1] = "json"  # any module: the file is not run here
    words += ["--end-of-command"]  # reported only if everything else parses
    monkeypatch.syspath_prepend("tools")
    main = importlib.import_module("benchmark").main if tool == "benchmark" else cli.execute
    with pytest.raises(ConfigError, match="unrecognized arguments: --end-of-command"):
        main(words if tool == "benchmark" else [tool, *words])
    packaged = tool == "train" and words[1].startswith(("configs/", "cifar100/"))
    if packaged and "EXPERIMENT.PLUGINS" not in words:
        config.load_config(words[1], [word for word in words[2:] if not word.startswith("--")])


@pytest.mark.parametrize(
    "name", ["train", "eval", "export", "make_shards", "report", "reproduce", "visualize"]
)
def test_script_runs_its_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{ROOT}/tools/{name}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    printed = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([TOOLS.get(name, name), "--help"])
    assert printed == capsys.readouterr().out
    assert f"usage: python {sys.argv[0]} " in printed


def test_quoted_examples_equal_their_files() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in ("custom.md", "library.md"))
    quoted = re.findall(r"```\w+\n# (examples/\S+)\n(.*?)\n```", text, flags=re.S)
    assert {path for path, _ in quoted} == {
        f"examples/{path.name}" for path in ROOT.glob("examples/*.[py]*")
    }
    for path, text in quoted:
        assert text == (ROOT / path).read_text().rstrip(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_files_of_the_project_are_well_formed() -> None:
    names = ("CITATION.cff", ".github/workflows/test.yml", "mkdocs.yml")
    citation, workflow, site = (yaml.safe_load((ROOT / name).read_text()) for name in names)
    assert {"cff-version", "message", "title", "authors", "references"} <= citation.keys()
    assert {"run": "bash scripts/test.sh"} in workflow["jobs"]["test"]["steps"]
    pages = {page for item in site["nav"] for page in item.values() if isinstance(page, str)}
    assert pages - {path.name for path in ROOT.glob("docs/*.md")} == {
        "index.md",
        "configuration.md",
    }
    known = ("#", "FROM ", "ENV ", "WORKDIR ", "COPY ", "RUN ", "CMD [")
    assert all(line.startswith(known) for line in (ROOT / "Dockerfile").read_text().splitlines())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_site_builds_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("mkdocs.commands.build").build
    monkeypatch.chdir(ROOT)  # mkdocstrings reads the package from the working directory
    load = importlib.import_module("mkdocs.config").load_config
    build(load("mkdocs.yml", site_dir=str(tmp_path), strict=True))
    assert "SOLVER.PRECISION" in (tmp_path / "configuration/index.html").read_text()
    assert "normkd_loss" in (tmp_path / "library/index.html").read_text()


SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch")])


def run_script(command: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    script = ["bash", *f"{ROOT}/scripts/{command}".split()]
    return subprocess.run(script, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_scripts_have_no_lint() -> None:
    check = ["shellcheck", *SCRIPTS] if shutil.which("shellcheck") else ["bash", "-n", *SCRIPTS]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("imagenet.sh", "PAIR must be r34_r18 or r50_mv1, got ''"),
        ("imagenet.sh r34", "PAIR must be r34_r18 or r50_mv1, got 'r34'"),
        ("imagenet.sh r34_r18", "METHOD is missing: choose one of at.yaml crd.yaml"),
        ("imagenet.sh r34_r18 normkd 0", "GPUS must be >= 1, got 0"),
        ("slurm/imagenet.sbatch", "CONFIG is missing"),
        ("slurm/imagenet.sbatch normkt.yaml", "normkt.yaml does not exist"),
        ("slurm/imagenet.sbatch configs/imagenet/r34_r18/normkd.yaml", "must run under Slurm"),
        ("imagenet_r34_r18.sh normkt", "configs/imagenet/r34_r18/normkt.yaml does not exist"),
    ],
)
def test_bad_arguments(command: str, words: str) -> None:
    done = run_script(command)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_imagenet_script_starts_one_process_per_gpu(tmp_path: Path) -> None:
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    done = run_script("imagenet_r34_r18.sh normkd 4 SEED 1", path=str(tmp_path))
    assert "--nproc-per-node 4" in done.stdout
    assert done.stdout.endswith(
        "tools/train.py --cfg configs/imagenet/r34_r18/normkd.yaml --resume SEED 1\n"
    )
