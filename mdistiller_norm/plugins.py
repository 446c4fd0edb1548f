"""Import plugins: Python files or modules that register networks, data sets and methods."""

import hashlib
import importlib
import os
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from mdistiller_norm.errors import ConfigError
from mdistiller_norm.registry import PLUGINS


def import_plugin(name: str, beside: Path = Path()) -> str:
    """Import a plugin, unless this process has imported it already; return its name from the working directory.

    Args:
        name: a file (``.py`` or with a slash), which can import the modules in its folder, or a module.
        beside: folder in which a file is searched first, before the working directory.
    """
    file = None
    if name.endswith(".py") or "/" in name:
        file = next((path.resolve() for path in (beside / name, Path(name)) if path.is_file()), None)
        if file is None:
            folders = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in (beside, Path())))
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
