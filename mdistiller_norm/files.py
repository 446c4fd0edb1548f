"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PROJECT = Path(__file__).resolve().parents[1]  # contains configs, tools and checkpoints in a checkout


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing that replaces ``path`` at the end, or is deleted after an error.

    Only one process may write a path at a time: the name of the temporary file is fixed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def write_text(content: str, path: Path) -> None:
    """Write a UTF-8 text file atomically."""
    with whole_file(path) as file:
        file.write(content.encode())


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    write_text(json.dumps(content, indent=2) + "\n", path)
