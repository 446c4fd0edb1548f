"""Short runs on the real digits, and the states that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mdistiller_norm.config import Config, load_config
from mdistiller_norm.engine.checkpoint import load

# A batch of 240 makes an epoch of 6 steps, the last one short.
SHORT = ["DATASET.TYPE=digits", "SOLVER.BATCH_SIZE=240", "SOLVER.NESTEROV=true", "SOLVER.WEIGHT_DECAY=5e-4"]
PAIR = [*SHORT, "DISTILLER.TEACHER=resnet14", "DISTILLER.STUDENT=resnet8"]
# Defaults that are made for data sets larger than the digits.
SMALLER = {"CRD": ["CRD.NCE.K=16"]}


def config(folder: Path, name: str, *overrides: str, epochs: int = 2) -> Config:
    """A run of ``LOG.PREFIX/distill/NAME``."""
    return load_config(
        None, [*PAIR, f"LOG.PREFIX={folder}", f"EXPERIMENT.NAME={name}", f"SOLVER.EPOCHS={epochs}", *overrides]
    )


def assert_same_state(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def state_of(folder: Path, name: str) -> dict[str, Any]:
    state = load(folder / "distill" / name / "latest.pt")
    del state["seconds"]
    return state
