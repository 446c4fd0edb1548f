"""Knowledge distillation for image classifiers, built around NormKD (Chi et al., 2023)."""

import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("fcntl") is None:  # locks of run folders and ledgers
    raise ImportError("mdistiller_norm requires Linux: this system has no module fcntl")
