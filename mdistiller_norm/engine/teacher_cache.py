"""Exact cache of a teacher's outputs.

Where a data set enumerates its augmentations (CIFAR: 81 crops x 2 orientations), the teacher is a fixed function of
(image, view), and its logits are row ``index * views + view`` of a store beside the teacher's checkpoint. The rows of
the next steps follow from the seed: missing ones are computed before these steps, in full batches.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdistiller_norm.data import MemoryTrainLoader
from mdistiller_norm.data.base import Tensors
from mdistiller_norm.distillers.base import Need
from mdistiller_norm.engine.row_store import Array, DeviceRows, RowStore, to_device
from mdistiller_norm.engine.runtime import progress
from mdistiller_norm.engine.teacher import Teacher
from mdistiller_norm.errors import CheckpointError
from mdistiller_norm.types import Batch, Outputs

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
PREFETCH_STEPS = 16  # steps whose missing rows are computed together
TOLERANCE = 0.05  # relative; half precision changes outputs by one hundredth
MIN_GPU_BATCH = 256  # fewer images do not use a GPU fully


class CachedTeacher(Teacher):
    """A teacher that runs only for the rows that its store lacks.

    Args:
        checkpoint: of the teacher; the store is beside it.
        pooled: width D of the pooled feature, which is stored if a method reads it.
        dtype: of the store, fp32 or fp16.
        teacher: other arguments of :class:`Teacher`.
    """

    extra = 1

    def __init__(
        self, loader: MemoryTrainLoader, checkpoint: Path, pooled: int, dtype: str, *teacher: Any
    ) -> None:
        super().__init__(*teacher)
        self.loader, self.classes = loader, self.network.num_classes
        self._views, self._device = loader.augment.views, next(self.network.parameters()).device
        on_gpu = self._device.type == "cuda"
        self._batch_size = max(loader.batch_size, MIN_GPU_BATCH) if on_gpu else loader.batch_size
        description = {
            "teacher": self.hash,
            "data": loader.fingerprint(),
            "views": self._views,
            "need": self.need.name,
            "precision": str(self.autocast or torch.float32),
        }
        key = json.dumps([description, dtype, RowStore.LAYOUT], sort_keys=True).encode()
        folder = Path(f"{checkpoint}.cache", hashlib.sha256(key).hexdigest()[:12])
        width = self.classes + (pooled if self.need is Need.POOLED else 0)
        self.store = RowStore(folder, loader.samples * self._views, width, DTYPES[dtype])
        self.requested = self.computed = 0  # rows
        self.device_rows: DeviceRows | None = None

    def summary(self) -> str:
        access = " (read-only)" if self.store.read_only else ""
        return (
            f"teacher cache: {len(self.store.written()):,} of {self.store.rows:,} rows are stored in "
            f"{self.store.folder}{access}; {self.requested:,} were read and {self.computed:,} computed"
        )

    def check_outputs(self) -> None:
        """Compare a batch of stored rows with the teacher's outputs, since the network's code may have changed."""
        written = self.store.written()
        rows = written[:: len(written) // self._batch_size + 1]
        rows = rows[self.store.is_valid(rows)]
        stored = self.store.read(rows).astype(np.float64)
        computed = self._run(rows).cpu().numpy().astype(np.float64) if len(rows) else stored
        if not np.linalg.norm(stored - computed) <= TOLERANCE * np.linalg.norm(computed):
            raise CheckpointError(f"{self.store.folder} does not match the teacher: remove it")

    def hold_on_device(self) -> str:
        """Copy the store to the teacher's device if that is a GPU with room for it; return a line about it, or ""."""
        if self._device.type != "cuda":
            return ""
        size, free = self.store.rows * self.store.row_bytes, torch.cuda.mem_get_info()[0]
        if fits := free >= 2 * size:  # half is left for training
            self.device_rows = DeviceRows(self.store, self._device)
        place = "is held on the device" if fits else "stays on the host"
        return f"the teacher cache {place}: {size / 1e9:.2f} GB, {free / 1e9:.2f} GB were free"

    def row_indices(self, raws: Iterable[Tensors]) -> Tensor:
        return torch.cat([raw[0] * self._views + raw[1] for raw in raws])

    def with_teacher_outputs(self, batches: Iterator[Tensors]) -> Iterator[Tensors]:
        """Yield the batches of an epoch with the stored rows of their samples appended."""
        raws = list(batches)  # only indices and views
        rows = self.row_indices(raws)
        host_rows = rows.cpu().numpy()  # the one host-device synchronisation of an epoch
        start = 0
        for first in range(0, len(raws), PREFETCH_STEPS):
            group = raws[first : first + PREFETCH_STEPS]
            sizes = [len(raw[0]) for raw in group]
            part = slice(start, start + sum(sizes))
            start, host = part.stop, host_rows[part]
            self.requested += len(host)
            missing, computed = self._compute_missing(host)
            if self.device_rows:
                values = self.device_rows.read(rows[part])
            else:
                values = to_device(self.store.read(host).astype(np.float32), self._device)
                new = np.isin(host, missing)
                found = computed[np.searchsorted(missing, host[new])]
                values[to_device(new, self._device)] = found.float()
            for raw, value in zip(group, values.split_with_sizes(sizes), strict=True):
                yield (*raw, value)
        self.store.flush()  # a finished epoch is on the disk

    def __call__(self, batch: Batch, *extra: Tensor) -> Outputs:
        (rows,) = extra  # [B, C] or [B, C + D]
        return Outputs(rows[:, : self.classes], (), (), rows[:, self.classes :])

    def fill(self, epochs: Iterable[Iterable[Tensors]]) -> Iterator[None]:
        """Compute the missing rows of these epochs' batches. Yields after each group, so that it can be stopped."""
        if self.store.read_only:  # the rows could not be kept
            return
        visited = np.zeros(self.store.rows, bool)
        for raws in epochs:
            visited[self.row_indices(raws).cpu().numpy()] = True
            yield
        rows = np.flatnonzero(visited)
        size = PREFETCH_STEPS * self._batch_size
        for first in progress(range(0, len(rows), size), desc="teacher cache"):
            self._compute_missing(rows[first : first + size])
            yield
        self.store.flush()

    def _compute_missing(self, rows: Array) -> tuple[Array, Tensor]:
        """Compute missing rows for the store and the device rows, if used; return these rows and their values."""
        if self.device_rows:
            rows = self.device_rows.absent(rows)
        missing = self.store.missing(rows)
        values = torch.empty(0, self.store.width, device=self._device)
        if len(missing):
            self.computed += len(missing)
            values = self._run(missing)
            if values.dtype is torch.float16 and not values.isfinite().all():
                raise CheckpointError(
                    "outputs are too large for fp16: set DISTILLER.TEACHER_CACHE_PRECISION fp32"
                )
            self.store.write_later(missing, values)
            if self.device_rows:
                self.device_rows.write(missing, values)
        if self.device_rows and len(rows):
            self.device_rows.copy_rows(self.device_rows.absent(rows))
        return missing, values

    def _run(self, rows: Array) -> Tensor:
        """Run the teacher for at least one row; return ``[n, width]`` in the store's dtype."""
        size, results = self._batch_size, []
        key = torch.zeros((), dtype=torch.int64, device=self._device)
        for first in range(0, len(rows), size):
            # Repeats fill the last batch: with one shape, a compiled teacher is compiled once.
            filled = to_device(np.resize(rows[first : first + size], size), self._device)
            batch = self.loader.prepare(filled // self._views, filled % self._views, key)
            outputs = super().__call__(batch)
            both = torch.cat([outputs.logits.float(), outputs.pooled.float()], 1)
            results.append(both[:, : self.store.width])
        return torch.cat(results)[: len(rows)].to(self.store.dtype)
