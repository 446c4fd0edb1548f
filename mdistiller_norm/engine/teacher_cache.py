"""The exact teacher cache: what a teacher said of (image, view) once, it need not say again.

Where a data set can name its augmentations (CIFAR: 81 crops x 2 orientations), the teacher is a fixed function of
(image, view), and its logits are the rows of a table: ``row = index * views + view``. The table lies in sparse files
beside the teacher's checkpoint. Rows are written once and never change, so a run that fills the table and one that
reads it see the same bits.

The rows of the coming steps are known ahead, since the plan of an epoch is a function of the seed: missing ones are
computed together in full batches before those steps, outside of the step itself, and a step only receives its rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mdistiller_norm.data.base import TrainLoader
from mdistiller_norm.distillers.base import Need
from mdistiller_norm.engine.cache_table import DTYPES, Array, DeviceRows, Table, Writer, to_device
from mdistiller_norm.engine.teacher import LiveTeacher, Raw
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.types import Batch, Outputs

# Steps whose rows are looked up together: enough to gather misses into full batches, few enough to stop in between.
AHEAD = 16
# How far the answers of a table may be from its teacher's, in shares of their size: half precision comes to a
# hundredth, another kernel or a compiler to much less.
SAME = 0.05
# Images that a GPU's teacher sees at once at least: with fewer, starting its kernels takes longer than they run.
GPU_BATCH = 256


class Use(NamedTuple):
    """How a table was used so far by this process.

    Attributes:
        asked: rows that steps asked for.
        computed: rows that the teacher had to be run for.
    """

    asked: int
    computed: int


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
        CheckpointError: the table cannot be used.
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
        key = hashlib.sha256(json.dumps([about, dtype, Table.LAYOUT], sort_keys=True).encode()).hexdigest()[:12]
        width = classes + (pooled if live.need is Need.POOLED else 0)
        folder = checkpoint.parent / f"{checkpoint.name}.cache" / key
        self.table = Table(folder, about, loader.samples * loader.views, width, DTYPES[dtype])
        self._writer = Writer(self.table) if self.table.writable else None
        self._asked = self._computed = 0
        self.device_rows: DeviceRows | None = None

    @property
    def use(self) -> Use:
        """How the table was used so far."""
        return Use(self._asked, self._computed)

    def summary(self) -> str:
        """A line about :attr:`use`."""
        asked, computed = self.use
        return f"teacher cache: {asked:,} answers read, {computed:,} computed"

    def check_space(self, steps: int) -> str:
        """Make sure that the disk holds what that many steps can add.

        Returns:
            A line about the size.

        Raises:
            CheckpointError: too little space.
        """
        new = min(steps * self.loader.global_batch_size, self.table.rows - len(self.table))
        # Rows are scattered: each may be the first of its block on the disk.
        row_bytes = self.table.row_bytes
        needed = min(new * (row_bytes + 4096), self.table.rows * row_bytes) if self.table.writable else 0
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

    def check_answers(self) -> None:
        """Compare a batch of the table's rows with what the teacher says of them now.

        The table is named by the teacher's weights, and the code that they run in may have changed since.

        Raises:
            CheckpointError: they are another network's answers.
        """
        written = self.table.written()
        size = self.batch_size(self.loader, self._device)
        rows = written[:: -(-len(written) // size)] if len(written) else written
        rows = rows[self.table.there(rows)]
        if not len(rows):
            return
        kept = self.table.read(rows).astype(np.float64)
        said = self._answers(rows).cpu().numpy().astype(np.float64)
        if not np.linalg.norm(kept - said) <= SAME * np.linalg.norm(said):
            raise CheckpointError(
                f"the teacher cache {self.table.folder} holds other answers than the teacher gives: its network's code "
                "has changed, or it is another network with these weights; remove the folder"
            )

    def hold_on_device(self) -> str:
        """Copy the table to the device of the teacher, where that is another one than the host's and has the room.

        Returns:
            A line about it; empty where there is nothing to copy.
        """
        device = self._device
        if device.type != "cuda":
            return ""
        size, free = self.table.rows * self.table.row_bytes, torch.cuda.mem_get_info(device)[0]
        if free < 2 * size:  # half of what is free is left to the training
            return f"the teacher cache stays on the host: {size / 1e9:.2f} GB, {free / 1e9:.2f} GB free on the device"
        self.device_rows = DeviceRows(self.table, device)
        return f"the teacher cache is held on the device: {size / 1e9:.2f} GB"

    def rows_of(self, raws: Iterable[Raw]) -> Tensor:
        """The table's rows for the samples of all batches, on the device."""
        named = list(raws)
        if not named:
            return torch.empty(0, dtype=torch.int64)
        indices, views = (torch.cat([raw[part] for raw in named]) for part in (0, 1))
        return indices * self._views + views

    def feed(self, batches: Iterator[Raw]) -> Iterator[Raw]:
        """See :class:`Teacher`: adds the batch's rows, ``[B, width]`` float32."""
        raws = list(batches)  # a batch's name is small: the rows of an epoch are known in one go
        rows = self.rows_of(raws)
        on_host, start = rows.cpu().numpy(), 0  # the one time that an epoch waits for the device here
        for first in range(0, len(raws), AHEAD):
            ahead = raws[first : first + AHEAD]
            sizes = [len(raw[0]) for raw in ahead]
            part = slice(start, start + sum(sizes))
            start = part.stop
            values = self._values(on_host[part], rows[part]).split_with_sizes(sizes)
            for raw, value in zip(ahead, values, strict=True):
                if raw is raws[-1]:
                    self._written()  # an epoch that came to its end is on the disk
                yield (*raw, value)

    def __call__(self, batch: Batch, *extra: Tensor) -> Outputs:
        """See :class:`Teacher`."""
        (rows,) = extra
        return Outputs(rows[:, : self.classes], (), (), rows[:, self.classes :])

    def fill(self, epochs: Iterable[Iterable[Raw]]) -> Iterator[None]:
        """Compute all rows of the epochs ahead of time, each once and neighbours together, a group at each turn.

        Args:
            epochs: the batches of each that a schedule will visit.
        """
        visited = np.zeros(self.table.rows, bool)
        for raws in epochs:
            visited[self.rows_of(raws).cpu().numpy()] = True
            yield
        rows = np.flatnonzero(visited)
        group = AHEAD * self.batch_size(self.loader, self._device)
        with tqdm(total=len(rows), desc="teacher cache", leave=False, mininterval=0.5, disable=None) as bar:
            for first in range(0, len(rows), group):
                part = rows[first : first + group]
                if self.device_rows:
                    self._bring(self.device_rows.absent(part))
                else:
                    self._compute(self.table.missing(part))
                bar.update(len(part))
                yield
        self._written()

    @staticmethod
    def batch_size(loader: TrainLoader, device: torch.device) -> int:
        """How many images the teacher sees at once."""
        return max(loader.batch_size, GPU_BATCH) if device.type == "cuda" else loader.batch_size

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _written(self) -> None:
        """Wait for the disk."""
        if self._writer:
            self._writer.finish()

    def _values(self, rows: Array, on_device: Tensor) -> Tensor:
        """The table's ``[n, width]`` float32 on the teacher's device; what is not there yet is computed."""
        self._asked += len(rows)
        if self.device_rows:
            self._bring(self.device_rows.absent(np.unique(rows)))
            return self.device_rows.read(on_device)
        missing = self.table.missing(rows)
        computed = self._compute(missing)
        values = self.table.read(rows)
        if len(missing):  # written by now or not
            there = np.searchsorted(missing, rows).clip(max=len(missing) - 1)
            values = np.where((missing[there] == rows)[:, None], computed.cpu().numpy()[there], values)
        return to_device(values.astype(np.float32, copy=False), on_device.device)

    def _bring(self, rows: Array) -> None:
        """Have these rows on the device: the table's, and for the rest what the teacher says."""
        assert self.device_rows
        if not len(rows):
            return
        missing = self.table.missing(rows)
        self.device_rows.put(missing, self._compute(missing))
        self.device_rows.bring(self.device_rows.absent(rows))

    def _compute(self, rows: Array) -> Tensor:
        """What the teacher says of these rows, in batches of one size; the table will have it soon.

        Raises:
            CheckpointError: it is too large for the table's numbers.
        """
        if not len(rows):
            return torch.empty(0, self.table.width, dtype=self.table.torch_dtype, device=self._device)
        self._computed += len(rows)
        values = self._answers(rows)
        # In float32 only a diverged teacher's are not finite, which is refused before.
        if values.dtype is torch.float16 and not values.isfinite().all():
            raise CheckpointError(
                "the teacher's answers are too large for fp16: set DISTILLER.TEACHER_CACHE_PRECISION fp32"
            )
        if self._writer:
            self._writer.add(rows, values)
        return values

    def _answers(self, rows: Array) -> Tensor:
        """What the teacher says of at least one row, in the table's type."""
        size, results = self.batch_size(self.loader, self._device), []
        key = torch.zeros((), dtype=torch.int64, device=self._device)
        for first in range(0, len(rows), size):
            # Repeats fill the last batch up: one shape, one compiled program.
            filled = to_device(np.resize(rows[first : first + size], size), self._device)
            outputs = self.live.run(self.loader.prepare(filled // self._views, filled % self._views, key).images)
            wide = [outputs.logits, outputs.pooled] if self.table.width > self.classes else [outputs.logits]
            results.append(torch.cat([part.float() for part in wide], 1))
        return torch.cat(results)[: len(rows)].to(self.table.torch_dtype)
