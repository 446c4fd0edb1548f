"""The exact teacher cache: what a teacher said of (image, view) once, it need not say again.

Where a data set can name its augmentations (CIFAR: 81 crops x 2 orientations), the teacher is a fixed function of
(image, view), and its logits are the rows of a table: ``row = index * views + view``. The table is a sparse file beside
the teacher's checkpoint, and a byte a row says whether it is there. Rows are written once and never change, so a run
that fills the table and one that reads it see the same bits.

The rows of the coming steps are known ahead, since the plan of an epoch is a function of the seed: missing ones are
computed together in full batches before those steps, outside of the step itself, and a step only receives its rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from mdistiller_norm.data.base import TrainLoader
from mdistiller_norm.distillers.base import Need
from mdistiller_norm.engine.teacher import LiveTeacher, Raw
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.types import Batch, Outputs

Array = npt.NDArray[Any]
DType = np.dtype[Any]
DTYPES: dict[str, DType] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}
# Steps whose rows are looked up together: enough to gather misses into full batches, few enough to stop in between.
AHEAD = 16


class Use(NamedTuple):
    """How a table was used so far by this process.

    Attributes:
        asked: rows that steps asked for.
        computed: rows that the teacher had to be run for.
    """

    asked: int
    computed: int


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


class CachedTeacher:
    """A teacher whose answers are kept in a table and run for only where they are not there yet.

    Args:
        live: the teacher behind it; reads logits, or logits and the pooled feature.
        loader: training batches with named views.
        checkpoint: the teacher's weights; the table lies beside it.
        data_hash: of the training images and their normalisation.
        classes: C.
        pooled: width D of the pooled feature, where it is needed.
        dtype: of the stored numbers, ``fp32`` or ``fp16``.

    Raises:
        CheckpointError: the table cannot be used, or the disk is too small for what the schedule can fill.
    """

    extra = 1

    def __init__(
        self, live: LiveTeacher, loader: TrainLoader, checkpoint: Path, data_hash: str, classes: int, pooled: int,
        dtype: str,
    ) -> None:  # fmt: skip
        assert loader.views is not None
        self.live, self.loader, self.hash, self.classes = live, loader, live.hash, classes
        self.network = live.network
        self._views = loader.views
        about: dict[str, object] = {
            "teacher": live.hash, "data": data_hash, "views": loader.views, "need": live.need.name,
            "precision": str(live.autocast or torch.float32),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps([about, dtype], sort_keys=True).encode()).hexdigest()[:12]
        width = classes + (pooled if live.need is Need.POOLED else 0)
        folder = checkpoint.parent / f"{checkpoint.name}.cache" / key
        self.table = Table(folder, about, loader.samples * loader.views, width, DTYPES[dtype])
        self._asked = self._computed = 0

    @property
    def use(self) -> Use:
        """How the table was used so far."""
        return Use(self._asked, self._computed)

    def check_space(self, steps: int) -> str:
        """Make sure that the disk holds what that many steps can add.

        Returns:
            A line about the size.

        Raises:
            CheckpointError: too little space.
        """
        new = min(steps * self.loader.batch_size, self.table.rows - len(self.table))
        # Rows are scattered: each may be the first of its block on the disk.
        row_bytes = self.table.width * self.table.dtype.itemsize
        needed = min(new * (row_bytes + 4096), self.table.rows * row_bytes)
        free = shutil.disk_usage(self.table.folder).free
        if free < needed:
            raise CheckpointError(
                f"the teacher cache in {self.table.folder} may need {needed / 1e9:.2f} GB and the disk has "
                f"{free / 1e9:.2f} GB free: make room or set DISTILLER.TEACHER_CACHE off"
            )
        return (
            f"teacher cache {self.table.folder}: {len(self.table):,} of {self.table.rows:,} rows of {row_bytes} bytes "
            f"are there, at most {needed / 1e9:.2f} GB more on disk"
        )

    def rows_of(self, raw: Raw) -> Array:
        """The table's rows for a batch."""
        indices, views = raw[0], raw[1]
        rows: Array = (indices * self._views + views).cpu().numpy()
        return rows

    def feed(self, batches: Iterator[Raw]) -> Iterator[Raw]:
        """See :class:`Teacher`: adds the batch's rows, ``[B, width]`` float32."""
        while ahead := list(islice(batches, AHEAD)):
            rows = [self.rows_of(raw) for raw in ahead]
            values = self._values(np.concatenate(rows)).split_with_sizes([len(part) for part in rows])
            yield from ((*raw, value) for raw, value in zip(ahead, values, strict=True))

    def __call__(self, batch: Batch, *extra: Tensor) -> Outputs:
        """See :class:`Teacher`."""
        (rows,) = extra
        return Outputs(rows[:, : self.classes], (), (), rows[:, self.classes :])

    def fill(self, batches: Iterable[Raw], steps: int) -> Iterator[int]:
        """Compute all rows of the batches ahead of time, a group of batches at each turn.

        Args:
            batches: what a schedule will visit.
            steps: how many they are, for the progress bar.
        """
        with tqdm(total=steps, desc="teacher cache", leave=False, mininterval=0.5, disable=None) as bar:
            stream = iter(batches)
            while ahead := list(islice(stream, AHEAD)):
                self._add(self.table.missing(np.concatenate([self.rows_of(raw) for raw in ahead])))
                bar.update(len(ahead))
                yield len(ahead)

    def _values(self, rows: Array) -> Tensor:
        self._asked += len(rows)
        missing = self.table.missing(rows)
        computed = self._add(missing)
        values = self.table.read(rows)
        if not self.table.writable and len(missing):
            there = np.searchsorted(missing, rows).clip(max=len(missing) - 1)
            values = np.where((missing[there] == rows)[:, None], computed[there], values)
        device = next(self.network.parameters()).device
        result = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        return result.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else result

    def _add(self, rows: Array) -> Array:
        """Run the teacher for these rows, in batches of one size, and keep what it says."""
        self._computed += len(rows)
        size, results = self.loader.batch_size, []
        device = next(self.network.parameters()).device
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            filled = torch.from_numpy(np.resize(part, size)).to(device)  # repeats: one shape, one compiled program
            key = torch.zeros((), dtype=torch.int64, device=device)
            batch = self.loader.prepare(filled // self._views, filled % self._views, key)
            outputs = self.live.run(batch.images)
            wide = [outputs.logits, outputs.pooled] if self.table.width > self.classes else [outputs.logits]
            values = torch.cat([part.float() for part in wide], 1)[: len(part)].cpu().numpy()
            values = values.astype(self.table.dtype)
            if self.table.writable:
                self.table.write(part, values)
            results.append(values)
        return np.concatenate(results) if results else np.empty((0, self.table.width), self.table.dtype)
