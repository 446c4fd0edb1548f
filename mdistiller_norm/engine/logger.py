"""Logs of a run: printed lines, ``metrics.jsonl``, TensorBoard scalars, and the environment."""

import json
import platform
import re
import subprocess
import sys
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import mdistiller_norm
from mdistiller_norm.errors import first_line
from mdistiller_norm.files import write_text

Record = dict[str, Any]
TENSORBOARD = "tensorboard"  # in the run folder
_SPEEDS = ("images_per_second", "data_wait", "seconds")  # of TensorBoard's group speed


def environment(device: torch.device) -> Record:
    """Return versions, device and git commit of this process."""
    root = Path(mdistiller_norm.__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = name[1].strip() if name else platform.machine()
    # Not installed inside another repository.
    checkout = git("rev-parse", "--show-toplevel") == str(root)
    return {
        "mdistiller_norm": mdistiller_norm.__version__,
        "commit": git("rev-parse", "HEAD") if checkout else None,
        "modified": checkout and bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str, which checkpoints can hold
        "torchvision": version("torchvision"),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _append_line(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text + "\n")


class RunLog:
    """The log of a run folder; without a folder, for a process of rank > 0, it drops everything.

    Drops entries of the folder from ``first_epoch`` and ``first_step`` on, left by an interrupted run.
    """

    def __init__(self, folder: Path | None, first_epoch: int = 1, first_step: int = 0) -> None:
        self.folder, self.held = folder, ExitStack()  # lock of the folder, until close()
        if folder:
            self._metrics = folder / "metrics.jsonl"
            kept = [each for each in read_metrics(self._metrics) if each["epoch"] < first_epoch]
            write_text("".join(json.dumps(each) + "\n" for each in kept), self._metrics)
            self._writer = SummaryWriter(folder / TENSORBOARD, purge_step=first_step)

    def line(self, text: str) -> None:
        if self.folder:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            _append_line(self.folder / "worklog.txt", text)

    def epoch(self, record: Record) -> None:
        if self.folder:
            _append_line(self._metrics, json.dumps(record))
            for name in record.keys() - {"epoch"}:
                group = "speed" if name in _SPEEDS else "epoch"
                self._writer.add_scalar(f"{group}/{name}", record[name], record["epoch"])
            self._writer.flush()

    def step(self, losses: dict[str, float], step: int) -> None:
        if self.folder:
            for name, value in losses.items():
                self._writer.add_scalar(f"train/loss_{name}", value, step)

    def close(self) -> None:
        with self.held:
            if self.folder:
                self._writer.close()


def start_wandb(
    folder: Path, project: str, tags: str, config: Record, resources: ExitStack
) -> str:
    """Mirror TensorBoard to Weights & Biases until ``resources`` are closed; return a warning if that fails."""
    try:
        import wandb
    except ImportError:
        return "LOG.WANDB: wandb is not installed"
    wandb.tensorboard.patch(root_logdir=str(folder / TENSORBOARD))
    resources.callback(wandb.tensorboard.unpatch)
    try:
        names = {"project": project, "name": folder.name, "tags": tags.split(",")}
        wandb.init(dir=str(folder), config=config, **names)
    except wandb.Error as error:
        return f"LOG.WANDB: wandb does not start ({first_line(error)})"
    resources.callback(wandb.finish)
    return ""


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a ``metrics.jsonl``, skipping damaged lines."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("epoch"), int):
                records.append(record)
    return records
