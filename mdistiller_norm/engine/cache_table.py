"""Rows of numbers in sparse files, each written once, shared by processes; and a copy of them on a device."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.files import write_json

Array = npt.NDArray[Any]
DType = np.dtype[Any]
DTYPES: dict[str, DType] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


# A table is a row of files of about this size: small enough to copy, to list and for any file system.
SHARD_BYTES = 2**28


def to_device(array: Array, device: torch.device) -> Tensor:
    """An array on a device, without waiting for what that still has to do; on the CPU the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _checks(values: Array) -> Array:
    """CRC-32 of each row, with the highest bit set: zero says that there is no row."""
    sums = np.fromiter((zlib.crc32(row) for row in np.ascontiguousarray(values)), np.uint32, len(values))
    checks: Array = sums | np.uint32(1 << 31)
    return checks


class Table:
    """Rows of numbers in sparse files, each row written once; safe with several processes on one machine.

    Beside the files of rows lies one of checksums, and a row is there if its checksum says so: what a crash of the
    machine left half written counts as missing, and nobody has to wait for the disk.

    Args:
        folder: made when it is not there; without permission to write, rows are only read.
        about: what the rows are a function of; a folder made for something else is refused.
        rows: how many there can be.
        width: numbers in a row.
        dtype: of the stored numbers.
        shard_rows: how many are in a file; what fills ``SHARD_BYTES`` unless told.

    Raises:
        CheckpointError: the folder is of something else, or cannot be used.
    """

    LAYOUT = "shards, crc32"

    def __init__(
        self, folder: Path, about: dict[str, object], rows: int, width: int, dtype: DType, shard_rows: int = 0
    ) -> None:
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype
        self.row_bytes = width * dtype.itemsize
        self.torch_dtype = torch.float16 if dtype == np.float16 else torch.float32
        self._shard_rows = shard_rows or max(1, SHARD_BYTES // self.row_bytes)
        self._shards: dict[int, Array] = {}
        description = about | {
            "rows": rows, "width": width, "dtype": dtype.name, "layout": self.LAYOUT, "shard_rows": self._shard_rows,
        }  # fmt: skip
        self.writable = self._create(description)
        if not self.writable and not (folder / "about.json").exists():
            raise CheckpointError(
                f"the teacher cache {folder} cannot be made: put the teacher's weights where one can write beside "
                "them, or set DISTILLER.TEACHER_CACHE off"
            )
        try:
            found = json.loads((folder / "about.json").read_text())
            with (folder / "checks.bin").open("r+b" if self.writable else "rb") as file:
                access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
                self._there = np.frombuffer(mmap.mmap(file.fileno(), rows * 4, access=access), np.uint32)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"the teacher cache {folder} cannot be read ({error}): remove it") from error
        if found != description:
            raise CheckpointError(f"the teacher cache {folder} was made for something else: remove it")

    def _create(self, description: dict[str, object]) -> bool:
        """Make the files if need be; whether they can be written."""
        about = self.folder / "about.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if not about.exists():
                    with (self.folder / "checks.bin").open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, self.rows * 4)  # a full disk must not kill a later write
                    write_json(description, about)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return False
            raise CheckpointError(f"the teacher cache {self.folder} cannot be made ({error})") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _path(self, number: int) -> Path:
        return self.folder / f"rows-{number:04d}.bin"

    def _shard_bytes(self, number: int) -> int:
        return min(self._shard_rows, self.rows - number * self._shard_rows) * self.row_bytes

    def _shard(self, number: int) -> Array | None:
        """A file of rows, to read; None while nobody has begun it."""
        if number not in self._shards:
            path = self._path(number)
            try:
                with path.open("rb") as file:
                    view = mmap.mmap(file.fileno(), self._shard_bytes(number), access=mmap.ACCESS_READ)
            except FileNotFoundError:
                return None
            except (OSError, ValueError) as error:
                raise CheckpointError(f"the teacher cache's {path} cannot be read ({error}): remove it") from error
            self._shards[number] = np.frombuffer(view, self.dtype).reshape(-1, self.width)
        return self._shards[number]

    def there(self, rows: Array) -> Array:
        """Which of the rows ``[n]`` are there: ``[n]`` booleans.

        Raises:
            CheckpointError: a file of rows cannot be read.
        """
        wanted: Array = self._there[rows]
        found: Array = wanted != 0
        found[found] = _checks(self.read(rows[found])) == wanted[found]
        return found

    def missing(self, rows: Array) -> Array:
        """Those of the rows that are not there, each once, in ascending order."""
        wanted = np.unique(rows)
        absent: Array = wanted[~self.there(wanted)]
        return absent

    def write(self, rows: Array, values: Array) -> None:
        """Add rows ``[n]`` with values ``[n, width]``; those that another process added meanwhile stay as they are.

        Raises:
            CheckpointError: the disk is full, or fails.
        """
        values = np.ascontiguousarray(values, self.dtype)
        try:
            with self._locked():
                new = ~self.there(rows)
                order = np.argsort(rows[new])
                rows, values = rows[new][order], values[new][order]
                for number in np.unique(rows // self._shard_rows).tolist():
                    mine = rows // self._shard_rows == number
                    self._write_shard(number, rows[mine] - number * self._shard_rows, values[mine])
                self._there[rows] = _checks(values)
        except OSError as error:
            raise CheckpointError(
                f"the teacher cache {self.folder} cannot be written ({error.strerror}): free space or set "
                "DISTILLER.TEACHER_CACHE off; the rows that are there are good"
            ) from error

    def _write_shard(self, number: int, rows: Array, values: Array) -> None:
        """Neighbours in one go. Not through the mapping: there a full disk would kill the process."""
        path = self._path(number)
        if not path.exists():
            temporary = path.with_suffix(".new")  # readers see it in its full size or not at all
            with temporary.open("wb") as file:
                file.truncate(self._shard_bytes(number))
            temporary.replace(path)
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        with path.open("r+b", buffering=0) as file:
            for first, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
                os.pwrite(file.fileno(), values[first:end].data, int(rows[first]) * self.row_bytes)

    def read(self, rows: Array) -> Array:
        """The values ``[n, width]`` of rows that are there; zeros, or what was left of it, for one that is not.

        Raises:
            CheckpointError: a file of rows cannot be read.
        """
        values = np.zeros((len(rows), self.width), self.dtype)
        numbers = rows // self._shard_rows
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            if (shard := self._shard(number)) is not None:
                values[mine] = shard[rows[mine] - number * self._shard_rows]
        return values

    def written(self) -> Array:
        """The rows that were written, in ascending order; :meth:`there` tells whether they arrived."""
        return np.flatnonzero(self._there)

    def __len__(self) -> int:
        """How many rows were written."""
        return int(np.count_nonzero(self._there))


class Writer:
    """Adds rows to a table in a thread of its own: training waits neither for the device nor for the disk.

    Args:
        table: that is writable.
    """

    # Groups of rows that may wait: a disk that is slower than the training slows it down, and the memory stays.
    LIMIT = 8

    def __init__(self, table: Table) -> None:
        self.table = table
        self._thread = ThreadPoolExecutor(1, "teacher-cache")
        self._pending: deque[Future[None]] = deque()

    def add(self, rows: Array, values: Tensor) -> None:
        """Write rows ``[n]`` with values ``[n, width]``, from any device, soon.

        Raises:
            CheckpointError: see :meth:`Table.write`; of these rows or of ones added before.
        """
        host = values.to("cpu", non_blocking=True)  # into pinned memory, if it comes from a GPU
        ready = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        self._pending.append(self._thread.submit(self._write, rows, host, ready))
        self.finish(self.LIMIT)

    def finish(self, leave: int = 0) -> None:
        """Wait until at most that many groups of rows are not written yet; raises as :meth:`add`."""
        while len(self._pending) > leave:
            self._pending.popleft().result()

    def _write(self, rows: Array, values: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready:
            ready.synchronize()
        self.table.write(rows, values.numpy())


class DeviceRows:
    """A table's rows in the memory of a device, where a step's are gathered without the host.

    Args:
        table: its rows that are there are copied at once, the others by :meth:`bring` and :meth:`put`.
        device: needs ``table.rows`` times ``table.width`` numbers of the table's type.
    """

    _CHUNK = 2**17

    def __init__(self, table: Table, device: torch.device) -> None:
        self.table = table
        self._values = torch.zeros(table.rows, table.width, dtype=table.torch_dtype, device=device)
        self._here = np.zeros(table.rows, bool)
        for first in range(0, table.rows, self._CHUNK):
            chunk = np.arange(first, min(first + self._CHUNK, table.rows))
            self.bring(chunk[table.there(chunk)])

    def absent(self, rows: Array) -> Array:
        """Those of the rows that are not here."""
        new: Array = rows[~self._here[rows]]
        return new

    def bring(self, rows: Array) -> None:
        """Copy rows that the table has."""
        self.put(rows, to_device(self.table.read(rows), self._values.device))

    def put(self, rows: Array, values: Tensor) -> None:
        """Keep rows ``[n]`` with values ``[n, width]``, which are on the device."""
        self._values[to_device(rows, self._values.device)] = values
        self._here[rows] = True

    def read(self, rows: Tensor) -> Tensor:
        """The values ``[n, width]``, float32, of rows that are here."""
        return self._values[rows].float()
