"""Compiling networks with TorchInductor, where a compiler is there and the run is long enough to pay for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from mdistiller_norm.errors import first_line
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Outputs

# Steps below which compiling (half a minute to two) costs more than it saves.
WORTHWHILE_STEPS = 3000


def compiler_missing(device: torch.device) -> str:
    """Why nothing can be compiled for this device; empty if it can."""
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "no C++ compiler (g++ or clang++, or the one that CXX names) was found"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than what the compiler supports"
    return ""


def choose(setting: str, device: torch.device, steps: int) -> tuple[str, str]:
    """What to compile, and a line that says why.

    Args:
        setting: ``ENGINE.COMPILE``: auto, none, teacher or all.
        device: to compile for.
        steps: of the whole run, so that a resumed one is compiled as it was before; 0 if none is left.

    Returns:
        none, teacher or all; and the line, empty where there is nothing to say.
    """
    if setting == "none":
        return "none", ""
    if why := compiler_missing(device):
        return "none", f"nothing is compiled: {why}"
    if setting != "auto":
        return setting, f"compiling: {setting} (ENGINE.COMPILE)"
    if steps < WORTHWHILE_STEPS:
        return "none", f"nothing is compiled: {steps} steps are fewer than the {WORTHWHILE_STEPS} that pay for it"
    return "teacher", "compiling the teacher (ENGINE.COMPILE auto)"


def compile_teacher(module: nn.Module, example: Tensor, warn: Callable[[str], None]) -> Callable[[Tensor], Outputs]:
    """A frozen network with its weights as constants, laid out for the device; the network itself if that fails.

    Args:
        module: from images to outputs.
        example: images of the usual batch.
        warn: is told why it failed, in a line.
    """
    options: dict[str, Any] = {"freezing": True}
    compiled = torch.compile(module, dynamic=False, options=options)
    try:
        with torch.no_grad():
            compiled(example)
    except Exception as error:  # a compiler can fail in any way, and the run does not depend on it
        warn(f"the teacher could not be compiled ({first_line(error)}): it runs uncompiled")
        return module
    return compiled


def compile_student(network: Network, warn: Callable[[str], None], twice: bool = False) -> Callable[[Tensor], Outputs]:
    """The passes of a network that trains, compiled at the first of each shape; as they are once that failed.

    Args:
        network: stays as it is, and shares its weights.
        warn: is told why it failed, in a line.
        twice: each pass is differentiated more than once, as DOT does.
    """
    if twice:
        # A backward pass may be one that another run left on disk, and write over what the next one has to read:
        # PyTorch then raises. It looks at this setting when it compiles and in every backward pass.
        functorch.donated_buffer = False
    compiled, failed = torch.compile(network.outputs, dynamic=False), False

    def passes(images: Tensor) -> Outputs:
        nonlocal failed
        if not failed:
            try:
                return compiled(images)
            except Exception as error:  # as above; what is the network's own fault is raised again below
                failed = True
                warn(f"the student could not be compiled ({first_line(error)}): it runs uncompiled")
        return network.outputs(images)

    return passes
