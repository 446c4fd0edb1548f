"""Compilation of networks with TorchInductor, for runs that are long enough to gain from it."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from mdistiller_norm.errors import first_line
from mdistiller_norm.types import Outputs

Forward = Callable[[Tensor], Outputs]
WORTHWHILE_STEPS = 3000  # with fewer, compiling costs more than it saves


def compiler_missing(device: torch.device) -> str:
    """Return why nothing can be compiled for this device, or ""."""
    compilers = os.environ.get("CXX", "g++"), "clang++"
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
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
        return "none", f"not compiling: fewer than {WORTHWHILE_STEPS:,} steps"
    return "teacher", "compiling the teacher (ENGINE.COMPILE auto)"


def compile_outputs(
    outputs: Forward, name: str, warn: Callable[[str], None], twice: bool = False, **options: Any
) -> Forward:
    """Compile the forward pass of a network; run it uncompiled, with a warning, if that fails.

    Args:
        name: of the network in the warning.
        twice: whether each pass is differentiated twice, as in DOT.
        options: of TorchInductor, such as ``freezing=True`` for constant weights.
    """
    if twice:
        # Otherwise a backward pass may overwrite tensors that the next one reads. PyTorch reads this setting when it
        # compiles and, for programs from its cache on disk, in every backward pass.
        functorch.donated_buffer = False
    compiled, failed = torch.compile(outputs, dynamic=False, options=options or None), False

    def forward(images: Tensor) -> Outputs:
        nonlocal failed
        if not failed:
            try:
                return compiled(images)
            except Exception as error:  # errors of the network are raised again below
                failed = True
                warn(
                    f"the {name} could not be compiled ({first_line(error)}): it runs uncompiled"
                )
        return outputs(images)

    return forward
