"""Hooks of mkdocs: the pages outside docs/, and the configuration page generated from the package's table of keys."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "results/*.md",
    "results/h100/*.json",
    "checkpoints/README.md",
)
INTRODUCTION = """# Configuration

A config file sets the keys that differ from these defaults. `_BASE_: other.yaml`, or a list, includes other files,
relative to the file, or packaged ones by name (`_BASE_: digits/normkd`). Precedence, lowest first: bases in order, the
file, `KEY VALUE` pairs on the command line. Keys are nested (`SOLVER: {LR: 0.1}`) or dotted (`SOLVER.LR: 0.1`).
"""


def configuration() -> str:
    """Return the configuration page: one table for each section and one for the nodes of the methods."""
    from mdistiller_norm.config_files import describe_keys
    from mdistiller_norm.config_keys import KEYS

    tables: dict[str, list[str]] = {}
    for key, default, kind, meaning in describe_keys():
        section = key.split(".")[0] if key in KEYS else "Methods"
        tables.setdefault(section if "." in key else "Run", []).append(
            f"| `{key}` | `{default}` | {kind} | {meaning} |\n"
        )
    page = INTRODUCTION
    for section, rows in tables.items():
        header = "| key | default | type | meaning |\n| --- | --- | --- | --- |\n"
        page += f"\n## {section}\n\n{header}{''.join(sorted(rows))}"
    return page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated page and the repository's pages outside docs/."""
    files.append(File.generated(config, "configuration.md", content=configuration()))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        files.append(
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Adapt relative links to a site whose root is both the repository and docs/."""
    uri = page.file.src_uri
    if "/" in uri:
        return markdown.replace("](../docs/", "](../")
    if uri in ("index.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        return markdown.replace("](docs/", "](")
    return re.sub(r"\]\(\.\./", "](", markdown)
