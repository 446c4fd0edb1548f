"""The documentation: commands parse, configs load, quoted files and links exist, project files are well-formed."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mdistiller_norm import cli, config
from mdistiller_norm.errors import ConfigError

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "checkpoints/README.md")]
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
    lines = "\n".join([*fenced, *inline, *re.findall(r"^ {4}(.*)", text, flags=re.M)]).replace("\\\n", " ")
    return [re.sub(r"\s#\s.*", "", line) for line in lines.splitlines()]


def commands() -> list[tuple[str, str, str]]:
    found = []
    for page in PAGES:
        for match in filter(None, map(STARTS.search, code(page.read_text()))):
            tool, arguments = match[1] or match[2] or "", match[3].split(";")[0].strip()
            found.append((page.name, TOOLS.get(tool, tool), arguments))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "tool", "arguments"), commands())
def test_documented_command_parses(
    page: str, tool: str, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(arguments) if word != "..."]
    tool, *words = [tool, *words] if tool else words
    for word in words:
        assert not word.startswith(("configs/", "examples/")) or Path(word).is_file(), word
    if "--plugin" in words:
        words[words.index("--plugin") + 1] = "json"  # any importable module: the file is not run here
    words += ["--end-of-command"]  # reported only if everything else parses
    monkeypatch.syspath_prepend("tools")
    main = importlib.import_module("benchmark").main if tool == "benchmark" else cli.execute
    with pytest.raises(ConfigError, match="unrecognized arguments: --end-of-command"):
        main(words if tool == "benchmark" else [tool, *words])
    if (
        tool == "train"
        and words[1].startswith(("configs/", "cifar100/"))
        and "EXPERIMENT.PLUGINS" not in words
    ):
        config.load_config(words[1], [word for word in words[2:] if not word.startswith("--")])


def test_quoted_examples_equal_their_files() -> None:
    text = "".join((ROOT / "docs" / page).read_text() for page in ("custom.md", "library.md"))
    quoted = re.findall(r"```\w+\n# (examples/\S+)\n(.*?)\n```", text, flags=re.S)
    assert {path for path, _ in quoted} == {f"examples/{path.name}" for path in ROOT.glob("examples/*.[py]*")}
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
    assert pages - {path.name for path in ROOT.glob("docs/*.md")} == {"index.md", "configuration.md"}
    known = ("#", "FROM ", "ENV ", "WORKDIR ", "COPY ", "RUN ", "CMD [")
    assert all(line.startswith(known) for line in (ROOT / "Dockerfile").read_text().splitlines())
