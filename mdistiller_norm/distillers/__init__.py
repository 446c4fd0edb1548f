"""Distillation methods, one file each. Importing the package registers all of them."""

import importlib
import pkgutil

from mdistiller_norm.distillers.base import (
    DISTILLERS,
    Distiller,
    Need,
    Pair,
    build_distiller,
    register,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DISTILLERS", "Distiller", "Need", "Pair", "build_distiller", "register"]
