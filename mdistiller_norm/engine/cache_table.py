"""Rows of numbers in a sparse file, each written once, shared by processes; and a copy of them on a device."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdistiller_norm.errors import CheckpointError

Array = npt.NDArray[Any]
DType = np.dtype[Any]
DTYPES: dict[str, DType] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


class Table:
    """Rows of numbers in a sparse file, each written once; safe with several processes on one machine.

    Args:
        folder: made when it is not there; without permission to write, rows are only read.
        about: what the rows are a function of; a folder made for something else is refused.
        rows: how many there can be.
        width: numbers in a row.
        dtype: of the stored numbers.

    Raises:
        CheckpointError: the folder is of something else, or cannot be used.
    """

    def __init__(self, folder: Path, about: dict[str, object], rows: int, width: int, dtype: DType) -> None:
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype
        self._row_bytes = width * dtype.itemsize
        description = about | {"rows": rows, "width": width, "dtype": dtype.name}
        self.writable = self._create(description)
        try:
            found = json.loads((folder / "about.json").read_text())
            mode = "r+b" if self.writable else "rb"
            self._data, self._valid = ((folder / name).open(mode, buffering=0) for name in ("rows.bin", "valid.bin"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the teacher cache {folder} cannot be read ({error}): remove it") from error
        if found != description:
            raise CheckpointError(f"the teacher cache {folder} was made for something else: remove it")
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        self._flags = np.frombuffer(mmap.mmap(self._valid.fileno(), rows, access=access), np.uint8)
        view = mmap.mmap(self._data.fileno(), rows * self._row_bytes, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(view, dtype).reshape(rows, width)

    def _create(self, description: dict[str, object]) -> bool:
        """Make the files if need be; whether they can be written."""
        about = self.folder / "about.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if not about.exists():
                    for name, size in (("rows.bin", self.rows * self._row_bytes), ("valid.bin", self.rows)):
                        with (self.folder / name).open("wb") as file:
                            file.truncate(size)
                    with (self.folder / "valid.bin").open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, self.rows)  # a full disk must not kill a later write
                    temporary = self.folder / ".about.json"
                    temporary.write_text(json.dumps(description, indent=2))
                    temporary.replace(about)
            return True
        except PermissionError:
            return False
        except OSError as error:
            raise CheckpointError(f"the teacher cache {self.folder} cannot be made ({error})") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def there(self, rows: Array) -> Array:
        """Which of the rows are there: booleans of the same shape."""
        found: Array = self._flags[rows] != 0
        return found

    def missing(self, rows: Array) -> Array:
        """Those of the rows that are not there, each once, in ascending order."""
        wanted = np.unique(rows)
        absent: Array = wanted[self._flags[wanted] == 0]
        return absent

    def write(self, rows: Array, values: Array) -> None:
        """Add rows ``[n]`` with values ``[n, width]``; those that another process added meanwhile stay as they are.

        Raises:
            CheckpointError: the disk is full, or fails.
        """
        values = np.ascontiguousarray(values, self.dtype)
        try:
            with self._locked():
                new = self._flags[rows] == 0
                for row, value in zip(rows[new].tolist(), values[new], strict=True):
                    os.pwrite(self._data.fileno(), value.tobytes(), row * self._row_bytes)
                os.fdatasync(self._data.fileno())  # a row is declared valid only when it is on the disk
                self._flags[rows[new]] = 1
        except OSError as error:
            raise CheckpointError(
                f"the teacher cache {self.folder} cannot be written ({error.strerror}): free space or set "
                "DISTILLER.TEACHER_CACHE off; the rows that are there are good"
            ) from error

    def read(self, rows: Array) -> Array:
        """The values ``[n, width]`` of rows that are there."""
        values: Array = self._rows[rows]
        return values

    def __len__(self) -> int:
        """How many rows are there."""
        return int(np.count_nonzero(self._flags))


class DeviceRows:
    """A table's rows in the memory of a device, where a step's are gathered without the host.

    Args:
        table: its rows that are there are copied at once, the others by :meth:`bring`.
        device: needs ``table.rows`` times ``table.width`` numbers of the table's type.
    """

    _CHUNK = 2**17

    def __init__(self, table: Table, device: torch.device) -> None:
        self.table = table
        kind = torch.float16 if table.dtype == np.float16 else torch.float32
        self._values = torch.zeros(table.rows, table.width, dtype=kind, device=device)
        self._here = np.zeros(table.rows, bool)
        for first in range(0, table.rows, self._CHUNK):
            chunk = np.arange(first, min(first + self._CHUNK, table.rows))
            self.bring(chunk[table.there(chunk)])

    def bring(self, rows: Array) -> None:
        """Copy those of the rows, all of which are in the table, that are not here yet."""
        new = rows[~self._here[rows]]
        if len(new):
            values = torch.from_numpy(np.ascontiguousarray(self.table.read(new)))
            self._values[torch.from_numpy(new).to(self._values.device)] = values.to(self._values.device)
            self._here[new] = True

    def read(self, rows: Tensor) -> Tensor:
        """The values ``[n, width]``, float32, of rows that were brought."""
        return self._values[rows].float()
