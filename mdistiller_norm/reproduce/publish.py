"""Puts the weights of finished runs into ``checkpoints/``, with the manifest entry that makes them known."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mdistiller_norm.engine.checkpoint import load_weights, save_atomically
from mdistiller_norm.engine.teacher_file import MANIFEST, read_manifest
from mdistiller_norm.errors import ConfigError, DataError
from mdistiller_norm.files import write_text
from mdistiller_norm.reproduce.jobs import cell_identity, identity
from mdistiller_norm.reproduce.ledger import finished_record
from mdistiller_norm.reproduce.tables import load_tables


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in fp16 but for vectors (batch norms, biases), whose range it might not hold; loading widens them."""
    return {name: value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
            for name, value in state.items()}  # fmt: skip


def publish(run: Path, folder: Path) -> Path:
    """Write the last epoch's weights of a finished run, and its entry of the manifest.

    Args:
        run: the run folder.
        folder: of the checkpoints and their manifest.

    Returns:
        The file.

    Raises:
        DataError: the run is not finished.
        ConfigError: it fills no cell of the paper's tables, so that its weights must not teach there; or a file of that
            name is listed already.
        CheckpointError: its weights cannot be read, or the file not be written.
    """
    record = finished_record(run)
    papers = [cell for table in load_tables().values() if table.is_papers for cell in table.cells.values()]
    if identity(record["config"]) not in {cell_identity(cell) for cell in papers}:
        raise ConfigError(
            f"{run} fills no cell of the paper's tables: another schedule or setting must not teach there"
        )
    words = [record["student"], record["dataset"], *record["method"], f"seed{record['seed']}"]
    path, manifest = folder / ("_".join(words) + ".pt"), folder / MANIFEST.name
    entries = read_manifest(manifest)
    if path.exists() or any(entry["file"] == path.name for entry in entries):
        raise ConfigError(f"{path} is there already: remove it and its entry in {manifest} to publish another")
    weights = load_weights(run / "student_last.pt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_atomically({"model": halved(weights.state), "about": weights.about}, path)
        entry: dict[str, Any] = {
            "file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "model": record["student"],
            "dataset": record["dataset"], "method": "+".join(record["method"]), "epochs": record["epochs"],
            "top1": round(record["last"]["top1"], 2), "command": record["command"],
            "commit": record["environment"].get("commit"),
        }  # fmt: skip
        before = manifest.read_text(encoding="utf-8").rstrip("\n") + "\n" if entries else ""
        write_text(before + yaml.safe_dump([entry], sort_keys=False, width=1000), manifest)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error})") from error
    return path
