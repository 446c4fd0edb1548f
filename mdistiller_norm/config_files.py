"""The command ``config``: show a resolved config, copy a packaged one, list the keys."""

import argparse
import re
from pathlib import Path

from mdistiller_norm.catalog import columns, matches
from mdistiller_norm.config import default_config, leaves, load_config, show
from mdistiller_norm.config_keys import KEYS
from mdistiller_norm.distillers import DISTILLERS
from mdistiller_norm.distillers.base import COMMON_MEANINGS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import CONFIGS, command, find_config, write_text


def main(options: argparse.Namespace) -> int:
    """Run an action of the command."""
    if options.action == "show":
        print(show(load_config(options.file, options.overrides, plugins="skip")))
    elif options.action == "copy":
        print(f"wrote {copy(options.name, options.to)}")
    else:
        print(columns([row for row in describe_keys() if matches(row[0], options.pattern)]))
    return 0


def copy(name: str, to: Path) -> Path:
    """Copy a packaged config to a file or folder; its ``_BASE_`` files become names of packaged configs."""
    source = find_config(name).resolve()
    if not source.is_relative_to(CONFIGS) or not source.is_file():
        raise ConfigError(f"{name} is not a packaged config; see {command('list')} configs")
    if (target := to / source.name if to.is_dir() else to).exists():
        raise ConfigError(f"{target} exists: choose another name")

    def packaged(match: re.Match[str]) -> str:
        bases = [find_config(base, source.parent) for base in match[1].strip("[]").split(", ")]
        names = [str(base.relative_to(CONFIGS).with_suffix("")) for base in bases]
        return f"_BASE_: [{', '.join(names)}]"

    target.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"^_BASE_: (.+)$", packaged, source.read_text(encoding="utf-8"), flags=re.M)
    used = f"{command('train')} --cfg {target}"
    write_text(re.sub(r"python tools/train\.py --cfg \S+", used, text), target)
    return target


def describe_keys() -> list[tuple[str, str, str, str]]:
    """Return name, default, type and meaning of every config key; requirements are part of the meaning."""
    rows = []
    for key, default in leaves(default_config()):
        if key in KEYS:
            meaning = KEYS[key].help + (f" ({KEYS[key].must})" if KEYS[key].must else "")
        else:
            method, _, rest = key.partition(".")
            common = COMMON_MEANINGS.get(key.rpartition(".")[2], "")
            meaning = DISTILLERS[method].meanings.get(rest, common)
        rows.append((key, str(default) or "''", type(default).__name__, meaning))
    return rows
