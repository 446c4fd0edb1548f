"""Compilation of networks with TorchInductor, for runs that are long enough to gain from it."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from mdistiller_norm.errors import first_line
from mdistiller_norm.models.base import Network
from mdistiller_norm.types import Outputs

WORTHWHILE_STEPS = 3000  # with fewer, compiling (30 to 120 seconds) costs more than it saves


def compiler_missing(device: torch.device) -> str:
    """Return why nothing can be compiled for this device, or ""."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "no C++ compiler was found (g++, clang++, or the one named by CXX)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is too old for the compiler"
    return ""


def choose(setting: str, device: torch.device, steps: int) -> tuple[str, str]:
    """Return none, teacher or all, and the reason, for ``ENGINE.COMPILE`` and the steps of the whole run."""
    if setting == "none":
        return "none", ""
    if reason := compiler_missing(device):
        return "none", f"not compiling: {reason}"
    if setting != "auto":
        return setting, f"compiling: {setting} (ENGINE.COMPILE)"
    if steps < WORTHWHILE_STEPS:
        return "none", f"not compiling: {steps} step{'s' * (steps != 1)} (worth it from {WORTHWHILE_STEPS:,})"
    return "teacher", "compiling the teacher (ENGINE.COMPILE auto)"


def compile_teacher(
    module: nn.Module, example: Tensor, warn: Callable[[str], None]
) -> Callable[[Tensor], Outputs]:
    """Compile a frozen network with its weights as constants; return it uncompiled, with a warning, if that fails."""
    compiled = torch.compile(module, dynamic=False, options={"freezing": True})
    try:
        with torch.no_grad():
            compiled(example)
    except Exception as error:  # compilers fail in many ways, and the run does not depend on them
        warn(f"the teacher could not be compiled ({first_line(error)}): it runs uncompiled")
        return module
    return compiled


def compile_student(
    network: Network, warn: Callable[[str], None], twice: bool = False
) -> Callable[[Tensor], Outputs]:
    """Compile ``network.outputs`` for training; run it uncompiled, with a warning, if that fails."""
    if twice:  # each pass is differentiated twice, as in DOT
        # Otherwise a backward pass may overwrite tensors that the next one reads. PyTorch reads this setting when it
        # compiles and, for programs from its cache on disk, in every backward pass.
        functorch.donated_buffer = False
    compiled, failed = torch.compile(network.outputs, dynamic=False), False

    def forward(images: Tensor) -> Outputs:
        nonlocal failed
        if not failed:
            try:
                return compiled(images)
            except Exception as error:  # the network's own errors are raised again below
                failed = True
                warn(f"the student could not be compiled ({first_line(error)}): it runs uncompiled")
        return network.outputs(images)

    return forward
