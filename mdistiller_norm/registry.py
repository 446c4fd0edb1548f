"""Registries of networks, data sets and methods, and the plugins (Python files or modules) that add to them."""

import difflib
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from mdistiller_norm.errors import ConfigError

T = TypeVar("T")
PLUGINS: list[ModuleType] = []  # imported plugins


def nearest(name: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three candidates that are similar to ``name``, ignoring case, the best first."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    return [
        by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)
    ]


def not_registered(name: str) -> str:
    """Return a hint if a plugin defines an object of this name, which it then did not register."""
    file = next((plugin.__file__ for plugin in PLUGINS if name in vars(plugin)), "")
    hint = "decorate it (methods: @distillers.register)"
    return f"{name} in {file} is not registered: {hint}" if file else ""


def suggest(name: str, candidates: Collection[str]) -> str:
    """Return a hint for an unknown name: register it, or the nearest candidates, or all if none is similar."""
    if hint := not_registered(name):
        return hint
    if near := nearest(name, candidates):
        return f"did you mean {' or '.join(near)}?"
    return f"choose from {', '.join(sorted(candidates))}"


class Registry(dict[str, T]):
    """Registered objects by name; ``kind`` names their kind in messages ("model", "distiller")."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under ``name``."""

        def add(entry: T) -> T:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self[name] = entry
            return entry

        return add

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(f"unknown {self.kind} {name!r}: {suggest(name, self)}")


def import_plugin(name: str, beside: Path = Path()) -> str:
    """Import a plugin, unless this process has imported it already; return its name from the working directory.

    Args:
        name: a file (``.py`` or with a slash), which can import the modules in its folder, or a module.
        beside: folder in which a file is searched first, before the working directory.
    """
    file = None
    if name.endswith(".py") or "/" in name:
        file = next(
            (path.resolve() for path in (beside / name, Path(name)) if path.is_file()), None
        )
        if file is None:
            folders = " or ".join(
                dict.fromkeys(str(folder.resolve()) for folder in (beside, Path()))
            )
            raise ConfigError(f"plugin {name} does not exist in {folders}")
    try:
        if file is None:
            PLUGINS.append(importlib.import_module(name))
            return name
        _import_file(file)
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        raise ConfigError(f"plugin {name} cannot be imported: {_reason(error, file)}") from error
    return os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file)


def _import_file(file: Path) -> None:
    # The path makes the module name unique, also among installed modules.
    name = f"plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last: it must not hide installed modules
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    try:
        SourceFileLoader(name, str(file)).exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    PLUGINS.append(module)


def _reason(error: BaseException, file: Path | None) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    place = f"{file}:{lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())}"
