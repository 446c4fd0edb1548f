"""Publication of the weights of finished runs in ``checkpoints/``, with an entry in its manifest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mdistiller_norm.engine.checkpoint import load_weights, save_atomically
from mdistiller_norm.engine.teacher_file import MANIFEST, add_to_manifest, read_manifest
from mdistiller_norm.errors import ConfigError
from mdistiller_norm.reproduce.ledger import finished_record, identity
from mdistiller_norm.reproduce.plan import cell_identity
from mdistiller_norm.reproduce.tables import TABLES


def to_fp16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert matrices to fp16; vectors (batch norms, biases) may exceed its range and stay in fp32."""
    return {
        name: value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
        for name, value in state.items()
    }


def publish(run: Path, folder: Path) -> Path:
    """Write the last epoch's weights of a run of the paper's tables in fp16 and their manifest entry."""
    record = finished_record(run)
    cells = [cell for table in TABLES.values() if table.in_paper for cell in table.cells.values()]
    if identity(record["config"]) not in {cell_identity(cell) for cell in cells}:
        raise ConfigError(f"{run} does not fill a cell of the paper's tables")
    words = [record["student"], record["dataset"], *record["method"], f"seed{record['seed']}"]
    path, manifest = folder / ("_".join(words) + ".pt"), folder / MANIFEST.name
    if path.exists() or any(entry["file"] == path.name for entry in read_manifest(manifest)):
        raise ConfigError(f"{path} exists: remove it and its entry in {manifest} to publish another run")
    weights = load_weights(run / "student_last.pt")
    folder.mkdir(parents=True, exist_ok=True)
    save_atomically({"model": to_fp16(weights.state), "about": weights.about}, path)
    add_to_manifest(
        manifest, path, model=record["student"], dataset=record["dataset"], method="+".join(record["method"]),
        epochs=record["epochs"], top1=round(record["last"]["top1"], 2), command=record["command"],
        commit=record["environment"].get("commit"),
    )  # fmt: skip
    return path
