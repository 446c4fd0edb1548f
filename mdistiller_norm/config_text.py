"""What config files and the command line say: keys that are known, values that are not checked yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import nearest


class Setting(NamedTuple):
    """A value as it was written.

    Attributes:
        key: dotted.
        value: as YAML reads it.
        where: for messages: file and line, or ``command line``.
    """

    key: str
    value: Any
    where: str


def read_settings(
    path: str | Path | None, overrides: Sequence[str], tree: Mapping[str, Any], strict: bool = True
) -> list[tuple[str, list[Setting]]]:
    """What a file, its bases and the command line set, each with its source; the later ones win.

    Args:
        path: the file, or None.
        overrides: of the command line.
        tree: all keys and their defaults.
        strict: refuse other keys; else pass over them.

    Raises:
        ConfigError: a file that cannot be read, or a key that cannot be set; names the file and the line.
    """
    blocks: dict[Path, tuple[str, list[Setting]]] = {}
    if path is not None:
        _read_with_bases(Path(path), tree, strict, (), blocks)
    return [*blocks.values(), ("command line", _parse_overrides(overrides, tree, strict))]


def _read_with_bases(
    path: Path,
    tree: Mapping[str, Any],
    strict: bool,
    chain: tuple[Path, ...],
    blocks: dict[Path, tuple[str, list[Setting]]],
) -> None:
    """Append the settings of a file to ``blocks``, after those of its bases. ``chain``: the files that led here."""
    identity = path.resolve()
    if identity in [file.resolve() for file in chain]:
        raise ConfigError(f"_BASE_ goes in a circle: {' -> '.join(str(file) for file in (*chain, path))}")
    if identity in blocks:
        return
    asked = f" (the _BASE_ of {chain[-1]})" if chain else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest(path.name, sorted(file.name for file in path.parent.glob("*.yaml")))
        hint = f": did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise ConfigError(f"config file {path}{asked} does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}{asked} cannot be read: {error}") from None
    bases, settings = _parse_file(text, path, tree, strict)
    for base in bases:
        _read_with_bases(Path(os.path.normpath(path.parent / base)), tree, strict, (*chain, path), blocks)
    blocks[identity] = (str(path), settings)


def _parse_file(text: str, path: Path, tree: Mapping[str, Any], strict: bool) -> tuple[list[str], list[Setting]]:
    """The bases a YAML text names, and its settings; the keys are known ones, the values unchecked."""
    bases: list[str] = []
    settings: list[Setting] = []
    seen: set[str] = set()

    def collect(mapping: yaml.MappingNode, prefix: str) -> None:
        """Add what a mapping, whose keys begin with ``prefix``, sets."""
        for name_node, value_node in mapping.value:
            where = f"{path}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"{where}: a key must be a plain name")
            key = f"{prefix}{name_node.value}"
            if key in seen:
                raise ConfigError(f"{where}: key {key} is given twice")
            seen.add(key)
            if key == "_BASE_":
                value = loader.construct_object(value_node, deep=True)
                bases.extend([value] if isinstance(value, str) else value if isinstance(value, list) else [])
                if not bases or not all(isinstance(base, str) for base in bases):
                    raise ConfigError(f"{where}: _BASE_ must be a path or a list of paths, not {value!r}")
            elif key not in tree:
                if strict:
                    raise ConfigError(f"{where}: {_unknown(key, tree)}")
            elif not isinstance(tree[key], CfgNode):
                value = loader.construct_object(value_node, deep=True)
                if isinstance(tree[key], str) and isinstance(value, bool):
                    value = value_node.value  # YAML takes on and off for true and false; here they are words.
                settings.append(Setting(key, value, where))
            elif isinstance(value_node, yaml.MappingNode):
                collect(value_node, f"{key}.")
            else:
                raise ConfigError(f"{where}: {_is_section(key, tree)}")

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            collect(root, "")
        elif root is not None:
            raise ConfigError(f"{path}:1: a config must be a mapping of keys to values")
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a config: its brackets are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return bases, settings


def _parse_overrides(overrides: Sequence[str], tree: Mapping[str, Any], strict: bool) -> list[Setting]:
    settings = []
    items = iter(overrides)
    for item in items:
        key, equals, text = item.partition("=")
        if key not in tree and strict:
            raise ConfigError(f"command line: {_unknown(key, tree)}")
        if isinstance(tree.get(key), CfgNode):
            raise ConfigError(f"command line: {_is_section(key, tree)}")
        if not equals:
            try:
                text = next(items)
            except StopIteration:
                raise ConfigError(f"command line: {key} has no value: overrides are KEY VALUE pairs") from None
        if key not in tree:
            continue
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        if isinstance(tree[key], str) and not isinstance(value, str | list):
            value = text  # A name may look like a number, or be empty.
        settings.append(Setting(key, value, "command line"))
    return settings


def _unknown(key: str, tree: Mapping[str, Any]) -> str:
    """Message for a key that does not exist; its last name in another section counts as nearest."""
    last = key.rsplit(".", 1)[-1].lower()
    same_name = [known for known in tree if known.rsplit(".", 1)[-1].lower() == last]
    tops = [known for known in tree if "." not in known]
    same_depth = [known for known in tree if known.count(".") == key.count(".")]
    hints = (nearest(key, same_name) or same_name or nearest(key, same_depth))[:3]
    return f"unknown key {key}: " + (
        f"did you mean {' or '.join(hints)}?" if hints else f"the top keys are {', '.join(tops)}"
    )


def _is_section(key: str, tree: Mapping[str, Any]) -> str:
    inside = [known for known, value in tree.items() if known.startswith(f"{key}.") and not isinstance(value, CfgNode)]
    return f"{key} is a section, not a value: set one of {', '.join(inside) or 'its keys (it has none)'}"
