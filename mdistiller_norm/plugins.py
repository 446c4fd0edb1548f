"""Plugins: Python files of a user's own that register networks, data sets and methods when they are imported."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from mdistiller_norm.errors import ConfigError


def import_plugin(name: str, beside: Path | None = None) -> str:
    """Import a plugin, unless this process has it already.

    Args:
        name: a file (it ends in ``.py`` or has a slash), or a module that Python finds. A file may import the modules
            that lie beside it.
        beside: the folder in which a file is looked for first; else, and after that, it is the working directory.

    Returns:
        What names the same plugin from the working directory.

    Raises:
        ConfigError: it is not there, or fails while it is imported (because a name that it registers is taken, for
            example); says where.
    """
    if not name.endswith(".py") and "/" not in name:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a user's code may raise, or a script that is no plugin
            raise ConfigError(f"plugin {name} cannot be imported: {_reason(error, Path())}") from error
        return name
    folders = [folder for folder in (beside, Path()) if folder is not None]
    file = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if file is None:
        places = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
        raise ConfigError(f"plugin {name} does not exist in {places}")
    file = file.resolve()
    try:
        _import_file(file)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"plugin {name} cannot be imported: {_reason(error, file)}") from error
    return os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file)


def _import_file(file: Path) -> None:
    # Named by its path: two plugins may have the same name, and one may be called like an installed module.
    name = f"plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last, so that nothing installed is hidden by a file beside a plugin
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _reason(error: BaseException, file: Path) -> str:
    """What went wrong and in which line of the plugin, in one line."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file}:{lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())}"
