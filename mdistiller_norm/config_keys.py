"""Config keys and config files: the table of keys with their checks, and YAML files read as text by dotted key."""

import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from mdistiller_norm.distillers.temperature import STATISTICS, WEIGHTINGS
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.files import command, find_config, package_data, regular
from mdistiller_norm.registry import nearest, not_registered

Settings = dict[str, tuple[Any, str]]  # dotted key -> text, or list of texts, and its source
_LARGEST, _LARGEST_FILE = 10_000, 2**20  # keys of a file, which aliases can multiply, and bytes
# Requirement -> function that tests it. "one of a, b, ..." has none.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "": lambda x: True,
    "> 0": lambda x: min(x if isinstance(x, list) else [x]) > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "in [0, 2**63)": lambda x: 0 <= x < 2**63,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
    "in [0, 0.5]": lambda x: 0 <= x <= 0.5,
    "in [0, 30]": lambda x: 0 <= x <= 30,
    "valid UTF-8": lambda x: x.encode() is not None,  # raises a ValueError
    "the name of one folder, without /": lambda x: "/" not in x and x not in (".", ".."),
    "the name of one folder, without /, and not empty": lambda x: (
        x.encode() != b"" and "/" not in x and x not in (".", "..")
    ),
    "[] or three numbers in [0, 1]": lambda x: len(x) in (0, 3) and all(0 <= v <= 1 for v in x),
    "[] or three numbers in (0, 1]": lambda x: len(x) in (0, 3) and all(0 < v <= 1 for v in x),
    "two areas with 0 < first <= second <= 1": lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
    "increasing epochs >= 1": lambda x: x == sorted(set(x)) and min(x, default=1) >= 1,
    "different names": lambda x: len(set(x)) == len(x),
    "NONE or different methods": lambda x: isinstance(x, str) or len({"NONE", *x}) == len(x) + 1,
}


class Key(NamedTuple):
    """A key of ``config_keys.yaml``; ``must`` is its requirement."""

    default: Any
    help: str
    must: str = ""
    several: bool = False
    path: bool = False
    items: Any = None


_SOURCE = package_data("config_keys.yaml")
# Every registered distiller adds a node under its name, see default_config.
KEYS = {name: Key(**entry) for name, entry in _SOURCE["keys"].items()}
REMOVED = {name: Key(**entry) for name, entry in _SOURCE["removed"].items()}
# Last part of a key in the node of a method -> requirement.
_METHOD_KEYS = _SOURCE["methods"] | {
    "STATISTIC": f"one of {', '.join(STATISTICS)}",
    "WEIGHTING": f"one of {', '.join(WEIGHTINGS)}",
}
_TYPES = {bool: "true or false", int: "an integer", float: "a finite number", str: "valid text"}
_BRACKETS = re.compile(r"\s*(\[.*\]|\(.*\))\s*", re.DOTALL)


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
        found = (
            yaml.load(regular(path, _LARGEST_FILE).read_text(encoding="utf-8"), TextLoader) or {}
        )
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


def check_value(key: str, value: Any, defaults: Mapping[str, Any], source: str) -> Any:
    """Return the value of a dotted key, a text or a list of texts, in the type of its default.

    ``defaults`` are those of every key and section; ``source`` is of the value, for the message.
    """
    if key not in defaults:
        raise ConfigError(f"{source}: unknown key {key}{_hint(key, defaults)}")
    default = defaults[key]
    if isinstance(default, CfgNode):
        hint = f"set one of its keys, such as {key}.{next(iter(default), '')}"
        raise ConfigError(f"{source}: {key} is a section: {hint}")
    about = KEYS.get(key) or Key(default, "", _METHOD_KEYS.get(key.rpartition(".")[2], ""))
    requirement, is_list = about.must, isinstance(default, list)
    several = is_list or about.several or key == "KD.TEMPERATURE"
    item = [*default, about.items][0] if is_list else default
    try:
        if several and isinstance(value, str) and _BRACKETS.fullmatch(value):
            value = yaml.load(f"[{value.strip()[1:-1]}]", TextLoader)
        if is_list and isinstance(value, str):
            raise TypeError
        if is_list or (several and value and isinstance(value, list)):
            result: Any = [_convert(key, each, item) for each in value]
        else:
            result = _convert(key, value, default)
        names = requirement.removeprefix("one of ")
        valid = (
            result in names.split(", ") if names != requirement else _CHECKS[requirement](result)
        )
    except (TypeError, ValueError, KeyError, RecursionError, yaml.YAMLError):
        kind = _TYPES.get(type(item), "a value")
        valid, requirement = False, f"a list (each item {kind})" if is_list else kind
    if not valid:
        got = value if isinstance(value, str) and value else reprlib.repr(value)
        raise ConfigError(f"{source}: {key} must be {requirement}, got {got}")
    return result


def _hint(key: str, known: Iterable[str]) -> str:
    last = f".{key.rpartition('.')[2]}".lower()
    same_name = [name for name in known if name.lower().endswith(last)]
    section = [name for name in known if name.startswith(f"{key.partition('.')[0]}.")]
    near = nearest(key, same_name) or same_name or nearest(key, section) or nearest(key, known)
    if key in REMOVED:
        return f": it was removed, {REMOVED[key].help.format(command('reproduce'))}"
    if hint := not_registered(key.split(".")[0]):
        return f": {hint}"
    return f": did you mean {' or '.join(near[:3])}?" if near else ""


def _convert(key: str, text: Any, default: Any) -> Any:
    if not isinstance(text, str) or "\0" in text:
        raise TypeError
    os.fsencode(text)  # raises a ValueError for lone surrogates
    if isinstance(default, bool):
        return yaml.SafeLoader.bool_values[text.lower()]
    result = type(default)(text)
    if isinstance(result, str):
        return os.path.expanduser(result) if key in KEYS and KEYS[key].path else result
    if not math.isfinite(result):
        raise ValueError
    return result
