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

NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/README.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted(ROOT.glob("docs/*.md"))]
STARTS = re.compile(
    r"(?:python(?: -m mdistiller_norm| tools/(\w+)\.py)|torchrun .*?tools/(\w+)\.py|mdistiller-norm)\s(.*)"
)


def code(text):
    """Return the lines of code blocks, indented code and inline code, without comments."""
    fenced = re.findall(r"^ *```.*?\n(.*?)^ *```", text, flags=re.M | re.S)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    text = "\n".join([*fenced, *inline, *re.findall(r"^ {4}(.*)", text, flags=re.M)])
    return [re.sub(r"\s#\s.*", "", line) for line in text.replace("\\\n", " ").splitlines()]


def commands():
    lines = [line for page in PAGES for line in code(page.read_text())]
    matches = filter(None, map(STARTS.search, lines))
    return sorted({(match[1] or match[2] or "", match[3].split(";")[0]) for match in matches})


@pytest.mark.parametrize(("tool", "arguments"), commands())
def test_documented_command_parses(tool, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(arguments) if word != "..."]
    tool, *words = [tool.replace("make_", ""), *words] if tool else words
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


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("tools/[!b]*.py")))
def test_script_runs_its_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{ROOT}/tools/{name}.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert f"usage: python {sys.argv[0]} " in capsys.readouterr().out


def test_quoted_examples_equal_their_files():
    text = "".join((ROOT / "docs" / page).read_text() for page in ("custom.md", "library.md"))
    quoted = re.findall(r"```\w+\n# (examples/\S+)\n(.*?)\n```", text, flags=re.S)
    files = {f"examples/{path.name}" for path in ROOT.glob("examples/*.[py]*")}
    assert {path for path, _ in quoted} == files
    for path, text in quoted:
        assert text == (ROOT / path).read_text().rstrip(), path


def test_relative_links_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), target


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_site_builds_without_warnings(tmp_path, monkeypatch):
    build = pytest.importorskip("mkdocs.commands.build").build
    monkeypatch.chdir(ROOT)  # mkdocstrings reads the package from the working directory
    load = importlib.import_module("mkdocs.config").load_config
    build(load("mkdocs.yml", site_dir=str(tmp_path), strict=True))
    assert "SOLVER.PRECISION" in (tmp_path / "configuration/index.html").read_text()


def run_script(*words):
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


def test_files_of_the_project_are_well_formed():
    files = [ROOT / name for name in ("CITATION.cff", ".github/workflows/test.yml", "Dockerfile")]
    citation, workflow = (yaml.safe_load(file.read_text()) for file in files[:2])
    assert {"cff-version", "message", "title", "authors", "references"} <= citation.keys()
    assert {"run": "bash scripts/test.sh"} in workflow["jobs"]["test"]["steps"]
    known = ("#", "FROM ", "ENV ", "WORKDIR ", "COPY ", "RUN ", "CMD [")
    assert all(line.startswith(known) for line in files[2].read_text().splitlines())


def test_scripts_have_no_lint():
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*.sbatch")]
    each = ["bash", "-c", 'for file; do bash -n "$file" || exit 1; done', "bash"]
    check = ["shellcheck"] if shutil.which("shellcheck") else each
    assert run_script(*check, *scripts).returncode == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("imagenet.sh r34", "PAIR must be r34_r18 or r50_mv1, got 'r34'"),
        ("imagenet.sh r34_r18", "METHOD is missing: choose one of at.yaml crd.yaml"),
        ("imagenet.sh r34_r18 normkd 0", "GPUS must be >= 1, got 0"),
        ("slurm/imagenet.sbatch normkt.yaml", "normkt.yaml does not exist"),
        ("slurm/imagenet.sbatch configs/imagenet/r34_r18/normkd.yaml", "must run under Slurm"),
    ],
)
def test_bad_arguments(command, words):
    done = run_script("bash", *f"scripts/{command}".split())
    assert words in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_imagenet_script_starts_one_process_per_gpu(tmp_path, monkeypatch):
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    done = run_script("bash", *["scripts/imagenet_r34_r18.sh", "normkd", "4", "SEED", "1"])
    command = "train.py --cfg configs/imagenet/r34_r18/normkd.yaml --resume SEED 1\n"
    assert re.search(f"--nproc-per-node 4 .*{command}$", done.stdout)
