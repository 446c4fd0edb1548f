"""The program that the user started, for messages and child processes."""

import sys
from pathlib import Path

from mdistiller_norm.files import PROJECT


def python_arguments(name: str) -> list[str]:
    """Return the arguments of ``python`` or ``torchrun`` that start a command.

    They are a file in ``tools/`` if the user started this process with one, else ``-m mdistiller_norm NAME``.
    """
    script = Path(sys.argv[0])
    file = script.with_name("make_shards.py" if name == "shards" else f"{name}.py")
    is_tool = script.resolve().parent == PROJECT / "tools" and file.is_file()
    return [str(file)] if is_tool else ["-m", "mdistiller_norm", name]


def command(name: str) -> str:
    """Return a command of this package as the user would type it."""
    first, *others = python_arguments(name)
    return f"mdistiller-norm {name}" if others else f"python {first}"
