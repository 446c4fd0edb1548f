"""Fixed-width rows in a file that processes share, and a copy of them in device memory."""

import errno
import fcntl
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.files import open_lock, whole_file

Array = npt.NDArray[Any]


def to_device(array: Array, device: torch.device) -> Tensor:
    """Copy an array to a device without synchronising. On the CPU, the tensor shares the array's memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _checksums(values: Array) -> Array:
    """Compute the CRC-32 of each row, with the highest bit set: zero marks a row that was never written."""
    return np.array(
        [zlib.crc32(row) | 1 << 31 for row in np.ascontiguousarray(values)], np.uint32
    )


class RowStore:
    """Rows of numbers in one sparse file, shared by the processes of a machine. Each row is written once.

    The rows of a folder that cannot be written are read, and other rows are not stored.

    The file holds a checksum for each row, then the rows. A row is valid if its checksum matches, so a row that a
    crash left half written is missing, and no write has to wait for the disk.
    """

    LAYOUT = "one file, crc32"

    def __init__(self, folder: Path, rows: int, width: int, dtype: torch.dtype) -> None:
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype
        self.row_bytes = width * dtype.itemsize
        self._dtype = np.dtype(np.float16 if dtype is torch.float16 else np.float32)
        self._lock, self._file = folder / "lock", folder / "rows.bin"
        self._header = rows * 4  # bytes of the checksums
        self._file_bytes = self._header + rows * self.row_bytes
        self._thread = ThreadPoolExecutor(1, "teacher-cache")
        self._pending: Future[None] | None = None
        try:
            self.read_only = False
            self._create()
            self._checksums: Array = np.memmap(self._file, np.uint32, "r", shape=rows)
            shape = rows, width
            self._values: Array = np.memmap(self._file, self._dtype, "r", self._header, shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the teacher cache {folder} cannot be used ({error})"
            ) from error

    def _create(self) -> None:
        """Create the file unless it exists; set ``read_only``."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open_lock(self._lock) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._file.exists():
                    with whole_file(self._file) as file:
                        file.truncate(self._file_bytes)
        except OSError as error:
            denied = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            if not (denied and self._file.exists()):
                raise
            self.read_only = True

    def written(self) -> Array:
        """Return the rows that were written, in ascending order; a crash may have made some of them invalid."""
        return np.flatnonzero(self._checksums)

    def is_valid(self, rows: Array) -> Array:
        if self._file.exists() and self._file.stat().st_size < self._file_bytes:
            # Reading the memory map would kill the process.
            raise CheckpointError(f"{self._file} was truncated: remove {self.folder}")
        checksums = self._checksums[rows]
        valid = np.asarray(checksums != 0)
        valid[valid] = _checksums(self.read(rows[valid])) == checksums[valid]
        return valid

    def missing(self, rows: Array) -> Array:
        distinct = np.unique(rows)
        return np.asarray(distinct[~self.is_valid(distinct)])

    def read(self, rows: Array) -> Array:
        return np.asarray(self._values[rows])

    def write(self, rows: Array, values: Array) -> None:
        """Write distinct rows ``[n]`` with values ``[n, width]``; rows that are valid already stay as they are."""
        try:
            with open_lock(self._lock) as lock, self._file.open("r+b", buffering=0) as file:
                fcntl.flock(lock, fcntl.LOCK_EX)
                new = ~self.is_valid(rows)
                values = np.ascontiguousarray(values[new], self._dtype)
                # Not through the memory map, where a full disk would kill the process.
                for row, value, checksum in zip(
                    rows[new], values, _checksums(values), strict=True
                ):
                    os.pwrite(file.fileno(), value, self._header + int(row) * self.row_bytes)
                    os.pwrite(file.fileno(), checksum, int(row) * 4)
        except OSError as error:
            problem = f"the teacher cache {self.folder} cannot be written ({error.strerror})"
            hint = "free space or set DISTILLER.TEACHER_CACHE off"
            raise CheckpointError(f"{problem}: {hint}") from error

    def write_later(self, rows: Array, values: Tensor) -> None:
        """Write rows from any device in a thread, after those of the previous call, whose errors are raised."""
        if self.read_only:
            return
        host = values.to("cpu", non_blocking=True)  # into pinned memory if it comes from a GPU
        ready = (
            torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None
        )

        def write() -> None:
            if ready:
                ready.synchronize()
            self.write(rows, host.numpy())

        self.flush()
        self._pending = self._thread.submit(write)

    def flush(self) -> None:
        """Wait until the rows of the last :meth:`write_later` are written; raise its errors."""
        if self._pending:
            self._pending.result()


class DeviceRows:
    """A store's valid rows in device memory, where a step gathers them without the host."""

    def __init__(self, store: RowStore, device: torch.device) -> None:
        self.store = store
        self._values = torch.zeros(store.rows, store.width, dtype=store.dtype, device=device)
        self._copied = np.zeros(store.rows, bool)
        written = store.written()
        for rows in np.array_split(written, len(written) // 2**17 + 1):
            self.copy_rows(rows[store.is_valid(rows)])

    def absent(self, rows: Array) -> Array:
        return np.asarray(rows[~self._copied[rows]])

    def copy_rows(self, rows: Array) -> None:
        self.write(rows, to_device(self.store.read(rows), self._values.device))

    def write(self, rows: Array, values: Tensor) -> None:
        self._values[to_device(rows, self._values.device)] = values
        self._copied[rows] = True

    def read(self, rows: Tensor) -> Tensor:
        return self._values[rows].float()
