"""Files and commands of the package, and atomic writing of files."""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

PACKAGE = Path(__file__).resolve().parent
# Contains configs and checkpoints: the installed package, or the checkout that contains the package.
PROJECT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent
CONFIGS = PROJECT / "configs"


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


def package_data(name: str) -> Any:
    """Return the content of a YAML file of the package."""
    return yaml.safe_load((PACKAGE / name).read_text(encoding="utf-8"))


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """Return the path of a config file in a folder, else of the packaged one, else the path in the folder.

    The suffix ``.yaml`` and, for packaged files, the leading ``configs/`` may be left out.
    """
    local = Path(os.path.normpath(folder / name))
    packaged = CONFIGS / str(name).removeprefix("configs/")
    candidates = [
        Path(f"{path}{suffix}") for path in (local, packaged) for suffix in ("", ".yaml")
    ]
    return next((path for path in candidates if path.is_file()), local)


def regular(path: Path, largest: int | None = None) -> Path:
    """Return the path of a regular file of at most ``largest`` bytes; raise an OSError for others, such as a FIFO."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if largest is not None and status.st_size > largest:
        raise OSError(errno.EFBIG, f"larger than {largest:,} bytes", str(path))
    return path


@contextmanager
def whole_file(path: Path, keep: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing that replaces ``path`` at the end, or is deleted after an error.

    Only one process may write a path at a time: the name of the temporary file is fixed. The previous version is
    renamed to ``keep``, if given.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process; a symbolic link is not followed
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def open_lock(path: Path) -> IO[str]:
    """Open a lock file for appending, without following a symbolic link."""
    return os.fdopen(
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a"
    )


def write_text(content: str, path: Path) -> None:
    """Write a UTF-8 text file atomically."""
    with whole_file(path) as file:
        file.write(content.encode())


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    write_text(json.dumps(content, indent=2) + "\n", path)
