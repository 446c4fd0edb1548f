"""Knowledge distillation for image classifiers, built around NormKD (Chi et al., 2023)."""

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdistiller_norm.library import Distillation, create_model, load, train

__version__ = "0.1.0"
__all__ = ["Distillation", "create_model", "load", "train"]

if importlib.util.find_spec("fcntl") is None:  # locks of run folders and ledgers
    raise ImportError("mdistiller_norm requires Linux: this system has no module fcntl")


def __getattr__(name: str) -> Any:  # imports PyTorch when it is needed
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mdistiller_norm import library

    return getattr(library, name)
