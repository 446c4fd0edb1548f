"""Small files, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_text(content: str, path: Path) -> None:
    """Write a UTF-8 text file: whatever happens in between, the old one is there or the whole new one.

    Raises:
        OSError: it cannot be written; the old one is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file, see :func:`write_text`."""
    write_text(json.dumps(content, indent=2) + "\n", path)
