"""Checkpoints: written atomically with a SHA-256, verified and read without running code.

Weights are read from this project's files and from state dicts of other projects: bare or under a usual key, with or
without the prefixes of DataParallel, torch.compile and Lightning.
"""

from __future__ import annotations

import argparse
import collections
import copy
import hashlib
import io
import pathlib
import re
import struct
import zipfile
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
    argparse.Namespace, collections.defaultdict, list, dict, pathlib.PosixPath, pathlib.PurePosixPath,
    np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    _numpy.multiarray.scalar, (_numpy.multiarray.scalar, "numpy.core.multiarray.scalar"),
]  # fmt: skip

LATEST, PREVIOUS = "latest.pt", "latest.prev.pt"  # the state of a run, and the one before it
_WEIGHT_KEYS = ("model", "state_dict", "trainable", "model_state_dict", "net")
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and torch.compile
_MARK = b"mdistiller_norm sha256 "
_NO_CHECKPOINTS = {
    b"<": "an HTML or XML page, not a checkpoint: download the file again",
    b"version https://git-lfs": "a Git LFS pointer, not a checkpoint: run `git lfs pull`",
    b"\x1f\x8b": "a gzip file, not a checkpoint: unpack it",
}


def _signature(content: memoryview) -> bytes:
    """Return the end of a signed zip archive: the length of its comment, and the comment with the SHA-256."""
    comment = _MARK + hashlib.sha256(content).hexdigest().encode()
    return struct.pack("<H", len(comment)) + comment


_SIGNATURE_BYTES = len(_signature(memoryview(b"")))


def save_atomically(content: Any, path: Path, keep: Path | None = None) -> None:
    """Call ``torch.save`` and sign the file; it holds either its old or its whole new content.

    The SHA-256 of the file is the comment of the zip archive, which other readers ignore. ``keep`` is a path to which
    the previous version is renamed.
    """
    buffer = io.BytesIO()
    try:
        with whole_file(path, keep) as file:
            torch.save(content, buffer)
            archive = buffer.getbuffer()[:-2]  # without the length of the empty comment
            file.write(archive)
            file.write(_signature(archive))
    except OSError as error:
        intact = "; its previous version is intact" if path.exists() else ""
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}){intact}") from error


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
        self._pending = self._thread.submit(
            self._write, {name: copies[id(content)] for name, content in files.items()}
        )

    def finish(self) -> None:
        """Wait for pending writes; raise their errors."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, files: Mapping[str, Any]) -> None:
        for name, content in files.items():
            keep = self.folder / PREVIOUS if name == LATEST else None
            save_atomically(content, self.folder / name, keep)


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
    """Verify a checkpoint and read it onto the CPU with ``weights_only``.

    The SHA-256 of this project's files is verified, and the CRC-32 of the members of other zip archives. Files in the
    format of PyTorch before 1.6 have no checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    _verify(content, path)
    try:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling other files may raise anything
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} contains a {refused[1]}, which is not loaded because it could run code: save only the "
                "state_dict() of the network"
            ) from error
        reason = first_line(error).split(". ")[0]
        raise CheckpointError(f"{path} is not loaded ({reason}): it may be truncated") from error


def _verify(content: bytes, path: Path) -> None:
    archive, signature = memoryview(content)[:-_SIGNATURE_BYTES], content[-_SIGNATURE_BYTES:]
    for magic, kind in _NO_CHECKPOINTS.items():
        if content[:512].lstrip().startswith(magic):
            raise CheckpointError(f"{path} is {kind}")
    start = content[:512].split()
    if start and all(word.isascii() and word.decode().isprintable() for word in start):
        raise CheckpointError(f"{path} is a text file, not a checkpoint: download the file again")
    if signature[2:].startswith(_MARK):
        damage = "its SHA-256 does not match" if signature != _signature(archive) else ""
    elif content.startswith(b"PK"):
        try:
            member = zipfile.ZipFile(io.BytesIO(content)).testzip()
            damage = f"the CRC-32 of {member} does not match" if member else ""
        except Exception as error:  # zipfile raises anything on damaged archives
            damage = f"{first_line(error)}: it may be truncated"
    else:
        damage = ""
    if damage:
        raise CheckpointError(f"{path} is damaged ({damage})")


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
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the weights of a network")
    about = content.get("about")
    for candidate in (*(content.get(key) for key in _WEIGHT_KEYS), content):
        if isinstance(candidate, Mapping):
            state = {str(name): value for name, value in candidate.items() if isinstance(value, Tensor)}
            if state:
                return Weights(state, path, dict(about) if isinstance(about, Mapping) else {})
    raise CheckpointError(f"{path} holds no weights under {', '.join(_WEIGHT_KEYS)} or at its top level")


def _match_names(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers, of a whole distiller or of Lightning, if more names match without them."""
    bare = {_PREFIXES.sub("", name): value for name, value in state.items()}
    students = {name.removeprefix("student."): v for name, v in bare.items() if name.startswith("student.")}
    first = next(iter(expected), "")
    candidates = [state, bare, students]
    for names in (bare, students):
        prefix = next((name.removesuffix(first) for name in names if name.endswith(f".{first}")), "")
        candidates.append(
            {name.removeprefix(prefix): v for name, v in names.items() if name.startswith(prefix)}
        )
    return max(candidates, key=lambda names: len(names.keys() & expected.keys()))


def load_into(network: nn.Module, weights: Weights, name: str) -> None:
    """Load weights strictly: every name and shape must match."""
    expected = network.state_dict()
    state = _match_names(weights.state, expected)
    misfit = f"{weights.path} does not fit {name}"
    for key in [*expected, *state]:
        if key not in state and not key.endswith(
            "num_batches_tracked"
        ):  # missing before PyTorch 0.4.1, never read
            raise CheckpointError(f"{misfit}: it lacks tensor {key}")
        if key not in expected:
            raise CheckpointError(f"{misfit}: it has the unknown tensor {key}")
        if key in state and state[key].shape != expected[key].shape:
            shapes = tuple(state[key].shape), tuple(expected[key].shape)
            raise CheckpointError(f"{misfit}: {key} has shape {shapes[0]}, not {shapes[1]}")
    try:
        network.load_state_dict(state)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # modules with their own checks, such as torchvision's MNASNet
        raise CheckpointError(f"{weights.path} does not load into {name}: {first_line(error)}") from error
