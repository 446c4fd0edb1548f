"""Config files: YAML with bases and merge keys, read as text by dotted key."""

import os
from pathlib import Path
from typing import Any

import yaml

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import find_config, regular
from mdistiller_norm.program import command

Settings = dict[str, tuple[Any, str]]  # dotted key -> text, or list of texts, and its source
_LARGEST, _LARGEST_FILE = 10_000, 2**20  # keys of a file, which aliases can multiply, and bytes


class TextLoader(yaml.BaseLoader):
    """Loads every scalar as text, nested mappings as dotted keys, and the merge keys (``<<``) of YAML 1.1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        settings: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = self.construct_scalar(name_node)
            value = self.construct_object(value_node, deep=True)
            if name == "<<":
                for base in value if isinstance(value, list) else [value]:
                    if not isinstance(base, dict):
                        raise yaml.YAMLError("<< must be a mapping or a list of mappings")
                    merged = _replace(base, merged)  # the first one wins
                continue
            found = {name: value}
            if isinstance(value, dict):
                found = {f"{name}.{key}": inner for key, inner in value.items()}
            if twice := settings.keys() & found.keys():
                raise yaml.YAMLError(f"key {min(twice)} is given twice")
            settings |= found
            if len(settings) > _LARGEST:
                raise yaml.YAMLError(f"it has more than {_LARGEST:,} keys")
        return _replace(merged, settings)


def _replace(settings: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    names = {key.split(".")[0] for key in by}
    return {key: value for key, value in settings.items() if key.split(".")[0] not in names} | by


def read_settings(path: Path) -> dict[str, Any]:
    """Return the text, or list of texts, of each dotted key of a file."""
    try:
        found = yaml.load(regular(path, _LARGEST_FILE).read_text(encoding="utf-8"), TextLoader) or {}
        if not isinstance(found, dict):
            raise ValueError("it must be a mapping of keys to values")
    except FileNotFoundError:
        hint = f"see {command('list')} configs"
        raise ConfigError(f"config file {path} does not exist; {hint}") from None
    except (OSError, ValueError, RuntimeError, ArithmeticError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} cannot be read: {reason}") from None
    return found


def read_file(path: Path, done: set[Path]) -> Settings:
    """Return the settings of a file, unless it was read before, on top of those of its bases."""
    found = read_settings(path)
    if path.resolve() in done:
        return {}
    done.add(path.resolve())
    bases = found.pop("_BASE_", [])
    settings: Settings = {}
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: _BASE_ must be a file or a list of files")
        settings |= read_file(find_config(os.path.expanduser(base), path.parent), done)
    return settings | {key: (value, str(path)) for key, value in found.items()}
