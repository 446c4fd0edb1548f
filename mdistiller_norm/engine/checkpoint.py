"""Checkpoints: written atomically, read without running code.

Three kinds of file are read as weights: this project's students (``student_best.pt``: the weights and what they are
for), its run states (``latest.pt``), and others' state dicts: bare or under a usual key (``model`` in mdistiller and
RepDistiller), with or without the prefixes of DataParallel and torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller_norm.errors import CheckpointError, first_line
from mdistiller_norm.files import whole_file

# The harmless types that published checkpoints hold beside tensors.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar") if hasattr(np, "_core") else np.core.multiarray.scalar,  # type: ignore[attr-defined]
]

# Where the weights stand in a file that holds more; and what DataParallel and torch.compile put before their names.
_HOLDERS = ("model", "state_dict", "trainable", "model_state_dict", "net")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


def _list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)


# What may stand beside the weights in this project's files, of what is read.
_ABOUT: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("name", "variant", "dataset", "type"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("classes", "plugins"), lambda value: _list_of(value, str)),
    "mean": lambda value: _list_of(value, Real) and len(value) in (0, 1, 3),
    "std": lambda value: _list_of(value, Real) and len(value) in (0, 1, 3) and min(value, default=1) > 0,
    "image_size": lambda value: _list_of(value, int) and len(value) == 2 and min(value) > 0,
    "resize": lambda value: isinstance(value, int) and value > 0,
    "top1": lambda value: isinstance(value, Real),
}


def save_atomically(content: Any, path: Path) -> None:
    """``torch.save`` by :func:`~mdistiller_norm.files.whole_file`.

    Raises:
        CheckpointError: it could not be written (a full disk, a folder without permission).
    """
    try:
        with whole_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} could not be written ({error}); the one before it is intact") from error


class Saver:
    """Writes the checkpoints of a folder, in the order they are given.

    Args:
        folder: exists.
        background: in a thread of its own, from a copy in the host's memory, so that training goes on meanwhile. For
            what lies on a GPU: on the CPU the thread would take a core from the training.
    """

    def __init__(self, folder: Path, background: bool) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, "checkpoints") if background else None
        self._pending: Future[None] | None = None

    def save(self, files: Mapping[str, Any]) -> None:
        """Write contents by file name, once those before are written.

        Raises:
            CheckpointError: one could not be written, of these or of those before.
        """
        self.finish()
        if not self._thread:
            self._write(files)
            return
        distinct = {id(content): content for content in files.values()}
        copies = {key: _on_host(content) for key, content in distinct.items()}
        self._pending = self._thread.submit(self._write, {name: copies[id(content)] for name, content in files.items()})

    def finish(self) -> None:
        """Wait until everything is written; raises as :meth:`save`."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, files: Mapping[str, Any]) -> None:
        for name, content in files.items():
            save_atomically(content, self.folder / name)


def _on_host(value: Any) -> Any:
    """A copy of a nest of dictionaries, lists and tuples, its tensors in the host's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with its attributes: in a state dict's are the versions of its modules
        copied.update((key, _on_host(item)) for key, item in value.items())
        return copied
    if isinstance(value, list | tuple):
        return type(value)(_on_host(item) for item in value)
    return value


def _is_program(path: Path) -> bool:
    """Whether it is an exported network: ``torch.load`` takes the one for a damaged file, and warns of the other."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception:  # not a zip file, or a damaged one, which torch.load judges
        return False
    return not names.isdisjoint(("archive_format", "constants.pkl"))


def load(path: str | Path) -> Any:
    """Read a checkpoint onto the CPU with ``weights_only``: data, never code.

    Raises:
        CheckpointError: missing, broken, a program, or holding types that no checkpoint needs.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    if _is_program(path):
        raise CheckpointError(
            f"{path} is a program of torch.export or TorchScript: name the checkpoint that it was made of, or save its "
            "state_dict()"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_line(error).split(". ")[0]
        raise CheckpointError(
            f"{path} is broken or holds more than weights, and is not loaded ({reason})"
            ": of a network that was saved whole, save its state_dict()"
        ) from error
    except Exception as error:  # an unpickler that is fed with something else may raise anything
        reason = first_line(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({reason}): it may be cut off") from error


@dataclass(frozen=True)
class Weights:
    """Weights of one network and what the file says they are for.

    Attributes:
        state: the state dict.
        path: the file.
        about: this project's facts beside the weights (``name``, ``num_classes``, ``dataset``, ``top1`` ...), or empty.
    """

    state: dict[str, Tensor]
    path: Path
    about: dict[str, Any] = field(default_factory=dict)


def load_weights(path: str | Path) -> Weights:
    """The weights of a network out of any of the known kinds of file.

    Raises:
        CheckpointError: as :func:`load`, or a file without weights, or with facts beside them that cannot be.
    """
    path = Path(path)
    content = load(path)
    about: dict[str, Any] = {}
    if isinstance(content, Mapping):
        found = content.get("about")
        about = dict(found) if isinstance(found, Mapping) else {}
        for key, holds in _ABOUT.items():
            if key in about and not holds(about[key]):
                raise CheckpointError(f"{path} is damaged: it says that its {key} is {about[key]!r}")
        for key in _HOLDERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the weights of a network")
    state = {_WRAPPERS.sub("", str(name)): value for name, value in content.items()}
    if any(name.startswith("student.") for name in state):  # a whole distiller, ours or mdistiller's
        state = {name.removeprefix("student."): v for name, v in state.items() if name.startswith("student.")}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no weights under {', '.join(_HOLDERS)} or at its top")
    return Weights(state, path, about)


def _without_holder(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the network's own names, where all of them lie in one module of another, as Lightning saves them."""
    first = next(iter(expected), "")
    holders = {name.removesuffix(first) for name in state if name.endswith(f".{first}")}
    inside = [holder for holder in holders if all(name.startswith(holder) for name in state)]
    return {name.removeprefix(inside[0]): value for name, value in state.items()} if inside else state


def load_into(network: nn.Module, weights: Weights, name: str) -> None:
    """Load weights strictly: every name and shape must fit.

    Raises:
        CheckpointError: they are of another network; names the first difference.
    """
    expected = network.state_dict()
    state = _without_holder(weights.state, expected)
    for key in [*expected, *state]:
        wanted, got = expected.get(key), state.get(key)
        if got is None and key.endswith("num_batches_tracked"):
            continue  # files older than PyTorch 0.4.1 lack the counter, which nothing here reads
        if wanted is None or got is None:
            what = "lacks" if got is None else "has the unknown"
            raise CheckpointError(f"{weights.path} does not fit {name}: it {what} tensor {key}")
        if wanted.shape != got.shape:
            raise CheckpointError(
                f"{weights.path} does not fit {name}: {key} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
            )
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # a module with a rule of its own, such as torchvision's MNASNet
        raise CheckpointError(f"{weights.path} does not load into {name}: {first_line(error)}") from error
