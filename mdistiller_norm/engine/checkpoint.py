"""Checkpoints: written atomically with a SHA-256, verified and read without running code."""

import argparse
import collections
import hashlib
import io
import pathlib
import re
import struct
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller_norm.errors import CheckpointError, first_line
from mdistiller_norm.files import whole_file

# Types that published checkpoints contain besides tensors; NumPy 1 and 2 store scalars under different names.
_numpy: Any = getattr(np, "core" if np.__version__.startswith("1.") else "_core")
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    list,
    dict,
    *(
        (getattr(pathlib, name), f"{module}.{name}")
        for name in ("PosixPath", "PurePosixPath")
        for module in ("pathlib", "pathlib._local")
    ),  # the second one in Python 3.13
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
    _numpy.multiarray.scalar,
    (_numpy.multiarray.scalar, "numpy.core.multiarray.scalar"),
]

LATEST, PREVIOUS = "latest.pt", "latest.prev.pt"  # the last two states of a run
_WEIGHT_KEYS = ("model", "state_dict", "trainable", "model_state_dict", "net")
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel and torch.compile
_MARK = b"mdistiller_norm sha256 "
_NO_CHECKPOINTS = {
    b"<": "an HTML or XML page",
    b"version https://git-lfs": "a Git LFS pointer",
    b"\x1f\x8b": "a gzip file",
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
            archive = buffer.getbuffer()[:-2]  # without its empty comment
            file.writelines((archive, _signature(archive)))
    except OSError as error:
        intact = "; its previous version is intact" if path.exists() else ""
        raise CheckpointError(f"{path} cannot be written ({error.strerror}){intact}") from error


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
            problem = f"{path} contains a {refused[1]}, which could run code"
            raise CheckpointError(f"{problem}: save only its state_dict()") from error
        reason = first_line(error).split(". ")[0]
        raise CheckpointError(f"{path} is not loaded ({reason}): it may be truncated") from error


def _verify(content: bytes, path: Path) -> None:
    archive, signature = memoryview(content)[:-_SIGNATURE_BYTES], content[-_SIGNATURE_BYTES:]
    start, damage = content[:512].lstrip(), ""
    kinds = [kind for magic, kind in _NO_CHECKPOINTS.items() if start.startswith(magic)]
    if start and start.isascii() and min(start) >= ord("\t"):
        kinds.append("a text file")
    if kinds:
        raise CheckpointError(f"{path} is {kinds[0]}, not a checkpoint")
    if signature[2:].startswith(_MARK):
        damage = "its SHA-256 does not match" if signature != _signature(archive) else ""
    elif content.startswith(b"PK"):
        try:
            member = zipfile.ZipFile(io.BytesIO(content)).testzip()
            damage = f"the CRC-32 of {member} does not match" if member else ""
        except Exception as error:  # zipfile raises anything on damaged archives
            damage = f"{first_line(error)}: it may be truncated"
    if damage:
        raise CheckpointError(f"{path} is damaged ({damage})")


@dataclass(frozen=True)
class Weights:
    """The state dict of a network, its file, and this project's metadata (``name``, ``dataset``, ``top1`` ...)."""

    state: dict[str, Tensor]
    path: Path
    about: dict[str, Any]


def load_weights(path: str | Path) -> Weights:
    """Read the weights of a network: of this project, or a state dict, bare or under a usual key."""
    path = Path(path)
    content = load(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not weights")
    about = content.get("about")
    for candidate in (*(content.get(key) for key in _WEIGHT_KEYS), content):
        if isinstance(candidate, Mapping):
            state = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
            if state:
                return Weights(state, path, dict(about) if isinstance(about, Mapping) else {})
    raise CheckpointError(f"{path} holds no weights, bare or in {', '.join(_WEIGHT_KEYS)}")


def load_into(network: nn.Module, weights: Weights, name: str) -> None:
    """Load weights strictly: every name and shape must match.

    The prefix of a wrapper, of a whole distiller or of Lightning is removed if more names match without it.
    """
    expected, candidates = network.state_dict().keys(), [weights.state]
    bare = {_PREFIXES.sub("", key): value for key, value in weights.state.items()}
    first = f".{next(iter(expected), '')}"
    found = [key.removesuffix(first[1:]) for key in bare if key.endswith(first)]
    for prefix in ("", "ema.", *found):
        candidates.append({k[len(prefix) :]: v for k, v in bare.items() if k.startswith(prefix)})
    try:
        network.load_state_dict(max(candidates, key=lambda state: len(state.keys() & expected)))
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2] or str(error), 300)
        raise CheckpointError(f"{weights.path} does not fit {name}: {reason}") from error
