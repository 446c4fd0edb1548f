"""Files, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PROJECT = Path(__file__).resolve().parents[1]  # with configs, tools and checkpoints, where it is a checkout


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to: whatever happens in between, the old one is there or the whole new one.

    A process that is killed leaves a hidden file, which the next one overwrites: no two may write at the same time.

    Raises:
        OSError: it cannot be written; the old one is intact.
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
    """Write a UTF-8 text file, see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(content.encode())


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file, see :func:`whole_file`."""
    write_text(json.dumps(content, indent=2) + "\n", path)
