"""What a run leaves for people to read: lines, ``metrics.jsonl``, TensorBoard scalars, and where it ran."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import mdistiller_norm
from mdistiller_norm.files import write_text

Record = dict[str, Any]
TENSORBOARD = "tensorboard"  # of a run folder


def environment(device: torch.device) -> Record:
    """Versions, device and git commit of this process, for the record of a run."""
    root = Path(mdistiller_norm.__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    ours = git("rev-parse", "--show-toplevel") == str(root)  # not the repository of somebody who installed this in it
    return {
        "mdistiller_norm": mdistiller_norm.__version__,
        "commit": git("rev-parse", "HEAD") if ours else None,
        "modified": ours and bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain one, which a state can hold
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def append_line(path: Path, text: str) -> None:
    """Add a line to a text file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


class RunLog:
    """The log of one run folder.

    Args:
        folder: of the run.
        first_epoch: metrics of this epoch and later ones, left by an interrupted run, are dropped. Where lines of
            ``metrics.jsonl`` are damaged, the whole file is appended to ``metrics.damaged`` before, with a warning.
        first_step: likewise for the scalars by step.

    Attributes:
        held: closed with the log: what keeps other processes out of the folder.
    """

    def __init__(
        self,
        folder: Path,
        first_epoch: int = 1,
        first_step: int = 0,
    ) -> None:
        self.folder, self.held = folder, ExitStack()
        self.metrics = folder / "metrics.jsonl"
        self._keep_metrics(first_epoch)
        self._by_epoch = SummaryWriter(folder / TENSORBOARD, purge_step=first_epoch)
        # By step in a folder of its own: TensorBoard drops what an interrupted run left by the number of the step.
        self._by_step = SummaryWriter(folder / TENSORBOARD / "steps", purge_step=first_step)

    def _keep_metrics(self, first_epoch: int) -> None:
        """Drop the metrics of that epoch and later ones, and damaged lines after the file was kept as it was."""
        records = _read_lines(self.metrics)
        if None in records:
            aside = self.metrics.with_suffix(".damaged")
            with aside.open("ab") as file:
                file.write(self.metrics.read_bytes())
            self.line(f"warning: {records.count(None)} lines of {self.metrics} are damaged: they are kept in {aside}")
        kept = (json.dumps(record) + "\n" for record in records if record and record["epoch"] < first_epoch)
        write_text("".join(kept), self.metrics)

    def line(self, text: str) -> None:
        """Print a line and append it to ``worklog.txt``."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        append_line(self.folder / "worklog.txt", text)

    def epoch(self, record: Record) -> None:
        """Keep the metrics of an epoch."""
        append_line(self.metrics, json.dumps(record))
        for name, value in record.items():
            if name != "epoch":
                self._by_epoch.add_scalar(name, value, record["epoch"])
        self._by_epoch.flush()

    def step(self, values: dict[str, float], step: int) -> None:
        """Keep running averages after that many steps."""
        for name, value in values.items():
            self._by_step.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered, and let other processes into the folder."""
        self._by_epoch.close()
        self._by_step.close()
        self.held.close()


class SilentLog(RunLog):
    """The log of a process that leaves writing to another; only its warnings are printed."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def line(self, text: str) -> None:
        """Print a warning; drop anything else."""
        if text.startswith("warning:"):
            print(f"process {self.rank}: {text}", file=sys.stderr, flush=True)

    def epoch(self, record: Record) -> None:
        """Drop it."""

    def step(self, values: dict[str, float], step: int) -> None:
        """Drop them."""

    def close(self) -> None:
        """Nothing to do."""


def read_metrics(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``; lines that are none, as after a power failure, are left out."""
    return [record for record in _read_lines(path) if record]


def _read_lines(path: Path) -> list[Record | None]:
    """A record for each line, None for one that is damaged; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = [_read_line(line) for line in lines if line]
    return records[:-1] if lines[-1] and not records[-1] else records


def _read_line(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None
