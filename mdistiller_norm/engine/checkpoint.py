"""Checkpoints: written atomically, read without running code.

Weights are read from this project's files and from state dicts of other projects: bare or under a usual key, with or
without the prefixes of DataParallel, torch.compile and Lightning.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller_norm.errors import CheckpointError, first_line
from mdistiller_norm.files import whole_file

# Types that published checkpoints contain besides tensors; NumPy 1 and 2 store scalars under different names.
_numpy: Any = np._core if hasattr(np, "_core") else np.core
_SAFE_TYPES: list[Any] = [
    argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    _numpy.multiarray.scalar, (_numpy.multiarray.scalar, "numpy.core.multiarray.scalar"),
]  # fmt: skip

_WEIGHT_KEYS = ("model", "state_dict", "trainable", "model_state_dict", "net")
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and torch.compile


def save_atomically(content: Any, path: Path) -> None:
    """Call ``torch.save`` so that the file holds either its old or its whole new content."""
    try:
        with whole_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); its previous version is intact") from error


class Saver:
    """Writes the checkpoints of a folder in order; in the background from copies, while a GPU continues training."""

    def __init__(self, folder: Path, background: bool) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._pending: Future[None] | None = None

    def save(self, files: Mapping[str, Any]) -> None:
        """Write contents by file name; raise the errors of pending writes first."""
        self.finish()
        if not self._thread:
            self._write(files)
            return
        distinct = {id(content): content for content in files.values()}
        copies = {key: _to_host(content) for key, content in distinct.items()}
        self._pending = self._thread.submit(self._write, {name: copies[id(content)] for name, content in files.items()})

    def finish(self) -> None:
        """Wait for pending writes; raise their errors."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, files: Mapping[str, Any]) -> None:
        for name, content in files.items():
            save_atomically(content, self.folder / name)


def _to_host(value: Any) -> Any:
    """Copy nested dictionaries, lists and tuples, with their tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the attributes: state dicts hold the versions of their modules
        copied.update((key, _to_host(item)) for key, item in value.items())
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_to_host(item) for item in value)
    return value


def load(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU with ``weights_only``."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling other files may raise anything
        reason = first_line(error).split(". ")[0]
        raise CheckpointError(
            f"{path} is not loaded ({reason}): it may be truncated, or hold more than weights (save the state_dict() "
            "of a network, not the network)"
        ) from error


@dataclass(frozen=True)
class Weights:
    """The state dict of a network, its file, and this project's metadata (``name``, ``dataset``, ``top1`` ...)."""

    state: dict[str, Tensor]
    path: Path
    about: dict[str, Any] = field(default_factory=dict)


def load_weights(path: str | Path) -> Weights:
    """Read the weights of a network from any of the known layouts."""
    path = Path(path)
    content = load(path)
    about: dict[str, Any] = {}
    if isinstance(content, Mapping):
        found = content.get("about")
        about = dict(found) if isinstance(found, Mapping) else {}
        content = next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the weights of a network")
    state = {_PREFIXES.sub("", str(name)): value for name, value in content.items()}
    if any(name.startswith("student.") for name in state):  # a whole distiller, of this project or mdistiller
        state = {name.removeprefix("student."): v for name, v in state.items() if name.startswith("student.")}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no weights under {', '.join(_WEIGHT_KEYS)} or at its top level")
    return Weights(state, path, about)


def _without_prefix(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove a prefix that all names share, such as Lightning's attribute of the network."""
    first = next(iter(expected), "")
    prefixes = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    shared = next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in state)), "")
    return {name.removeprefix(shared): value for name, value in state.items()}


def load_into(network: nn.Module, weights: Weights, name: str) -> None:
    """Load weights strictly: every name and shape must match."""
    expected = network.state_dict()
    state = _without_prefix(weights.state, expected)
    misfit = f"{weights.path} does not fit {name}"
    for key in [*expected, *state]:
        if key not in state and not key.endswith("num_batches_tracked"):  # missing before PyTorch 0.4.1, never read
            raise CheckpointError(f"{misfit}: it lacks tensor {key}")
        if key not in expected:
            raise CheckpointError(f"{misfit}: it has the unknown tensor {key}")
        if key in state and state[key].shape != expected[key].shape:
            shapes = tuple(state[key].shape), tuple(expected[key].shape)
            raise CheckpointError(f"{misfit}: {key} has shape {shapes[0]}, not {shapes[1]}")
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # modules with their own checks, such as torchvision's MNASNet
        raise CheckpointError(f"{weights.path} does not load into {name}: {first_line(error)}") from error
